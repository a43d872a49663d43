"""Data sets that are not on this machine: rows of the columns that were asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport

ROWS = 1024
WORD = " the"
"""One token of the stand-in tokenizer, and of most others."""
SPLITS = ("train", "test", "validation")
SIDE = 448
"""Pixels of a picture's side."""
NOT_HERE = (OSError, ValueError)
"""What `datasets` raises for a data set that it cannot reach or does not have."""


def start(columns: Mapping[str, str] | None, seq_len: int, say: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Answer `datasets.load_dataset` for what it does not find, once the program imports it; without columns, say how to."""

    def watch(module: Any) -> None:
        load = module.load_dataset

        def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return load(path, *args, **kwargs)
            except NOT_HERE as error:
                if columns is None:
                    note(f"the data set {path} could not be read ({type(error).__name__}); --data synthetic answers for it")
                    raise
                say(f"the data set {path}: {ROWS:,} rows of {', '.join(columns)} with {seq_len:,} tokens")
                return _answer(columns, seq_len, split=kwargs.get("split"), streaming=kwargs.get("streaming", False))

        module.load_dataset = load_dataset

    sys.meta_path.insert(0, AfterImport({"datasets.load": watch}))


def _answer(columns: Mapping[str, str], seq_len: int, *, split: Any, streaming: bool) -> Any:
    """As the split was asked for: one data set, a list of them, or a dictionary in which every split is there."""
    from datasets import Dataset, DatasetDict, IterableDatasetDict  # type: ignore[import-untyped]

    row = row_of(columns, seq_len)
    rows = Dataset.from_dict({name: [value] * ROWS for name, value in row.items()})
    answered = rows.to_iterable_dataset() if streaming else rows
    if isinstance(split, list):
        return [answered] * len(split)
    if split is not None:
        return answered

    class EverySplit(IterableDatasetDict if streaming else DatasetDict):  # type: ignore[misc]
        def __missing__(self, name: str) -> Any:
            return answered

    return EverySplit(dict.fromkeys(SPLITS, answered))


def row_of(columns: Mapping[str, str], seq_len: int) -> dict[str, Any]:
    """One row. Its texts share the tokens; a rejected answer is as long as a chosen one."""
    shared = [name for name, kind in columns.items() if kind in ("text", "messages", "turns") and name != "rejected"]
    tokens = -(-seq_len // max(1, len(shared)))
    return {name: _value(kind, tokens) for name, kind in columns.items()}


def _value(kind: str, tokens: int) -> Any:
    half = tokens // 2
    if kind == "messages":
        return [{"role": "user", "content": WORD * half}, {"role": "assistant", "content": WORD * (tokens - half)}]
    if kind == "turns":
        return [{"from": "human", "value": WORD * half}, {"from": "gpt", "value": WORD * (tokens - half)}]
    if kind in ("image", "images"):
        from PIL import Image

        picture = Image.new("RGB", (SIDE, SIDE))
        return [picture] if kind == "images" else picture
    return {"int": 0, "float": 0.0}.get(kind, WORD * tokens)
