"""Decoders of the Llama shape (transformers 5.24, models/llama/modeling_llama.py and its relatives)."""

from __future__ import annotations

from peftplan.arch.modules import Attention, Block
from peftplan.memory import ops
from peftplan.memory.attention import attend, causal_mask
from peftplan.memory.model import Model, kinds_of, run_stack
from peftplan.memory.tape import Tensor


def llama(model: Model) -> Tensor:
    """`LlamaModel.forward`."""
    f = model.tape
    x = model.inputs()
    head = model.arch.blocks[0].attentions[0].head_dim
    f.module = "model"
    _positions = f.new((model.seq,), "int64", "position_ids")
    f.module = "model.rotary_emb"
    cos, sin = (f.new((1, model.seq, head), x.dtype, name) for name in ("cos", "sin"))
    blocks = {layer: block for block in model.arch.blocks for layer in block.layers}

    windows = {block.attentions[0].window for block in model.arch.blocks}
    masks = {window: causal_mask(model, x.dtype, window) for window in windows}

    def layer(number: int, x: Tensor) -> Tensor:
        block = blocks[number]
        return decoder_layer(model, block, number, x, cos, sin, masks[block.attentions[0].window])

    x = run_stack(model, kinds_of(model), x, layer, name="layers", checkpointed=model.running.checkpointing)
    return model.rmsnorm("model.norm", x)


def decoder_layer(model: Model, block: Block, number: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """`LlamaDecoderLayer.forward`."""
    f = model.tape
    residual = x
    x = model.rmsnorm("model.layers.{}.input_layernorm", x, number)
    x = attention(model, block.attentions[0], number, x, cos, sin, mask)
    f.module = "model.layers.{}"
    x = ops.add(f, residual, x)
    residual = x
    x = model.rmsnorm("model.layers.{}.post_attention_layernorm", x, number)
    x = mlp(model, block, number, x)
    f.module = "model.layers.{}"
    return ops.add(f, residual, x)


def attention(model: Model, a: Attention, number: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """`LlamaAttention.forward`."""
    f = model.tape
    b, s, _ = x.dims
    name = "model.layers.{}.self_attn"
    q = model.linear(f"{name}.q_proj", x, number)
    q = ops.heads(f, q, (b, a.num_attention_heads, s, a.head_dim), clones=True)
    k = model.linear(f"{name}.k_proj", x, number)
    k = ops.heads(f, k, (b, a.num_key_value_heads, s, a.head_dim), clones=True)
    v = model.linear(f"{name}.v_proj", x, number).view((b, a.num_key_value_heads, s, a.head_dim))
    f.module = name
    q, k = ops.rotary(f, q, cos, sin), ops.rotary(f, k, cos, sin)
    k, v = model.cached(k, v)
    out = attend(model, a, q, k, v, mask)
    return model.linear(f"{name}.o_proj", out, number)


def mlp(model: Model, block: Block, number: int, x: Tensor) -> Tensor:
    """`LlamaMLP.forward`."""
    f = model.tape
    name = "model.layers.{}.mlp"
    gate = model.linear(f"{name}.gate_proj", x, number)
    f.module = f"{name}.act_fn"
    gate = ops.activation(f, gate, block.mlp.activation)
    up = model.linear(f"{name}.up_proj", x, number)
    f.module = name
    x = ops.mul(f, gate, up)
    del gate, up
    return model.linear(f"{name}.down_proj", x, number)
