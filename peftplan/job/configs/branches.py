"""The commands of a line of a shell script, and the values of variables that `if`, `case` and tests set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from peftplan.errors import quoted

PIECES = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|(?<!\S)\#.*|.""", re.DOTALL)
"""Quoted texts, escaped characters, a comment, which begins at the start of a word, and all other characters."""
BETWEEN = re.compile(r"&&|\|\||;;&?|;|(?<=\s)&(?=\s|$)")
"""What stands between two commands of one line."""
KEYWORD = re.compile(r"\s*(if|then|elif|else|fi|case|esac|do|done|while|until|for|\{|!)(?=\s|$)")
TEST = re.compile(r"\s*(\[|\(\(|test\s)")
NEVER = re.compile(r"\s*(?:false|\[\[? (?:0 (?:==?|-eq) 1|1 (?:==?|-eq) 0) \]\]?)\s*")
"""A condition that never holds."""
OF_WORDS = re.compile(r"\s|^-")
"""In a value that is more than one word of a command, or that is an option of its own."""
OF_LAUNCHES = frozenset({"NPROC_PER_NODE", "nproc_per_node", "NNODES", "CUDA_VISIBLE_DEVICES"})
"""Variables that a launch reads from the environment, in which nothing can be left open."""


def parts_of(line: str) -> Iterator[tuple[str, str]]:
    """The commands of a line, each with what stands behind it: `&&`, `||`, `;`, `;;`, `&`, a bracket, or nothing.

    What stands in quotes or in `$(...)` is not divided.
    """
    start = index = 0
    brackets: list[bool] = []  # of each open one: whether it is part of a word
    in_backticks = False
    while index < len(line):
        between = BETWEEN.match(line, index)
        piece = (between or PIECES.match(line, index) or [""])[0]
        end = index + len(piece)
        divides = between is not None and not any(brackets)
        if piece == "`":
            in_backticks = not in_backticks
        elif piece == "(":
            follows = line[end : end + 1]
            brackets.append(any(brackets) or follows == "(" or (bool(line[start:index].strip()) and follows != ")"))
            divides = not brackets[-1]
        elif piece == ")":
            divides = not (brackets.pop() if brackets else False)
        if divides and not in_backticks:
            yield line[start:index], piece
            start = end
        index = end
    yield line[start:], ""


class Block(NamedTuple):
    """An `if`, a `case`, or a test before `&&`: the variables before it, and at the end of each branch."""

    word: str
    before: dict[str, str]
    ends: list[dict[str, str]]


class Variables:
    """The variables of a script. One that has different values in the branches before a command is left open, as `$NAME`.

    Of several words, such as options, or of the launch, the last value is read, and `doubts` says so.
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._doubted: dict[str, str] = {}
        self._blocks: list[Block] = []
        self._dead: list[bool] = []
        """Of each block: whether its branch never runs."""

    @property
    def in_block(self) -> bool:
        """Whether commands run only in a branch."""
        return bool(self._blocks)

    @property
    def is_dead(self) -> bool:
        """Whether commands never run."""
        return any(self._dead)

    def doubts(self) -> dict[str, str]:
        """Variables that depend on a branch, of which a value is read → what is assumed."""
        return {
            f"${name}": f"${name} depends on a branch of the script; {quoted(value.strip())} is read"
            for name, value in self._doubted.items()
            if self.values.get(name) == value
        }

    def enter(self, part: str) -> str:
        """A command without the keywords before it, which begin and end branches."""
        while (match := KEYWORD.match(part)) is not None:
            word, part = match[1], part[match.end() :]
            if word in ("if", "case"):
                self._open(word, is_dead=NEVER.fullmatch(part) is not None)
            elif word in ("elif", "else"):
                self._next("if", is_last=word == "else")
            elif word in ("fi", "esac"):
                self._close("if" if word == "fi" else "case")
            elif word == "for" and (name := re.match(r"\s*([A-Za-z_]\w*)\s+(?:in\s+([^\s*?$`;]+)\s*$)?", part)):
                self.values[name[1]] = (name[2] or f"${name[1]}").strip("'\"")
        return part

    def leave(self, part: str, behind: str) -> None:
        """What stands behind a command begins or ends a branch."""
        if behind.startswith(";;"):
            self._next("case")
        elif behind == ")" and part.split()[-1:] == ["*"]:
            self._next("case", is_last=True, ends=False)
        elif behind in ("&&", "||") and (TEST.match(part) or NEVER.fullmatch(part)):
            self._open("test", is_dead=behind == "&&" and NEVER.fullmatch(part) is not None)
        elif behind == "||":
            self._next("test", is_last=True)
        elif behind in (";", "&", ""):
            self._close("test")

    def _open(self, word: str, *, is_dead: bool) -> None:
        self._dead.append(is_dead)
        self._blocks.append(Block(word, dict(self.values), [dict(self.values)]))

    def _next(self, word: str, *, is_last: bool = False, ends: bool = True) -> None:
        """Another branch of the innermost block; the last one leaves no way around the block."""
        if not self._blocks or self._blocks[-1].word != word:
            return
        block = self._blocks[-1]
        self._dead[-1] = False
        if ends:
            block.ends.append(self.values)
            self.values = dict(block.before)
        if is_last:
            del block.ends[:1]

    def _close(self, word: str) -> None:
        if not self._blocks or self._blocks[-1].word != word:
            return
        block = self._blocks.pop()
        self._dead.pop()
        is_empty = word == "case" and self.values == block.before  # behind the last `;;`
        ends = block.ends if is_empty else [*block.ends, self.values]
        self.values = {}
        for name in dict.fromkeys(name for end in ends for name in end):
            values = list(dict.fromkeys(end[name] for end in ends if name in end))
            self.values[name] = values[-1]
            if len(values) > 1 and (name in OF_LAUNCHES or any(map(OF_WORDS.search, values))):
                self._doubted[name] = values[-1]
            elif len(values) > 1:
                self.values[name] = f"${name}"
