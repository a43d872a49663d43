"""How many bytes of a card a program can get: a lower figure than the marketed one, and never a guess above a record.

A run that is said to fit must fit, so every rule takes the smallest figure that public records support:

1. what CUDA (HIP) told a program on this card, the smallest record that is not from Windows;
2. else the `nvidia-smi` total, less the largest share of it that CUDA was seen to leave out on a card of the same vendor
   with at least half the memory (the share shrinks with size: 8 % of 4 GiB, 2 % of 24 GiB, 0.4 % of 141 GiB);
3. else the marketed size read as GiB, less the largest share of it missing on any card of the same vendor.

A size in GB (24GB) is a card sold as such: the least that rules 1 and 2 give of NVIDIA's cards sold with this size, else rule 3.
Cards with their own memory and cards that share the CPU's are not compared with each other. Windows figures do not
count: there CUDA reports about the `nvidia-smi` total, and on Linux hundreds of MiB less for the same card.
Left out: the context of the process itself (hardware/context.py) and what a desktop on the same card takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftplan.errors import InputError
from peftplan.hardware.gpus import Gpu, Reported, gpus
from peftplan.units import MIB

MIB_PER_MARKETED_GB = 1024
"""No `nvidia-smi` total is above marketed GB × 1024 MiB; what ECC and spare memory take of it is part of the missing share
(T4: 16,384 MiB with ECC off, 15,360 with ECC on; B300: 275,040 MiB of 288 GB)."""

COMPARABLE_SIZE = 0.5
"""Smallest memory, relative to the card in question, of a card whose held-back share is taken over (rule 2)."""


@dataclass(frozen=True, slots=True)
class Usable:
    """Bytes that a program can get of the card, and why so many, in words for the user."""

    bytes: int
    why: str


def usable_bytes(gpu: Gpu) -> Usable:
    """What torch can get of one device, in bytes, context included; `why` says which of the rules above applied."""
    if gpu.capacity_bytes is not None:
        return Usable(gpu.capacity_bytes, f"{gpu.name} as given")
    if gpu.sold_gb is not None:
        return _as_sold(gpu.name, gpu.sold_gb)
    record = smallest_record(gpu)
    if record is not None:
        return Usable(record.mib * MIB, f"{_runtime(gpu)} reports {record.mib} MiB ({_of_records(gpu)}: {record.how})")
    if gpu.total_mib is not None:
        return _less_share(gpu, _total_mib, smallest=COMPARABLE_SIZE, size_text=f"nvidia-smi total {gpu.total_mib} MiB")
    return _as_marketed(gpu)


def _as_marketed(gpu: Gpu) -> Usable:
    return _less_share(gpu, _marketed_mib, smallest=0.0, size_text=f"{gpu.marketed_gb:g} GB as marketed, read as GiB,")


def _as_sold(name: str, sold_gb: float) -> Usable:
    """What a card sold with so many GB gives."""
    same_size = [card for card in gpus() if (card.vendor, card.unified, card.marketed_gb) == ("NVIDIA", False, sold_gb)]
    recorded = [card for card in same_size if card.total_mib is not None or smallest_record(card) is not None]
    if not recorded:
        return _as_marketed(Gpu(id=name, name=name, vendor="NVIDIA", marketed_gb=sold_gb))
    least, card = min((usable_bytes(card).bytes, card.id) for card in recorded)
    why = f"counted as the smallest of {len(recorded)} cards sold as {sold_gb:g} GB ({card}); {sold_gb:g}GiB would be exact"
    return Usable(least, why)


def smallest_record(gpu: Gpu) -> Reported | None:
    """The smallest device total that a program was told, Windows records left out; None where there is none."""
    return min((r for r in gpu.cuda_total_mib if r.os != "windows"), key=lambda r: r.mib, default=None)


def _less_share(gpu: Gpu, size: Callable[[Gpu], int | None], *, smallest: float, size_text: str) -> Usable:
    """`size` of the card, scaled by the worst (reported / size) of its peers that have at least `smallest` of its size."""
    mib = size(gpu)
    if mib is None:
        raise InputError("gpu", gpu.id, "its memory is not recorded; give a size such as 24GiB")
    share, peer, reported, of = min(
        (record.mib / peer_mib, peer.id, record.mib, peer_mib)
        for peer in gpus()
        if (peer.vendor, peer.unified) == (gpu.vendor, gpu.unified)
        and (record := smallest_record(peer)) is not None
        and (peer_mib := size(peer)) is not None
        and peer_mib >= smallest * mib
    )
    why = (
        f"{size_text} less {1 - share:.1%}, the largest share that {_runtime(gpu)} is known to leave out "
        f"({peer}: {reported} of {of} MiB); not measured on this card{_with_ecc(gpu)}"
    )
    return Usable(mib * reported // of * MIB, why)


def _total_mib(gpu: Gpu) -> int | None:
    return gpu.total_mib


def _marketed_mib(gpu: Gpu) -> int | None:
    return None if gpu.marketed_gb is None else int(gpu.marketed_gb * MIB_PER_MARKETED_GB)


def _runtime(gpu: Gpu) -> str:
    return "HIP" if gpu.vendor == "AMD" else "CUDA"


def _of_records(gpu: Gpu) -> str:
    count = sum(record.os != "windows" for record in gpu.cuda_total_mib)
    return "the only public record" if count == 1 else f"the smallest of {count} public records"


def _with_ecc(gpu: Gpu) -> str:
    """Cards that are shipped with ECC off have less memory when someone turned it on, as some clouds do."""
    with_ecc = [variant.mib for variant in gpu.total_mib_variants if variant.when == "ECC on"]
    return f"; with ECC on nvidia-smi shows {min(with_ecc)} MiB" if with_ecc else ""
