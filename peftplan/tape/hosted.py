"""Inputs of checkpointed layers, offloaded to host memory. The device holds none of them until backward copies them back.

Source: transformers, modeling_utils.py (`_activation_checkpointing_enable` with `offload`); torch, autograd/graph.py
(`save_on_cpu`), utils/checkpoint.py (`save_inputs`, `CheckpointFunction`): the tensors among a layer's positional arguments.
"""

from __future__ import annotations

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor


class Hosted:
    """A tensor in host memory, with the facts that restore it on the device."""

    __slots__ = ("buffer", "dims", "dtype", "index", "leaf", "node")

    def __init__(self, f: Tape, x: Tensor, buffer: Tensor | None = None) -> None:
        self.buffer = buffer
        self.dims = x.dims
        self.dtype = x.dtype
        self.node = x.node
        self.index = x.index
        self.leaf = x.storage is not None and (x.storage.number, x.dims) in f.leaves


def stored(f: Tape, args: tuple[object, ...], buffer: Tensor | None = None) -> tuple[object, ...]:
    """Move the tensors among the arguments to the host; `buffer` takes the first one when it comes back."""
    if buffer is None:
        return tuple(Hosted(f, x) if type(x) is Tensor else x for x in args)
    at = next(index for index, x in enumerate(args) if type(x) is Tensor)
    return tuple(Hosted(f, x, buffer) if index == at and type(x) is Tensor else x for index, x in enumerate(args))


def fetched(f: Tape, args: tuple[object, ...]) -> tuple[object, ...]:
    """Copy the tensors among the arguments back to the device."""
    return tuple(_copy(f, x) if type(x) is Hosted else x for x in args)


def _copy(f: Tape, x: Hosted) -> Tensor:
    buffer = x.buffer if x.buffer is not None and x.buffer.dtype == x.dtype else None  # fp32 is on the host in bf16
    copy = f.new(x.dims, x.dtype, "to") if buffer is None else buffer
    assert copy.storage is not None
    if x.leaf:
        f.leaves.add((copy.storage.number, x.dims))
    return Tensor(copy.storage, x.dims, x.dtype, x.node, x.index)
