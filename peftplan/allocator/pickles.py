"""A pickle of plain containers, read in bounded time and memory: its opcodes are scanned before any of them runs.

A pickle is a program. Nine bytes can make the memo 4 GB large, a name can run code. What is let through only builds dicts, lists,
tuples, text and numbers, and in numbers that fit. Source: pickletools.py of Python 3.13 (opcodes and their arguments).
"""

from __future__ import annotations

import io
import pickle
import re
from typing import NoReturn

from peftplan.errors import RefusedError

MAGIC = b"\x80"
"""What every pickle since protocol 2 begins with, and no JSON does."""
MOST_BYTES = 96 * 2**20
"""Of the file. Two letters of text take 4 bytes there and 72 in memory."""
MOST_CONTAINERS = 2**23
"""Lists, dicts and tuples; an empty one takes 1 byte in the file and 72 in memory."""

_RUN = re.compile(
    rb"(?:[(012N\x88\x89\]aelt)\x85-\x87}dsu\x94]"  # marks, stack, None, booleans, containers, MEMOIZE
    rb"|[Khq\x80].|M..|J.{4}|[G\x95].{8}"  # numbers, memo by one byte, PROTO, FRAME
    rb"|j.{4}|r...\x00"  # memo by four bytes: LONG_BINPUT below 2^24, as it makes a table of that size
    rb"|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8})){1,1000}",  # LONG1, as long as addresses are
    re.DOTALL,
)
"""A bounded run of opcodes without a length of their own: an unbounded one would remember every step to go back."""
_SIZED = {0x8A: 1, 0x8C: 1, 0x58: 4, 0x8D: 8}
"""Opcodes with a length, and its bytes: LONG1, SHORT_BINUNICODE, BINUNICODE, BINUNICODE8."""
_NAMING = b"ci\x93"
"""Opcodes that look up a name, where `find_class` refuses."""
_CONTAINERS = (b"]", b"}", b"l", b"d", b"t", b"\x85", b"\x86", b"\x87")


class NotPlainError(ValueError):
    """A pickle with an opcode that plain containers do not need, or too many of them."""


class _ContainersOnly(pickle.Unpickler):
    """Plain containers need no name to be looked up, and nothing else is let in."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise RefusedError(f"the snapshot names {f'{module}.{name}'!r}: only plain containers, strings and numbers are read")


def load(content: bytes) -> object:
    """The object of a pickle. Raises RefusedError where it names a class or function; a damaged one raises almost anything."""
    _scan(content)
    return _ContainersOnly(io.BytesIO(content)).load()


def _scan(content: bytes) -> None:
    """Raises NotPlainError where the pickle could take more than it is allowed; up to its end or to where it names something."""
    if sum(map(content.count, _CONTAINERS)) > MOST_CONTAINERS:
        raise NotPlainError(f"more than {MOST_CONTAINERS} containers")
    at = 0
    while at < len(content):
        if run := _RUN.match(content, at):
            at = run.end()
            continue
        opcode = content[at]
        if opcode == pickle.STOP[0] or opcode in _NAMING:
            return
        if opcode not in _SIZED:
            raise NotPlainError(f"opcode {opcode:#04x} at byte {at}")
        start = at + 1 + _SIZED[opcode]
        at = start + int.from_bytes(content[at + 1 : start], "little")
    raise NotPlainError("it does not end")
