"""Vision-language models of samples without images: their text part alone runs, as the text model's layers do.

Sources: transformers, models/{qwen2_vl,qwen2_5_vl,qwen3_vl,qwen3_vl_moe,idefics3,smolvlm,mistral3}/modeling_*.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models import gemma
from peftplan.memory.models.decoder import decoder, masks_of, run_layers
from peftplan.memory.models.moe import qwen_route, routed_block
from peftplan.memory.models.style import Style
from peftplan.memory.units import ROTARY
from peftplan.tape.tensors import Tensor

GRIDS = 3
"""Positions of a token: in time, in height and in width."""


def with_grids(model: Model, style: Style, *, by_sections: bool) -> Tensor:
    """`Qwen2_5_VLTextModel.forward`. `by_sections`: sections of the three grids of angles are joined; else they are written into
    the first grid (Qwen3-VL)."""
    x = inputs(model)
    model.tape.module = "model.language_model"
    _positions = model.tape.new((model.seq,), "int64", "position_ids")
    masks = masks_of(model, style, x.dtype)
    tables = tables_of_grids(model, x.dtype, by_sections=by_sections)
    return run_layers(model, style, x, lambda _window: tables, masks=masks)


def tables_of_grids(model: Model, dtype: str, *, by_sections: bool) -> tuple[Tensor, Tensor]:
    """`Qwen2_5_VLRotaryEmbedding.forward`: cosines and sines of each sequence."""
    a = next(block.attentions[0] for block in model.arch.blocks if block.attentions)
    f, width = model.tape, a.rotary_dim or a.head_dim
    grids, dims = (GRIDS, "b", model.seq, width // 2), ("b", model.seq, width)
    model.units.enter(ROTARY)
    f.module = "model.language_model.rotary_emb"
    positions = f.new((*grids[:-1], 1), "fp32", "to")
    _angles = f.new(grids, "fp32", "mul")
    del positions

    def joined() -> Tensor:
        _half = f.new((*dims[:-1], width // 2), "fp32", "cat") if by_sections else None
        return f.new(dims, "fp32", "cat")

    cos = f.new(grids, "fp32", "cos")
    cos = f.new(grids, "fp32", "cos")  # scaled
    sin = f.new(grids, "fp32", "sin")
    sin = f.new(grids, "fp32", "sin")
    sin = joined()
    cos = joined()
    return (cos, sin) if dtype == "fp32" else (f.new(dims, dtype, "cos"), f.new(dims, dtype, "sin"))


LANGUAGE = Style(stack="model.language_model.layers.{}", final_norm="model.language_model.norm")
qwen2_vl = partial(with_grids, style=LANGUAGE, by_sections=True)
qwen3_vl = partial(with_grids, style=LANGUAGE, by_sections=False)
qwen3_vl_moe = partial(
    with_grids,
    style=LANGUAGE._replace(mixture=partial(routed_block, route=qwen_route, router="mlp.gate", name="mlp.experts")),
    by_sections=False,
)
mistral3 = partial(decoder, style=LANGUAGE)
gemma3 = partial(decoder, style=gemma.GEMMA3._replace(both_masks=False, stack=LANGUAGE.stack, final_norm=LANGUAGE.final_norm))
idefics3 = partial(decoder, style=Style(stack="model.text_model.layers.{}", final_norm="model.text_model.norm"))
