"""Another tool's own benchmark on a rehearsed card, against what it printed on a real one.

    python -m tools.referees [--write] [ID ...]

`vramcalc bench` 0.1.2 trains a few steps and records its bytes; `data/runs/vramcalc_a6000.jsonl` holds what it recorded on an RTX
A6000 with torch 2.14.1 and transformers 4.57.6. Run it in an environment with vramcalc, transformers, peft and the CUDA build
of torch. `--write` puts the table between the marks of docs/rehearse.md.
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
from tools import marked

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "data" / "runs" / "vramcalc_a6000.jsonl"
ROWS = ROOT / "tests" / "rehearse" / "referees.json"
PAGE = ROOT / "docs" / "rehearse.md"
MARKS = ("<!-- referees -->", "<!-- end of referees -->")


def options(run: dict[str, Any]) -> list[str]:
    """The benchmark's options for a published row."""
    chosen = run["options"]
    words = [
        "--train",
        "--attn",
        chosen["attn_implementation"],
        "--batch",
        str(chosen["batch_size"]),
        "--seq",
        str(chosen["seq_len"]),
    ]
    words += ["--precision", "pure"] if chosen["autocast"] == "none" else []
    words += ["--grad-checkpoint"] if chosen["gradient_checkpointing"] else []
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
    """A row per published run as Markdown, with a column per environment that it was rehearsed in."""
    environments = sorted({_environment(row) for row in rows}, reverse=True)
    by_run: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_run.setdefault(row["id"], {})[_environment(row)] = row
    header = ["`vramcalc bench`, RTX A6000", "it recorded", *environments]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    for several in by_run.values():
        first = next(iter(several.values()))
        words = re.sub(r"--train |--batch 1 --seq 2048 ?", "", first["options"]).strip()
        cells = [_cell(several.get(environment)) for environment in environments]
        lines.append(f"| {first['model']} `{words}` | {first['published']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _environment(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row['versions'][name]}" for name in ("torch", "transformers"))


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["rehearsed"] == row["published"]:
        return f"{row['rehearsed']:,} (equal)"
    return f"{row['rehearsed']:,} ({100 * (row['rehearsed'] / row['published'] - 1):+.4f} %)"


def write(rows: list[dict[str, Any]]) -> None:
    """Keep the rows beside those of other runs and environments, and put the table into the page."""
    earlier = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else []
    by_run = {(row["id"], _environment(row)): row for row in [*earlier, *rows]}
    rows = sorted(by_run.values(), key=lambda row: (int(row["id"].rpartition("/")[2]), _environment(row)))
    ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    marked.write(PAGE, MARKS, table(rows))


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
