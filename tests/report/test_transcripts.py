"""docs/transcripts.md is what its commands print."""

from __future__ import annotations

import re

import pytest

from tools.transcripts import JOBS, PAGE, page, printed

VERDICTS = ("✓", "!", "✗", "?")


def test_the_page_is_what_the_commands_print() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "if meant: python -m tools.transcripts, and read the difference"


def test_the_page_shows_every_verdict_in_at_most_25_lines() -> None:
    shown = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(shown) == 2 * len(JOBS)
    assert max(len(text.splitlines()) for text in shown) <= 25
    assert {line[0] for text in shown for line in text.splitlines() if line and line[0] in VERDICTS} == set(VERDICTS)
    assert any(" does not run: " in text for text in shown)


def test_a_command_that_fails_is_no_transcript() -> None:
    with pytest.raises(SystemExit):
        printed("no-such-model", 80)
