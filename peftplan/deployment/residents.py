"""Bytes of a loaded base and its adapters: on the GPU each tensor is rounded up to 512, on the CPU it takes its own bytes.

Source: as `parameters.py`; peft `tuners/*/layer.py` for the buffers. Nothing is prepared for training.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.arch.modules import Architecture
from peftplan.deployment.safetensors import StoredTensor
from peftplan.deployment.scratch import Array, Device, Scratch
from peftplan.dtypes import parse_dtype
from peftplan.methods.adaptation import Adaptation
from peftplan.parameters import SAVED_COPY, Parameter, Parameters

ONE_PER_LAYER = (".boft_P",)
"""Buffers that all adapters of a layer share; the others come with each adapter."""


def base_bytes(arch: Architecture, loaded: Parameters, *, dtype: str, device: Device) -> int:
    """The base with its quantization state and its buffers; `dtype` is what it was loaded in."""
    of = Scratch(device)
    buffers = sum(
        (1 if b.layers is None else len(b.layers)) * of.bytes(Array(dtype if b.dtype == "model" else b.dtype, b.shape))
        for b in arch.buffers
    )
    shared = sum(of.bytes(Array(a.dtype, a.dims)) for a in loaded.shared)
    return _stored((p for p in loaded.all if p.owner == "base"), of) + shared + buffers


def adapter_bytes(adaptation: Adaptation, loaded: Parameters, *, dtype: str, device: Device) -> int:
    """One adapter: its tensors, its copies of saved modules, its own buffers."""
    own = _stored((p for p in loaded.all if p.owner == "adapter"), Scratch(device))
    return own + _buffers(adaptation, dtype, device, shared=False)


def prompt_bytes(prompt: StoredTensor, loaded: Parameters, *, dtype: str, device: Device) -> int:
    """One adapter of virtual tokens, of which inference keeps only what was saved: the encoder's output, and saved modules."""
    of = Scratch(device)
    return of.bytes(Array(dtype, prompt.shape)) + _stored((p for p in loaded.all if SAVED_COPY in p.name), of)


def shared_bytes(adaptation: Adaptation, *, dtype: str, device: Device) -> int:
    """What all adapters of one base share."""
    return _buffers(adaptation, dtype, device, shared=True)


def _stored(parameters: Iterable[Parameter], of: Scratch) -> int:
    return sum(p.copies * of.bytes(Array(a.dtype, a.dims)) for p in parameters for a in p.allocations)


def _buffers(adaptation: Adaptation, dtype: str, device: Device, *, shared: bool) -> int:
    of = Scratch(device)
    return sum(
        b.copies * of.bytes(Array(dtype if b.dtype == "adapter" else parse_dtype(b.dtype), b.shape))
        for b in adaptation.buffers
        if b.name.endswith(ONE_PER_LAYER) == shared
    )
