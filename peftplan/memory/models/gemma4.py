"""Gemma 4, its text part: heads normed and rotated before they are moved, borrowed keys and values, inputs of each layer's own.

L layers, p the width of a layer's own input. Sources: transformers, models/gemma4/modeling_gemma4.py and
models/gemma4_unified/modeling_gemma4_unified.py (`Gemma4TextModel.forward` and what it calls, `Gemma4Model.forward`).
"""

from __future__ import annotations

from functools import partial

from peftplan.arch.blocks import Attention
from peftplan.depth.stack import run_stack
from peftplan.memory.activations import activation
from peftplan.memory.attention import attend, repeats_heads
from peftplan.memory.calls import inputs, into_cache
from peftplan.memory.experts import divided_in_place, row_sum, taken, top_k
from peftplan.memory.masks import causal_mask, seen_in_blocks
from peftplan.memory.model import Model
from peftplan.memory.models.decoder import rotary_tables
from peftplan.memory.models.mlps import gated_mlp
from peftplan.memory.models.moe import run_experts
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import rms_by_power
from peftplan.tape import ops
from peftplan.tape.rotary import rotary
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Operand, Tensor

Stored = dict[bool, tuple[Tensor, Tensor]]
"""Whether attention slides → keys and values of the last layer of that kind that has its own."""


def gemma4(model: Model, style: Style) -> Tensor:
    """`Gemma4TextModel.forward`."""
    x = inputs(model)
    return layers(model, style, x, own_inputs(model, style, x))


def gemma4_of_text(model: Model, style: Style) -> Tensor:
    """`Gemma4Model.forward` of text alone: it looks for the tokens of pictures and sound, and finds none."""
    f = model.tape
    f.module = "model"
    _masks = [f.new(("b", "s"), "bool", name) for name in ("image_mask", "video_mask", "audio_mask", "multimodal_mask")]
    _ids = f.new(("b", "s"), "int64", "llm_input_ids")
    x = inputs(model)
    _embeds = embedded = None
    if _has_own_inputs(model, style):
        if f.modules is not None:  # `pad_embedding`
            f.modules.read("model", None, model.part(str(model.arch.input_embedding)).own_weight)
        _embeds = f.new(x.dims, x.dtype, "llm_inputs_embeds")
        embedded = embedded_apart(model, style)
    return layers(model, style, x, own_inputs(model, style, x, embedded))


def _stem(style: Style) -> str:
    return style.stack.removesuffix(".layers.{}")


def _has_own_inputs(model: Model, style: Style) -> bool:
    return model.has(f"{_stem(style)}.embed_tokens_per_layer")


def embedded_apart(model: Model, style: Style) -> Tensor:
    """`get_per_layer_inputs`: rows of a table as wide as all layers' inputs."""
    return model.embedding(f"{_stem(style)}.embed_tokens_per_layer", ("b", "s"))


def own_inputs(model: Model, style: Style, x: Tensor, embedded: Tensor | None = None) -> Tensor | None:
    """`project_per_layer_inputs`: what each layer reads beside the hidden states, (b, s, L, p); None where there is none."""
    if not _has_own_inputs(model, style):
        return None
    f, stem = model.tape, _stem(style)
    embedded = embedded_apart(model, style) if embedded is None else embedded
    width = model.part(f"{stem}.per_layer_projection_norm").own_weight.dims[0]
    assert isinstance(width, int)
    projected = model.linear(f"{stem}.per_layer_model_projection", x)
    f.module = stem
    projected = ops.scale(f, projected)
    layers = sum(len(block.layers) for block in model.arch.blocks)
    dims = (*x.dims[:2], layers, width)
    projected = style.norm(model, f"{stem}.per_layer_projection_norm", projected.view(dims), None)
    f.module = stem
    return ops.scale(f, ops.add(f, projected, embedded.view(dims)))


def layers(model: Model, style: Style, x: Tensor, own: Tensor | None) -> Tensor:
    """What `Gemma4TextModel.forward` does with the embeddings, and what it gives each layer of its own."""
    f = model.tape
    f.module = _stem(style)
    _positions = f.new((model.seq,), "int64", "position_ids")
    attentions = {block.attentions[0].window: block.attentions[0] for block in model.arch.blocks}
    masks = {window: _mask(model, style, x.dtype, a) for window, a in sorted(attentions.items(), key=lambda pair: pair[0] or 0)}
    tables = {window: rotary_tables(model, x.dtype, a) for window, a in attentions.items()}
    blocks = {layer: block for block in model.arch.blocks for layer in block.layers}
    stored: Stored = {}  # which the calls of checkpointed layers hold until backward has run them all again

    def layer(number: int, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, own_input: Tensor | None) -> Tensor:
        return decoder_layer(Call(model, style, blocks[number], number, (cos, sin), mask), x, own_input, stored)

    def beside(number: int) -> tuple[Tensor | None, ...]:
        window = blocks[number].attentions[0].window
        own_input = None if own is None else sliced(f, own, (*own.dims[:2], own.dims[3]))
        return masks[window], *tables[window], own_input

    states = [x]
    x = run_stack(
        model,
        _kinds(model),
        states,
        layer,
        name="layers",
        checkpointed=model.running.checkpointing,
        own=beside,
    )
    return style.norm(model, f"{_stem(style)}.norm", x, None)


def _kinds(model: Model) -> tuple[int, ...]:
    """Layers of one block are alike; where some borrow of others, each is run."""
    kinds = {layer: kind for kind, block in enumerate(model.arch.blocks) for layer in block.layers}
    borrow = any(block.attentions[0].borrows for block in model.arch.blocks)
    return tuple(layer if borrow else kinds[layer] for layer in sorted(kinds))


def _mask(model: Model, style: Style, dtype: str, a: Attention) -> Tensor | None:
    if a.sees_blocks and style is BESIDE_TOWERS and model.running.attention in ("sdpa", "eager"):
        return seen_in_blocks(model, dtype, windowed=a.window is not None)
    return causal_mask(model, dtype, a.window)


def decoder_layer(c: Call, x: Tensor, own_input: Tensor | None, stored: Stored) -> Tensor:
    """`Gemma4TextDecoderLayer.forward`."""
    residual = x
    x = c.norm("input_layernorm", x)
    x = c.module("self_attn", x, partial(attention, stored=stored), by_name=True)
    x = c.norm("post_attention_layernorm", x)
    x = ops.add(c.at(), residual, x)
    residual = x
    x = c.norm("pre_feedforward_layernorm", x)
    x = c.module("mlp", x, gated_mlp)
    if c.block.mlp.variant == "moe":
        x = beside_experts(c, residual, x)
    x = c.norm("post_feedforward_layernorm", x)
    x = ops.add(c.at(), residual, x)
    if own_input is not None:
        residual = x
        x = c.linear("per_layer_input_gate", x)
        x = activation(c.at("act_fn"), x, c.block.mlp.activation)
        x = ops.mul(c.at(), x, own_input)
        x = c.linear("per_layer_projection", x)
        x = c.norm("post_per_layer_input_norm", x)
        x = ops.add(c.at(), residual, x)
    return ops.scale_(c.at(), x) if c.style.mixture is None else ops.scale(c.at(), x)


def attention(c: Call, x: Tensor, stored: Stored) -> Tensor:
    """`Gemma4TextAttention.forward`."""
    a, dropout = c.block.attentions[0], c.model.arch.dropout.attention
    sliding = a.window is not None
    q = _turned(c, c.norm("self_attn.q_norm", _heads(c, "q", x, a.num_attention_heads)))
    if a.borrows:
        k, v = stored[sliding]
    else:
        k = _heads(c, "k", x, a.num_key_value_heads)
        v = k if a.keys_as_values else _heads(c, "v", x, a.num_key_value_heads)
        k = _turned(c, c.norm("self_attn.k_norm", k))
        v = _moved(c.norm("self_attn.v_norm", v))
        k, v = into_cache(c.model, k, v)
    if a.stores:
        stored[sliding] = k, v
    c.at("self_attn")
    x = attend(c.model, a, q, k, v, c.mask, dropout=dropout, rotated=True, moved=True)
    return c.linear("self_attn.o_proj", x)


def _heads(c: Call, side: str, x: Tensor, heads: int) -> Tensor:
    """A projection viewed as heads, behind each token; gradients of values that come head by head are copied."""
    a, f = c.block.attentions[0], c.tape
    x = c.linear(f"self_attn.{side}_proj", x)
    dims = (*x.dims[:2], heads, a.head_dim)
    by_head = c.model.joins or c.model.running.attention == "eager" or repeats_heads(c.model, a, c.mask)
    of_values = "k" if a.keys_as_values else "v"
    return ops.heads(f, x, dims, clones=side == of_values and by_head and heads > 1)


def _turned(c: Call, x: Tensor) -> Tensor:
    return _moved(rotary(c.at("self_attn"), x, *c.tables))


def _moved(x: Tensor) -> Tensor:
    """`transpose(1, 2)`."""
    b, s, heads, d = x.dims
    return x.view((b, heads, s, d))


def beside_experts(c: Call, residual: Tensor, x: Tensor) -> Tensor:
    """The MLP's output, normed, and that of the experts, which read what the MLP read before its norm."""
    first = c.norm("post_feedforward_layernorm_1", x)
    second = (c.style.mixture or _experts)(c, residual)
    second = c.norm("post_feedforward_layernorm_2", second)
    c.model.layer_locals += [first, second]  # names of the layer's forward
    return ops.add(c.at(), first, second)


def _experts(c: Call, residual: Tensor) -> Tensor:
    flat = ops.reshaped(c.at(), residual)  # whose gradients are added up apart
    _probabilities, weights, indices = route(c, flat)
    second = c.norm("pre_feedforward_layernorm_2", flat)
    return run_experts(c, second, indices, weights, "experts")


def route(c: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Gemma4TextRouter.forward`: the best of a softmax over all experts, made to sum to one, times a factor of each expert."""
    params = c.model.part(f"{c.style.stack}.router", c.number).params
    x = c.norm("router.norm", x)
    f = c.at("router")
    x = ops.scale(f, ops.mul(f, x, params["scale"]))
    scores = c.linear("router.proj", x)
    f = c.at("router")
    probabilities = ops.softmax(f, scores, "fp32")
    weights, indices = top_k(f, probabilities, c.block.mlp.num_experts_per_tok)
    weights = divided_in_place(f, weights, row_sum(f, weights))
    return probabilities, ops.mul(f, weights, _factors(f, params["per_expert_scale"], indices)), indices


def _factors(f: Tape, of_experts: Operand, indices: Tensor) -> Tensor:
    return taken(f, of_experts, indices, indices.dims)


TEXT = Style(norm=rms_by_power)
gemma4_text = partial(gemma4, style=TEXT)
BESIDE_TOWERS = TEXT._replace(stack="model.language_model.layers.{}")
gemma4_with_towers = partial(gemma4_of_text, style=BESIDE_TOWERS)
