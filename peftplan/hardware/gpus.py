"""The GPU catalogue: what each card is sold as, what `nvidia-smi` shows, what a program is told, and where each was read.

Three sizes of one card differ and are kept apart, per device that a program sees:
marketed (`RTX 4090, 24 GB`) > `nvidia-smi` total (24,564 MiB) > CUDA device total (24,080 MiB on Linux; on Windows about
the `nvidia-smi` total). Source: data/gpus.json, each row with its own sources.
"""

import re
from functools import cache
from typing import NamedTuple, TypedDict

from peftplan import datafiles
from peftplan.errors import InputError, UnknownNameError
from peftplan.units import GB, GIB, MIB

_UNITS = {"gib": GIB, "gb": GB, "g": GB, "mib": MIB, "mb": 10**6}
_SOLD = ("gb", "g")
"""Units in which cards are sold: 24GB is what a card sold as 24 GB gives, not 24 × 10⁹ bytes."""
_CAPACITY = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb)", re.IGNORECASE)
MAX_CAPACITY = 2**20 * GIB
"""No device comes near it: a capacity above it is a slip of the pen."""
_MAKER = re.compile(r"(nvidia|amd|geforce)+")
_SIZE = re.compile(r"[4-9]|[1-9][0-9]|[1-3][0-9][0-9]")
"""Sizes of cards in GB; less is a number of GPUs or an index, and more the name of a card, such as 1650."""
_COUNTED_BEHIND = re.compile(r"(.+?)[\s-]*[x×*]\s*(\d+)", re.IGNORECASE)
OTHERS = "; `peftplan gpus` lists them; or a size such as 24GiB"
"""What else is accepted as a card."""
_NOT_IN_KEY = re.compile(r"[^a-z0-9+]")


class Row(TypedDict):
    """The fields of a card's row that find it, and those that are rows themselves. The others are as in `Gpu`."""

    id: str
    name: str
    aliases: list[str]
    total_mib_variants: list[dict[str, object]]
    cuda_total_mib: list[dict[str, object]]


class Cards(TypedDict):
    """The file of the catalogue."""

    gpus: list[Row]


class Reported(NamedTuple):
    """One public record of the device total that a program was told: torch `total_memory`, `cudaMemGetInfo` or HIP's."""

    mib: int
    os: str | None
    how: str
    source: str


class Variant(NamedTuple):
    """The `nvidia-smi` total under other settings than the usual ones (ECC the other way, an older driver, a modified card)."""

    mib: int
    when: str
    source: str


class Gpu(NamedTuple):
    """One card, or a size that a user gave: `capacity_bytes` (24GiB) or `sold_gb` (24GB), then only `id` and `name` besides.

    `compute_capability` is CUDA's (`8.9`) or AMD's chip name (`gfx942`); `multiprocessors` are known of cards since Turing;
    `bf16` and `fp8` mean arithmetic in hardware (torch emulates bf16 below compute capability 8.0). `unified`: memory
    shared with the CPU.
    """

    id: str
    name: str
    aliases: tuple[str, ...] = ()
    vendor: str | None = None
    kind: str | None = None
    unified: bool = False
    marketed_gb: float | None = None
    total_mib: int | None = None
    total_mib_source: str | None = None
    total_mib_variants: tuple[Variant, ...] = ()
    cuda_total_mib: tuple[Reported, ...] = ()
    compute_capability: str | None = None
    multiprocessors: int | None = None
    bf16: bool | None = None
    fp8: bool | None = None
    flags_source: str | None = None
    bandwidth_gb_per_s: float | None = None
    bandwidth_source: str | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    capacity_bytes: int | None = None
    sold_gb: float | None = None
    context_mib: float | None = None
    """The CUDA context that a user gave for it."""


OF_A_REQUEST = ("sold_gb", "context_mib")
"""Fields of `Gpu` that a user gives, and that no card of the catalogue has."""


@cache
def gpus() -> tuple[Gpu, ...]:
    """Every card of the catalogue, in its order."""
    return tuple(_gpu(row["id"]) for row in _rows())


def find_gpu(name: str) -> Gpu:
    """The card with this id, driver name or alias; `24GiB` and `40000MiB` are exact sizes, `24GB` and `24G` a card sold as such.

    Case, spaces, dashes and a leading maker's name do not matter. A name that several cards share means the one that its
    row documents as an alias, which is the smallest (`a100` is the 40 GB card).
    """
    if (capacity := _CAPACITY.fullmatch(name.strip())) is not None:
        return _anonymous(name.strip(), number=float(capacity[1]), unit=capacity[2].lower())
    gpu_id = _ids_by_key().get(_key(name))
    if gpu_id is None:
        meant = _meant(name)
        raise UnknownNameError("gpu", name, _rows_by_id(), also=OTHERS, meant={name.lower(): meant} if meant else {})
    return _gpu(gpu_id)


def _meant(name: str) -> str | None:
    """What a size without a unit, or a card with the number of GPUs behind it, should have been."""
    if _SIZE.fullmatch(name.strip()):
        return f"{name.strip()}GB"
    counted = _COUNTED_BEHIND.fullmatch(name.strip())
    return f"{counted[2]}x{counted[1]}" if counted and _key(counted[1]) in _ids_by_key() else None


def _anonymous(name: str, *, number: float, unit: str) -> Gpu:
    if not 1 <= number * _UNITS[unit] <= MAX_CAPACITY:
        raise InputError("gpu", name, f"accepted: a size above zero and at most {MAX_CAPACITY // GIB} GiB, such as 24GiB")
    if unit in _SOLD:
        return Gpu(id=name, name=name, sold_gb=number)
    return Gpu(id=name, name=name, capacity_bytes=round(number * _UNITS[unit]))


def _key(name: str) -> str:
    key = _NOT_IN_KEY.sub("", name.lower())
    maker = _MAKER.match(key)
    return key[maker.end() :] if maker else key


@cache
def _ids_by_key() -> dict[str, str]:
    """Every name to its card's id. Rows are ordered small before large, so a driver name that two cards share is the smaller."""
    ids = {_key(row["id"]): row["id"] for row in _rows()}
    for row in _rows():
        for name in (*row["aliases"], row["name"]):
            ids.setdefault(_key(name), row["id"])
    return ids


def _rows() -> list[Row]:
    return datafiles.load("gpus.json", Cards)["gpus"]


@cache
def _rows_by_id() -> dict[str, Row]:
    return {row["id"]: row for row in _rows()}


@cache
def _gpu(gpu_id: str) -> Gpu:
    row = _rows_by_id()[gpu_id]
    variants = [datafiles.record(Variant, variant) for variant in row["total_mib_variants"]]
    reported = [datafiles.record(Reported, total) for total in row["cuda_total_mib"]]
    return datafiles.record(Gpu, {**row, "total_mib_variants": variants, "cuda_total_mib": reported})
