"""What a process uses on a card outside torch's allocator (the CUDA context), and torch's cuBLAS workspace inside it.

A context differs by card, driver, CUDA and by the kernels that were loaded, and no formula gives it. What is stated of a
card comes from public measurements of exactly this card, else it is None with the reason. A verdict needs a figure, so where
none is known it assumes one that was measured on another card (`context_for_verdict`).
Source: data/context.json, each row with its own source.
"""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from peftplan import datafiles
from peftplan.units import MIB

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu

TRAINING = "training"
CREATED = ("bare", "first tensor")
"""States of a measured process (data/context.json): a step of training was run, or only the context was created."""

EAGER = "eager"
"""Every kernel loaded at start, as before CUDA 11.7: 942 MiB where lazy loading takes 481 (an A100 with an old torch)."""

DEFAULT_WORKSPACE_BYTES = (4096 * 2 + 16 * 8) * 1024
"""`CUBLAS_WORKSPACE_CONFIG` default `:4096:2:16:8`, pairs of KiB and count: 8,519,680 bytes."""

HOPPER_WORKSPACE_BYTES = 4096 * 8 * 1024
"""`:4096:8`: 33,554,432 bytes."""

CUBLASLT_WORKSPACE_BYTES = 1024 * 1024
"""`CUBLASLT_WORKSPACE_SIZE`'s default, 1024 KiB."""

HOPPER_WORKSPACE_CAPABILITIES = ("9.0", "10.0", "11.0", "12.0")
_FIRST_UNCERTAIN_MAJOR = 9
_WORKSPACE_SOURCE = "torch aten/src/ATen/cuda/CublasHandlePool.cpp"


DEFAULT_CAPABILITY = (8, 0)
"""Whose kernels and workspaces count where no card is named: those of sm80 and sm86, the cards that most runs use."""


GENERATIONS = {
    **dict.fromkeys(("6.0", "6.1", "6.2"), "Pascal"),
    **dict.fromkeys(("7.0", "7.2"), "Volta"),
    "7.5": "Turing",
    **dict.fromkeys(("8.0", "8.6", "8.7"), "Ampere"),
    "8.9": "Ada",
    "9.0": "Hopper",
    **dict.fromkeys(("10.0", "10.3", "11.0", "12.0", "12.1"), "Blackwell"),
}
"""Compute capability → generation. Source: NVIDIA's list of GPUs by compute capability and the CUDA C++ Programming Guide."""


class Measurements(TypedDict):
    """The file of the contexts."""

    measurements: list[dict[str, object]]


class ContextMeasurement(NamedTuple):
    """One public measurement. `exact` is false where it was read from rounded or mixed output; `mib` is as recorded."""

    gpu: str
    state: str
    mib: float
    how: str
    torch: str | None
    cuda: str | None
    driver: str | None
    os: str | None
    year: int | None
    module_loading: str | None
    exact: bool
    source: str
    note: str | None


class Looked(NamedTuple):
    """Bytes that were looked up, or None, with the reason and, where there is a figure, its source."""

    bytes: int | None
    why: str
    source: str | None = None


def context_measurements(gpu: "Gpu") -> tuple[ContextMeasurement, ...]:
    """Every public measurement on exactly this card, in whatever state and with whatever software."""
    return tuple(m for m in _measurements() if m.gpu == gpu.id)


@cache
def _measurements() -> tuple[ContextMeasurement, ...]:
    return tuple(
        datafiles.record(ContextMeasurement, row) for row in datafiles.load("context.json", Measurements)["measurements"]
    )


def context_bytes(gpu: "Gpu") -> Looked:
    """The context of a process with today's lazy module loading: after a training step if measured so, else as created.

    The largest such figure of this card. Left out where only a created context was measured: the kernels that training
    loads on top (36 MiB on a T4, the one card where both are recorded).
    """
    measured = context_measurements(gpu)
    current = [m for m in measured if m.module_loading != EAGER]
    usable = [m for m in current if m.state == TRAINING] or [m for m in current if m.state in CREATED]
    if not usable:
        return Looked(None, _nothing_current(measured))
    largest = max(usable, key=lambda m: m.mib)
    state = "after a training step" if largest.state == TRAINING else "as created, before training loads its kernels"
    software = f"torch {largest.torch}" if largest.torch else "torch version not recorded"
    rounding = "" if largest.exact else f"; {largest.note}"
    why = f"{largest.mib:g} MiB measured {state} ({software}){rounding}"
    return Looked(int(largest.mib * MIB), why, largest.source)


class Context(NamedTuple):
    """The context that a verdict counts, and whether it was measured on another card."""

    bytes: int
    why: str
    assumed: bool


def context_for_verdict(gpu: "Gpu") -> Context:
    """The context of a card: as given, else as measured on it, else the largest current one of its generation, else of all.

    Current means loaded lazily, in whatever state (`EAGER` is left out). A size without a card, and generations without a
    measurement (Volta, Hopper, AMD's), take the largest of all: 828 MiB.
    """
    if gpu.context_mib is not None:
        return Context(int(gpu.context_mib * MIB), "as given", assumed=False)
    if (measured := context_bytes(gpu)).bytes is not None:
        return Context(measured.bytes, measured.why, assumed=False)
    current = [m for m in _measurements() if m.module_loading != EAGER]
    generation = GENERATIONS.get(gpu.compute_capability or "")
    of_generation = [m for m in current if generation and _generation(m.gpu) == generation]
    largest = max(of_generation or current, key=lambda m: m.mib)
    cards = f"{generation} card" if of_generation else "card"
    why = f"not known of this card; assumed: {largest.mib:g} MiB, the largest recorded of any {cards} ({largest.gpu})"
    return Context(int(largest.mib * MIB), why, assumed=True)


@cache
def _generation(gpu_id: str) -> str | None:
    from peftplan.hardware.gpus import find_gpu

    return GENERATIONS.get(find_gpu(gpu_id).compute_capability or "")


def _nothing_current(measured: tuple[ContextMeasurement, ...]) -> str:
    if not measured:
        return "no public measurement of this card's CUDA context is known"
    seen = ", ".join(f"{m.mib:g} MiB ({m.state}{', eager' if m.module_loading == EAGER else ''})" for m in measured)
    return f"no public measurement of this card's CUDA context with lazy module loading is known; others: {seen}"


def cublas_workspace_bytes(compute_capability: str | None) -> Looked:
    """Default workspace that torch allocates per cuBLAS handle and stream, in bytes; it counts as allocated memory.

    Equation: Σ size × count over `CUBLAS_WORKSPACE_CONFIG`. Larger on 9.0 and, in recent torch, on 10.0, 11.0 and 12.0
    (older torch: 8,519,680 there). None for other capabilities from 9.0 on (10.3, 12.1) and for AMD: not recorded. Left
    out: what the environment variable changes, and a second handle (backward runs in its own thread).
    """
    if compute_capability is None:
        return Looked(None, "the card's compute capability is not known")
    if compute_capability in HOPPER_WORKSPACE_CAPABILITIES:
        return Looked(HOPPER_WORKSPACE_BYTES, f":4096:8 on compute capability {compute_capability}", _WORKSPACE_SOURCE)
    major = compute_capability.partition(".")[0]
    if major.isdigit() and int(major) < _FIRST_UNCERTAIN_MAJOR:
        why = f":4096:2:16:8 on compute capability {compute_capability}"
        return Looked(DEFAULT_WORKSPACE_BYTES, why, _WORKSPACE_SOURCE)
    return Looked(None, f"torch's default workspace on {compute_capability} is not recorded")
