"""What peftplan knows, as lists of records: `models`, `gpus` and `methods` return what the commands of the same names list."""

from __future__ import annotations

from typing import NamedTuple

from peftplan.arch import catalogue
from peftplan.arch.catalogue import ModelEntry
from peftplan.frames import Listing
from peftplan.hardware import gpus as cards
from peftplan.hardware.usable import usable_bytes
from peftplan.methods import METHODS
from peftplan.validation import text


class GpuEntry(NamedTuple):
    """A card: `usable_bytes` is what a program can get of it, for the reason in `usable_source`; null is not known."""

    id: str
    name: str
    aliases: tuple[str, ...]
    vendor: str | None
    kind: str | None
    unified: bool
    marketed_gb: float | None
    total_mib: int | None
    usable_bytes: int
    usable_source: str
    compute_capability: str | None
    bf16: bool | None
    fp8: bool | None


class MethodEntry(NamedTuple):
    """A method: what trains, who published it, and the storage of the base that its name implies."""

    name: str
    peft_type: str | None
    summary: str
    source: str
    quant: str | None


def models(pattern: str | None = None) -> Listing[ModelEntry]:
    """The built-in models; with `pattern`, those whose name, alias, id or model type contains it (`*` and `?` as in a shell)."""
    return Listing(catalogue.models(None if pattern is None else text(pattern, field="pattern")))


def matching_cards(pattern: str | None = None) -> list[cards.Gpu]:
    """The cards of the catalogue whose name or an alias contains `pattern`, in full."""
    part = text(pattern or "", field="pattern").lower()
    return [card for card in cards.gpus() if any(part in name.lower() for name in (card.id, card.name, *card.aliases))]


def gpus(pattern: str | None = None) -> Listing[GpuEntry]:
    """The cards; with `pattern`, those whose name or an alias contains it."""
    entries: Listing[GpuEntry] = Listing()
    for card in matching_cards(pattern):
        usable = usable_bytes(card)
        fields = {name: getattr(card, name) for name in GpuEntry._fields if not name.startswith("usable")}
        entries.append(GpuEntry(**fields, usable_bytes=usable.bytes, usable_source=usable.why))
    return entries


def list_methods() -> Listing[MethodEntry]:
    """The methods with closed formulas; other peft types are counted from a `peft_config` by the installed peft."""
    return Listing(MethodEntry(**{name: getattr(method, name) for name in MethodEntry._fields}) for method in METHODS.values())
