"""One base class for every error that a user can cause; each message is one line that can be shown as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from reprlib import Repr
from types import BuiltinFunctionType, FunctionType, MappingProxyType

MOST_OF_A_MESSAGE = 1500
"""Characters; a message that quotes a long name or many names is cut in its middle."""
MOST_OF_A_VALUE = 120
"""Characters that a message quotes of a value."""
MOST_DIGITS = 100
"""A whole number with more digits is described, not quoted: Python refuses to write out more than 4,300."""


def one_line(text: str, *, most: int = MOST_OF_A_MESSAGE) -> str:
    """Text as one line of at most `most` characters: white space as spaces, other control characters escaped, the middle cut."""
    half = most // 2 - 3
    if len(text) > 8 * most:  # no need to look at all of what will be cut
        text = text[: 4 * most] + text[-4 * most :]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


_OF_SHORT_REPR = (bool, float, complex, type(None), type, Enum, PurePath, FunctionType, BuiltinFunctionType)
"""Others may hold anything, and their repr takes as long as it takes."""


class _Quoted(Repr):
    """The beginning of a value's repr, in bounded time: values may be huge, or hold one list a thousand times."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 3, MOST_OF_A_VALUE
        self.maxtuple = self.maxlist = self.maxset = self.maxfrozenset = self.maxdict = 20

    def repr_str(self, text: str, level: int) -> str:
        return repr(text[:MOST_OF_A_VALUE])

    def repr_bytes(self, data: bytes, level: int) -> str:
        return repr(data[:MOST_OF_A_VALUE])

    def repr_instance(self, value: object, level: int) -> str:
        plain = isinstance(value, _OF_SHORT_REPR) or type(value).__name__ == "dtype"  # torch's and numpy's
        return repr(value) if plain else f"<{type(value).__name__} object>"

    def repr_int(self, number: int, level: int) -> str:
        digits = int(number.bit_length() * 0.30103) + 1  # log10(2)
        return repr(number) if digits <= MOST_DIGITS else f"a number of about {digits} digits"


def quoted(value: object) -> str:
    """A value as messages show it, at most `MOST_OF_A_VALUE` characters; a tuple of names as it is typed, with commas."""
    names = value[:20] if isinstance(value, tuple) else ()
    text = _Quoted().repr(",".join(names) if names and all(isinstance(name, str) for name in names) else value)
    return text if len(text) <= MOST_OF_A_VALUE else text[: MOST_OF_A_VALUE - 3] + "..."


SIMILAR = 0.6
"""The least `difflib` ratio of a name that is suggested: a typing error keeps more, another word less."""
NOTHING = "none"
"""Never suggested: someone who types a name wants something, and any short nonsense is as similar to it."""
MOST_OF_A_MODEL = 12
"""Names of modules that a message lists where none is near; most decoders have fewer."""
SHORTEST_BEGINNING = 2
"""A name of fewer letters begins too many others to mean one of them."""


def nearest(name: str, choices: Sequence[str], *, most: int = 3, cutoff: float = SIMILAR) -> list[str]:
    """The choices that read most like `name`, best first; those that begin with it, its last number whole,
    and those of the same letters before all others."""
    longer = [choice for choice in choices if len(name) >= SHORTEST_BEGINNING and choice.startswith(name)]
    swapped = [choice for choice in choices if sorted(choice) == sorted(name)]
    longer = [choice for choice in longer if not (name[-1].isdigit() and choice[len(name) : len(name) + 1].isdigit())]
    return list(dict.fromkeys((*longer, *swapped, *_similar(name, tuple(choices), most, cutoff))))[:most]


@lru_cache(maxsize=4096)
def _similar(name: str, choices: tuple[str, ...], most: int, cutoff: float) -> list[str]:
    from difflib import get_close_matches  # needed only once something is wrong

    return get_close_matches(name, choices, n=most, cutoff=cutoff)


def near_names(typed: Iterable[str], known: Iterable[str], *, most: int = 6) -> str:
    """`near: …` with what reads like one of the names, else `it has …`."""
    names, typed = sorted(known), tuple(typed)
    each = 1 if len(typed) > 1 else 4
    near = list(dict.fromkeys(choice for name in typed for choice in nearest(name, names, most=each)))
    if near:
        return f"near: {', '.join(near[:most])}"
    more = len(names) - MOST_OF_A_MODEL
    return f"it has {', '.join(names[:MOST_OF_A_MODEL])}{f' and {more} more' if more > 0 else ''}"


class PeftplanError(Exception):
    """Base of all errors that peftplan raises on purpose. The message becomes one line of bounded length."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(PeftplanError, ValueError):
    """Bad input: names the field, the value, and what is accepted."""

    form = "{field}: {value} is not valid; {accepted}"

    def __init__(self, field: str, value: object, accepted: str) -> None:
        self.field, self.value, self.accepted = field, value, accepted
        super().__init__(self.message())

    def message(self) -> str:
        """The line that is shown."""
        return self.form.format(field=self.field, value=quoted(self.value), accepted=self.accepted)

    def named(self, field: str) -> InputError:
        """This error under the name that was typed."""
        self.field = field
        self.args = (one_line(self.message()),)
        return self


class BoundError(InputError):
    """A value of the wrong size or kind: `r must be at least 1 (got 0)`."""

    form = "{field} must be {accepted} (got {value})"


class OptionError(InputError):
    """An option that does not go with the others, whatever its value: `--double-quant: nothing is quantized`."""

    form = "{field}: {accepted}"


class MissingError(InputError):
    """Something that is needed and was left out: `--num-virtual-tokens is missing: peft has no default for it`."""

    form = "{field} is missing: {accepted}"

    def __init__(self, field: str, accepted: str) -> None:
        super().__init__(field, None, accepted)


class UnreadableError(InputError):
    """A file that cannot be read: `--peft-config: cannot read 'x.json': No such file or directory`."""

    form = "{field}: cannot read {value}: {accepted}"


class UnwritableError(InputError):
    """A file that cannot be written."""

    form = "{field}: cannot write {value}: {accepted}"


class UnknownNameError(InputError):
    """A name outside a closed set. Shows the nearest accepted names, also of `beside`, which are accepted elsewhere, or what is
    `meant` by a word that people use; and all accepted names if they fit into half of a message.
    """

    def __init__(
        self,
        field: str,
        value: object,
        choices: Iterable[str],
        *,
        also: str = "",
        beside: Iterable[str] = (),
        meant: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.choices = sorted(choices)
        text = value if isinstance(value, str) else quoted(value)
        word = meant.get(text.lower())
        near = (
            [word]
            if word
            else [choice for choice in nearest(text[:MOST_OF_A_VALUE].lower(), [*self.choices, *beside]) if choice != NOTHING]
        )
        names = ", ".join(self.choices)
        if len(names) <= MOST_OF_A_MESSAGE // 2:
            accepted = f"accepted: {names or 'nothing'}"
        else:
            plain = sorted(self.choices, key=lambda name: (name.count("-"), name))
            accepted = f"accepted: one of {len(plain)} names, such as {', '.join(plain[:8])}{also}"
        if near:
            accepted = f"did you mean {' or '.join(near)}? {accepted}"
        super().__init__(field, value, accepted)


class UnknownOptionError(UnknownNameError):
    """An option that a method does not have; shows what is near."""

    def __init__(self, option: str, method: str, choices: Iterable[str], *, beside: Iterable[str] = ()) -> None:
        self.choices = sorted(choices)
        self.near = nearest(option[:MOST_OF_A_VALUE].lower(), [*self.choices, *beside])
        InputError.__init__(self, option, method, f"accepted: {', '.join(self.choices)}" if self.choices else "it has none")

    def message(self) -> str:
        """The line that is shown."""
        suggested = f"did you mean {' or '.join(self.near)}? " if self.near else ""
        return f"{self.field} is not an option of {self.value}; {suggested}{self.accepted}"


class RefusedError(PeftplanError):
    """A combination that makes sense as input but that the real libraries refuse, for the reason given."""


class UnsupportedKeyError(RefusedError):
    """A key of a user's file that is not supported. Its reason names keys of that file, not options."""


class NeedsTraceError(PeftplanError):
    """What the closed formulas do not cover and the trace engine does; the message names the part of the job."""

    hint = " (no formula yet: add --engine trace)"


class NoEngineError(NeedsTraceError):
    """What the trace engine does not reproduce either; the message says why."""

    hint = ""


class NoRankFormulaError(NeedsTraceError):
    """A step over several GPUs without a formula, which the trace engine may follow."""

    hint = " (no formula yet)"


class MissingExtraError(PeftplanError):
    """Something that needs an optional extra that is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{what} needs an optional extra: pip install 'peftplan[{extra}]'")
