"""Encoders of the BERT shape (transformers, models/{bert,roberta,xlm_roberta}/modeling_*.py).

Left out: cross-attention, which no task of a lone encoder runs.
"""

from __future__ import annotations

from peftplan.arch.blocks import Block
from peftplan.depth.stack import run_stack
from peftplan.errors import NeedsTraceError
from peftplan.memory.activations import activation
from peftplan.memory.attention import attend
from peftplan.memory.calls import inputs
from peftplan.memory.kinds import kinds_of
from peftplan.memory.masks import causal_mask
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Tensor

ROBERTA = ("roberta", "xlm-roberta")


def bert(model: Model) -> Tensor:
    """`BertModel.forward` up to the last hidden states; a pooler belongs to the head."""
    model.can_cache = False
    block = model.arch.blocks[0]
    if len(block.attentions) > 1:
        raise NeedsTraceError(f"cross-attention of {model.arch.model_type}")
    prefix = "roberta" if model.arch.model_type in ROBERTA else "bert"
    x = embeddings(model, f"{prefix}.embeddings")
    mask = (causal_mask if block.attentions[0].causal else bidirectional_mask)(model, x.dtype)

    def layer(number: int, x: Tensor, mask: Tensor | None) -> Tensor:
        return encoder_layer(model, block, f"{prefix}.encoder.layer.{{}}", number, x, mask)

    kinds = kinds_of(model, block.stack)
    return run_stack(model, kinds, x, layer, name="layers", checkpointed=model.running.checkpointing, every=(mask,))


def bidirectional_mask(model: Model, dtype: str, window: int | None = None, *, cross: bool = False) -> Tensor | None:
    """`create_bidirectional_mask`: one only where there is padding, or a window of less than the sequence to each side; for eager
    of the model's dtype, made from the boolean one that sdpa takes. `cross`: a decoder's, over what the encoder returned.
    """
    f, s, running = model.tape, model.source, model.running
    windowed = window is not None and model.length(s) >= window // 2
    if running.attention == "flash_attention_2" or not (running.padding or windowed):
        return None
    of_all: Dims = (1, 1, model.seq if cross else s, s)
    by_sample: Dims = ("b", *of_all[1:])
    eager = running.attention == "eager"
    masked = running.padding or "attention_mask" in model.batch
    seen = near_keys(f, of_all, padded=masked, last="bitwise_and" if eager else "attention_mask") if windowed else None
    if masked:
        seen = f.new(by_sample, "bool", "bitwise_and" if eager else "attention_mask")
    return f.new(by_sample, dtype, "attention_mask") if eager else seen


def near_keys(f: Tape, dims: Dims, *, padded: bool, last: str) -> Tensor:
    """`sliding_window_bidirectional_mask_function`: the distance of each query and key, which must be within the window. Each
    condition is `and`ed to those before, first to one that is always true (`and_masks`).
    """
    difference = f.new(dims, "int64", "sub")
    distance = f.new(dims, "int64", "abs")
    del difference
    near = f.new(dims, "bool", "le")
    del distance
    seen = f.new(dims, "bool", "bitwise_and")
    del near
    seen = f.new(dims, "bool", "bitwise_and" if padded else last)
    return f.new(dims, "bool", "bitwise_and") if padded else seen


def embeddings(model: Model, name: str) -> Tensor:
    """`BertEmbeddings.forward`; RoBERTa counts the positions of each sample."""
    f, s = model.tape, model.seq
    f.module = name
    rows = ("b", s) if model.arch.model_type in ROBERTA else (1, s)
    position_ids = f.new(rows, "int64", "position_ids") if model.arch.model_type in ROBERTA else None
    token_type_ids = f.new(rows, "int64", "token_type_ids")
    words = inputs(model)
    token_types = model.embedding(f"{name}.token_type_embeddings", ("b", s), token_type_ids)
    f.module = name
    x = ops.add(f, words, token_types)
    positions = model.embedding(f"{name}.position_embeddings", rows, position_ids)
    f.module = name
    x = ops.add(f, x, positions)
    x = model.layernorm(f"{name}.LayerNorm", x)
    f.module = f"{name}.dropout"
    out = ops.dropout(f, x, model.arch.dropout.embedding)
    del x  # frees the norm before the embeddings
    return out


def encoder_layer(model: Model, block: Block, name: str, number: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """`BertLayer.forward`."""
    f = model.tape
    attention_output = attention(model, block, f"{name}.attention", number, x, mask)
    inner = model.linear(f"{name}.intermediate.dense", attention_output, number)
    f.module = f"{name}.intermediate.intermediate_act_fn"
    inner = activation(f, inner, block.mlp.activation)
    x = output(model, f"{name}.output", number, inner, attention_output)
    del inner  # a local of `feed_forward_chunk`
    return x


def attention(model: Model, block: Block, name: str, number: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """`BertAttention.forward`: self-attention and its output."""
    a = block.attentions[0]
    dims = ("b", a.num_attention_heads, model.seq, a.head_dim)
    q, k, v = (model.linear(f"{name}.self.{part}", x, number).view(dims) for part in ("query", "key", "value"))
    model.tape.module = f"{name}.self"
    out = attend(model, a, q, k, v, mask, dropout=model.arch.dropout.attention, rotated=False, wide=False)
    del q, k, v
    return output(model, f"{name}.output", number, out, x)


def output(model: Model, name: str, number: int, x: Tensor, residual: Tensor) -> Tensor:
    """`BertSelfOutput.forward`, `BertOutput.forward`."""
    f = model.tape
    x = model.linear(f"{name}.dense", x, number)
    f.module = f"{name}.dropout"
    x = ops.dropout(f, x, model.arch.dropout.hidden)
    f.module = name
    return model.layernorm(f"{name}.LayerNorm", ops.add(f, x, residual), number)
