"""The folder of a rehearsal, and what is left of those whose owner was killed.

A rehearsal removes its folder at its end. If its process is killed, the next rehearsal does: a lock on one of the folder's files
says whether its owner, or the keeper of its program, still runs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "peftplan-rehearsal-"
LOCK = "lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, removed at the end."""
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        lock = hold(folder / "new")
        (folder / "new").rename(folder / LOCK)  # held from the moment at which others find it
        try:
            yield folder
        finally:
            os.close(lock)


def hold(path: Path) -> int:
    """Lock a file beside others that hold it, until this process ends or closes what is returned; its children do not hold it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(OSError):  # a file system without locks: then nobody removes the folder either
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _sweep(temporary: Path) -> None:
    """Remove the folders that nobody holds any more."""
    for path in temporary.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
