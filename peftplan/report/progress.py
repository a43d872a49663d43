"""A progress line on stderr in a terminal: what runs now, and how much is done."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 1.0
"""Seconds before anything is shown: what is done sooner needs no bar."""


@contextmanager
def waiting(title: str) -> Iterator[Callable[[str, float], None] | None]:
    """A callback that takes what is done now and the share that is behind; None where stderr is no terminal.

    The bar comes after `PATIENCE` seconds and is gone when the block ends, however it ends.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("importing torch and transformers", total=1.0)
    begin = threading.Timer(PATIENCE, bar.start)
    begin.daemon = True
    begin.start()
    try:
        yield lambda what, share: bar.update(task, description=what, completed=share)
    finally:
        begin.cancel()
        begin.join()
        bar.stop()
