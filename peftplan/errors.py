"""One base class for every error that a user can cause; each message is one line that can be shown as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SIMILAR = 0.6
"""The least `difflib` ratio of a name that is suggested: a typing error keeps more, another word less."""
SHORTEST_BEGINNING = 2
"""A name of fewer letters begins too many others to mean one of them."""


def nearest(name: str, choices: Sequence[str], *, most: int = 3, cutoff: float = SIMILAR) -> list[str]:
    """The choices that read most like `name`, best first; those that begin with it before all others."""
    from difflib import get_close_matches  # needed only once something is wrong

    longer = [choice for choice in choices if len(name) >= SHORTEST_BEGINNING and choice.startswith(name)]
    return list(dict.fromkeys((*longer, *get_close_matches(name, choices, n=most, cutoff=cutoff))))[:most]


def near_names(wanted: Iterable[str], known: Iterable[str], *, most: int = 6) -> str:
    """`near: …` with what reads like one of the names, else `it has …`."""
    names, wanted = sorted(known), tuple(wanted)
    each = 1 if len(wanted) > 1 else 4
    near = list(dict.fromkeys(choice for name in wanted for choice in nearest(name, names, most=each)))
    return f"near: {', '.join(near[:most])}" if near else f"it has {', '.join(names[:most])}"


class PeftplanError(Exception):
    """Base of all errors that peftplan raises on purpose."""


class InputError(PeftplanError, ValueError):
    """Bad input: names the field, the value, and what is accepted."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        self.field, self.value, self.accepted = field, value, accepted
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field}: {shown} is not accepted; {accepted}".replace("\n", " "))


class UnknownNameError(InputError):
    """A name outside a closed set; shows the nearest accepted names, `beside` included, which are accepted elsewhere."""

    def __init__(
        self, field: str, value: object, choices: Iterable[str], *, most: int = 12, also: str = "", beside: Iterable[str] = ()
    ) -> None:
        self.choices = sorted(choices)
        near = nearest(str(value).lower(), [*self.choices, *beside])
        if len(self.choices) <= most:
            accepted = "accepted: " + (", ".join(self.choices) or "nothing")
        else:
            accepted = f"accepted: one of {len(self.choices)} names, such as {', '.join(self.choices[:5])}{also}"
        if near:
            accepted = f"did you mean {' or '.join(near)}? {accepted}"
        super().__init__(field, value, accepted)


class RefusedError(PeftplanError):
    """A combination that makes sense as input but that the real libraries refuse, for the reason given."""


class NeedsTraceError(PeftplanError):
    """What the closed formulas do not know and the trace engine finds out; the message says which part of the job it is."""

    hint = " (--engine trace knows)"


class NoEngineError(NeedsTraceError):
    """What the trace engine does not reproduce either; the message says why."""

    hint = ""


class MissingExtraError(PeftplanError):
    """Something that needs an optional extra which is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{what} needs an optional extra: pip install 'peftplan[{extra}]'")
