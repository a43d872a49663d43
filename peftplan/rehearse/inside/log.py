"""A process' peaks as they come, in a file: what is left of a process that a signal ends."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peftplan.rehearse.figures import LOG, Figure

PERIOD = 0.25
"""Seconds between two looks at the phase that runs."""


class Log:
    """Appends what changed, each process to a file of its own."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._figures: list[Figure] = []
        self._facts: Mapping[str, Any] = {}

    def add(self, figures: Iterable[Figure], facts: Mapping[str, Any]) -> None:
        """Note the peaks of a phase so far and what is known of the process, where they have changed and a device is in use."""
        latest = list(figures)
        if not latest or (latest == self._figures and facts == self._facts):
            return
        change: dict[str, Any] = {"figures": latest}
        self._append(change if facts == self._facts else {**change, "facts": facts})
        self._figures, self._facts = latest, facts

    def was_loading(self) -> None:
        """All figures so far are those of loading."""
        self._append({"loading": True})

    def _append(self, change: Mapping[str, Any]) -> None:
        with Path(self._folder, LOG.format(process=os.getpid())).open("a", encoding="utf-8") as file:
            file.write(json.dumps(change) + "\n")


def every_period(look: Callable[[], None], ended: threading.Event) -> None:
    """Call `look` every period, from a thread of its own, until `ended` is set."""

    def run() -> None:
        while not ended.wait(PERIOD):
            look()

    threading.Thread(target=run, name="peftplan-log", daemon=True).start()
