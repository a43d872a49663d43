"""Families of the Llama shape, by what they do differently.

Sources: transformers, models/{llama,mistral,ministral3,qwen2,qwen3,granite,olmo,olmo2,olmo3,phi3,glm,glm4,smollm3,starcoder2,
seed_oss,hunyuan_v1_dense,exaone4,nemotron,arcee,apertus,ernie4_5}/modeling_*.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.memory.models.decoder import decoder
from peftplan.memory.models.style import Style
from peftplan.memory.norms import bare_layer_norm, layer_norm, layer_norm_plus_one, rms_cast_last
from peftplan.tape.rotary import partly_rotary, partly_rotary_in_turn, rotary
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


def interleaved(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """GLM-4: each layer makes interleaved copies of both tables."""
    cos = f.new(cos.dims, cos.dtype, "repeat_interleave")
    sin = f.new(sin.dims, sin.dtype, "repeat_interleave")
    return partly_rotary(f, q, k, cos, sin)


def cast_back(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """OLMo: the rotated heads in the dtype that they came in."""
    rotated = rotary(f, q, cos, sin), rotary(f, k, cos, sin)
    return f.to(rotated[0], q.dtype), f.to(rotated[1], k.dtype)


def in_turn_in_fp32(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """ERNIE 4.5: as GLM-4 with tables in fp32, of copies in fp32; cast back once both are there."""
    cos = f.new(cos.dims, cos.dtype, "repeat_interleave")
    sin = f.new(sin.dims, sin.dtype, "repeat_interleave")
    rotated = rotary(f, q, cos, sin, widens=True), rotary(f, k, cos, sin, widens=True)
    return f.to(rotated[0], q.dtype), f.to(rotated[1], k.dtype)


llama = partial(decoder, style=Style())
granite = partial(decoder, style=Style(multiplied=True))
olmo = partial(decoder, style=Style(norm=bare_layer_norm, rotate=cast_back, wide_tables=True, views_last=True))
OLMO2 = Style(
    norm=rms_cast_last,
    norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    rotate=cast_back,
    wide_tables=True,
    qk_norm="flat",
    views_last=True,
)
olmo2 = partial(decoder, style=OLMO2)
olmo3 = partial(decoder, style=OLMO2._replace(tables_by_window=True, both_masks=True))
phi3 = partial(
    decoder,
    style=Style(rotate=partly_rotary_in_turn, by_head=True, dropouts=(None, "resid_attn_dropout", "resid_mlp_dropout")),
)
glm = partial(decoder, style=Style(rotate=interleaved, by_head=True))
glm4 = partial(
    decoder,
    style=Style(
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        rotate=interleaved,
        by_head=True,
    ),
)
starcoder2 = partial(decoder, style=Style(norm=layer_norm, drops_inside=True))
seed_oss = partial(decoder, style=Style(drops_inside=True))
hunyuan = partial(decoder, style=Style(qk_norm="rotated", qk_names=("query_layernorm", "key_layernorm")))
exaone4 = partial(
    decoder,
    style=Style(norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"), qk_norm="moved", norms_last=True),
)
nemotron = partial(
    decoder,
    style=Style(norm=layer_norm_plus_one, rotate=partly_rotary, by_head=True, plain=("mlp.up_proj", "mlp.down_proj")),
)
arcee = partial(decoder, style=Style(plain=("mlp.up_proj", "mlp.down_proj")))
apertus = partial(
    decoder,
    style=Style(
        norms=("attention_layernorm", None, "feedforward_layernorm", None),
        qk_norm="moved",
        plain=("mlp.up_proj", "mlp.down_proj"),
    ),
)
ernie4_5 = partial(decoder, style=Style(rotate=in_turn_in_fp32, wide_tables=True))
