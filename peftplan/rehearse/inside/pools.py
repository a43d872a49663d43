"""Tasks of a thread pool run one after the other, in the order in which they are submitted: a rehearsal is then the same twice.

Where blocks lie, and so what is reserved, depends on the order of allocations, and a block that is not split counts whole.
Loaders that copy weights in threads (transformers, `core_model_loading.GLOBAL_WORKERS`) leave that order to timing. The order
here is one that a real run may have.

`submit` returns when its task is done, or after `PATIENCE`. So a task that waits for what the program does next hangs nothing:
the program loses these seconds once per pool. Such a task fails if its own time limit is shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from weakref import WeakSet

import torch

PATIENCE = 10.0
"""Seconds for which `submit` waits. A pool with a task that takes longer runs as it would without us from then on."""
COPIED = "threads copied to the card: here one after the other; in a real run timing decides the order"
LEFT_ALONE = f"a task of a thread pool took longer than {PATIENCE:.0f} s: from then on timing decides the order of its tasks"


def start(say: Callable[[str], None]) -> None:
    """Wait for each task of a pool. `say`: is told once that threads copied to the card, and of pools that are left alone."""
    submit = ThreadPoolExecutor.submit
    notes: list[str] = []
    left_alone: WeakSet[ThreadPoolExecutor] = WeakSet()

    def submit_and_wait(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        before = _allocations()
        future = submit(self, fn, *args, **kwargs)
        if self not in left_alone and not wait([future], PATIENCE).done:
            left_alone.add(self)
            say(LEFT_ALONE)
        if not notes and _allocations() > before:
            notes.append(COPIED)
            say(COPIED)
        return future

    ThreadPoolExecutor.submit = submit_and_wait  # type: ignore[assignment,method-assign]


def _allocations() -> int:
    """Blocks that were given out so far, on every card in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    counts = (torch._C._cuda_memoryStats(device)["allocation"]["all"]["allocated"] for device in range(torch.cuda.device_count()))
    return sum(counts)
