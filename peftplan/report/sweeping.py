"""A sweep as a stream: CSV, JSON lines or Parquet. Whatever ends it, what was written of a text is whole rows."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peftplan.errors import InputError, MissingExtraError, PeftplanError, RefusedError, UnknownNameError, UnwritableError
from peftplan.files import replacing

if TYPE_CHECKING:
    from peftplan.planning.sweep import Sweep, Tally
    from peftplan.planning.sweep_points import Chunk

FORMATS = ("csv", "jsonl", "parquet")
BY_SUFFIX = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def format_of(fmt: str | None, output: str | None) -> str:
    """The format, from its name or from the file's. Raises before any work is done."""
    if fmt is None:
        suffix = Path(output or "").suffix.lower()
        if suffix and suffix not in BY_SUFFIX:
            raise InputError("--output", output, f"accepted: a name that ends with {', '.join(BY_SUFFIX)}, or --format beside it")
        fmt = BY_SUFFIX.get(suffix, "csv")
    if fmt not in FORMATS:
        raise UnknownNameError("--format", fmt, FORMATS)
    if fmt == "parquet":
        if output is None:
            raise RefusedError("--format parquet needs a file (--output FILE.parquet)")
        if find_spec("pyarrow") is None:
            raise MissingExtraError("Parquet (pyarrow)", "sweep")
    if output is not None and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise InputError("--output", output, "accepted: a file in an existing folder")
    return fmt


def write(result: Sweep, *, fmt: str, output: str | None, each: Callable[[Chunk], None]) -> None:
    """Write all rows to a file, or to stdout; `each` is called with every chunk too.

    A text that cannot be written to its end keeps whole rows; a Parquet file appears whole or not at all, since its end says what
    is in it. Raises PeftplanError for a full disk.
    """
    if fmt == "parquet":
        _parquet(result, str(output), each)
        return
    lines = _csv if fmt == "csv" else _json_lines
    with _sink(output) as sink:
        if fmt == "csv":
            sink(",".join(result.columns) + "\n")
        for chunk in result.chunks():
            sink("".join(lines(chunk)))
            each(chunk)


def _csv(chunk: Chunk) -> Iterator[str]:
    memo: dict[object, str] = {None: "", True: "true", False: "false"}

    def cell(value: object) -> str:
        text = str(value)
        return f'"{text.replace(chr(34), chr(34) * 2)}"' if set(text) & {",", '"', "\n", "\r"} else text

    def cells(values: list[object]) -> list[str]:
        for value in {value for value in values if type(value) is str}:
            memo.setdefault(value, cell(value))
        plain = (bool, str, type(None))
        return [memo[value] if type(value) in plain else str(value) if type(value) is int else cell(value) for value in values]

    for row in zip(*map(cells, chunk.values()), strict=True):
        yield ",".join(row) + "\n"


def _json_lines(chunk: Chunk) -> Iterator[str]:
    names = tuple(chunk)
    for values in zip(*chunk.values(), strict=True):
        yield json.dumps(dict(zip(names, values, strict=True))) + "\n"


@contextmanager
def _sink(output: str | None) -> Iterator[Callable[[str], None]]:
    """What takes text that ends with a row."""
    if output is None:
        sys.stdout.flush()
        try:
            handle = sys.stdout.fileno()
        except (OSError, AttributeError, io.UnsupportedOperation):  # a test's stdout
            yield sys.stdout.write  # type: ignore[misc]
            return
        yield lambda text: _write(handle, text, "output")
        return
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
    except OSError as error:
        raise UnwritableError("--output", output, str(error.strerror)) from None
    try:
        yield lambda text: _write(handle, text, output)
    finally:
        os.close(handle)


def _write(handle: int, text: str, name: str) -> None:
    """Write text; where that fails midway, a file loses the row that was begun."""
    data = text.encode("utf-8")
    written = 0
    try:
        while written < len(data):
            written += os.write(handle, data[written:])
    except BrokenPipeError:
        raise
    except OSError as error:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            begun = written - (data.rfind(b"\n", 0, written) + 1)
            with suppress(OSError):
                os.ftruncate(handle, os.lseek(handle, -begun, os.SEEK_CUR))
        raise PeftplanError(f"{name}: {error.strerror}; the rows written so far are whole") from None


def _parquet(result: Sweep, output: str, each: Callable[[Chunk], None]) -> None:
    from pyarrow import parquet

    from peftplan.planning import sweep_arrow

    schema = sweep_arrow.schema(result)
    with replacing(output, field="--output") as file, parquet.ParquetWriter(file, schema) as writer:
        for chunk in result.chunks():
            writer.write_batch(sweep_arrow.batch(chunk, schema))
            each(chunk)


def summary(tally: Tally) -> str:
    """How the verdicts came about, in one line."""
    texts = {
        "requested": "decided by the bytes that tensors request",
        "bound": "that fit by a bound on what the allocator reserves",
        "replay": "by a replay",
    }
    parts = [f"{tally.by[by]:,} {text}" for by, text in texts.items() if tally.by.get(by)]
    undecided = tally.by.get(None, 0) if parts else 0
    if undecided:
        parts.append(f"{undecided:,} without a verdict (--replays N replays more points, --replays all every one)")
    if tally.refused:
        parts.append(f"{tally.refused:,} without numbers (column error says why)")
    line = f"{_counted(tally.rows, 'row')} in {tally.seconds:.1f} s, {_counted(tally.replayed, 'point')} replayed"
    return line + (f": {', '.join(parts)}" if parts else "")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
