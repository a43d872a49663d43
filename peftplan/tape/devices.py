"""A tape of one process on several GPUs: each tensor is made where the code runs that makes it, and backward runs there again."""

from __future__ import annotations

from copy import copy

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Backward, Dims, Node, Operand, Parameter, Tensor


class OneDevice:
    """Where all of a model is on one GPU: nothing is moved."""

    ranks = 1
    hooks_each_output = False
    keeps_gradients = False

    def enter_with_all(self, name: str, *xs: Tensor) -> tuple[Tensor, ...]:
        """Nothing is gathered."""
        return xs

    def arrive(self, layer: int, x: Tensor) -> Tensor:
        """The hidden states that a layer is called on."""
        return x

    def beside(self, layer: int, mask: Tensor | None, tables: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """What a layer is called with beside them: the mask alone, since it reads the tables of all layers."""
        return (mask,)

    def as_read(self, name: str, parameter: Parameter) -> Operand:
        """A part's parameter as the model's forward reads it, which does not call the part."""
        return parameter

    def read_mask(self) -> None:
        """The host reads whether a mask hides anything."""

    def hand_out(self, outputs: list[Tensor]) -> list[Tensor]:
        """What the model returns to its caller."""
        return outputs


class DeviceTape(Tape):
    """`device`: where what is made next is put."""

    def __init__(self, *, autocast: str | None = None, several: bool = False) -> None:
        super().__init__(autocast=autocast, several=several)
        self.device = 0
        self.device_of = [0]
        """Storage → its GPU."""

    def new(self, dims: Dims, dtype: str, op: str, node: Node | None = None) -> Tensor:
        """Allocate a tensor on the current GPU."""
        self.device_of.append(self.device)
        return super().new(dims, dtype, op, node)

    def record(self, backward: Backward, inputs: tuple[Operand | None, ...], *saved: object) -> Node | None:
        """A node that runs on the current GPU."""
        node = super().record(backward, inputs, *saved)
        if node is not None:
            node.device = self.device
        return node

    def _apply(self, node: Node) -> None:
        self.device = node.device
        super()._apply(node)

    def to_device(self, x: Tensor, device: int) -> Tensor:
        """`x.to(device)`: x itself, or a copy, whose gradient is copied back. Makes the device the current one."""
        assert x.storage is not None
        source, self.device = self.device_of[x.storage.number], device
        if source == device:
            return x
        return self.new(x.dims, x.dtype, "to", self.record(_copied_back, (x,), self, source))

    def seen_on(self, device: int) -> Tape:
        """The same tape with the events of one GPU alone."""
        seen, places = copy(self), [0]
        for n in self.log:
            places.append(places[-1] + (self.device_of[abs(n)] == device))
        seen.log = [n for n in self.log if self.device_of[abs(n)] == device]
        seen.marks = [(places[at], what) for at, what in self.marks]
        seen.products = []
        return seen


def _copied_back(f: Tape, node: Node, saved: tuple[DeviceTape, int], g: Tensor) -> Tensor:
    tape, source = saved
    tape.device = source
    return f.new(g.dims, g.dtype, "to")
