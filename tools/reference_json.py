"""The page docs/reference/json.md, from the JSON Schemas of the results."""

from __future__ import annotations


def json_page() -> str:
    """The whole page."""
    return "# JSON\n"
