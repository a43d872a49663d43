"""Run the command line in this process, as a pipe or a terminal of a given width would see it."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from peftplan.cli import main

HERE = Path(__file__).parent


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def run(*args: str, columns: int | None = 80) -> Done:
    """`peftplan args` in this folder; `columns` None is a pipe that knows no width."""
    out, err = io.StringIO(), io.StringIO()
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR", "HF_HUB_OFFLINE")}
    environment |= {"HF_HUB_OFFLINE": "1"} | ({} if columns is None else {"COLUMNS": str(columns)})
    before = Path.cwd()
    os.chdir(HERE)
    try:
        with patch.dict(os.environ, environment, clear=True), redirect_stdout(out), redirect_stderr(err):
            main(list(args))
    except SystemExit as stopped:
        return Done(stopped.code if isinstance(stopped.code, int) else 0, out.getvalue(), err.getvalue())
    finally:
        os.chdir(before)
    raise AssertionError("main always exits")
