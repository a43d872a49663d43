"""Files that appear whole or not at all: written under another name in the same folder, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from peftplan.errors import InputError


@contextmanager
def replacing(path: Path | str, *, field: str) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` once the block has ended without an error; what was there stays until then.

    `field` is what the error calls the path. Raises InputError where it cannot be written.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, target)
    except OSError as error:
        raise InputError(field, str(path), f"it cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            unfinished.unlink()
