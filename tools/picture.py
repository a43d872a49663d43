"""Draw docs/assets: what a terminal shows of one job, and the plots of two commands: `python -m tools.picture`."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "assets" / "answer.svg"
COMMAND = "peftplan estimate qwen3-8b --method lora --r 16 --seq-len 4096 --gpu rtx-4090"
PLOTS = {
    "compare.png": "peftplan compare llama-3.1-8b --method lora,dora,qlora,full --gpu l4,a100-80gb",
    "sweep.png": "peftplan sweep llama-3.1-8b --batch-size 1:16:1 --seq-len 512:8192:256 --gpu rtx-4090,a100-80gb",
}
"""File → the command that draws it with --plot."""
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
"""What a reader has: the picture loads nothing."""


def answer(*, coloured: bool = True) -> str:
    """What the command prints in a terminal of 80 columns."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"COLUMNS": "80"} | ({"FORCE_COLOR": "1"} if coloured else {"NO_COLOR": "1"})
    call = [sys.executable, "-m", *shlex.split(COMMAND)]
    return subprocess.run(call, check=True, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=ROOT).stdout


def drawn(text: str) -> str:
    """A terminal with this text, colours as escape sequences."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text(f"$ {COMMAND}", style="bold"))
    console.print(Text.from_ansi(text.rstrip()), "")  # the last line of a picture loses its underscores
    svg = console.export_svg(title="peftplan", theme=MONOKAI, unique_id="answer")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    return re.sub(r"font-family: Fira Code, monospace", f"font-family: {FONT}", svg)


def texts(svg: str) -> str:
    """The lines of a picture."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for x, y, text in re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        rows.setdefault(float(y), []).append((float(x), unescape(text).replace("\xa0", " ").rstrip("\n")))
    return "\n".join("".join(text for _, text in sorted(row)).rstrip() for _, row in sorted(rows.items()))


def plot(file: str) -> None:
    """Draw one of `PLOTS`."""
    call = [sys.executable, "-m", *shlex.split(PLOTS[file]), "--plot", str(FILE.with_name(file))]
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


if __name__ == "__main__":
    FILE.write_text(drawn(answer()), encoding="utf-8")
    for name in PLOTS:
        plot(name)
