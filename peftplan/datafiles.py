"""The location of the shipped data: `peftplan/data` in the wheel, `data/` beside the package in a checkout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
DATA = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent / "data"


@cache
def load(name: str) -> Any:
    """The parsed JSON file `data/<name>`; treat it as read-only, it is read once per process."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))
