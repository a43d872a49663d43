"""What is wanted of a rehearsal, checked before anything runs."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peftplan.errors import InputError, RefusedError
from peftplan.hardware.gpus import Gpu, find_gpu
from peftplan.planning.verdicts import find_cards

SEVERAL = re.compile(r"(\d+)x(.+)")
MOST_RANKS = 65536
ALL = "all"


class Request(NamedTuple):
    """A checked request; `cards` are those that the process sees."""

    command: tuple[str, ...]
    card: Gpu | None
    cards: int
    world_size: int
    ranks: tuple[int, ...]
    max_host: int | None


def read(
    command: Sequence[str],
    *,
    gpu: str | None,
    steps: int,
    world_size: int | None,
    rank: int | str,
    timeout: float | None,
    max_host: str | None,
) -> Request:
    """The request. Raises InputError, naming the field."""
    if not command:
        raise RefusedError("COMMAND is missing: put the program and its arguments after --, as in -- python train.py")
    if isinstance(command, str):
        raise InputError("COMMAND", command, "accepted: a list of the program and its arguments")
    if not shutil.which(command[0], path=None) and not (Path(sys.executable).parent / command[0]).exists():
        raise InputError("COMMAND", command[0], "accepted: a program on PATH, or the path of one")
    if steps < 0:
        raise InputError("steps", steps, "accepted: a number of optimizer steps, or 0 to run until the program ends")
    if timeout is not None and not timeout > 0:
        raise InputError("timeout", timeout, "accepted: seconds, above 0")
    if world_size is not None and not 1 <= world_size <= MOST_RANKS:
        raise InputError("world_size", world_size, f"accepted: a number of ranks from 1 to {MOST_RANKS:,}")
    cards, card = _cards(gpu)
    world = world_size or 1
    return Request(tuple(command), card, cards, world, _ranks(rank, world), _bytes(max_host))


def _cards(gpu: str | None) -> tuple[int, Gpu | None]:
    if gpu is None:
        return 1, None
    several = SEVERAL.fullmatch(gpu)
    count, name = (int(several[1]), several[2]) if several else (1, gpu)
    if not 1 <= count <= MOST_RANKS:
        raise InputError("gpu", gpu, f"accepted: from 1 to {MOST_RANKS:,} cards")
    cards = find_cards(name)
    if len(cards) != 1:
        raise InputError("gpu", gpu, "accepted: one kind of card, such as rtx-4090 or 8xh100")
    if cards[0].vendor not in (None, "NVIDIA"):
        raise InputError("gpu", gpu, "accepted: a card of NVIDIA, or a size such as 24GiB; the emulated card speaks CUDA")
    return count, cards[0]


def _ranks(rank: int | str, world_size: int) -> tuple[int, ...]:
    if rank == ALL:
        return tuple(range(world_size))
    try:
        number = int(rank)
    except ValueError:
        number = -1
    if number < 0 or (world_size > 1 and number >= world_size):
        raise InputError("rank", rank, f"accepted: all, or a rank from 0 to {world_size - 1}")
    return (number,)


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    card = find_gpu(size)
    if card.capacity_bytes is None:
        raise InputError("max_host", size, "accepted: a size such as 8GiB")
    return card.capacity_bytes
