"""The fourth way to a number: the real program over torch's own allocator, on a card whose kernels do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    snapshot: Path | None = None,
    stdout: int | None = None,
) -> Rehearsal:
    """Run a training program without a GPU and return what it needs, as torch's own allocator counted it.

    The program is the caller's own code. `gpu`: a card, or `8xh100`. `steps`: optimizer steps after which it is ended, 0 lets it
    end itself. `world_size` and `rank` (or `all`): one process plays one rank. `max_host`: a size such as `8GiB` that
    what it writes may take. `stdout`: a file descriptor for its output.

    Raises InputError for what no rehearsal can be, RefusedError where this machine allows none, MissingExtraError without torch.
    """
    from peftplan.rehearse import program, request

    checked = request.read(command, gpu=gpu, steps=steps, world_size=world_size, rank=rank, timeout=timeout, max_host=max_host)
    results = [
        program.rehearse(
            checked.command,
            card=checked.card,
            cards=checked.cards,
            world_size=checked.world_size,
            rank=number,
            steps=steps,
            timeout=timeout,
            keep_writes=keep_writes,
            network=network,
            max_host=checked.max_host,
            snapshot=snapshot,
            stdout=stdout,
        )
        for number in checked.ranks
    ]
    worst = max(results, key=lambda result: (result.oom is not None, result.needed_bytes))
    return replace(worst, ranks=tuple(rank for result in results for rank in result.ranks))
