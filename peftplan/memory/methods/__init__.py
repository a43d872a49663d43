"""What each PEFT method makes and keeps where it wraps a module: peft's forward, written on the tape."""

from __future__ import annotations

from peftplan.memory.methods.adalora import adalora
from peftplan.memory.methods.boft import boft
from peftplan.memory.methods.deltas import fourierft, loha, lokr
from peftplan.memory.methods.ia3 import ia3
from peftplan.memory.methods.lora import lora
from peftplan.memory.methods.oft import oft
from peftplan.memory.methods.vera import vera
from peftplan.memory.model import Adapter

ADAPTERS: dict[str, Adapter] = {
    "ADALORA": adalora,
    "BOFT": boft,
    "FOURIERFT": fourierft,
    "IA3": ia3,
    "LOHA": loha,
    "LOKR": lokr,
    "LORA": lora,
    "OFT": oft,
    "VERA": vera,
}
"""peft type → how it wraps a linear layer. Methods that are not here, and add tensors to modules, need the trace engine."""
