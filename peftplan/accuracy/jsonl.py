"""Run records in JSON Lines: a reader that refuses unknown fields, and an append that loses nothing.

Each line carries `digest`, the sha256 of its canonical JSON without it: a line that was edited by hand no longer matches.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from peftplan import files
from peftplan.accuracy.records import SCHEMA_VERSION, Record
from peftplan.errors import PeftplanError
from peftplan.validation import first_error

DIGEST = "digest"
TRUNCATED = "truncated: it does not end with a newline; `peftplan check --repair FILE` sets it aside"


class RecordFileError(PeftplanError):
    """A line of a record file that is refused; the message names the file and the line."""

    def __init__(self, path: Path, line: int, why: str) -> None:
        self.path, self.line, self.why = path, line, why
        super().__init__(f"{path}:{line}: {why}")


def digest(payload: Mapping[str, object]) -> str:
    """sha256 over the JSON with sorted keys, no spaces, in UTF-8, `digest` left out."""
    content = {name: value for name, value in payload.items() if name != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def to_line(record: Record) -> str:
    """The record as one line, newline included."""
    payload = record.payload()
    return json.dumps({**payload, DIGEST: digest(payload)}, ensure_ascii=False, separators=(",", ":")) + "\n"


def read(path: Path) -> list[Record]:
    """Every record of a file. Raises RecordFileError at the first line that is not one."""
    try:
        text = files.content(path, field="file").decode()
    except UnicodeDecodeError as error:
        raise RecordFileError(path, error.object[: error.start].count(b"\n") + 1, "not UTF-8 text") from None
    return [record for _, record in _numbered(path, text)]


def _numbered(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        yield number, _record(path, number, line)
    if lines[-1]:
        raise RecordFileError(path, len(lines), TRUNCATED)


def _record(path: Path, number: int, line: str) -> Record:
    """One line as a record: JSON, the version, the fields, the digest, in this order."""
    try:
        payload = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordFileError(path, number, f"not JSON ({error})") from None
    if not isinstance(payload, dict):
        raise RecordFileError(path, number, "not a JSON object")
    version = payload.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise RecordFileError(path, number, f"schema_version is {version!r}; this version of peftplan reads {SCHEMA_VERSION}")
    fields = {name: value for name, value in payload.items() if name != DIGEST}
    try:
        record = Record.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise RecordFileError(path, number, str(first_error(error))) from None
    if payload.get(DIGEST) != digest(payload):
        raise RecordFileError(path, number, "the digest does not match: the line was edited after it was written")
    return record


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, all or none, safe for several processes at once: one write under a lock, synced to the disk.

    Raises RecordFileError where the file ends in the middle of a line.
    """
    data = "".join(map(to_line, records)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = files.regular(path, field="output", flags=os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        with _locked(handle):
            size = os.fstat(handle).st_size
            if size and _last_byte(handle, size) != b"\n":
                raise RecordFileError(path, path.read_bytes().count(b"\n") + 1, TRUNCATED)
            if os.write(handle, data) != len(data):
                os.ftruncate(handle, size)
                raise PeftplanError(f"{path}: the disk took only a part of the record; nothing was added")
            os.fsync(handle)
    finally:
        os.close(handle)


def repair(path: Path) -> int:
    """Set a truncated last line aside in `<file>.cut`, and return how many bytes it had; 0 where the file is whole.

    A last line that is a whole record and lacks only its newline gets the newline.
    """
    handle = files.regular(path, field="file", flags=os.O_RDWR)
    try:
        with _locked(handle):
            content = files.content(path, field="file")
            whole_lines = content.rfind(b"\n") + 1
            tail = content[whole_lines:]
            if not tail:
                return 0
            if _is_record(path, tail):
                os.lseek(handle, 0, os.SEEK_END)
                os.write(handle, b"\n")
                return 0
            with open(f"{path}.cut", "ab") as aside:
                aside.write(tail + b"\n")
            os.ftruncate(handle, whole_lines)
            os.fsync(handle)
            return len(tail)
    finally:
        os.close(handle)


def _is_record(path: Path, tail: bytes) -> bool:
    try:
        _record(path, 1, tail.decode())
    except (RecordFileError, UnicodeDecodeError):
        return False
    return True


def _last_byte(handle: int, size: int) -> bytes:
    os.lseek(handle, size - 1, os.SEEK_SET)
    return os.read(handle, 1)


@contextmanager
def _locked(handle: int) -> Iterator[None]:
    """An exclusive lock on an open file, held by this process alone until the end."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if sys.platform == "win32":
            os.lseek(handle, 0, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_UN)
