"""The layers that LLaMA Pro adds: copied on the GPU, one after the other, and two of their projections made anew as zeros.

Source: ms-swift 4.6.0, tuners/llamapro.py (`LLaMAPro.prepare_model`, `_update_module_weight`).
"""

from __future__ import annotations

from peftplan.distributed.order import tensors
from peftplan.memory.loaded import Handle, Loader, Memory
from peftplan.parameters import Parameters

SOURCE = "ms-swift 4.6.0, tuners/llamapro.py:158"
ZEROED = (".o_proj.weight", ".down_proj.weight", ".o_proj.bias", ".down_proj.bias")
"""Ends of the names of the tensors that become zeros, in the order in which they do."""


def load_copied(memory: Memory[Handle], *, load: Loader, parameters: Parameters) -> None:
    """`load` the model, then copy the layers that train, and make their zeros beside what these replace."""
    load(memory)
    replaced: dict[int | None, dict[str, tuple[int, Handle]]] = {}
    for p, layer in tensors(p for p in parameters.all if p.trainable):
        sizes = tuple(a.nbytes for a in p.allocations)
        end = next((end for end in ZEROED if p.name.endswith(end)), None)
        if end is None:
            memory.keep(sizes)
        else:
            replaced.setdefault(layer, {})[end] = sum(sizes), memory.allocate(sum(sizes))
    for of_layer in replaced.values():
        for nbytes, before in (of_layer[end] for end in ZEROED if end in of_layer):
            memory.keep((nbytes,))
            memory.release(before)
