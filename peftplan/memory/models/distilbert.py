"""DistilBERT (transformers, models/distilbert/modeling_distilbert.py)."""

from __future__ import annotations

from peftplan.arch.blocks import Block
from peftplan.depth.stack import run_stack
from peftplan.memory.activations import activation
from peftplan.memory.attention import attend
from peftplan.memory.calls import behind, inputs
from peftplan.memory.kinds import kinds_of
from peftplan.memory.model import Model
from peftplan.memory.models.bert import bidirectional_mask
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor

EMBEDDINGS = "distilbert.embeddings"


def distilbert(model: Model) -> Tensor:
    """`DistilBertModel.forward`."""
    model.can_cache = False
    block = model.arch.blocks[0]
    x = embeddings(model)
    mask = bidirectional_mask(model, x.dtype)

    def layer(number: int, x: Tensor, mask: Tensor | None) -> Tensor:
        return transformer_block(model, block, number, x, mask)

    kinds, checkpointed = kinds_of(model, "encoder"), model.running.checkpointing
    return run_stack(model, kinds, x, layer, name="layers", checkpointed=checkpointed, every=(mask,))


def embeddings(model: Model) -> Tensor:
    """`Embeddings.forward`."""
    f = model.tape
    words = inputs(model)
    positions = model.embedding(f"{EMBEDDINGS}.position_embeddings", (1, model.seq))
    f.module = EMBEDDINGS
    x = ops.add(f, words, positions)
    x = model.layernorm(f"{EMBEDDINGS}.LayerNorm", x)
    f.module = f"{EMBEDDINGS}.dropout"
    return ops.dropout(f, x, model.arch.dropout.embedding)


def transformer_block(model: Model, block: Block, number: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """`TransformerBlock.forward`."""
    f, name = model.tape, "distilbert.transformer.layer.{}"
    attended = attention(model, block, f"{name}.attention", number, x, mask)
    attended = behind(model, f"{name}.attention_adapters", attended, number)
    f.module = name
    attended = model.layernorm(f"{name}.sa_layer_norm", ops.add(f, attended, x), number)
    out = ffn(model, block, f"{name}.ffn", number, attended)
    out = behind(model, f"{name}.output_adapters", out, number)
    f.module = name
    return model.layernorm(f"{name}.output_layer_norm", ops.add(f, out, attended), number)


def attention(model: Model, block: Block, name: str, number: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """`DistilBertSelfAttention.forward`."""
    a = block.attentions[0]
    dims = ("b", a.num_attention_heads, model.seq, a.head_dim)
    q, k, v = (model.linear(f"{name}.{part}_lin", x, number).view(dims) for part in "qkv")
    model.tape.module = name
    out = attend(model, a, q, k, v, mask, dropout=model.arch.dropout.attention, rotated=False, wide=False)
    return model.linear(f"{name}.out_lin", out, number)


def ffn(model: Model, block: Block, name: str, number: int, x: Tensor) -> Tensor:
    """`FFN.ff_chunk`."""
    f = model.tape
    hidden = model.linear(f"{name}.lin1", x, number)
    f.module = f"{name}.activation"
    hidden = activation(f, hidden, block.mlp.activation)
    hidden = model.linear(f"{name}.lin2", hidden, number)
    f.module = f"{name}.dropout"
    return ops.dropout(f, hidden, model.arch.dropout.hidden)
