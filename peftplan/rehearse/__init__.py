"""The fourth way to a number: the real program over torch's own allocator, on a card whose kernels do nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftplan.rehearse.request import Request
    from peftplan.results.rehearsal import Rehearsal


def rehearse(
    command: Sequence[str],
    *,
    gpu: str | None = None,
    steps: int = 3,
    world_size: int | None = None,
    rank: int | str = 0,
    timeout: float | None = None,
    max_host: str | None = None,
    keep_writes: bool = False,
    network: bool = False,
    snapshot: Path | str | None = None,
    record: bool = False,
    data: str | None = None,
    seq_len: int | None = None,
    routing: str = "balanced",
    stdout: int | None = None,
) -> Rehearsal:
    """Run a training program without a GPU and return what it needs, as torch's own allocator counted it.

    The program is the caller's own code. `gpu`: a card, or `8xh100`. `steps`: optimizer steps after which it is ended, 0 lets it
    end itself. `world_size` and `rank` (or `all`): one process plays one rank. `timeout`: seconds. `max_host`: a size such as
    `8GiB` that its processes and what they write may take of the host, else 80 % of what is free. `record`: keep every
    allocation in `recording`, for a timeline. `data`: `synthetic`, or `synthetic:prompt,completion`, answers for data sets that
    are not here with rows of `seq_len` tokens. `routing`: how many tokens each expert of a mixture gets, `balanced` or `worst`,
    all tokens the same experts. `stdout`: a file descriptor for its output.

    Raises InputError for what no rehearsal can be, RefusedError where this machine allows none, MissingExtraError without torch.
    """
    from peftplan.rehearse import request

    checked = request.read(
        command,
        gpu=gpu,
        steps=steps,
        world_size=world_size,
        rank=rank,
        timeout=timeout,
        max_host=max_host,
        keep_writes=keep_writes,
        network=network,
        snapshot=snapshot,
        record=record,
        data=data,
        seq_len=seq_len,
        routing=routing,
    )
    return run(checked, stdout=stdout)


def run(checked: Request, *, stdout: int | None = None) -> Rehearsal:
    """Rehearse what was asked and checked, each rank that is wanted after the other."""
    from peftplan.rehearse import program

    results = [program.rehearse(checked, rank=number, stdout=stdout) for number in checked.ranks]
    if checked.every_rank:
        launched = range(len(results), results[0].world_size)
        results += [program.rehearse(checked, rank=number, stdout=stdout) for number in launched]
    worst = max(results, key=lambda result: (result.oom is not None, result.needed_bytes))
    return replace(worst, ranks=tuple(rank for result in results for rank in result.ranks))


class _Callable(ModuleType):
    """This room, which is also the function that it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Rehearsal:
        return rehearse(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
