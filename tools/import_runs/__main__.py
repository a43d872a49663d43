"""Published measurements as run records: writes data/runs/<source>.jsonl and data/runs/not_expressible.jsonl.

`python -m tools.import_runs PEAKS METAMATH FITCHECK VRAMCALC`. The first two are JSON Lines files of rows copied from public
sources, each with its source and licence: single-GPU training peaks of many projects, and peft's benchmark, one run per method.
The others are unpacked source distributions from PyPI: fitcheck-llm 0.3.1, whose archive has more of its T4 runs than PEAKS, and
vramcalc 0.1.2. What a row leaves open is decided here, once, and said in its record under `unknown` (assumed) or `differs` (known
not to be what the setup says).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from peftplan.accuracy.jsonl import digest, to_line
from tools.import_runs.fitcheck import archived
from tools.import_runs.metamath import metamath
from tools.import_runs.projects import SOURCES
from tools.import_runs.rows import NotExpressibleError, Row, read_rows
from tools.import_runs.vramcalc import benchmark_rows

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"


def not_expressible(row: Row, why: str) -> str:
    """One line of what no setup describes: the row's source, what it measured, and why."""
    names = ("id", "source", "repo", "path", "commit", "licence", "model", "method", "gpu", "metric_class", "value_bytes")
    fields = {name: row[name] for name in names if row.get(name) is not None} | {"why": why}
    return json.dumps({**fields, "digest": digest(fields)}, ensure_ascii=False, separators=(",", ":")) + "\n"


def convert(peaks: Iterable[Row], benchmark: Iterable[Row]) -> tuple[dict[str, list[str]], Counter[str]]:
    """File name → lines; and how many rows each reason kept out."""
    files: dict[str, list[str]] = {"peft_metamath": [to_line(metamath(row)) for row in benchmark], "not_expressible": []}
    why: Counter[str] = Counter()
    for row in peaks:
        name, to_record = SOURCES[row["source"]]
        try:
            files.setdefault(name, []).append(to_line(to_record(row)))
        except NotExpressibleError as error:
            files["not_expressible"].append(not_expressible(row, str(error)))
            why[str(error)] += 1
    return {name: lines for name, lines in files.items() if lines}, why


def main() -> None:
    """Write every file, and say what was kept out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peaks", type=Path)
    parser.add_argument("metamath", type=Path)
    parser.add_argument("fitcheck", type=Path)
    parser.add_argument("vramcalc", type=Path)
    args = parser.parse_args()
    peaks = read_rows(args.peaks)
    more = archived(args.fitcheck, {row["path"] for row in peaks if row.get("path")})
    files, why = convert([*peaks, *more, *benchmark_rows(args.vramcalc)], read_rows(args.metamath))
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, lines in sorted(files.items()):
        (RUNS / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines):4} {name}.jsonl")
    for reason, times in why.most_common():
        print(f"{times:4} rows not expressible: {reason}")


if __name__ == "__main__":
    main()
