"""Both engines on one job, as the comparing tools ask them, with traced peaks kept in a file.

Nearly all of a comparison's time is the trace. A file of kept traces lets a tool go on where it stopped, and evaluates changed
formulas over the same traces in minutes. A job whose definition changed is traced anew; what a change of the *trace* moves is not
seen: delete those lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from peftplan.errors import NeedsTraceError, PeftplanError
from peftplan.planning.estimate import estimate

RESERVED = "reserved"
Peaks = dict[str, int] | str
"""Bytes by phase, and reserved bytes where they are known; or why there are none."""


def peaks(config: Mapping[str, Any], options: Mapping[str, Any], engine: Literal["analytic", "trace"]) -> Peaks:
    """What an engine says of a job."""
    try:
        estimated = estimate(deepcopy(dict(config)), engine=engine, **options)  # transformers writes into nested dicts
    except PeftplanError as error:
        return f"refused: {error}"
    except Exception as error:  # a fault of ours: it is reported like a number of one engine alone
        return f"raised: {type(error).__name__}: {error}"
    if estimated.peaks:
        reserved = estimated.peaks.reserved
        return {**estimated.peaks.by_phase, **({} if reserved is None else {RESERVED: reserved})}
    reason = estimated.not_modelled[0]
    return f"no formula: {reason}" if reason.endswith(NeedsTraceError.hint) else f"refused: {reason}"


class KeptTraces:
    """Traced peaks by job, in a file of one JSON line a job where one is named."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
        self._traced: dict[str, Peaks] = {key(row["config"], row["options"]): row["traced"] for row in map(json.loads, lines)}

    def get(self, config: Mapping[str, Any], options: Mapping[str, Any]) -> Peaks | None:
        """The traced peaks of a job, None where it was not traced."""
        return self._traced.get(key(config, options))

    def keep(self, config: Mapping[str, Any], options: Mapping[str, Any], traced: Peaks) -> None:
        """Add a job's traced peaks."""
        if self.get(config, options) is None and self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"config": config, "options": options, "traced": traced}) + "\n")
        self._traced[key(config, options)] = traced


def key(config: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A job as text, the same whatever the order of its fields."""
    return json.dumps([config, options], sort_keys=True)
