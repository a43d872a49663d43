"""The CUDA module without CUDA: torch.cuda and NVML answer as on a machine with one H100."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("pynvml")

import pynvml
import torch

from peftplan.measure import cuda
from peftplan.measure.identity import allocator_settings

MIB = 2**20
UUID = "1b2c3d4e-0000-1111-2222-333344445555"
# as torch.cuda.memory_stats() names them; every other key is noise
STATS = {
    "allocated_bytes.all.current": 1, "allocated_bytes.all.peak": 3, "allocated_bytes.all.freed": 99,
    "reserved_bytes.all.current": 2, "reserved_bytes.all.peak": 4, "active_bytes.all.peak": 98,
    "allocated_bytes.small_pool.peak": 97,
}  # fmt: skip


class Machine:
    """What the driver says, changed by tests as they go."""

    def __init__(self) -> None:
        self.used = 500 * MIB
        self.processes: list[Any] = []
        self.uuids: list[str] = []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    here = Machine()
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, uuid=UUID)
    for name, answer in {
        "is_available": lambda: True,
        "set_device": lambda index: None,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda index: properties.name,
        "memory_stats": lambda device: STATS,
        "mem_get_info": lambda device: (70 * 2**30, 80 * 2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: here.uuids.append(uuid) or "handle",  # type: ignore[func-returns-value]
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=here.used),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: here.processes,
        "nvmlSystemGetDriverVersion": lambda: "550.54.15",
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    return here


def test_facts_and_counters(machine: Machine) -> None:
    device = cuda.open_device(0)
    facts = device.facts()
    assert (facts.gpu, facts.compute_capability, facts.total_bytes) == ("NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30)
    assert (facts.driver, facts.cuda) == ("550.54.15", torch.version.cuda)
    assert machine.uuids == [f"GPU-{UUID}"]
    assert device.read() == cuda.Reading(allocated=1, reserved=2, peak_allocated=3, peak_reserved=4)
    assert device.free_bytes() == 70 * 2**30


def test_the_process_is_found_by_its_id_or_not_at_all(machine: Machine) -> None:
    device = cuda.open_device(0)
    other = SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=9 * MIB)
    machine.processes = [other]
    assert device.process_bytes() is None  # as in a container
    machine.processes = [other, SimpleNamespace(pid=os.getpid(), usedGpuMemory=7 * MIB)]
    assert device.process_bytes() == 7 * MIB
    assert device.context_bytes() == 7 * MIB - 2  # reserved_bytes.all.current
    machine.processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]  # as on Windows
    assert device.process_bytes() is None


def test_the_context_is_what_the_device_uses_more_than_before(machine: Machine) -> None:
    device = cuda.open_device(0)
    machine.used += 400 * MIB
    assert device.before_bytes == 500 * MIB
    assert device.context_bytes() == 400 * MIB - 2


def test_without_nvml_there_are_torchs_figures(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uuid: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", missing)  # a slice of a MIG card
    device = cuda.open_device(0)
    assert (device.process_bytes(), device.used_bytes(), device.context_bytes(), device.facts().driver) == (None,) * 4
    assert device.read().peak_reserved == 4


def test_the_rank_is_the_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cuda.open_device().torch_device == torch.device("cuda", 3)
    assert cuda.open_device(1).torch_device == torch.device("cuda", 1)


def test_out_of_memory_is_torchs_or_a_librarys(machine: Machine) -> None:
    device = cuda.open_device(0)
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert device.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not device.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_settings_of_the_allocator_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    settings = allocator_settings()
    assert settings["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in settings


def test_no_other_module_asks_cuda() -> None:
    """One small module, so that a double can stand in for it."""
    from pathlib import Path

    rooms = Path(cuda.__file__).parent
    asking = [f.name for f in rooms.glob("*.py") if "torch.cuda" in f.read_text() and f.name != "cuda.py"]
    assert [name for name in asking if "torch.cuda." in _code(rooms / name)] == []


def _code(path: Any) -> str:
    """A module without its docstrings."""
    import ast

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)
