"""What became of the keys of another tool's file, in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from peftplan.errors import one_line, quoted
from peftplan.job.configs.plan import LAUNCHERS, misspelled
from peftplan.report.tabular import Column
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.planning.configs import ConfigEntry
    from peftplan.results.config_documents import ConfigDocument, IgnoredKeyDocument, ReadKeyDocument

PROGRAM = "the program's default of "
"""How what is assumed begins where a program's command line decides it."""
REHEARSE = "`peftplan rehearse` runs your own program, without a GPU"
"""What to do about a job without a peak."""
BOUNDS = {
    "at_most": "the peak is at most this",
    "at_least": "the peak is at least this",
    "unknown": f"no peak is stated; {REHEARSE}",
}
MOST_KEYS = 4
"""Unsupported keys, shown one by one."""
SHOWN = ("command", "trainer", "trl")
"""What is assumed of these is shown without `-v`; of shell variables too."""

COLUMNS = (
    Column("file"),
    Column("tool", wide=True),
    Column("model"),
    Column("trainable", right=True, wide=True),
    Column("peak", right=True),
    Column("verdict"),
    Column("note", wide=True),
)
MOST_NAMES = 3
NO_CONFIG = re.compile(
    "not a (?:training config|notebook)|accepted: (?:a program that|a script with|keys and values|a JSON object)"
)
"""Errors of files that are whole, but train nothing."""
MOST_NOTES = 20
SIGNS = {"at_most": "≤ ", "at_least": "≥ "}
SIGN_MEANS = {
    "at_most": "at most: the unsupported keys lower the peak",
    "at_least": "at least: the unsupported keys raise the peak",
}
LAUNCH_FILE = "a launch file without a model: pass it after a training config, with another --config"


def listed(entries: Sequence[ConfigEntry]) -> list[ConfigEntry]:
    """The files that get a row: training configs, or all where there are none."""
    return [entry for entry in entries if entry.tool not in ("other", *LAUNCHERS)] or list(entries)


def names(entries: Iterable[ConfigEntry]) -> dict[str, str]:
    """Path → the end of it that no other file has: `lora.sh`, or `dpo/lora.sh` beside `kto/lora.sh`."""
    parts = {entry.file: PurePath(entry.file).parts for entry in entries}
    ends: dict[str, str] = {}
    length = 0
    while left := [file for file in parts if file not in ends]:
        length += 1
        shared = Counter(parts[file][-length:] for file in left)
        alone = (file for file in left if shared[parts[file][-length:]] == 1 or length >= len(parts[file]))
        ends |= {file: str(PurePath(*parts[file][-length:])) for file in alone}
    return ends


def cells(entry: ConfigEntry, name: str) -> tuple[str | int | None, ...]:
    """One file of many, under that name."""
    peak = None if entry.peak_allocated is None else SIGNS.get(entry.bound or "", "") + format_bytes(entry.peak_allocated)
    verdict = entry.verdict and entry.verdict.replace("_", " ")
    model = None if entry.model is None else entry.model.rstrip("/").rpartition("/")[2]
    return (one_line(name), entry.tool, model, entry.trainable_parameters, peak, verdict, note(entry))


def note(entry: ConfigEntry) -> str | None:
    """Why there is no peak, which keys make it a bound, of what it is the peak, and which keys are misspelled."""
    if entry.tool in LAUNCHERS:
        return LAUNCH_FILE
    keys = ", ".join(entry.unsupported[:MOST_NAMES])
    more = len(entry.unsupported) - MOST_NAMES
    unsupported = f"unsupported: {keys}{f' and {more} more' if more > 0 else ''}" if keys else None
    error = entry.error and _in_its_row(entry.error, entry.file)
    of_keys = unsupported if entry.total_parameters is not None and unsupported else error or unsupported
    scope = f"{entry.scope} only: images are not counted" if entry.scope else None
    return "; ".join(filter(None, (entry.refused, of_keys, scope, *entry.misspelled))) or None


def _in_its_row(error: str, file: str) -> str:
    """An error without the path that it begins with, which the row names: `line 7: …`."""
    rest = error.removeprefix(f"{file}:")
    return error if rest == error else f"line {rest}" if rest[:1].isdigit() else rest.lstrip()


def notes(entries: Sequence[ConfigEntry]) -> list[str]:
    """The notes, a line each, for a table that is too narrow for them."""
    called = names(entries)
    lines = [f"{one_line(called[entry.file])}: {text}" for entry in entries if (text := note(entry)) is not None]
    more = len(lines) - MOST_NOTES
    return [*lines[:MOST_NOTES], f"and {more} more notes (--format csv has all)"] if more > 0 else lines


def summed(entries: Sequence[ConfigEntry]) -> str:
    """How many files have what, and what the signs before a peak mean."""
    launching = sum(entry.tool in LAUNCHERS for entry in entries)
    others = sum(entry.tool == "other" for entry in entries)
    counted = sum(entry.total_parameters is not None for entry in entries)
    peaks = [entry for entry in entries if entry.peak_allocated is not None]
    exact = sum(not entry.unsupported and entry.scope is None and entry.refused is None for entry in peaks)
    changed = sum(entry.refused is not None for entry in peaks)
    of_text = sum(entry.scope is not None for entry in peaks)
    training = len(entries) - launching - others
    text = f", {of_text} of text only" if of_text else ""
    text += f", {changed} after a change, without which the tool raises an error" if changed else ""
    figures = f": {counted} counted, {len(peaks)} with a peak, {exact} exact{text}" if training else ""
    parts = [_files(training, "training config") + figures]
    parts += [_files(number, what) for number, what in ((launching, "launch file"), (others, "other file")) if number]
    broken = [entry for entry in entries if entry.tool == "other" and entry.error and not NO_CONFIG.search(entry.error)]
    unread: list[str] = []
    if broken and training:
        named = ", ".join(one_line(PurePath(entry.file).name) for entry in broken[:MOST_NAMES])
        more = "" if len(broken) <= MOST_NAMES else f" and {len(broken) - MOST_NAMES} more"
        unread = [f"cannot be read: {named}{more} (--format json says why)"]
    legend = [f"{SIGNS[bound]}{text}" for bound, text in SIGN_MEANS.items() if any(entry.bound == bound for entry in peaks)]
    return "\n".join(["; ".join(parts), *unread, *legend])


def _files(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def summary(config: ConfigDocument) -> str:
    """The file, its tool, and how many keys went where."""
    files = ", ".join(PurePath(file).name for file in config["files"])
    counts = f"{len(config['read'])} keys read, {len(config['ignored'])} without effect on memory"
    assumed = config["assumed"]
    by_name = assumed.get("model", PROGRAM)
    options = sorted({text.removeprefix(PROGRAM) for text in assumed.values() if text.startswith(PROGRAM)})
    more = f" and {len(options) - MOST_KEYS} more" if len(options) > MOST_KEYS else ""
    taken = f"; the program's defaults of {', '.join(options[:MOST_KEYS])}{more}" if options else ""
    return (
        f"{files} ({config['tool']} {config['version']}): {counts}{taken}"
        + ("" if by_name.startswith(PROGRAM) else f"; {by_name}")
        + "".join(f"; {text}" for what, text in assumed.items() if what in SHOWN or what.startswith("$"))
        + "".join(f"; {text}" for text in misspelled(assumed))
    )


def unsupported(config: ConfigDocument, *, has_peak: bool = True, most: int | None = MOST_KEYS) -> list[str]:
    """A line for each unsupported key, and what the peak is then, if there is one."""
    keys = config["unsupported"]
    if not keys:
        return []
    lines = [f"unsupported: {key}: {row['why']}" for key, row in list(keys.items())[:most]]
    more = len(keys) - len(lines)
    lines += [f"and {more} more unsupported key{'' if more == 1 else 's'}: -v"] if more else []
    bound = config["bound"]
    return [*lines, *([f"so {BOUNDS[bound]}"] if bound and (has_peak or bound == "unknown") else [])]


def keys_of(config: ConfigDocument, names: Iterable[str]) -> str | None:
    """Which keys of the file set these options to the same values: `qlora.yml: --seq-len is sequence_len`; None without any."""
    by_option = {
        row["option"]: key for key, row in config["read"].items() if row["value"] == config["options"].get(row["option"])
    }
    own = [
        f"--{name.replace('_', '-')} is {by_option[name]}" for name in dict.fromkeys(names) if by_option.get(name, name) != name
    ]
    return f"{PurePath(config['files'][0]).name}: {', '.join(own)}" if own else None


def assumed(config: ConfigDocument) -> list[str]:
    """What the file leaves open: to the tool, with file and line, and to data and launcher."""
    lines = [f"{option}: the default of {at}" for option, at in config["defaults"].items()]
    return lines + [f"{what}: {value}" for what, value in config["assumed"].items()]


def keys(config: ConfigDocument) -> list[str]:
    """Every key, a line each, in its group."""
    lines = [f"read: {key}: {quoted(row['value'])} → {_arrow(row)}" for key, row in config["read"].items()]
    lines += [f"no effect: {key}: {_where(row)}" for key, row in config["ignored"].items()]
    return [*lines, *unsupported(config, most=None)]


def _arrow(row: ReadKeyDocument) -> str:
    return " · ".join(filter(None, (row["option"], row["why"]))) or "nothing follows"


def _where(row: IgnoredKeyDocument) -> str:
    return f"{row['why']} ({row['at']})" if row["at"] else str(row["why"])
