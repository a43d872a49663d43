"""Training commands in a shell script: read, never run. Variables that the script sets, and its arithmetic, are filled in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from peftplan.errors import RefusedError
from peftplan.job.configs.branches import Variables, parts_of
from peftplan.job.configs.detect import tool_of, trains
from peftplan.job.configs.documents import MOST_BYTES, BrokenFileError, Document, Written, as_number
from peftplan.job.configs.shell_lines import INTO, Here, Line, Script, script_of
from peftplan.job.configs.shell_lines import commands as shell_lines
from peftplan.job.configs.shell_values import filled, words_of

PROGRAMS = (
    ("swift", 1), ("megatron", 1), ("trl", 1), ("llamafactory-cli", 1), ("axolotl", 1), ("tune", 1),
    ("accelerate", 1), ("torchrun", 0), ("deepspeed", 0), ("python", 0), ("python3", 0),
)  # fmt: skip
"""Programs that begin a training command, and how many words after them are part of its name."""
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "python", "python3")
"""Programs that run a script: words before it are theirs, words behind it are the script's."""
WRAPPERS = (
    "nohup", "exec", "env", "time", "nice", "sudo", "srun", "mpirun", "numactl", "stdbuf", "uv", "poetry", "pipenv", "conda",
    "apptainer", "singularity", "docker", "podman", "bash", "sh", "zsh", "timeout", "eval", "uvx", "pipx", "tmux", "screen",
    "ssh", "mpiexec", "nsys", "taskset", "command",
)  # fmt: skip
"""Programs that run the command which stands behind their own words."""
SETTINGS = (".yaml", ".yml")
EDITORS, IN_PLACE = ("sed", "gsed", "perl", "yq", "jq", "awk", "gawk"), ("-i", "--in-place", "--inplace", "-pi")
"""Programs that change files, and options with which they do."""
ARRAY = re.compile(r"\s*(\w+)(\+?)=\((.*)\)\s*", re.DOTALL)
TRAINING = re.compile("train|tune|sft|dpo|grpo|lora", re.I)
"""What names of programs that train hold."""
OF_CALLER = re.compile(r"\$[@*]|\$\{[@*][^}]*\}")
"""All words with which the script itself is called: none are assumed."""
ASSIGNED = re.compile(r"\$\{([A-Za-z_]\w*):?=([^}]*)\}")
"""A value that a variable takes where it has none."""
DECLARING = ("export", "local", "declare", "readonly", "typeset")
HELP = frozenset({"--help", "-h", "--version"})
"""Words with which a program trains nothing."""
EXIT = re.compile(r"exit(\s+0)?\s*")
BRANCH = "a branch of the script that may not run"
WRITTEN = "the script runs no training command; one in a file that it writes is read"
MOST_DEPTH = 5
"""Functions that call each other."""
MOST_LINES_OF_FUNCTIONS = 10_000
"""The most lines that functions run; calls behind so many are not followed."""
MOST_COMMANDS = 200
LONGEST = 2**16
"""Characters of a command with its variables filled in; Linux takes no word above 2**17 bytes (`MAX_ARG_STRLEN`)."""


def of_shell(text: str, *, file: str) -> Document:
    """The first training command of a script, else its first command that a tool reads, else its first one.

    Further training commands are in its `assumed`. Raises BrokenFileError if the script has no command.
    """
    commands = list(commands_of(text, file=file))
    if not commands:
        raise BrokenFileError(file, None, "accepted: a script with a training command, such as swift sft, trl sft or torchrun")
    training: list[Document] = []
    of_tools: list[Document] = []
    for command in commands:
        try:
            tool = tool_of(command, file=file)
        except RefusedError:  # two tools match: a question only where the command is the one that is read
            if not training:
                raise
            training.append(command)
            continue
        of_tools += [command] if tool != "other" else []
        training += [command] if trains(command, tool) else []
    if not training:
        first = next(iter(of_tools), min(commands, key=_unlikely))
        return _with_others(first, [command for command in commands if command is not first], "commands")
    return _with_others(training[0], training[1:], "training commands")


def _unlikely(command: Document) -> tuple[bool, bool, bool]:
    """Sorts first a command that takes settings from a file, then one whose program trains by its name, then a launcher's."""
    program = command.program
    return not command.settings, TRAINING.search(program) is None, program.startswith("python")


def _with_others(first: Document, others: list[Document], called: str) -> Document:
    """The command that is read, with the lines of others in its `assumed`."""
    if not others:
        return first
    lines = f"line{'s' if len(others) > 1 else ''} {', '.join(str(command.line) for command in others)}"
    further = f"the file has {len(others) + 1} {called}; the first, in line {first.line}, is read, not that of {lines}"
    return first._replace(assumed={**first.assumed, "command": further})


def commands_of(text: str, *, file: str) -> Iterator[Document]:
    """Every training command of a script, with the variables that were set before it.

    Of a script that runs none, those of its functions, which another script may call, or of a file that it writes.
    """
    script = script_of(text)
    commands = list(_Commands(script, file).read(script.lines))
    for first, body in script.functions.values() if not commands else ():
        commands += _Commands(script, file).read(body, first=first)
    if commands:
        yield from commands
        return
    own = script_of("\n".join(script.written))
    written = _Commands(own._replace(functions={}), file).read(own.lines)
    yield from (each._replace(assumed={**each.assumed, "command": WRITTEN}) for each in written)


class _Commands:
    """Reads the commands of a script in their order."""

    def __init__(self, script: Script, file: str) -> None:
        self.functions, self.files, self.file = script.functions, script.files, file
        self.variables = Variables()
        self.written: dict[str, Written] = {}
        self.count, self.lines, self.folder = 0, 0, ""

    def read(self, lines: list[str], depth: int = 0, first: int = 1) -> Iterator[Document]:
        """The training commands of these lines."""
        for line in shell_lines(lines, first):
            if depth == 0 and not self.variables.in_block and EXIT.fullmatch(line.text):
                return
            values = self.variables.values
            if (array := ARRAY.fullmatch(line.text)) is not None:
                before = values.get(array[1], "") if array[2] else ""
                values[array[1]] = f"{before} {_short(filled(array[3], values), file=self.file, line=line.number)}".strip()
                continue
            for part, behind in parts_of(line.text):
                command = self.variables.enter(part)
                if not self.variables.is_dead:
                    yield from self._command(command, line, depth)
                self.variables.leave(behind)
            if (here := self.files.get(line.number)) is not None and not self.variables.is_dead:
                self._write(here)

    def _write(self, here: Here) -> None:
        """A file with what a command writes into it."""
        path, text = self._path(filled(here.path, self.variables.values)), "\n".join(here.lines)
        if not here.is_literal:
            pieces = (filled(piece, self.variables.values) for piece in text.split("\\$"))
            text = _short("$".join(pieces), file=self.file, line=here.line, most=MOST_BYTES)
        before = self.written.get(path) if here.adds else None
        if before is not None:
            self.written[path] = before._replace(text=f"{before.text}\n{text}")
        else:
            by = BRANCH if "condition" in self.variables.doubts() else "a command" if here.adds else ""
            self.written[path] = Written("\n" * here.line + text, here.line, by)

    def _path(self, name: str) -> str:
        return os.path.normpath(os.path.join(self.folder, name.strip("'\"")))

    def _changes(self, words: list[str], line: Line) -> None:
        """Notes files of settings that a command changes: `sed -i`, or what writes into one."""
        program = words[len(words) - words[::-1].index("|") if "|" in words else 0].rpartition("/")[2]
        changed = [into[2] or into[4] for into in INTO.finditer(" ".join(words))] if line.number not in self.files else []
        if program in EDITORS and any(word.startswith(IN_PLACE) for word in words):
            changed += words
        for name in changed:
            if name.endswith((*SETTINGS, ".json")):
                self.written[self._path(name)] = Written("", line.number, program)

    def _command(self, command: str, line: Line, depth: int) -> Iterator[Document]:
        values = self.variables.values
        for name, default in ASSIGNED.findall(command):
            values.setdefault(name, default)
        text = _short(filled(command, values), file=self.file, line=line.number)
        try:
            words = words_of(text)
        except ValueError as error:
            if any(command.lstrip().startswith(name) for name, _ in PROGRAMS):
                raise BrokenFileError(self.file, line.number, f"not a shell command: {error}") from None
            words = []
        environment: dict[str, str] = {}
        while words and (match := ASSIGNMENT.fullmatch(words[0])):
            environment[match[1]] = match[2]
            words.pop(0)
        if words[:1] and words[0] in DECLARING:
            values |= {match[1]: match[2] for word in words[1:] if (match := ASSIGNMENT.fullmatch(word))}
        elif not words:
            values |= environment
        elif words[0] == "cd" and len(words) == 2 and "$" not in words[1]:
            self.folder = os.path.join(self.folder, words[1])
        elif words[0] in self.functions and depth < MOST_DEPTH:
            yield from self._function(words, environment, depth)
        elif not (unwrapped := _unwrapped(words)):
            self._changes(words, line)
        elif self.count < MOST_COMMANDS and not HELP.intersection(words := unwrapped):
            self.count += 1
            program, settings, arguments = _command(words)
            if arguments or settings:
                settled = {**values, **environment}
                document = Document(arguments, line.arguments, "command", program, settled, settings=settings, folder=self.folder)
                yield document._replace(line=line.number, assumed=self.variables.doubts(), written=dict(self.written))

    def _function(self, words: list[str], environment: Mapping[str, str], depth: int) -> Iterator[Document]:
        """The training commands of a function, in which `$1` is its own first word, not that of the script."""
        first, body = self.functions[words[0]]
        self.lines += len(body)
        if self.lines > MOST_LINES_OF_FUNCTIONS:
            return
        before = {name: value for name, value in self.variables.values.items() if name.isdecimal()}
        own = {str(at): word for at, word in enumerate(words[1:], 1) if not OF_CALLER.fullmatch(word)}
        self._positional(own)
        self.variables.values |= environment
        yield from self.read(body, depth + 1, first)
        self._positional(before)

    def _positional(self, words: Mapping[str, str]) -> None:
        values = {name: value for name, value in self.variables.values.items() if not name.isdecimal()}
        self.variables.values = {**values, **words}


def _short(text: str, *, file: str, line: int, most: int = LONGEST) -> str:
    """The text, if a shell could run it. Variables that repeat each other double their length in every line."""
    if len(text) > most:
        raise BrokenFileError(file, line, f"accepted: a command of at most {most:,} characters, its variables filled in")
    return text


def _unwrapped(words: list[str]) -> list[str]:
    """A command from its training program on, without what runs it, such as `srun`, or answers it, such as `yes |`; empty if it
    runs none."""
    names = [name for name, _ in PROGRAMS]
    for index, each in enumerate(words):
        if each.rpartition("/")[2] in names:
            return [each.rpartition("/")[2], *words[index + 1 :]]
        if " " in each and words[0] in WRAPPERS:  # of `bash -c`
            try:
                commands = [_unwrapped(words_of(part)) for part, _ in parts_of(each)]
            except ValueError:
                return []
            return next(filter(None, commands), [])
        if words[0] not in WRAPPERS:
            break
    return _unwrapped(words[words.index("|") + 1 :]) if "|" in words else []


def _command(words: list[str]) -> tuple[str, str, dict[str, object]]:
    """The program of a command, with its script; the file from which it takes settings; and its arguments."""
    name = words[0]
    start = 1 + dict(PROGRAMS)[name]
    if name == "tune" and "--config" in words[:-1]:  # tune run [options of torchrun] RECIPE --config FILE [key=value …]
        at = words.index("--config")
        return " ".join([*words[:2], words[at - 1]]), words[at + 1], _arguments(words[2 : at - 1]) | _arguments(words[at + 2 :])
    own: list[str] = []
    if name not in LAUNCHERS:
        program, rest = " ".join(words[:start]), words[start:]
    else:
        script = next((index for index, word in enumerate(words) if word.endswith(".py") or words[index - 1] == "-m"), None)
        if name.startswith("python") and script is not None and words[script].startswith("torch.distributed"):
            further = (index for index, word in enumerate(words) if index > script and word.endswith(".py"))
            words, script = words[:1] + words[script + 1 :], next((index - script for index in further), None)
        if script is None:
            program, rest = " ".join(words[:start]), words[start:]
        else:
            program, rest = " ".join([*words[:start], words[script]]), words[script + 1 :]
            own = [word for word in words[start:script] if word != "-m"]
    behind = next((word for word in rest[:1] if word.endswith(SETTINGS) and not word.startswith("-")), "")
    values = _arguments(rest)
    settings = behind or str(values.get("config", ""))
    return program, settings, {**_arguments(own), **values}


def _arguments(words: list[str]) -> dict[str, object]:
    """`--key value…`, `--key=value`, `--switch` and `key=value` → values."""
    values: dict[str, list[str]] = {}
    key: str | None = None
    for word in words:
        if re.fullmatch(r"[|&;>]+|\d?>&?\d?", word):
            break
        if OF_CALLER.fullmatch(word):
            continue
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            values[key] = [value] if equals else []
        elif (key is None or (key == "config" and values[key])) and (match := re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", word)):
            values[match[1]] = [match[2]]
        elif key is not None:
            values[key].append(word)
    return {name: _value(texts) for name, texts in values.items()}


def _value(texts: list[str]) -> object:
    parsed = [_scalar(text) for text in texts]
    return True if not parsed else parsed[0] if len(parsed) == 1 else parsed


def _scalar(text: str) -> object:
    word = text.lower()
    if word in ("true", "false"):
        return word == "true"
    if word in ("none", "null"):
        return None
    if re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"[-+]?\d*\.\d+", text):
        return float(text)
    return as_number(text)
