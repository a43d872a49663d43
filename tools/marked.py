"""The part of a page that a tool writes: it stands between two comments of HTML, the marks."""

from __future__ import annotations

from pathlib import Path

Marks = tuple[str, str]


def part(page: Path, marks: Marks) -> str:
    """What stands between the marks."""
    return page.read_text(encoding="utf-8").partition(marks[0])[2].partition(marks[1])[0].strip()


def write(page: Path, marks: Marks, text: str) -> None:
    """Put a text between the marks in place of what stands there."""
    whole = page.read_text(encoding="utf-8")
    before, after = whole.partition(marks[0])[0], whole.partition(marks[1])[2]
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")
