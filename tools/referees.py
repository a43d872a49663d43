"""Another tool's own benchmark on a rehearsed card, against what it printed on a real one.

    python -m tools.referees [--write] [ID ...]

`vramcalc bench` 0.1.2 trains a few steps and records its bytes; `data/runs/vramcalc_a6000.jsonl` holds what it recorded on an RTX
A6000. Run it in an environment with vramcalc, its transformers (4.57.6), peft and the CUDA build of torch. `--write`
puts the table between the marks of docs/rehearse.md.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "data" / "runs" / "vramcalc_a6000.jsonl"
KEPT = ROOT / "tests" / "rehearse" / "referees.json"
PAGE = ROOT / "docs" / "rehearse.md"
MARKS = ("<!-- referees -->", "<!-- end of referees -->")


def options(run: dict[str, Any]) -> list[str]:
    """The benchmark's options for a published row."""
    stated = run["options"]
    words = [
        "--train",
        "--attn",
        stated["attn_implementation"],
        "--batch",
        str(stated["batch_size"]),
        "--seq",
        str(stated["seq_len"]),
    ]
    words += ["--precision", "pure"] if stated["autocast"] == "none" else []
    words += ["--grad-checkpoint"] if stated["gradient_checkpointing"] else []
    return words + (["--lora", str(run["method_config"]["r"])] if run["method"] == "lora" else [])


def measured(run: dict[str, Any]) -> dict[str, Any]:
    """What the benchmark records on the rehearsed card, in bytes."""
    with TemporaryDirectory() as name:
        folder, record = Path(name, "model"), Path(name, "record.jsonl")
        folder.mkdir()
        standins.write_repository(folder, run["model"])
        command = ["vramcalc", "bench", str(folder), *options(run), "--record", str(record)]
        rehearse(command, gpu="rtx-a6000", steps=0, keep_writes=True, timeout=1800, stdout=sys.stderr.fileno())
        row: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| `vramcalc bench`, RTX A6000 | it recorded | rehearsed | difference |", "| --- | --- | --- | --- |"]
    for row in rows:
        words = re.sub(r"--train |--batch 1 --seq 2048 ?", "", row["options"]).strip()
        drift = 100 * (row["rehearsed"] / row["published"] - 1)
        lines.append(f"| {row['model']} `{words}` | {row['published']:,} | {row['rehearsed']:,} | {drift:+.4f} % |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]]) -> None:
    """Keep the rows beside those of other ids, and put the table into the page."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
    by_id = {row["id"]: row for row in [*kept, *rows]}
    rows = sorted(by_id.values(), key=lambda row: int(row["id"].rpartition("/")[2]))
    KEPT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run the named rows, or all."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    for line in PUBLISHED.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if names and record["id"] not in names:
            continue
        result = measured(record["run"])
        row = {
            "id": record["id"],
            "model": record["run"]["model"],
            "options": " ".join(options(record["run"])),
            "published": record["peaks"]["overall"]["allocated"],
            "rehearsed": result["measured"].get("total"),
            "status": result["status"],
            "measured": result["measured"],
            "versions": {name: version(name) for name in ("vramcalc", "torch", "transformers", "peft")},
        }
        print(json.dumps(row), flush=True)
        if "--write" in arguments and row["rehearsed"]:
            write([row])


if __name__ == "__main__":
    main(sys.argv[1:])
