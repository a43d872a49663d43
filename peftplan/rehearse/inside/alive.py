"""What is alive on a device, from torch's own memory history: by the line of the program that allocated it, and by category.

Weights, gradients and optimizer states are told by their addresses; other blocks by the phase that made them: what a forward made
and backward still needs are activations, all else is temporary.
"""

from __future__ import annotations

import gc
import os
import site
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

MOST_EVENTS = 4_000_000
MOST_SHOWN = 12
OURS = "peftplan/rehearse/inside"
TORCH = os.path.dirname(torch.__file__) + os.sep
RECOMPUTING = "torch/utils/checkpoint.py"
"""A frame of this file in backward: a forward that checkpointing runs again."""
LIBRARIES = tuple(
    dict.fromkeys(
        [*site.getsitepackages(), site.getusersitepackages(), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))]
    )
)
SHARDING = ("torch/distributed/fsdp/", "torch/distributed/_composable/", "deepspeed/runtime/zero/")
"""Files of what shards weights, gradients and states over ranks."""
BUCKETS = "torch/nn/parallel/distributed.py"
"""The file that lets DDP's reducer make its buckets; the model's own lines are called from there too."""


class Block(NamedTuple):
    """One block: its address, its bytes as the allocator counts them, when it was made, and the frames of who asked."""

    address: int
    bytes: int
    time: int
    frames: tuple[Mapping[str, Any], ...]


class Persistent:
    """Addresses of tensors whose category is known, from the moments at which they are all there."""

    def __init__(self) -> None:
        self.category: dict[int, str] = {}

    def find_weights(self) -> None:
        """Parameters and quantization states of every module, when the first step begins."""
        modules = [thing for thing in objects() if issubclass(type(thing), torch.nn.Module)]
        parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}.values()
        some_frozen = any(not p.requires_grad for p in parameters)
        for parameter in parameters:
            adapter = some_frozen and parameter.requires_grad
            self._name(parameter, "adapter_weights" if adapter else "weights")
            for tensor in _tensors_of(getattr(parameter, "quant_state", None)):
                self._name(tensor, "quant_state")
        for module in modules:
            for buffer in module._buffers.values():
                self._name(buffer, "buffers")

    def find_gradients(self, optimizer: Any) -> None:
        """Gradients of what an optimizer trains, as it is about to step."""
        for parameter in _parameters(optimizer):
            self._name(parameter.grad, "gradients")

    def find_states(self, optimizer: Any) -> None:
        """An optimizer's states, after it has stepped."""
        for state in optimizer.state.values():
            for tensor in _tensors_of(state):
                self._name(tensor, "optimizer_states")

    def find_workspaces(self, device: int) -> None:
        """cuBLAS' workspaces, at the end: what is freed when torch gives them up."""
        before = {block.address for block in _alive(device)}
        torch._C._cuda_clearCublasWorkspaces()
        for address in before - {block.address for block in _alive(device)}:
            self.category[address] = "workspaces"

    def _name(self, tensor: Any, category: str) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
            tensor = getattr(tensor, "_local_tensor", tensor)  # a DTensor's own part
            if (start := address(tensor)) is not None:
                self.category[start] = category


def objects() -> list[Any]:
    """All objects that Python's collector knows, those too that a program has set aside (`gc.freeze`)."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    listed = gc.get_objects()
    if frozen:
        gc.freeze()
    return listed


def address(tensor: Any) -> int | None:
    """Where a tensor's storage lies; None of one without memory, as torch.compile keeps them of what it traced."""
    try:
        return int(tensor.untyped_storage().data_ptr()) or None
    except RuntimeError:
        return None


def _parameters(optimizer: Any) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _tensors_of(holder: Any, *, deep: int = 2) -> Iterator[Any]:
    """Tensors among the values of a mapping, or of an object, and of objects inside it."""
    values: Iterable[Any] = (
        holder.values() if isinstance(holder, Mapping) else vars(holder).values() if hasattr(holder, "__dict__") else ()
    )
    for value in list(values):
        if isinstance(value, torch.Tensor):
            yield value
        elif deep and hasattr(value, "__dict__") and not isinstance(value, type):
            yield from _tensors_of(value, deep=deep - 1)


@cache
def of_library(file: str) -> bool:
    """Whether a file belongs to Python, to an installed package, or to no file at all."""
    return not file.endswith(".py") or file.startswith(LIBRARIES) or "site-packages" in file or OURS in file


def line_of(frames: Iterable[Mapping[str, Any]]) -> tuple[str, int, str]:
    """The innermost line of Python outside torch and the standard library, else the innermost: (file, line, function)."""
    python = [frame for frame in frames if str(frame["filename"]).endswith(".py") and OURS not in frame["filename"]]
    frame = next((frame for frame in python if not _of_torch(frame["filename"])), python[0] if python else None)
    return (frame["filename"], frame["line"], frame["name"]) if frame else ("", 0, "")


@cache
def _of_torch(file: str) -> bool:
    return file.startswith(TORCH) or ("site-packages" not in file and of_library(file))


def now(device: int, persistent: Persistent, marks: list[tuple[int, int, str]]) -> list[dict[str, Any]]:
    """What is alive now, by line and category."""
    events = torch.cuda.memory._snapshot(device)["device_traces"][device]
    times = {event["addr"]: event["time_us"] for event in events if event["action"] == "alloc"}
    blocks = [block._replace(time=times.get(block.address, 0)) for block in _alive(device)]
    return by_line(categories(blocks, persistent, marks, marks[-1][0]))


def _alive(device: int) -> list[Block]:
    segments = torch._C._cuda_memorySnapshot(None)["segments"]
    blocks = (block for segment in segments if segment["device"] == device for block in segment["blocks"])
    return [Block(b["address"], b["size"], 0, tuple(b.get("frames", ()))) for b in blocks if b["state"] == "active_allocated"]


def at_peak(device: int) -> tuple[int, list[Block]]:
    """When the allocated bytes of a device were highest (µs), and the blocks of then."""
    events = torch.cuda.memory._snapshot(device)["device_traces"][device]
    moment, most, allocated = -1, -1, 0
    sizes: dict[int, int] = {}
    for index, event in enumerate(events):
        if event["action"] == "alloc":
            sizes[event["addr"]] = event["size"]
            allocated += event["size"]
        elif event["action"] == "free_completed":
            allocated -= sizes.pop(event["addr"], 0)
        if allocated > most:
            moment, most = index, allocated
    alive: dict[int, Block] = {}
    for event in events[: moment + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = Block(event["addr"], event["size"], event["time_us"], tuple(event.get("frames", ())))
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    return (events[moment]["time_us"] if moment >= 0 else 0), list(alive.values())


def categories(
    blocks: Iterable[Block], persistent: Persistent, marks: list[tuple[int, int, str]], moment: int
) -> Iterator[tuple[Block, str]]:
    """Each block that was alive at a moment, with its category."""
    computing = phase_at(marks, moment) in ("forward", "backward")
    for block in blocks:
        while_computing = category(block, persistent, marks)
        yield block, "temporaries" if while_computing == "activations" and not computing else while_computing


def category(block: Block, persistent: Persistent, marks: list[tuple[int, int, str]]) -> str:
    """A block's category while forward or backward runs."""
    known = persistent.category.get(block.address)
    phase = phase_at(marks, block.time)
    if known in ("weights", "adapter_weights", "quant_state", "buffers") and phase != "load":
        known = None  # the address was used again
    if (known == "gradients" and phase != "backward") or (known == "optimizer_states" and phase == "forward"):
        known = None
    if known is None:
        known = _of_sharding(block)
    if known is None:
        needed_later = phase == "forward" or any(RECOMPUTING in frame["filename"] for frame in block.frames)
        known = "activations" if needed_later else "temporaries"
    return known


def _of_sharding(block: Block) -> str | None:
    """Whether a block was made by what gathers weights from other ranks, or sends to them."""
    innermost = next((frame["filename"] for frame in block.frames if str(frame["filename"]).endswith(".py")), "")
    if BUCKETS in innermost:
        return "communication"
    frames = [frame for frame in block.frames if any(part in frame["filename"] for part in SHARDING)]
    if not frames:
        return None
    return "communication" if any("reduce" in frame["name"] for frame in frames) else "gathered_weights"


def phase_at(marks: list[tuple[int, int, str]], moment: int) -> str:
    """The phase that ran at a time (µs)."""
    return marks[max(0, bisect_right(marks, (moment, 1 << 60, "")) - 1)][2]


def by_line(blocks: Iterable[tuple[Block, str]]) -> list[dict[str, Any]]:
    """Blocks summed by line and category, the largest sums first."""
    sums: dict[tuple[str, int, str, str], list[int]] = {}
    for block, category in blocks:
        total = sums.setdefault((*line_of(block.frames), category), [0, 0])
        total[0] += block.bytes
        total[1] += 1
    largest = sorted(sums.items(), key=lambda item: -item[1][0])[:MOST_SHOWN]
    return [
        {
            "file": file,
            "line": line,
            "function": function,
            **({"category": category} if category else {}),
            "bytes": size,
            "blocks": count,
        }
        for (file, line, function, category), (size, count) in largest
    ]
