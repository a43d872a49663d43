"""Write docs/transcripts.md, what common jobs print at 80 and at 100 columns: `python -m tools.transcripts`."""

from __future__ import annotations

import io
import os
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

from peftplan.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "transcripts.md"
COLUMNS = (80, 100)
INTRO = """# What common jobs print

Each section is one command and what it prints at 80 and at 100 columns, without colours. In a terminal a line is green where
the job fits, yellow where it is tight or not known to fit, and red where it does not fit or does not run; the end of a bar is red
where the card has no room for it. `-v` adds every byte, every line with its formula, and every assumption.
`python -m tools.transcripts` writes this page, and a test compares it with what the commands print."""
JOBS = {
    "QLoRA of a 70B model, no card named": "llama-2-70b --method qlora --r 16",
    "The same on one card, which it fits": "llama-2-70b --method qlora --r 16 --gpu a100-80gb",
    "The same on two cards, one of which no change helps": "llama-2-70b --method qlora --r 16 --gpu rtx-4090,a100-80gb",
    "LoRA with a longer sequence on four cards": "qwen3-8b --r 16 --seq-len 4096 --gpu rtx-4090,l40s,a100-40gb,h100-80gb",
    "A tight job": "mistral-7b --method dora --seq-len 4096 --batch-size 2 --gpu rtx-4090",
    "A job that does not run": "llama-3.2-1b --method qlora --attn-implementation flash_attention_2 --gpu t4",
    "Full fine-tuning of a 7B model on a card of 24 GB": "llama-2-7b --method full --gpu rtx-4090",
    "A combination of changes": "qwen3-8b --r 16 --seq-len 8192 --gpu l4",
    "An encoder": "bert-base-uncased --batch-size 32 --gpu t4",
    "A mixture of experts": "mixtral-8x7b --method qlora --gpu h100-80gb",
    "A size instead of a card": "qwen3-8b --seq-len 8192 --gpu 24GiB",
    "A vision-language model of samples without images": "qwen2.5-vl-7b-instruct --gpu l4",
    "A model whose peak only a trace knows": "gemma-3n-e2b-it --gpu l4",
}


def printed(options: str, columns: int) -> str:
    """What `peftplan estimate` prints."""
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    with patch.dict(os.environ, environment), redirect_stdout(io.StringIO()) as out:
        try:
            main(["estimate", *shlex.split(options)])
        except SystemExit as stopped:
            if stopped.code:
                raise
    return out.getvalue().rstrip()


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for title, options in JOBS.items():
        parts.append(f"## {title}\n\n`peftplan estimate {options}`")
        parts += [
            f"<!-- not run: tools/transcripts.py writes it -->\n```text\n{printed(options, columns)}\n```" for columns in COLUMNS
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
