"""Lines and files of each room at some commits, as a table.

python tools/rooms.py 9534a8a7^ HEAD    in a clone with its history
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rooms(commit: str) -> tuple[Counter[str], Counter[str]]:
    """Lines and files of each folder in `peftplan/` at a commit, and of the files beside them. Empty files are left out."""
    counted = subprocess.run(
        ("git", "grep", "--count", "", commit, "--", "peftplan/*.py"), cwd=ROOT, check=True, capture_output=True, text=True
    )
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for row in counted.stdout.splitlines():
        path, _, count = row.removeprefix(f"{commit}:").rpartition(":")
        _, *folders, _ = path.split("/")
        room = folders[0] if folders else "(files)"
        lines[room] += int(count)
        files[room] += 1
    return lines, files


def table(*commits: str) -> str:
    """The table in Markdown, two columns a commit; a dash where there was no such room."""
    counts = [count for commit in commits for count in rooms(commit)]
    rows = ["| room | " + " | ".join(f"lines at {commit} | files" for commit in commits) + " |"]
    rows.append("| --- |" + " --- |" * len(counts))
    for room in sorted({room for count in counts for room in count}):
        rows.append(f"| {room} | " + " | ".join(f"{count[room]:,}" if room in count else "–" for count in counts) + " |")
    return "\n".join([*rows, "| all | " + " | ".join(f"{count.total():,}" for count in counts) + " |"])


if __name__ == "__main__":
    print(table(*sys.argv[1:]))
