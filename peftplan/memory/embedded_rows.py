"""Embeddings of texts that share one row without padding, and a loss of the embeddings.

s tokens of the row, or of a rank's part of it; h hidden size. Source: ms-swift 4.6.0, model/patcher.py
(`patch_output_normalizer`, in whose place of the head the hidden states stay, and `revert_padding_free`),
sequence_parallel/sequence_parallel.py (`gather`). Left out: numbers of each text, such as its embedding and its similarities with
others (loss/embedding.py).
"""

from __future__ import annotations

from peftplan.memory.embedded_pairs import normalized
from peftplan.memory.model import Model
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def last_of_texts(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """No loss, and what stands for all embeddings. Each text is as long as the longest."""
    f, (rows, _, width), num_parts = model.tape, x.dims, model.running.parts_of_row
    f.module = ""
    if num_parts > 1:  # under DDP the hooks of the model follow accelerate's `convert_outputs_to_fp32`
        x = gathered(f, f.to(x, "fp32"), num_parts)
    together = texts_apart(f, x)
    last = f.new((rows, width), x.dtype, "index", f.record(_last_backward, (together,), x.dims))
    del together
    return Tensor(None, (), "fp32"), normalized(f, last)


def texts_apart(f: Tape, x: Tensor) -> Tensor:
    """`revert_padding_free`: texts are copied out of the row, then together into one tensor."""
    parts = f.new(x.dims, x.dtype, "cat")
    together = f.new(x.dims, x.dtype, "stack", f.record(_apart_backward, (x,), x.dims))
    del parts
    return together


def gathered(f: Tape, part: Tensor, num_parts: int) -> Tensor:
    """`SequenceParallel.gather`: the row of which each rank has a part."""
    dims = (num_parts, *part.dims)
    received = f.new(dims, part.dtype, "all_gather")
    row = f.new(dims, part.dtype, "cat", f.record(_part_backward, (part,), part.dims))
    del received
    return row


def _part_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "contiguous")


def _last_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "index_put")


def _apart_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    """Zeros for the whole row, once for each of the texts, which are added up."""
    total, of_text = (f.new(saved[0], g.dtype, name) for name in ("slice_backward", "slice_backward of one text"))
    del of_text
    return total


def loss_of_texts(f: Tape, embeddings: Tensor) -> Tensor:
    """The mean over the texts."""
    return f.new((), "fp32", "mean", f.record(_loss_backward, (embeddings,), embeddings.dims, embeddings.dtype))


def _loss_backward(f: Tape, node: Node, saved: tuple[Dims, str], g: Tensor) -> Tensor:
    return f.new(saved[0], saved[1], "mm")
