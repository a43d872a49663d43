"""What each PEFT method makes and keeps where it wraps a module: peft's forward, written on the tape."""

from __future__ import annotations

from importlib import import_module

from peftplan.memory.parts import Adapter

ADAPTERS: dict[str, tuple[str, str]] = {
    "ADALORA": ("adalora", "adalora"),
    "BOFT": ("boft", "boft"),
    "FOURIERFT": ("deltas", "fourierft"),
    "IA3": ("ia3", "ia3"),
    "LOHA": ("deltas", "loha"),
    "LOKR": ("deltas", "lokr"),
    "LORA": ("lora", "lora"),
    "OFT": ("oft", "oft"),
    "VERA": ("vera", "vera"),
}
"""peft type → module of this folder and its function: how it wraps a linear layer. Methods that are not here, and add
tensors to modules, need the trace engine."""


OWN_LORA = ("automodel_lora", "lora")


def adapter_of(peft_type: str | None, *, own_lora: bool = False) -> Adapter | None:
    """How a peft type wraps a linear layer; None for those that do not. `own_lora`: the trainer has its own for LoRA."""
    if peft_type not in ADAPTERS:
        return None
    module, function = OWN_LORA if own_lora and peft_type == "LORA" else ADAPTERS[peft_type]
    adapter: Adapter = getattr(import_module(f"peftplan.memory.methods.{module}"), function)
    return adapter
