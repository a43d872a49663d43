"""Colours are read on a white screen as on a black one."""

from __future__ import annotations

import pytest

from peftplan.report.screen import CODES, SHADES

LEVELS = (0, 95, 135, 175, 215, 255)
"""Of the colour cube of xterm's 256 colours, which begins at 16."""
READABLE = 3.0
"""The least contrast of large text, and of what is not text alone (WCAG 2.1, 1.4.3 and 1.4.11); each line has a mark as well."""


def luminance(number: int) -> float:
    """Relative luminance (WCAG 2.1) of a colour of the cube."""
    red, green, blue = (LEVELS[(number - 16) // step % 6] / 255 for step in (36, 6, 1))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", ["green", "yellow", "red"])
def test_a_colour_is_read_on_white_and_on_black(colour: str) -> None:
    shade = luminance(SHADES[colour])  # type: ignore[index]
    assert CODES[colour] == f"\x1b[38;5;{SHADES[colour]}m"  # type: ignore[index]
    assert (1 + 0.05) / (shade + 0.05) >= READABLE
    assert (shade + 0.05) / 0.05 >= READABLE
