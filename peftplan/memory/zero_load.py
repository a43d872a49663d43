"""How a rank loads under ZeRO-1 and ZeRO-2: the whole model reaches the device, then what trains is flattened.

Source: DeepSpeed 0.19.8, runtime/engine.py (`_configure_distributed_model`), runtime/zero/stage_1_and_2.py (the constructor,
`initialize_optimizer_states`). Where the card has no room for a flat copy beside the model, DeepSpeed flattens on the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.load import Handle, Memory, load_order
from peftplan.memory.sharded import Loader
from peftplan.parameters import Parameter, Parameters


class FlatLoading(NamedTuple):
    """How a rank loads."""

    parameters: Parameters
    """As they are loaded and adapted."""
    cast: Parameters
    """The same in 16 bits."""
    groups: tuple[tuple[frozenset[str], int], ...]
    """The names of a flat group, and the elements of a rank's part."""
    world_size: int
    offloads: bool
    of_one_gpu: Loader | None
    """Loads and adapts a quantized model; None: any other is cast on the host."""
    on_host: bool = False
    """Whether the flat copy is made on the host."""

    def into(self, memory: Memory[Handle]) -> None:
        """Load tensor by tensor."""
        trained: dict[str, list[Handle]] = {}
        if self.of_one_gpu is None:
            for p, _ in (tensor for part in load_order(self.cast, quantized=False, moved=True) for tensor in part):
                self._put(memory, p, trained)
        else:
            self._cast_quantized(memory, trained)
        half = ITEMSIZE[next((p.dtype for p in self.cast.all if p.trainable), "bf16")]
        for names, part in self.groups:
            memory.empty_cache()
            if self.on_host:
                self._release(memory, names, trained)
                memory.empty_cache()
            memory.keep((half * part * self.world_size,))
            self._release(memory, names, trained)
            copy = memory.allocate(half * part)
            if self.offloads:  # cast on the way
                memory.release(memory.allocate(ITEMSIZE["fp32"] * part))
            else:
                memory.keep((ITEMSIZE["fp32"] * part,))
            memory.release(copy)
        if self.offloads:
            memory.keep((half * max((p.numel for p in self.cast.all if p.trainable), default=0),))
        else:
            zeros = [memory.allocate(ITEMSIZE["fp32"] * part) for _, part in self.groups]
            for handle in zeros:
                memory.release(handle)

    def _release(self, memory: Memory[Handle], names: Iterable[str], trained: dict[str, list[Handle]]) -> None:
        for name in names:
            for handle in trained.pop(name, ()):
                memory.release(handle)

    def _put(self, memory: Memory[Handle], p: Parameter, trained: dict[str, list[Handle]]) -> None:
        if p.trainable:
            trained.setdefault(p.name, []).append(memory.allocate(ITEMSIZE[p.dtype] * p.numel))
        else:
            memory.keep(_sizes(p))

    def _cast_quantized(self, memory: Memory[Handle], trained: dict[str, list[Handle]]) -> None:
        """Load on the device, then cast tensor by tensor what is not in 16 bits."""
        assert self.of_one_gpu is not None
        cast = {p.name: p for p in self.cast.all}
        moves = {p.name for p in self.parameters.all if p.trainable or cast[p.name].dtype != p.dtype}
        passing = Passing(memory, {_sizes(p) for p in self.parameters.all if p.name in moves})
        self.of_one_gpu(passing)
        for p, _ in (tensor for part in load_order(self.parameters, quantized=False, moved=True) for tensor in part):
            if p.name in moves:
                self._put(memory, cast[p.name], trained)
                passing.take(_sizes(p))


class Passing(Memory[Handle]):
    """A memory where tensors of some sizes are held by handles, since they are cast later."""

    def __init__(self, memory: Memory[Handle], moves: Iterable[tuple[int, ...]]) -> None:
        self.memory = memory
        self.by_size: dict[tuple[int, ...], list[Handle]] = {sizes: [] for sizes in moves}

    def allocate(self, nbytes: int) -> Handle:
        """Allocate a tensor."""
        return self.memory.allocate(nbytes)

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Allocate tensors that stay, or until they are cast."""
        if sizes in self.by_size:
            self.by_size[sizes].append(self.memory.allocate(sizes[0]))
        else:
            self.memory.keep(sizes)

    def release(self, tensor: Handle, /) -> None:
        """Free a tensor."""
        self.memory.release(tensor)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`."""
        self.memory.empty_cache()

    def take(self, sizes: tuple[int, ...]) -> None:
        """Free the oldest tensor of these sizes."""
        if self.by_size[sizes]:
            self.memory.release(self.by_size[sizes].pop(0))


def _sizes(p: Parameter) -> tuple[int, ...]:
    return tuple(a.nbytes for a in p.allocations if a.place == "device")
