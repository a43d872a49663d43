"""`nvidia-smi` for programs that start it: what NVML says of the emulated cards.

    nvidia-smi                                    a line per card
    nvidia-smi -L                                 names and UUIDs
    nvidia-smi --query-gpu=FIELD,FIELD --format=csv[,noheader][,nounits] [-i INDEX]

It is a program of its own and imports the standard library alone. What it cannot answer it says, in the rehearsal's notes too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from ctypes import CDLL, Structure, byref, c_int, c_uint, c_ulonglong, c_void_p, create_string_buffer
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
UNITS = {"memory.total": "MiB", "memory.used": "MiB", "memory.free": "MiB", "utilization.gpu": "%", "power.draw": "W"}


class Memory(Structure):
    """NVML's `nvmlMemory_t`, in bytes."""

    _fields_ = [(name, c_ulonglong) for name in ("total", "free", "used")]


def cards() -> Iterator[dict[str, str]]:
    """Each card: field of `--query-gpu` → its text, without units."""
    nvml = CDLL(LIBRARY)
    count, handle, memory, text = c_uint(), c_void_p(), Memory(), create_string_buffer(96)
    major, minor = c_int(), c_int()
    nvml.nvmlInit_v2()
    nvml.nvmlDeviceGetCount_v2(byref(count))
    for index in range(count.value):
        nvml.nvmlDeviceGetHandleByIndex_v2(index, byref(handle))
        nvml.nvmlDeviceGetMemoryInfo(handle, byref(memory))
        nvml.nvmlDeviceGetCudaComputeCapability(handle, byref(major), byref(minor))
        nvml.nvmlDeviceGetName(handle, text, len(text))
        name = text.value.decode()
        nvml.nvmlDeviceGetUUID(handle, text, len(text))
        uuid = text.value.decode()
        nvml.nvmlSystemGetDriverVersion(text, len(text))
        yield {
            "index": str(index),
            "count": str(count.value),
            "name": name,
            "gpu_name": name,
            "uuid": uuid,
            "gpu_uuid": uuid,
            "driver_version": text.value.decode(),
            "compute_cap": f"{major.value}.{minor.value}",
            "memory.total": str(memory.total >> 20),
            "memory.used": str(memory.used >> 20),
            "memory.free": str(memory.free >> 20),
            "utilization.gpu": "0",
            "temperature.gpu": "40",
            "power.draw": "0.00",
        }


def answer(arguments: list[str]) -> Iterator[str]:
    """The lines that are printed. Raises SystemExit for options that are not answered."""
    parser = argparse.ArgumentParser("nvidia-smi", add_help=False, allow_abbrev=False)
    parser.add_argument("-L", "--list-gpus", action="store_true")
    parser.add_argument("-i", "--id")
    parser.add_argument("--query-gpu")
    parser.add_argument("--format", default="csv")
    options, others = parser.parse_known_args(arguments)
    if others:
        _say(f"nvidia-smi {' '.join(arguments)} was not answered")
        sys.exit(f"nvidia-smi of a rehearsal does not answer {' '.join(others)}")
    wanted = None if options.id is None else options.id.split(",")
    chosen = [card for card in cards() if wanted is None or card["index"] in wanted or card["uuid"] in wanted]
    if options.query_gpu:
        yield from _table(chosen, options.query_gpu.split(","), options.format.split(","))
    for card in [] if options.query_gpu else chosen:
        name = f"GPU {card['index']}: {card['name']} (UUID: {card['uuid']})"
        yield name if options.list_gpus else f"{name}  {card['memory.used']}MiB / {card['memory.total']}MiB"


def _table(chosen: list[dict[str, str]], fields: list[str], form: list[str]) -> Iterator[str]:
    fields = [field.strip() for field in fields]
    units = {} if "nounits" in [part.strip() for part in form] else UNITS
    if "noheader" not in [part.strip() for part in form]:
        yield ", ".join(f"{field} [{UNITS[field]}]" if field in UNITS else field for field in fields)
    for card in chosen:
        yield ", ".join(f"{card.get(field, '[N/A]')} {units.get(field, '')}".strip() for field in fields)


def _say(text: str) -> None:
    if "EMULATED_SHARED" in os.environ:
        with Path(os.environ["EMULATED_SHARED"]).with_name("notes.txt").open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    print("\n".join(answer(sys.argv[1:])))
