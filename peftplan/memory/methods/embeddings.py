"""LoRA on an embedding, and rows of it that train.

Source: peft, tuners/lora/layer.py (`Embedding.forward`), tuners/trainable_tokens/layer.py (`get_merged_weights`,
`forward_adapters`): the whole table is copied with the trained rows in it, for the embedding and once more for a tied head.
"""

from __future__ import annotations

from peftplan.errors import NeedsTraceError
from peftplan.memory.parts import Part, Running
from peftplan.methods.lora import LoraConfig
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Tensor


def check_lora_embedding(running: Running) -> None:
    """Raises NeedsTraceError for what has no formula."""
    if running.config_as(LoraConfig).use_dora:
        raise NeedsTraceError("DoRA on an embedding")


def lora_embedding(f: Tape, part: Part, result: Tensor, ids: Tensor | None, *, scaled: bool) -> Tensor:
    """`result + (embedding(x, Aᵀ) @ Bᵀ) * scaling`, in the adapter's dtype; `result` are the rows of the base layer.

    `scaled`: the base layer scales its rows, and peft what it adds to them.
    """
    a, b = part.params["lora_embedding_A"], part.params["lora_embedding_B"]
    dims, rank = result.dims[:-1], a.dims[0]
    low = f.new((*dims, rank), a.dtype, "embedding", f.record(_transposed_backward, (a,), a.dims, dims, ids))
    out = ops.scale(f, products.linear(f, low, b))
    if scaled:
        out = ops.scale(f, out)
    narrow: Tensor = f.to(ops.add(f, result, out), result.dtype)
    return narrow


def _transposed_backward(f: Tape, node: Node, saved: tuple[Dims, Dims, Tensor | None], g: Tensor) -> Tensor:
    """The gradient of Aᵀ, which is copied to lie as A does."""
    rank, rows = saved[0]
    grad = ops.table_gradient(f, (rows, rank), saved[1], g.dtype)
    return f.new((rank, rows), grad.dtype, "clone")


def merged_rows(f: Tape, part: Part, adapter: Part) -> Tensor:
    """`weight.index_copy(0, index, deltas)`: keeps the index and the rows."""
    f.module = adapter.name
    deltas = adapter.params["trainable_tokens_delta"]
    weight = part.weight
    assert weight is not None
    index = f.new((deltas.dims[0],), "int64", "token_indices")
    rows = f.to(deltas, weight.dtype)
    return f.new(weight.dims, weight.dtype, "index_copy", f.record(_rows_backward, (rows,), rows, index))


def _rows_backward(f: Tape, node: Node, saved: tuple[Operand, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, g.dtype, "index_select")
