"""Queries, keys and values of a rotary decoder: their projections, norms and heads."""

from __future__ import annotations

from peftplan.arch.blocks import Attention
from peftplan.memory.models.style import Call
from peftplan.tape import ops
from peftplan.tape.shaping import cat, sliced, split
from peftplan.tape.tensors import Tensor


def projected(c: Call, a: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from a projection each; q and k viewed by heads and normed where the model does so: at once, or behind all."""
    side = _normed if a.qk_norm and c.style.qk_norm != "rotated" and not norms_in_rotation(c, a) else _by_head
    kernel = c.model.running.kernels.lora_qkv
    if kernel is not None and (ps := c.adapted(kernel, [f"self_attn.{name}_proj" for name in "qkv"])):
        from peftplan.memory import lora_kernels

        q, k, v = lora_kernels.qkv(c.tape, kernel, x, ps, c.lora_dropout)
        q = side(c, a, 0, q)
        k = side(c, a, 1, k)
        return q, k, v.view(_head_dims(a, 1, v))
    at_once = not (c.style.views_last or (a.qk_norm and c.style.norms_last))
    first = side if at_once else _as_projected
    if c.style.views_last and c.style.qk_norm == "flat" and side is _normed:
        first, side = _normed_flat, _by_head
    q = first(c, a, 0, c.linear("self_attn.q_proj", x))
    k = first(c, a, 1, c.linear("self_attn.k_proj", x))
    v = c.linear("self_attn.v_proj", x)
    if not at_once:
        q = side(c, a, 0, q)
        k = side(c, a, 1, k)
    return q, k, v.view(_head_dims(a, 1, v))


def norms_in_rotation(c: Call, a: Attention) -> bool:
    """Whether one kernel norms the heads of queries and keys and turns them."""
    kernel = c.model.running.kernels.rope
    return kernel is not None and kernel.norms and a.qk_norm and c.style.qk_norm == "head"


def _head_dims(a: Attention, side: int, x: Tensor) -> tuple[str | int, ...]:
    b, s, _ = x.dims
    return (b, (a.num_attention_heads, a.num_key_value_heads)[side], s, a.head_dim)


def _by_head(c: Call, a: Attention, side: int, x: Tensor) -> Tensor:
    return ops.heads(c.tape, x, _head_dims(a, side, x), clones=_clones(c, a), at_once=not c.style.views_last)


def _as_projected(c: Call, a: Attention, side: int, x: Tensor) -> Tensor:
    return x


def _normed_flat(c: Call, a: Attention, side: int, x: Tensor) -> Tensor:
    return c.norm(f"self_attn.{c.style.qk_names[side]}", x)


def _clones(c: Call, a: Attention) -> bool:
    """Whether the gradient of a projection comes back head by head: from rotary embedding as transformers writes it."""
    kernels = c.model.running.kernels
    separate = kernels.padding_free is not None and not norms_in_rotation(c, a)
    return a.positions == "rotary" and (kernels.rope is None or separate)


def _normed(c: Call, a: Attention, side: int, x: Tensor) -> Tensor:
    name = f"self_attn.{c.style.qk_names[side]}"
    dims = _head_dims(a, side, x)
    if c.style.qk_norm == "flat":
        return _by_head(c, a, side, _normed_flat(c, a, side, x))
    if c.style.qk_norm == "moved":
        return c.norm(name, _by_head(c, a, side, x))
    if c.style.qk_norm == "each":
        return _normed_each(c, name, _by_head(c, a, side, x))
    b, heads, s, d = dims
    x = ops.heads(c.tape, x, (b, s, heads, d), clones=_clones(c, a) and heads != 1)
    return c.norm(name, x).view(dims)


def _normed_each(c: Call, name: str, x: Tensor) -> Tensor:
    """`StableLmLayerNormPerHead`: split by heads, normed head by head, and joined."""
    b, heads, s, d = x.dims
    assert isinstance(heads, int)
    parts = split(c.at(name), x, [(b, 1, s, d)] * heads)
    normed = [c.norm(f"{name}.norms.{number}", part) for number, part in enumerate(parts)]
    return cat(c.at(name), normed, x.dims)


def parts_of(c: Call, a: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as slices of one projection, which the forward keeps until it returns (`Phi3Attention.forward`)."""
    f = c.tape
    b, s, _ = qkv.dims
    q, k, v = (
        sliced(f, qkv, (b, s, heads * a.head_dim))
        for heads in (a.num_attention_heads, a.num_key_value_heads, a.num_key_value_heads)
    )
    q, k, v = (ops.reshaped(f, part) for part in (q, k, v))  # once all are there, so that in backward they come before all slices
    return _by_head(c, a, 0, q), _by_head(c, a, 1, k), v.view(_head_dims(a, 1, v))
