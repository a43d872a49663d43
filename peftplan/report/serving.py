"""Files, merge and device bytes of a fine-tuned model as text: a table per section for people, a row per number for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from peftplan.deployment.kv_cache import growing_bytes
from peftplan.planning.finished import MergeMemory
from peftplan.planning.serving_result import KV_CACHE, Serving
from peftplan.planning.serving_verdict import Limits
from peftplan.report.cards import card_name
from peftplan.report.screen import Colour, Glyphs
from peftplan.report.tabular import Column, assumption_rows, family
from peftplan.units import format_bytes

PLACES = {"cpu": "on the CPU", "gpu": "on a GPU", "gpu_quantized": "on a GPU, as stored"}
BYTES, READ = Column("bytes", right=True), Column("", right=True)


class Section(NamedTuple):
    """One table, with a line below it where there is something to say."""

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[str]]
    below: str | None = None


def heading(result: Serving) -> str:
    """What the tables are about."""
    config = result.method["config"]
    rank = f" r={config['r']}" if "r" in config else ""
    return f"{result.model['name']} · {result.method['name']}{rank} · after training"


def verdicts(result: Serving, marks: Glyphs) -> Iterator[tuple[str, Colour]]:
    """A line per card, and one with the largest sizes that fit it."""
    for card in result.gpus:
        assumed = f", {format_bytes(card.context_bytes)} of CUDA context assumed" if card.context_assumed else ""
        left = f"{format_bytes(abs(card.headroom_bytes))} {'short' if card.headroom_bytes < 0 else 'left'}"
        needs = f"needs {format_bytes(card.needed_bytes)} of {format_bytes(card.usable_bytes)}, {left}{assumed}"
        mark, colour = LOOKS[card.verdict]
        yield f"{getattr(marks, mark)} {card_name(card.gpu)}: {card.verdict.replace('_', ' ')}, {needs}", colour
        if sizes := _largest(card.most):
            yield f"  fits with up to {sizes}", "bold"
        elif any(size == 0 for size in card.most[:-1]):
            yield "  fewer adapters, tokens or sequences do not make it fit", "bold"


LOOKS: dict[str, tuple[str, Colour]] = {"fits": ("fits", "green"), "tight": ("tight", "yellow"), "does_not_fit": ("fails", "red")}
"""Mark and colour of a verdict."""


def _largest(most: Limits) -> str:
    """The largest sizes in words, the others as asked for; where a search ended before the card was full, at least so many."""
    words = {"adapters": "adapter", "context": "token", "batch_size": "sequence"}
    sizes = []
    for name, word in words.items():
        size = getattr(most, name)
        if not size:
            continue
        tokens = " of context" if name == "context" else ""
        more = "" if name not in most.bounded else " (all that the model has)" if tokens else " or more"
        sizes.append(f"{_counted(size, word)}{tokens}{more}")
    return ", or ".join(sizes)


def sections(result: Serving) -> Iterator[Section]:
    """The tables, those without rows left out."""
    every = (_on_disk(result), _merging(result), _on_the_device(result), _cache(result), _assumptions(result))
    yield from (section for section in every if section.rows)


def remarks(result: Serving) -> list[str]:
    """What is not known or does not exist, and what no number holds."""
    reasons = dict.fromkeys(reason.removeprefix("merge: ") for reason in result.refused.values())
    return [*(f"note: {note}" for note in (*reasons, *result.assumptions.get("notes", ()))), not_counted(result)]


def not_counted(result: Serving) -> str:
    """What the numbers leave out."""
    return f"Not counted: {'; '.join(result.not_modelled)}."


def _sized(name: str, num_bytes: int, *more: str) -> tuple[str, ...]:
    return (name, f"{num_bytes:,}", format_bytes(num_bytes), *more)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _on_disk(result: Serving) -> Section:
    rows = []
    if result.file is not None:
        what = f"{_counted(len(result.file.tensors), 'tensor')}, {' and '.join(result.file.dtypes)}"
        rows.append(_sized("adapter_model.safetensors", result.file.num_bytes, what))
    if result.checkpoint is not None:
        merged = "merged model" if result.merges else "model"
        count = len(result.checkpoint.files)
        rows.append(_sized(merged, result.checkpoint.num_bytes, f"{_counted(count, 'file')}, {result.checkpoint.dtype}"))
    return Section((Column("on disk"), BYTES, READ, Column("")), rows)


def _merging(result: Serving) -> Section:
    columns = ("base", "adapter", "temporaries", "sum")
    rows = [_merge_row(merge) for merge in result.merges]
    largest = max((merge.need for merge in result.merges), key=lambda need: need.num_bytes, default=None)
    below = f"temporaries: of {family(largest.module)}, which needs most" if largest is not None and largest.num_bytes else None
    host = next((merge.need.host_bytes for merge in result.merges if merge.need.host_bytes), 0)
    if host:
        below = f"{below}; as stored, {format_bytes(host)} more on the CPU"
    numbers = (*(Column(name, right=True) for name in columns), Column("bytes", right=True, wide=True))
    return Section((Column("merging"), *numbers), rows, below)


def _merge_row(merge: MergeMemory) -> tuple[str, ...]:
    parts = (merge.base, merge.adapter, merge.need.num_bytes)
    return (PLACES[merge.place], *map(format_bytes, (*parts, merge.total)), f"{merge.total:,}")


def _on_the_device(result: Serving) -> Section:
    memory, assumed = result.loaded, result.assumptions
    stored = assumed["dtype"] if assumed["quant"] == "none" else assumed["quant"]
    rows = [_sized(f"base, {stored}", memory.base)]
    if memory.all_adapters:
        rows.append(_sized(f"{_counted(memory.adapters, 'adapter')}, {assumed['serving_dtype']}", memory.all_adapters))
    if result.cache is not None:
        rows.append(_sized(f"KV cache, {assumed['batch_size']:,} × {result.cache.tokens:,} tokens", result.cache.num_bytes))
    total = "sum without the KV cache" if KV_CACHE in result.not_modelled else "sum"
    return Section((Column("serving"), BYTES, READ), [*rows, _sized(total, result.total)])


def _cache(result: Serving) -> Section:
    columns = (Column("KV cache"), Column("tensor"), Column("layers", right=True), BYTES, READ)
    if result.cache is None:
        return Section(columns, ())
    rows = []
    for tensor in result.cache.tensors:
        name, *sizes = _sized(f"{tensor.kind}, {tensor.part}", tensor.num_bytes)
        rows.append((name, f"{'×'.join(map(str, tensor.shape))} {tensor.dtype}", str(tensor.layers), *sizes))
    growing = growing_bytes(result.cache.tensors)
    return Section(columns, rows, f"appending a token briefly needs {format_bytes(growing)} more")


def _assumptions(result: Serving) -> Section:
    rows = [(name, value.partition(" (")[0] if name == "model" else value) for name, value in assumption_rows(result.assumptions)]
    return Section((Column("assumption"), Column("value")), rows)
