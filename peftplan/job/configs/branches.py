"""The commands of a line of a shell script, and the values of variables that `if`, `case` and tests set."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from peftplan.errors import quoted
from peftplan.job.configs.conditions import both, either, holds, is_test, matches, opposite
from peftplan.job.configs.shell_values import PIECES, filled

BETWEEN = re.compile(r"&&|\|\||;;&?|;|(?<=\s)&(?=\s|$)")
"""What stands between two commands of one line."""
OVER_WORDS = re.compile(
    r"""\s*(?:getopts\b|\(\(\s*\$#|\[\[?\s*(?:"?\$#"?\s+-(?:(?:gt|ne)\s+0|g[te]\s+1)\b"""
    r"""|"?\$(?:1|\{1(?::-)?\})"?\s+(?:!=\s+(?:""|'')|=~\s+\^-|\])|-n\s+"?\$\{?1\b))"""
)
"""The condition of a loop over the words with which a script is called: none are assumed, so that it does not run."""
KEYWORD = re.compile(r"\s*(if|then|elif|else|fi|case|esac|do|done|while|until|for|\{|\}|!)(?=\s|$)")
SUBJECT = re.compile(r"\s*(\S+)\s+in(?=\s|$)")
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


@dataclass(slots=True)
class Block:
    """An `if`, a `case`, or what stands behind a test and `&&`: the variables before it, and at the end of each branch."""

    word: str
    before: dict[str, str]
    runs: bool | None
    """Whether its current branch runs; None where the script does not decide it."""
    condition: str = ""
    subject: str | None = None
    """What the patterns of a `case` are compared with, where it is known."""
    is_settled: bool = False
    """Whether a branch up to here runs for certain, so that no later one does, and there is no way around the block."""
    awaits_pattern: bool = False
    ends: list[dict[str, str]] = field(default_factory=list)


class Variables:
    """The variables of a script. One that has different values in the branches before a command is left open, as `$NAME`.

    Of several words, such as options, or of the launch, the last value is read, and `doubts` says so, as where only some branches
    set one. A condition that these variables decide leaves one branch.
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._doubted: dict[str, str] = {}
        self._blocks: list[Block] = []
        self._loops = 0
        self._command, self._is_negated, self._in_condition = "", False, False
        self._joint, self._has_test = "", False
        self._so_far: bool | None = None
        self._holds: bool | None = None
        """Whether the last list of commands succeeds."""
        self._text = ""

    @property
    def in_block(self) -> bool:
        """Whether commands run only in a branch that may not run."""
        return any(block.runs is not True for block in self._blocks)

    @property
    def is_dead(self) -> bool:
        """Whether commands never run."""
        return any(block.runs is False for block in self._blocks)

    def doubts(self) -> dict[str, str]:
        """Variables that depend on a branch, and conditions of the command itself → what is assumed."""
        doubts = {
            f"${name}": f"${name} depends on a branch of the script; {quoted(value.strip())} is read"
            for name, value in self._doubted.items()
            if self.values.get(name) == value
        }
        conditions = [block.condition for block in self._blocks if block.runs is None]
        if conditions:
            doubts["condition"] = f"the script runs the command where {quoted(conditions[-1])} holds, which it does not decide"
        return doubts

    def enter(self, part: str) -> str:
        """A command without the keywords before it, which begin and end branches."""
        self._is_negated = False
        while (match := KEYWORD.match(part)) is not None:
            word, part = match[1], part[match.end() :]
            self._keyword(word, part)
            if word == "case" and (subject := SUBJECT.match(part)) is not None:
                part = part[subject.end() :]
        self._command = part.strip()
        return part

    def _keyword(self, word: str, part: str) -> None:
        if word in ("if", "elif", "while", "until", "then", "do"):
            self._in_condition = word not in ("then", "do")
        if word == "if":
            self._open(word, None)
        elif word == "case":
            subject = SUBJECT.match(part)
            text = filled(subject[1], self._known()).strip("'\"") if subject is not None else "$"
            is_open = "$" in text or "`" in text or self._loops > 0
            self._open(word, False, subject=None if is_open else text, condition=f"case {text}")
            self._blocks[-1].awaits_pattern = True
        elif word == "then" and self._is_in("if") and (block := self._blocks[-1]).runs is not False:
            block.runs, block.condition = self._holds, self._text
            block.is_settled |= self._holds is True
        elif word in ("elif", "else"):
            self._next("if", True if word == "else" else None)
        elif word in ("fi", "esac"):
            self._close("if" if word == "fi" else "case")
        elif word == "while" and OVER_WORDS.match(part) and "1" not in self.values:
            self._open(word, False, condition=str(self._loops))
        elif word in ("do", "done"):
            self._loops = max(0, self._loops + (1 if word == "do" else -1))
            if word == "done" and self._is_in("while") and self._blocks[-1].condition == str(self._loops):
                self._close("while")
        elif word == "{" and self._is_in("test"):
            self._blocks[-1].word = "{"
        elif word == "}":
            self._close("{")
        elif word == "!":
            self._is_negated = not self._is_negated
        elif word == "for" and (name := re.match(r"\s*([A-Za-z_]\w*)\s+(?:in\s+([^\s*?$`;]+)\s*$)?", part)):
            self.values[name[1]] = (name[2] or f"${name[1]}").strip("'\"")

    def leave(self, behind: str) -> None:
        """What stands behind the command that was entered begins or ends a branch."""
        block = self._blocks[-1] if self._blocks else None
        if behind == "(":
            if self._is_in("test") and not self._command:
                self._blocks[-1].word = "("
            return
        if behind == ")" and block is not None and block.awaits_pattern:
            self._next("case", matches(self._command, block.subject))
            block.awaits_pattern = False
            return
        if not behind and not self._command and self._joint:  # the list goes on in the next line
            return
        self._list(behind)
        if behind == ")":
            self._close("(")
        elif behind.startswith(";;"):
            self._close("test")
            self._next("case", False)
            if self._is_in("case"):
                self._blocks[-1].awaits_pattern = True
                self._blocks[-1].subject = None if behind == ";;&" else self._blocks[-1].subject

    def _list(self, behind: str) -> None:
        """Joins the command to those before it in a list such as `[ A ] && B || C`."""
        known = self._known()
        is_of_test = is_test(self._command, known)
        decided = holds(self._command, known) if is_of_test else None if self._in_condition else True
        value = None if self._loops else decided
        value = opposite(value) if self._is_negated else value
        if self._joint:
            value = (both if self._joint == "&&" else either)(self._so_far, value)
            self._text = f"{self._text} {self._joint} {self._command}"
        else:
            self._text = self._command
        has_test = is_of_test or self._has_test
        self._close("test")
        if behind not in ("&&", "||"):
            self._holds, self._joint, self._has_test = value, "", False
            return
        self._so_far, self._joint, self._has_test = value, behind, has_test
        if has_test:
            self._open("test", value if behind == "&&" else opposite(value), condition=self._text)

    def _known(self) -> dict[str, str]:
        """The variables, without the values of those that depend on a branch."""
        doubted = {name: f"${name}" for name, value in self._doubted.items() if self.values.get(name) == value}
        return {**self.values, **doubted} if doubted else self.values

    def _is_in(self, word: str) -> bool:
        return bool(self._blocks) and self._blocks[-1].word == word

    def _open(self, word: str, runs: bool | None, *, condition: str = "", subject: str | None = None) -> None:
        self._blocks.append(Block(word, dict(self.values), runs, condition, subject, is_settled=runs is True))

    def _next(self, word: str, runs: bool | None) -> None:
        """Another branch of the innermost block."""
        if not self._is_in(word):
            return
        block = self._blocks[-1]
        if block.runs is not False:
            block.ends.append(self.values)
        self.values = dict(block.before)
        block.runs = False if block.is_settled else runs
        block.is_settled |= runs is True

    def _close(self, word: str) -> None:
        if not self._is_in(word):
            return
        self._next(word, False)
        block = self._blocks.pop()
        ends = block.ends if block.is_settled else [block.before, *block.ends]
        self.values = {}
        for name in dict.fromkeys(name for end in ends for name in end):
            values = list(dict.fromkeys(end[name] for end in ends if name in end))
            self.values[name] = values[-1]
            differ, in_each = len(values) > 1, all(name in end for end in ends)
            if differ and name not in OF_LAUNCHES and not any(map(OF_WORDS.search, values)):
                self.values[name] = f"${name}"
            elif differ or not in_each:  # elsewhere the environment has it, or nothing does
                self._doubted[name] = values[-1]
