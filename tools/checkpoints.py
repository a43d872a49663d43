"""Checkpoints of holes as they are published: other names, matrices in 8 or 4 bits, layers that transformers leaves out."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

SAFE_BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
"""Bytes of a number, by the names of safetensors."""
Tensors = dict[str, dict[str, Any]]
"""What a checkpoint's header says: name → dtype, shape and where it lies."""


def rename(file: Path, names: dict[str, str]) -> None:
    """Give the tensors of a checkpoint of holes their published names."""
    prefix = re.compile(f"^(?:{'|'.join(map(re.escape, names))})")
    rewrite(
        file, lambda tensors: {prefix.sub(lambda start: names[start[0]], name, count=1): row for name, row in tensors.items()}
    )


def rewrite(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the header of a checkpoint of holes."""
    with file.open("rb") as written:
        (length,) = struct.unpack("<Q", written.read(8))
        tensors = change(json.loads(written.read(length)))
    end = max(row["data_offsets"][1] for row in tensors.values() if "data_offsets" in row)
    header = json.dumps(tensors)
    with file.open("wb") as renamed:
        renamed.write(struct.pack("<Q", len(header)) + header.encode("ascii"))
        renamed.truncate(len(header) + 8 + end)


def further_pattern(config: dict[str, Any]) -> str:
    """A letter for each layer that predicts further tokens."""
    stated = "".join({"attention": "*", "moe": "E"}[kind] for kind in config.get("mtp_layers_block_type", ()))
    return str(config.get("mtp_hybrid_override_pattern", stated))


def with_further_tokens(layers: str, pattern: str, tensors: Tensors) -> Tensors:
    """The tensors beside those of such layers, each of which has the shapes of the model's first layer of its kind."""
    parts = dict(tensors)
    norm, end = (f"backbone.layers.{layers.index(pattern[0])}.norm.weight", len(pattern) - 1)
    for place, letter in enumerate(pattern):
        prefix = f"backbone.layers.{layers.index(letter)}."
        parts |= {
            f"mtp.layers.{place}.{name.removeprefix(prefix)}": row for name, row in tensors.items() if name.startswith(prefix)
        }
    (width,) = tensors[norm]["shape"]
    parts |= {f"mtp.layers.0.{name}.weight": tensors[norm] for name in ("enorm", "hnorm")}
    parts[f"mtp.layers.{end}.final_layernorm.weight"] = tensors[norm]
    parts["mtp.layers.0.eh_proj.weight"] = tensors[norm] | {"shape": [width, 2 * width]}
    return placed(parts)


BLOCK = 128
"""Rows and columns of a matrix in 8 bits that have one scale."""
IN_16_BITS = re.compile(r"(^|\.)(embed_tokens|lm_head|gate|\w*norm)\.weight$")
"""Tensors that stay as they are where matrices are in 8 bits."""


def in_8_bits(tensors: Tensors) -> Tensors:
    """Matrices as DeepSeek's and MiniMax's checkpoints have them, with a scale for each block."""
    parts: Tensors = {}
    for name, row in tensors.items():
        if name.endswith(".weight") and len(row["shape"]) == 2 and IN_16_BITS.search(name) is None:
            rows, columns = row["shape"]
            parts[name] = row | {"dtype": "F8_E4M3"}
            parts[f"{name}_scale_inv"] = {"dtype": "F32", "shape": [-(-rows // BLOCK), -(-columns // BLOCK)]}
        else:
            parts[name] = row
    return placed(parts)


def with_attending_layer(tensors: Tensors) -> Tensors:
    """The tensors beside those of Qwen 3.5's layer that predicts a further token, which has the shapes of one of attention."""
    stack = "model.language_model.layers."
    of_queries = next(name for name in tensors if name.startswith(stack) and name.endswith(".self_attn.q_proj.weight"))
    layer = of_queries.removesuffix("self_attn.q_proj.weight")
    parts = tensors | {f"mtp.layers.0.{name.removeprefix(layer)}": row for name, row in tensors.items() if name.startswith(layer)}
    norm = tensors[f"{layer}input_layernorm.weight"]
    parts |= {f"mtp.{name}.weight": norm for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    (width,) = norm["shape"]
    return placed(parts | {"mtp.fc.weight": norm | {"shape": [width, 2 * width]}})


OF_EXPERT = re.compile(r"(model\..*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def with_stacked_experts(tensors: Tensors) -> Tensors:
    """The tensors with one of all experts of a layer for what projects up, and one for what projects down, but of a layer that
    predicts a further token."""
    parts: Tensors = {}
    experts = [place for name in tensors if (place := OF_EXPERT.fullmatch(name))]
    count = 1 + max(int(place[2]) for place in experts)
    for name, row in tensors.items():
        if (place := OF_EXPERT.fullmatch(name)) is None:
            parts[name] = row
        elif place[2] == "0" and place[3] != "up":
            rows, columns = row["shape"]
            gated = place[3] == "gate"
            parts[f"{place[1]}.{'gate_up' if gated else 'down'}_proj"] = row | {"shape": [count, (1 + gated) * rows, columns]}
    return placed(parts)


def with_columns_first(tensors: Tensors) -> Tensors:
    """The tensors with stacks of experts whose dims are (expert, in, out)."""
    turned = {name: row for name, row in tensors.items() if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
    return placed(tensors | {name: row | {"shape": [row["shape"][place] for place in (0, 2, 1)]} for name, row in turned.items()})


def placed(parts: Tensors) -> Tensors:
    """Tensors one behind the other."""
    changed: Tensors = {}
    end = 0
    for name, fields in parts.items():
        start, end = end, end + prod(fields.get("shape", [0])) * SAFE_BYTES.get(str(fields.get("dtype")), 0)
        changed[name] = fields if "dtype" not in fields else {**fields, "data_offsets": [start, end]}
    return changed


def in_4_bits(tensors: Tensors) -> Tensors:
    """The experts of gpt-oss as they are published: blocks of 32 numbers in 16 bytes, and a byte for the scale of each."""
    parts: Tensors = {}
    for name, row in tensors.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            e, h, width = row["shape"]
            shapes = {"blocks": [e, width, h // 32, 16], "scales": [e, width, h // 32]}
            parts |= {f"{name}_{part}": {"dtype": "U8", "shape": shape} for part, shape in shapes.items()}
        else:
            parts[name] = row
    return placed(parts)
