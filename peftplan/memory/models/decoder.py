"""Decoders of the Llama shape: embedding, layers of attention and MLP with norms around them, final norm.

What a family does differently is a `Style`. Source: transformers, models/llama/modeling_llama.py and its relatives, whose
order of operations and whose names of locals these functions follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from peftplan.arch.blocks import Attention, Block
from peftplan.depth.sections import seconds_apart
from peftplan.depth.stack import run_stack
from peftplan.errors import NoEngineError
from peftplan.job.kernel_facts import Rotary
from peftplan.ledger import Dim
from peftplan.memory import fused_layers
from peftplan.memory.calls import inputs
from peftplan.memory.kinds import kinds_of
from peftplan.memory.masks import causal_mask
from peftplan.memory.model import Model
from peftplan.memory.models.mlps import mlp
from peftplan.memory.models.projections import norms_in_rotation, parts_of, projected
from peftplan.memory.models.style import Call, Style
from peftplan.memory.units import NORM, ROTARY
from peftplan.tape import ops
from peftplan.tape.shaping import cat, sliced
from peftplan.tape.tensors import Outputs, Tensor

OF_OLDER_CARDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose steps by Unsloth were rehearsed on an emulated T4."""


def decoder(model: Model, style: Style) -> Tensor:
    """`…Model.forward` of a rotary decoder."""
    f = model.tape
    replaced = model.running.kernels.decoder
    if replaced and not model.running.flash and not on_older_card(model):
        raise NoEngineError("unsloth's attention on a card before compute capability 8.0 (no formula yet)")
    embedded = x = inputs(model)
    f.module = "model"
    behind_masks = style.mixture is not None  # where GraniteMoe multiplies, and Granite before
    if style.multiplied and not behind_masks:
        embedded = x = ops.scale(f, x)
    of_batch = model.running.ring is not None or model.running.ulysses > 1
    _positions = None if replaced or of_batch else f.new((model.seq,), "int64", "position_ids")
    if model.running.kernels.padding_free is not None:
        model.batch["positions"] = f.new(("b", model.seq), "int32", "to")
    windows = {block.attentions[0].window for block in model.arch.blocks} if style.tables_by_window else {None}
    masks = {} if replaced else masks_of(model, style, x.dtype)
    f.module = "model"
    if style.multiplied and behind_masks:
        embedded = x = ops.scale(f, x)
    states = [drop_embedding(model, style, x)]  # no name holds it while the layers run
    del x
    if model.running.recorded is not None:
        from peftplan.memory.models.recorded import recorded_layer

        style = style._replace(layer=recorded_layer)
    dtype = "fp32" if style.wide_tables else states[0].dtype
    turned = not replaced and any(a.positions == "rotary" for block in model.arch.blocks for a in block.attentions)
    tables = {window: rotary_tables(model, dtype) if turned else () for window in windows}
    x = run_layers(model, style, states, lambda window: tables[window if style.tables_by_window else None], masks=masks)
    del embedded
    return x


def drop_embedding(model: Model, style: Style, x: Tensor) -> Tensor:
    """The dropout of embeddings, which may be a module."""
    f, probability, (name, *_) = model.tape, model.arch.dropout.embedding, style.dropouts
    return ops.dropout(f, x, probability) if name is None else f.call(name, None, (), x, lambda x: ops.dropout(f, x, probability))


def on_older_card(model: Model) -> bool:
    """Whether a job of Unsloth's on a card before compute capability 8.0 is one that was rehearsed there."""
    running = model.running
    supervised = running.loss == "unsloth" and running.kernels.padding_free is not None and not running.of_completions
    adapts = running.peft_type == "LORA" and not getattr(running.config, "modules_to_save", None)
    return (
        supervised and adapts and model.quant is not None and running.dtype == "fp16" and model.arch.model_type in OF_OLDER_CARDS
    )


def masks_of(model: Model, style: Style, dtype: str) -> dict[int | None, Tensor | None]:
    """Window → mask, of each kind of attention that the model has."""
    windows = {a.window for block in model.arch.blocks for a in block.attentions}
    if style.both_masks and len(windows) == 1:
        windows |= {0} if None in windows else {None}
    return {window: causal_mask(model, dtype, window) for window in sorted(windows, key=lambda window: window or 0)}


def run_layers(
    model: Model,
    style: Style,
    states: Tensor | list[Tensor],
    tables: Callable[[int | None], tuple[Tensor, ...]],
    *,
    dtype: str | None = None,
    masks: Mapping[int | None, Tensor | None] | None = None,
) -> Tensor:
    """The masks, all layers, and the final norm; `tables` finds those of a layer by its window.

    `states`: the input of the first layer; a list is emptied, so that only the layers hold it. `dtype` is that of the embeddings,
    and so of masks, where it is not that of the input; `masks`: those that are there already.
    """
    blocks = {layer: block for block in model.arch.blocks for layer in block.layers}
    numbers = sorted(blocks)  # of a model that skips layers without images: those that run
    states = states if isinstance(states, list) else [states]
    masks_by_window = masks_of(model, style, dtype or states[0].dtype) if masks is None else masks
    outputs: list[Tensor] = []
    layer_inputs: list[Tensor] = []
    returned = model.running.returns_hidden_states
    holds = model.running.holds_hidden_states or returned

    def layer(place: int, x: Tensor, mask: Tensor | None, *own_tables: Tensor) -> Outputs:
        number = numbers[place]
        block = blocks[number]
        if holds:
            layer_inputs.append(x.detach())
        call = Call(model, style, block, number, own_tables or tables(window_of(block)), mask)
        out = (style.layer or serial)(call, x)
        return (out, *model.layer_locals[-1:]) if style.hands_out_weights else out

    def its_mask(place: int) -> tuple[Tensor | None, ...]:
        window = window_of(blocks[numbers[place]])
        return model.units.beside(place, masks_by_window.get(window), tables(window))

    kinds = kinds_of(model)
    if style.hands_out_weights and not model.past:  # a prefix trains before every layer
        kinds = seconds_apart(kinds)
    recorded_completions = model.running.of_completions and model.running.recorded is not None
    if holds or recorded_completions:  # the next layer decides too how long a layer's output lives: each is run
        kinds = tuple(range(len(kinds)))
    x = run_stack(
        model,
        kinds,
        states,
        layer,
        name="layers",
        checkpointed=model.running.checkpointing and not style.checkpoints_parts,
        own=None if style.mask_by_position else its_mask,
        every=its_mask(0) if style.mask_by_position else (),
        outputs=outputs if style.hands_out_weights else None,
        holds=holds,
    )
    holds = False  # `layer` runs again in backward, when nothing more is held
    if style.final_norm is not None and model.ends:
        x = style.norm(model, style.final_norm, model.units.enter_with(NORM, x), None)
    outputs.clear()
    if returned:
        model.kept += [*layer_inputs, x.detach()]
    layer_inputs.clear()  # which frames refer to
    return x


def window_of(block: Block) -> int | None:
    """The window of a layer's attention; None without one, or without attention."""
    return block.attentions[0].window if block.attentions else None


def rotary_tables(model: Model, dtype: str, a: Attention | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines, as wide as the part of a head that is rotated, of this attention or the first layer's."""
    a = a or next(a for block in model.arch.blocks for a in block.attentions)
    width = a.head_dim if a.rotary_dim is None else a.rotary_dim
    running = model.running
    shares = running.ring is not None or running.ulysses > 1 or running.kernels.attention is not None
    rows: Dim = "b" if shares else 1  # whose positions come with the batch
    f, dims = model.tape, (rows, model.seq, width)
    model.units.enter(ROTARY)
    f.module = "model.rotary_emb"
    positions = f.new((rows, model.seq, 1), "fp32", "to")
    half = f.new((*dims[:-1], width // 2), "fp32", "mul")
    del positions
    model.angles_made()
    angles = f.new(dims, "fp32", "cat")
    cos = f.new(dims, "fp32", "cos")
    cos = f.new(dims, "fp32", "cos")  # scaled
    sin = f.new(dims, "fp32", "sin")
    sin = f.new(dims, "fp32", "sin")
    if dtype != "fp32":
        cos, sin = f.new(dims, dtype, "cos"), f.new(dims, dtype, "sin")
    del half, angles
    return cos, sin


def serial(c: Call, x: Tensor) -> Tensor:
    """`LlamaDecoderLayer.forward`, with norms where the style has them."""
    before, after, before_mlp, after_mlp = (partial(c.norm, name) for name in c.style.norms)
    attended = partial(c.module, "self_attn", function=c.style.attention or attention, by_name=True)
    residual = x
    x = c.part(before, x)
    x = c.behind("attention", c.part(attended, x, by_name=True))
    x = c.part(after, x)
    x = added(c, residual, x, c.style.dropouts[1])
    residual = x
    x = c.part(before_mlp, x)
    x = c.behind("output", c.part(partial(c.module, "mlp", function=mlp), x))
    x = c.part(after_mlp, x)
    return added(c, residual, x, c.style.dropouts[2])


def added(c: Call, residual: Tensor, x: Tensor, dropout: str | None = None) -> Tensor:
    """What a sublayer adds to the residual, dropped out, multiplied. `dropout`: the name of a module that drops out."""
    f = c.at()
    x = x if c.style.drops_inside else c.dropout(x, dropout)
    if c.style.multiplied:
        x = ops.scale(f, x)
    return ops.add(f, residual, x)


def attention(c: Call, x: Tensor) -> Tensor:
    """`LlamaAttention.forward`."""
    a, kernels = c.block.attentions[0], c.model.running.kernels
    _qkv = c.linear("self_attn.qkv_proj", x) if a.fused_qkv else None
    q, k, v = projected(c, a, x) if _qkv is None else parts_of(c, a, _qkv)
    f = c.at("self_attn")
    _projected = (q, k, v) if c.style.holds_projected else None
    rotated = a.positions == "rotary"
    if rotated and norms_in_rotation(c, a) and kernels.rope is not None and kernels.rope.partial_rows:
        q, k = (_normed_and_turned(c, kernels.rope, *side) for side in zip((q, k), c.style.qk_names, strict=True))
    elif rotated and norms_in_rotation(c, a):
        q, k = fused_layers.norm_and_rotate(f, q, k)
    elif rotated and kernels.rope is not None:
        q, k = fused_layers.rotate(f, kernels.rope, q, k, in_place=kernels.padding_free is None)
    elif rotated:
        q, k, *_kept_alive = c.style.rotate(f, q, k, *c.tables)
    if a.scaled_queries:
        q = scaled_by_position(c, q)
    if a.qk_norm and c.style.qk_norm == "rotated":
        q = c.norm(f"self_attn.{c.style.qk_names[0]}", q)
        k = c.norm(f"self_attn.{c.style.qk_names[1]}", k)
    f = c.at("self_attn")
    k, v = c.cached(k, v, rotated=rotated)
    by_document = kernels.padding_free is not None and c.model.running.flash
    if by_document:
        v = ops.heads(f, v, v.dims, clones=True)
        q, k, v = (sliced(f, side, side.dims) for side in (q, k, v))
    x = c.attend(q, k, v, rotated=rotated)
    if by_document:
        x = cat(f, [x], x.dims)  # of the documents' results
    if kernels.lora_o is not None and (ps := c.adapted(kernels.lora_o, [f"self_attn.{c.style.output}"])):
        from peftplan.memory import lora_kernels

        x = lora_kernels.output(f, kernels.lora_o, x, ps[0], c.lora_dropout)
    else:
        x = c.linear(f"self_attn.{c.style.output}", x)
    if c.style.drops_inside:
        c.at("self_attn")
        x = c.dropout(x)
    return x


def _normed_and_turned(c: Call, kernel: Rotary, x: Tensor, name: str) -> Tensor:
    weight = c.model.part(f"{c.style.stack}.self_attn.{name}", c.number).weight
    assert weight is not None
    return fused_layers.norm_and_turn(c.at("self_attn"), kernel, x, weight)


def scaled_by_position(c: Call, q: Tensor) -> Tensor:
    """Llama 4's `get_llama_4_attn_scale`, of every layer: a number for each position, in the queries' dtype."""
    f, factor = c.tape, c.tape.new((1, 1, c.model.seq, 1), "fp32", "div")
    for op in ("floor", "add", "log", "mul", "add"):
        factor = f.new(factor.dims, "fp32", op)
    return ops.mul(f, q, f.to(factor, q.dtype))
