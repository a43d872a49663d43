"""ModernBERT (transformers, models/modernbert/modeling_modernbert.py) through sdpa or eager attention."""

from __future__ import annotations

from peftplan.arch.blocks import Block
from peftplan.depth.stack import run_stack
from peftplan.memory.activations import activation
from peftplan.memory.attention import attend
from peftplan.memory.calls import behind, inputs
from peftplan.memory.kinds import kinds_of
from peftplan.memory.model import Model
from peftplan.memory.models.bert import bidirectional_mask
from peftplan.memory.models.decoder import rotary_tables
from peftplan.memory.models.recorded import recorded_layer
from peftplan.memory.models.style import Call, Style
from peftplan.memory.norms import layer_norm
from peftplan.tape import ops
from peftplan.tape.rotary import rotary_in_fp32
from peftplan.tape.shaping import split
from peftplan.tape.tensors import Tensor

Turns = tuple[Tensor, Tensor]
STYLE = Style(norm=layer_norm)
"""Of layers with a record."""


def modernbert(model: Model) -> Tensor:
    """`ModernBertModel.forward`."""
    f = model.tape
    model.can_cache = False
    f.module = "model"
    _positions = f.new((1, model.seq), "int64", "position_ids")
    x = embeddings(model)
    _embedded = x  # in the arguments of masks
    blocks = {layer: block for block in model.arch.blocks for layer in block.layers}
    windows = {block.attentions[0].window for block in model.arch.blocks}
    masks = {window: bidirectional_mask(model, x.dtype, window) for window in (None, *sorted(filter(None, windows)))}
    if model.running.recorded is not None:  # rehearsed with a mask of all tokens, which those of windows are joined with
        masks = {window: f.new(("b", 1, model.seq, model.seq), "bool", "bitwise_and") for window in masks if masks[window]}
    turns = {window: rotary_tables(model, x.dtype) for window in windows}

    def layer(number: int, x: Tensor) -> Tensor:
        block = blocks[number]
        if model.running.recorded is not None:
            return recorded_layer(Call(model, STYLE, block, number, (), None), x)
        window = block.attentions[0].window
        cos, sin = turns[window]
        return encoder_layer(model, block, number, x, masks[window], (cos, sin))

    kinds = kinds_of(model, "encoder")
    if model.running.recorded is not None:  # copies of layers that take turns keep a hidden state too many: each is run
        kinds = tuple(range(len(kinds)))
    x = run_stack(model, kinds, x, layer, name="layers", checkpointed=model.running.checkpointing)
    return model.layernorm("model.final_norm", x)


def embeddings(model: Model) -> Tensor:
    """`ModernBertEmbeddings.forward`."""
    f = model.tape
    x = model.layernorm("model.embeddings.norm", inputs(model))
    f.module = "model.embeddings.drop"
    return ops.dropout(f, x, model.arch.dropout.embedding)


def encoder_layer(model: Model, block: Block, number: int, x: Tensor, mask: Tensor | None, turns: Turns) -> Tensor:
    """`ModernBertEncoderLayer.forward`; layer 0 has no norm before its attention."""
    f, name = model.tape, "model.layers.{}"
    normed = (
        x if number == 0 else model.layernorm(f"{name}.attn_norm", x, number)
    )  # an argument, until the adapter behind is done
    attended = behind(model, f"{name}.attention_adapters", attention(model, block, number, normed, mask, turns), number)
    del normed
    f.module = name
    x = ops.add(f, x, attended)
    normed = model.layernorm(f"{name}.mlp_norm", x, number)
    out = behind(model, f"{name}.output_adapters", mlp(model, block, number, normed), number)
    del normed
    f.module = name
    return ops.add(f, x, out)


def attention(model: Model, block: Block, number: int, x: Tensor, mask: Tensor | None, turns: Turns) -> Tensor:
    """`ModernBertAttention.forward`: queries and keys are turned in fp32; the three are views of one projection."""
    f, a, name = model.tape, block.attentions[0], "model.layers.{}.attn"
    qkv = model.linear(f"{name}.Wqkv", x, number)
    f.module = name
    q, k, v = split(f, qkv, [("b", a.num_attention_heads, model.seq, a.head_dim)] * 3)
    q, k = rotated(model, q, k, *turns)
    out = attend(model, a, q, k, v, mask, dropout=model.arch.dropout.attention, moved=True)  # backward stacks the three gradients
    out = model.linear(f"{name}.Wo", out, number)
    f.module = name
    return ops.dropout(f, out, model.arch.dropout.attention)


def rotated(model: Model, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`."""
    f, dtype = model.tape, q.dtype
    wide_q, wide_k = rotary_in_fp32(f, q, cos, sin), rotary_in_fp32(f, k, cos, sin)
    return f.to(wide_q, dtype), f.to(wide_k, dtype)


def mlp(model: Model, block: Block, number: int, x: Tensor) -> Tensor:
    """`ModernBertMLP.forward`."""
    f, name = model.tape, "model.layers.{}.mlp"
    both = model.linear(f"{name}.Wi", x, number)
    f.module = name
    half = ("b", model.seq, block.mlp.intermediate_size)
    first, gate = split(f, both, [half, half])
    del both
    inner = ops.mul(f, activation(f, first, block.mlp.activation), gate)
    return model.linear(f"{name}.Wo", ops.dropout(f, inner, model.arch.dropout.hidden), number)
