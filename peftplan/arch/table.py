"""Weight tables: an `Architecture` as compact JSON, for built-in models whose model type has no reader.

`data/weights/<name>.json` is written from transformers' own model on the meta device (`tools/weight_tables.py`), so that counts
and stored bytes are exact without torch. Blocks, name, source and notes are not in it.
"""

from __future__ import annotations

from typing import TypedDict

from peftplan.arch.modules import Architecture, Buffer, Module, PromptDims
from peftplan.datafiles import DATA, record
from peftplan.datafiles import load as load_data
from peftplan.units import in_ranges

SCALARS = (
    "model_type",
    "model_class",
    "task_type",
    "hidden_size",
    "vocab_size",
    "input_embedding",
    "output_embedding",
    "supports_sdpa",
    "supports_flash_attn",
)
NAME_LISTS = ("keep_in_fp32", "keep_in_fp32_strict", "frozen", "logits_ops")
PROMPT = ("num_layers", "token_dim", "num_attention_heads", "num_key_value_heads", "head_dim", "num_transformer_submodules")


class Table(TypedDict):
    """The fields of a table that are nested, besides those in `SCALARS` and `NAME_LISTS`. Layers are ranges."""

    prompt: dict[str, int] | None
    ties: list[tuple[str, str]]
    buffers: list[tuple[str, str, list[int], str | None]]
    modules: list[tuple[str, str, dict[str, list[int]], str | None]]


def to_table(arch: Architecture) -> dict[str, object]:
    """The architecture as JSON values; layers as ranges, `0-3,5`."""
    return {
        **{key: getattr(arch, key) for key in SCALARS},
        **{key: list(getattr(arch, key)) for key in NAME_LISTS},
        "prompt": None if arch.prompt is None else {key: getattr(arch.prompt, key) for key in PROMPT},
        "ties": [list(tie) for tie in arch.ties],
        "buffers": [[b.name, b.dtype, list(b.shape), None if b.layers is None else in_ranges(b.layers)] for b in arch.buffers],
        "modules": [
            [m.name, m.kind, {p: list(shape) for p, shape in m.params}, None if m.layers is None else in_ranges(m.layers)]
            for m in arch.modules
        ],
    }


def from_table(table: Table) -> Architecture:
    """The architecture of a table that `to_table` wrote."""
    flat = {key: value for key, value in table.items() if key in SCALARS or key in NAME_LISTS}
    nested = {
        "prompt": None if table["prompt"] is None else PromptDims(**table["prompt"]),
        "ties": [(alias, owner) for alias, owner in table["ties"]],
        "buffers": [Buffer(name, dtype, tuple(shape), _indices(layers)) for name, dtype, shape, layers in table["buffers"]],
        "modules": [
            Module(name, kind, tuple((p, tuple(shape)) for p, shape in params.items()), _indices(layers))
            for name, kind, params, layers in table["modules"]
        ],
    }
    return record(Architecture, {**flat, **nested})


def load_table(name: str) -> Architecture | None:
    """The shipped weight table of a built-in model, or None if it has none."""
    file = f"weights/{name}.json"
    return from_table(load_data(file, Table)) if (DATA / file).is_file() else None


def _indices(text: str | None) -> tuple[int, ...] | None:
    """`0-2,5` → `(0, 1, 2, 5)`."""
    if text is None:
        return None
    pairs = (part.partition("-") for part in text.split(","))
    return tuple(i for first, _, last in pairs for i in range(int(first), int(last or first) + 1))
