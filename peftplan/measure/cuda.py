"""The device. This is the only module that queries torch.cuda and NVML; tests replace it with a double.

Bytes are integers. `allocated` and `reserved` are those of torch's caching allocator (`torch.cuda.memory_stats`, torch);
`process` is what the driver counts for this process, context included, and `used` for the whole device (NVML, nvidia-ml-py 13).
In a container the driver does not know the process by our id: `process` is then None, never a guess.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from peftplan.errors import MissingExtraError, PeftplanError

SNAPSHOT_ENTRIES = 1_000_000
"""Allocator events that a snapshot keeps, the latest ones (`_record_memory_history(max_entries=)`)."""


class NoCudaError(PeftplanError):
    """There is no CUDA device to measure on."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about a device that a measurement depends on."""

    gpu: str
    compute_capability: str
    total_bytes: int
    """The device's memory as CUDA reports it."""
    driver: str | None
    cuda: str | None


@dataclass(frozen=True, slots=True)
class Reading:
    """The allocator's counters: current values, and peaks since the last reset."""

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int


class Device(Protocol):
    """What a measurement needs of a device."""

    torch_device: torch.device
    backend: str
    before_bytes: int | None
    """Bytes in use on the whole device before this process touched it, as the driver reports them."""

    def facts(self) -> Facts: ...
    def synchronize(self) -> None: ...
    def empty_cache(self) -> None: ...
    def reset_peaks(self) -> None: ...
    def read(self) -> Reading: ...
    def free_bytes(self) -> int: ...
    def process_bytes(self) -> int | None: ...
    def used_bytes(self) -> int | None: ...
    def context_bytes(self) -> int | None: ...
    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]: ...
    def is_out_of_memory(self, error: BaseException) -> bool: ...
    def start_history(self) -> None: ...
    def save_history(self, path: Path) -> None: ...


class Cuda:
    """One CUDA device of this process."""

    backend = "nccl"

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self._nvml = _nvml_handle(index)
        self.before_bytes = self.used_bytes()
        torch.cuda.set_device(index)

    def facts(self) -> Facts:
        """Name, compute capability and memory as CUDA reports them, driver and CUDA versions."""
        properties = torch.cuda.get_device_properties(self.torch_device)
        return Facts(
            gpu=properties.name,
            compute_capability=f"{properties.major}.{properties.minor}",
            total_bytes=properties.total_memory,
            driver=_driver_version() if self._nvml is not None else None,
            cuda=torch.version.cuda,
        )

    def synchronize(self) -> None:
        """Wait for every kernel, so that no free is pending."""
        torch.cuda.synchronize(self.torch_device)

    def empty_cache(self) -> None:
        """Return every segment without a live block to the driver."""
        torch.cuda.empty_cache()

    def reset_peaks(self) -> None:
        """Reset peaks to the current values."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def read(self) -> Reading:
        """The allocator's counters."""
        stats = torch.cuda.memory_stats(self.torch_device)
        kinds = ("allocated_bytes", "reserved_bytes")
        return Reading(*(int(stats.get(f"{kind}.all.{at}", 0)) for at in ("current", "peak") for kind in kinds))

    def free_bytes(self) -> int:
        """Bytes that the driver has left (`cudaMemGetInfo`)."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def process_bytes(self) -> int | None:
        """Bytes that the driver counts for this process: context, kernels, allocator; None if it does not report them."""
        if self._nvml is None:
            return None
        import pynvml  # type: ignore[import-untyped]

        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._nvml)
        except pynvml.NVMLError:
            return None
        return next((int(p.usedGpuMemory) for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)

    def used_bytes(self) -> int | None:
        """Bytes in use on the whole device, by all processes, as the driver reports them."""
        if self._nvml is None:
            return None
        import pynvml

        return int(pynvml.nvmlDeviceGetMemoryInfo(self._nvml).used)

    def context_bytes(self) -> int | None:
        """Bytes of this process outside the allocator's segments. Before the first tensor this is the context."""
        process, used = self.process_bytes(), self.used_bytes()
        if process is None and used is not None and self.before_bytes is not None:
            process = used - self.before_bytes
        return None if process is None else process - self.read().reserved

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """CUDA's autocast."""
        return torch.autocast("cuda", dtype=dtype)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether it is torch's out-of-memory error, or CUDA's from a library outside the allocator (bitsandbytes, NCCL)."""
        return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()

    def start_history(self) -> None:
        """Record every allocation from now on, with its Python stack."""
        torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES, stacks="python")

    def save_history(self, path: Path) -> None:
        """Write torch's memory snapshot (a pickle, as pytorch.org/memory_viz reads it) and stop recording."""
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)


def open_device(index: int | None = None) -> Device:
    """The CUDA device of this process: `index`, else `LOCAL_RANK` as torchrun and accelerate set it, else 0.

    Raises NoCudaError if there is none.
    """
    _check_cuda()
    return Cuda(int(os.environ.get("LOCAL_RANK", "0")) if index is None else index)


def card_name() -> str:
    """The name of the first device. Creates no context. Raises NoCudaError if there is no device."""
    _check_cuda()
    return str(torch.cuda.get_device_name(0))


def _check_cuda() -> None:
    if not torch.cuda.is_available():
        why = f"torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else "torch sees none"
        raise NoCudaError(f"measure needs a CUDA GPU, and {why}; `peftplan estimate --engine trace` needs none")


def _nvml_handle(index: int) -> Any:
    """NVML's handle of the device, found by its UUID, since `CUDA_VISIBLE_DEVICES` renumbers; None if NVML has none (MIG)."""
    try:
        import pynvml
    except ImportError:
        raise MissingExtraError("measure (nvidia-ml-py)", "measure") from None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except pynvml.NVMLError:
        return None


def _driver_version() -> str:
    import pynvml

    return str(pynvml.nvmlSystemGetDriverVersion())
