"""What is alive at the peak, the largest groups of equal tensors first: `estimate --explain-peak`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from peftplan.errors import RefusedError
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks

MOST = 20
"""Groups that people are shown before the rest becomes one row; programs, and `-v`, get all."""
TRACED = "traced: "
"""How the source of a traced line begins; the operation follows."""
_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer(?=\.|$)|\.default(?=\.|$)")
"""What peft puts around the names that transformers gives."""


class Row(NamedTuple):
    """`copies` equal tensors: what they are, whose, made by what; `share` is of the peak."""

    category: str
    name: str
    made_by: str
    dtype: str
    shape: tuple[int | str, ...]
    copies: int
    bytes: int
    share: float


def rows(result: Estimate) -> list[Row]:
    """Every line of the peak, largest first; they add up to `peak_allocated`. Raises RefusedError where no peak is stated."""
    total = peaks_of(result).allocated
    lines = sorted((line for line in result.ledger if line.place == "device"), key=lambda line: -line.bytes())
    return [
        Row(
            category=line.category,
            name=line.name.replace("{}", "*"),
            made_by=line.source.removeprefix(TRACED) if line.source.startswith(TRACED) else "",
            dtype=line.dtype,
            shape=line.dims,
            copies=line.copies,
            bytes=line.bytes(),
            share=line.bytes() / total,
        )
        for line in lines
        if line.bytes()
    ]


def peaks_of(result: Estimate) -> Peaks:
    """The peaks of a result that has some."""
    if result.peaks is None:
        raise RefusedError(f"explain_peak: the {result.engine} engine states no peak for this job; accepted: engine trace")
    return result.peaks


def facts(result: Estimate) -> list[dict[str, object]]:
    """One record per group for programs; `share` with six decimals."""
    return [{**row._asdict(), "shape": list(row.shape), "share": round(row.share, 6)} for row in rows(result)]


def kind(name: str) -> str:
    """The module as its author named it: without the names of peft's wrappers."""
    return _WRAPPERS.sub("", name).removeprefix("base_model.model") or "(model)"


def tensor(row: Row) -> str:
    """`fp32 1×2048×4096`."""
    return f"{row.dtype} {'×'.join(map(str, row.shape))}".rstrip()


def operation(row: Row) -> str:
    """`_log_softmax` for `aten._log_softmax.default`; nothing for what was loaded."""
    if row.made_by == "load":
        return ""
    return re.sub(r"^aten\.(\w+)\.\w+(?=$|,)", r"\1", row.made_by)


def split(groups: Sequence[Row], *, everything: bool) -> tuple[list[Row], list[Row]]:
    """What is shown one by one, and the rest; a rest of one is no rest."""
    most = len(groups) if everything or len(groups) <= MOST + 1 else MOST
    return list(groups[:most]), list(groups[most:])
