"""What the JSON of an estimate says of the file of another training tool, key by key."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class ReadKeyDocument(TypedDict):
    """A key of a file that decides options."""

    value: object
    option: str
    """The options, comma-separated."""
    why: str


class IgnoredKeyDocument(TypedDict):
    """A key that does not change memory."""

    value: object
    why: str
    at: str
    """The tool's file and line."""


class UnsupportedKeyDocument(TypedDict):
    """A key that changes memory, or may, and that no option says."""

    value: object
    why: str
    effect: Literal["lowers", "raises", "unknown"]
    """What it does to the true peak."""
    option: str | None
    """The option that replaces the key if it is set."""


class RefusedKeyDocument(TypedDict):
    """A key with which the tool raises. The numbers are those of the file with the change `instead`."""

    value: object
    why: str
    """The tool's error, with file and line."""
    instead: dict[str, object]
    """Keys and their new values; null removes the key."""


class ConfigDocument(TypedDict):
    """What the file of another training tool says: `--config`."""

    tool: str
    version: str
    """The version whose defaults are known."""
    files: list[str]
    model: str | None
    options: dict[str, object]
    """peftplan's options, the tool's defaults included."""
    launch: dict[str, object]
    read: dict[str, ReadKeyDocument]
    ignored: dict[str, IgnoredKeyDocument]
    unsupported: dict[str, UnsupportedKeyDocument]
    refused: dict[str, RefusedKeyDocument]
    defaults: dict[str, str]
    """Option that the file leaves to the tool → the tool's file and line."""
    assumed: dict[str, str]
    """What the file leaves to the data or the launcher."""
    bound: Literal["at_most", "at_least", "unknown"] | None
    """How the peak relates to the real one if a key is not supported."""
