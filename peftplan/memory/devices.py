"""`device_map` on the tape: accelerate's hooks move what a module is called with to the module's GPU.

Source: accelerate, hooks.py (`AlignDevicesHook`), big_modeling.py (`dispatch_model`). A layer's hook runs before its
checkpoint, which keeps the copies: of the hidden states where the layer before is on another GPU, and of cosines and sines in
each layer that is not where they are made, beside the final norm. The hook of the whole model brings the loss and the logits
back to the first GPU, where the batch is.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.distributed.device_map import Places
from peftplan.memory.model import Model
from peftplan.memory.units import NORM, ROOT, ROTARY, TAIL, OneGpu
from peftplan.parameters import Parameter as Family
from peftplan.tape.devices import DeviceTape
from peftplan.tape.tensors import Tensor

FIRST = 0
"""The GPU of the batch (`dispatch_model`, `main_device`)."""


class Devices(OneGpu):
    """The hooks of one process. `places`: where its modules are."""

    every_layer = True

    def __init__(self, model: Model, places: Places) -> None:
        assert isinstance(model.tape, DeviceTape)
        self.model, self.f, self.places = model, model.tape, places
        norms = (m.name for m in model.arch.modules if m.layers is None and "Norm" in m.kind)
        self.norm = places.modules.get(next(norms, ""), FIRST)
        embedding = places.modules.get(model.arch.input_embedding or "", FIRST)
        head = places.modules.get(model.arch.output_embedding or "", embedding)  # a tied one has no weight of its own
        self.parts = {NORM: self.norm, TAIL: head}
        self.passing: list[Tensor] = []
        """What the rotary module was called with, until it returns."""

    def enter(self, name: str) -> None:
        """Before the model runs, and before its rotary module does."""
        if name == ROOT:
            self.f.device = FIRST
        if name == ROTARY and self.norm != FIRST:
            self.f.device = self.norm
            states = ("b", self.model.seq, self.model.arch.hidden_size or 0)
            self.passing = [self.f.new(states, self.model.running.dtype, "to"), self.f.new((self.model.seq,), "int64", "to")]

    def enter_with(self, name: str, x: Tensor) -> Tensor:
        """Before the final norm or the head runs."""
        device = self.parts.get(name)
        return x if device is None else self.f.to_device(x, device)

    def arrive(self, layer: int, x: Tensor) -> Tensor:
        """Before a layer's checkpoint."""
        return self.f.to_device(x, self.places.layers[layer])

    def beside(self, layer: int, mask: Tensor | None, tables: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """What a layer is called with by name."""
        self.passing.clear()
        device = self.places.layers[layer]
        mask = None if mask is None else self.f.to_device(mask, device)
        return mask, *(self.f.to_device(table, device) for table in tables)

    def hand_out(self, outputs: list[Tensor]) -> list[Tensor]:
        """What the model returns, on the first GPU."""
        return [self.f.to_device(x, FIRST) for x in outputs]

    def groups(self, trained: list[Family]) -> Iterator[list[Family]]:
        """What the optimizer steps over, GPU by GPU."""
        for device in range(self.places.devices):
            self.f.device = device
            yield [*self.places.held_on(trained, device)]
