"""Put the real output of the main job into the README: `python tools/readme.py` between the first ```text fences."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
MAIN_JOB = ("estimate", "llama-2-70b", "--method", "qlora", "--r", "16")


def main_job() -> str:
    """What the main job prints at 80 columns, without colour."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "peftplan", *MAIN_JOB]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.rstrip()


def with_output(readme: str, output: str) -> str:
    """The README with the block between its ```text fences replaced."""
    return re.sub(r"(?<=```text\n).*?(?=\n```)", lambda _: output, readme, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(with_output(README.read_text(encoding="utf-8"), main_job()), encoding="utf-8")
