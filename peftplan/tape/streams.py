"""Tensors of no module, on streams of their own: buffers that ranks gather into and reduce from."""

from __future__ import annotations

from peftplan.ledger import Category
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Tensor


def on_stream(f: Tape, dims: Dims, dtype: str, op: str, stream: int, category: Category) -> Tensor:
    """A new tensor of these dims that `op` makes on a stream; 0 is the stream that computes."""
    f.module = ""
    tensor = f.new(dims, dtype, op)
    number = tensor.storage.number  # type: ignore[union-attr]
    f.category[number] = category
    if stream:
        f.streams[number] = stream
    return tensor
