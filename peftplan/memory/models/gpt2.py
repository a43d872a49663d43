"""GPT-2 and StarCoder 1: learned positions, one projection for q, k and v.

Sources: transformers, models/{gpt2,gpt_bigcode}/modeling_*.py.
"""

from __future__ import annotations

from functools import partial

from peftplan.arch.blocks import Attention
from peftplan.memory.calls import inputs
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import masks_of, run_layers
from peftplan.memory.models.mlps import mlp
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import layer_norm
from peftplan.tape import ops
from peftplan.tape.shaping import split
from peftplan.tape.tensors import Tensor


def model_forward(model: Model, style: Style) -> Tensor:
    """`GPT2Model.forward`: token and position embeddings live until it returns."""
    f = model.tape
    tokens = inputs(model)
    f.module = "transformer"
    _positions = f.new((model.seq,), "int64", "position_ids")
    masks = masks_of(model, style, tokens.dtype) if model.arch.model_type == "gpt_bigcode" else None
    positions = model.embedding("transformer.wpe", (1, model.seq), _positions)
    f.module = "transformer"
    states = [ops.add(f, tokens, positions)]  # no name holds it while layers run
    masks = masks or masks_of(model, style, tokens.dtype)
    drop = model.arch.dropout.embedding
    states = [f.call("transformer.drop", None, (), states.pop(), lambda x: ops.dropout(f, x, drop))]
    keeps = model.running.keeps_keys

    def layer(c: Call, x: Tensor) -> Tensor:
        return block(c, x, model.kept if keeps else None)

    x = run_layers(model, style._replace(layer=layer), states, lambda window: (), masks=masks)
    keeps = False  # `layer` runs again in backward, when nothing more is held
    del tokens, positions
    return x


def block(c: Call, x: Tensor, keys: list[object] | None = None) -> Tensor:
    """`GPT2Block.forward`. `keys`: what the outputs hold, to which a layer adds its keys and values under a checkpoint."""
    residual = x
    x = c.norm("ln_1", x)
    attended = c.behind("attention", c.module("attn", x, partial(attention, keys=keys)))
    x = ops.add(c.at(), attended, residual)
    normed = c.norm("ln_2", x)
    out = c.behind("output", c.module("mlp", normed, feed_forward))
    return ops.add(c.at(), x, out)


def feed_forward(c: Call, x: Tensor) -> Tensor:
    """`GPT2MLP.forward`."""
    inner = [mlp(c, x)]  # no name holds it once it went through dropout
    c.at("mlp")
    return c.module("mlp.dropout", inner.pop(), Call.dropout)


def attention(c: Call, x: Tensor, keys: list[object] | None) -> Tensor:
    """`GPT2Attention.forward`, `GPTBigCodeAttention.forward`."""
    a = c.block.attentions[0]
    q, k, v = (by_head if _interleaved(c, a) else side_by_side)(c, a, c.linear("attn.c_attn", x))
    if keys is not None:
        keys += [k.detach(), v.detach()]  # views of what c_attn returned
    k, v = c.cached(k, v, rotated=False)
    x = c.attend(q, k, v, rotated=False)
    x = c.linear("attn.c_proj", x)
    c.at("attn")
    return c.module("attn.resid_dropout", x, Call.dropout)


def _interleaved(c: Call, a: Attention) -> bool:
    """StarCoder 1 without multi-query keeps each head's q, k and v together."""
    return c.model.arch.model_type == "gpt_bigcode" and a.num_key_value_heads > 1


def side_by_side(c: Call, a: Attention, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of all heads, one after the other."""
    b, s, _ = x.dims
    heads = (a.num_attention_heads, a.num_key_value_heads, a.num_key_value_heads)
    parts = split(c.at("attn"), x, [(b, s, count * a.head_dim) for count in heads])
    return tuple(part.view((b, count, s, a.head_dim)) for part, count in zip(parts, heads, strict=True))


def by_head(c: Call, a: Attention, x: Tensor) -> tuple[Tensor, ...]:
    """Heads first, then q, k and v of each."""
    b, s, _ = x.dims
    f = c.at("attn")
    x = ops.heads(f, x, (b, a.num_attention_heads, s, 3 * a.head_dim), clones=True)
    return split(f, x, [(b, a.num_attention_heads, s, a.head_dim)] * 3)


STYLE = Style(norm=layer_norm, layer=block, stack="transformer.h.{}", final_norm="transformer.ln_f")

gpt2 = partial(model_forward, style=STYLE._replace(narrow_eager=True, mask_by_position=True))
gpt_bigcode = partial(model_forward, style=STYLE)
