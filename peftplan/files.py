"""Files of the user: read whole, if they are files and not too large; written so that they appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from peftplan.errors import InputError, UnreadableError, UnwritableError

MOST_BYTES = 64 * 2**20
"""Of a file where nothing smaller is said: parsed JSON takes up to 25 times its size."""


def regular(path: Path | str, *, field: str, flags: int = os.O_RDONLY) -> int:
    """An open handle on a regular file. Raises UnreadableError for a folder, a pipe, a device, or what cannot be opened.

    `field` is what the error calls the path. A pipe would make a reader wait for a writer, a device may never end.
    """
    try:
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o644)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UnreadableError(field, str(path), _reason(error)) from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UnreadableError(field, str(path), f"it is {kind}")
    return handle


def content(path: Path | str, *, field: str, most: int = MOST_BYTES) -> bytes:
    """All bytes of a regular file. Raises InputError where there are more than `most`, UnreadableError for an unreadable file."""
    data = beginning(path, field=field, most=most + 1)
    if len(data) > most:
        raise InputError(field, str(path), f"accepted: a file of at most {most:,} bytes")
    return data


def beginning(path: Path | str, *, field: str, most: int) -> bytes:
    """The first bytes of a regular file, at most so many. Raises UnreadableError for an unreadable file."""
    with open(regular(path, field=field), "rb") as file:
        try:
            return file.read(most)
        except OSError as error:
            raise UnreadableError(field, str(path), _reason(error)) from None


def text(path: Path | str, *, field: str, most: int = MOST_BYTES) -> str:
    """The same as text. Raises InputError where it is not UTF-8."""
    try:
        return content(path, field=field, most=most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(field, str(path), f"accepted: UTF-8 text; byte {error.start} is not") from None


def is_file(path: Path | str) -> bool:
    """Whether there is a regular file; False for a path that no file can have."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def replacing(path: Path | str, *, field: str) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` once the block has ended without an error; what was there stays until then.

    `field` is what the error calls the path. Raises InputError where it cannot be written, and for a pipe or a device, whose
    place a file would take.
    """
    target = Path(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UnwritableError(field, str(path), "it is a pipe or a device")
    unfinished = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, target)
    except OSError as error:
        raise UnwritableError(field, str(path), _reason(error)) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
