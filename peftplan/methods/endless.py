"""Refuse regular expressions that take too long. Python's `re` backtracks, so nested repeats can take exponential time.

Which pattern does depends on the names it meets, and nothing can stop a match once it has begun. A pattern that may backtrack
is therefore first tried on the model's names in another process, which ends after a bounded time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache

from peftplan.arch.modules import Architecture
from peftplan.errors import InputError

FEW_REPEATS = 3
"""A pattern with at most this many repeats takes time cubic in a name's length: about a millisecond per name."""
_REPEAT = re.compile(r"[*+{]|(?<!\()\?")
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
SECONDS, NAMES_A_SECOND = 2, 5000
"""CPU time that a pattern may take: 2 seconds, and one more per 5,000 names."""
_WALL = 10
"""Wall-clock seconds allowed per CPU second, since other programs may keep the processor busy."""
FORMS = ("%s", r"(^|.*\.)%s($|\..*)", r"(.*\.)?(%s)$", r"(?:^|.*?\.)%s\.(\d+)\.")
"""How peft and transformers wrap a pattern: for target_modules, modules_to_save, rank_pattern, layers_pattern."""
_TRY = """
import json, re, signal, sys
pattern, names, forms, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
for form in forms:
    try:
        regex = re.compile(form % pattern)
    except re.error:
        continue
    for name in names:
        regex.match(name), regex.fullmatch(name)
"""


def refuse_endless(arch: Architecture, fields: Mapping[str, object]) -> None:
    """Raise InputError for a field whose pattern does not finish in time on the names of this model."""
    risky = [(field, text) for field, value in fields.items() for text in _texts(value) if may_backtrack(text)]
    if not risky:
        return
    names = tuple(name for module in arch.modules for name in module.names())
    for field, pattern in risky:
        if not _ends(pattern, names):
            raise InputError(
                field,
                pattern,
                f"it takes more than {_seconds(names):.0f} s to match the names of this model's modules; "
                "accepted: a regular expression without repeats inside repeats",
            )


def may_backtrack(pattern: str) -> bool:
    """Whether a pattern repeats a group, or has more than a few repeats."""
    return bool(_REPEATED_GROUP.search(pattern)) or len(_REPEAT.findall(pattern)) > FEW_REPEATS


def _texts(value: object) -> Iterator[str]:
    """The strings in a field: itself, the items of a list, the keys of a mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset, dict)):
        yield from (item for item in value if isinstance(item, str))


def _seconds(names: tuple[str, ...]) -> float:
    return SECONDS + len(names) / NAMES_A_SECOND


@lru_cache(maxsize=64)
def _ends(pattern: str, names: tuple[str, ...]) -> bool:
    """Whether another process matches all names in time; False if none can be started."""
    import subprocess

    seconds = _seconds(names)
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=json.dumps((pattern, names, FORMS, seconds)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_WALL * seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return False
    return tried.returncode == 0
