"""A release: the version in pyproject, CITATION.cff and the changelog, and the tag that says the same.

    python tools/release.py 0.1.0 [--date 2026-11-27]    put the version and the date into the three files
    python tools/release.py --check v0.1.0               exit 1 unless they say what the tag says

The workflow that builds a tag and publishes a release runs the second. Needs no package but Python's own.
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = r"\d+\.\d+\.\d+"
PLACES = {
    "pyproject.toml": (rf'^version = "({VERSION})"$', 'version = "{version}"'),
    "CITATION.cff": (rf"^version: ({VERSION})\n(?:date-released: .*\n)?", "version: {version}\ndate-released: {day}\n"),
    "CHANGELOG.md": (rf"^## ({VERSION}) \((?:unreleased|\d{{4}}-\d\d-\d\d)\)$", "## {version} ({day})"),
}
"""File → where it says the version, and how a release writes it. The first section of the changelog is the newest."""


def versions(root: Path = ROOT) -> dict[str, str]:
    """File → the version that it says."""
    matches = {name: re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M) for name, (pattern, _) in PLACES.items()}
    return {name: match[1] if match else "no version" for name, match in matches.items()}


def disagreements(tag: str, root: Path = ROOT) -> list[str]:
    """What the files say otherwise than the tag; a release has a date."""
    wanted = tag.removeprefix("v")
    lines = [f"{name}: {version}, not {wanted}" for name, version in versions(root).items() if version != wanted]
    for name, dated in (("CHANGELOG.md", rf"^## {re.escape(wanted)} \(\d"), ("CITATION.cff", r"^date-released: \d")):
        if not re.search(dated, (root / name).read_text(encoding="utf-8"), re.M):
            lines.append(f"{name}: {wanted} has no date")
    return lines if re.fullmatch(f"v{VERSION}", tag) else [f"{tag}: a tag is v and a version, such as v0.1.0", *lines]


def write(version: str, day: str, root: Path = ROOT) -> None:
    """Put a version and its date into the files. Raises ValueError for a changelog whose first section is another release."""
    newest = re.search(PLACES["CHANGELOG.md"][0], (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if newest is not None and newest[1] != version and "(unreleased)" not in newest[0]:
        raise ValueError(f"CHANGELOG.md: the first section is the release {newest[1]}; begin one as ## {version} (unreleased)")
    for name, (pattern, text) in PLACES.items():
        file = root / name
        replaced = re.sub(pattern, text.format(version=version, day=day), file.read_text(encoding="utf-8"), count=1, flags=re.M)
        file.write_text(replaced, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="such as 0.1.0")
    parser.add_argument("--date", default=date.today().isoformat())
    parser.add_argument("--check", metavar="TAG", help="such as v0.1.0")
    arguments = parser.parse_args()
    if (arguments.version is None) == (arguments.check is None):
        parser.error("give a version, or --check and a tag")
    if arguments.version:
        try:
            write(arguments.version, arguments.date)
        except ValueError as error:
            parser.error(str(error))
    lines = disagreements(arguments.check or f"v{arguments.version}")
    print("\n".join(lines) or f"{arguments.check or arguments.version}: the files agree")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
