"""What is wanted of a rehearsal, checked before anything runs."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.hardware.gpus import Gpu, find_gpu
from peftplan.planning.verdicts import find_cards
from peftplan.rehearse.settings import BALANCED, ROUTINGS

SEVERAL = re.compile(r"(\d+)x(.+)")
MOST_RANKS = 65536
ALL = "all"
MOST_OF_FREE = 80
"""Per cent of the free host memory that a rehearsal may take unless told otherwise."""
SEQ_LEN = 2048
KINDS = ("text", "int", "float", "messages", "turns", "image", "images")
"""What a column of synthetic rows may hold; `messages` have a role and a content, `turns` a `from` and a `value`."""
KIND_OF = {
    "label": "int",
    "labels": "int",
    "score": "float",
    "messages": "messages",
    "conversations": "turns",
    "image": "image",
    "images": "images",
}
"""Kind of a column whose kind is not stated, by its name."""


class Request(NamedTuple):
    """A checked request.

    `cards`: those that the process sees. `ranks`: those that are played first; with `every_rank`, the others that a launcher
    makes follow. `max_host`: bytes. `data`: column of a row → its kind.
    """

    command: tuple[str, ...]
    card: Gpu | None
    cards: int
    world_size: int
    ranks: tuple[int, ...]
    every_rank: bool
    max_host: int
    steps: int
    timeout: float | None
    keep_writes: bool
    network: bool
    snapshot: Path | None
    record: bool
    data: Mapping[str, str] | None
    seq_len: int
    routing: str


def read(
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
    routing: str = BALANCED,
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
    if seq_len is not None and (data is None or seq_len < 1):
        raise InputError("seq_len", seq_len, "accepted: tokens of a row, above 0, with --data synthetic")
    snapshot = None if snapshot is None else Path(snapshot)
    if snapshot is not None and not snapshot.parent.is_dir():
        raise InputError("snapshot", str(snapshot), "accepted: a file in an existing folder")
    if routing not in ROUTINGS:
        raise InputError("routing", routing, f"accepted: {', '.join(ROUTINGS)}")
    cards, card = _cards(gpu)
    world = world_size or 1
    return Request(
        command=tuple(command),
        card=card,
        cards=cards,
        world_size=world,
        ranks=_ranks(rank, world),
        every_rank=rank == ALL,
        max_host=_bytes(max_host) or free_host_bytes() * MOST_OF_FREE // 100,
        steps=steps,
        timeout=timeout,
        keep_writes=keep_writes,
        network=network,
        snapshot=snapshot,
        record=record,
        data=None if data is None else _columns(data),
        seq_len=seq_len or SEQ_LEN,
        routing=routing,
    )


def free_host_bytes() -> int:
    """Host memory that is free, or that a container may still take."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, taken = (Path("/sys/fs/cgroup", f"memory.{what}") for what in ("max", "current"))
    if limit.exists() and (bound := limit.read_text(encoding="ascii").strip()).isdigit():
        free = min(free, int(bound) - int(taken.read_text(encoding="ascii")))
    return max(free, 0)


def _columns(text: str) -> dict[str, str]:
    """Column → kind, from `synthetic` or `synthetic:NAME,NAME=KIND`."""
    word, _, names = text.partition(":")
    kinds = {}
    for part in names.split(",") if names else ["text"]:
        name, _, kind = part.partition("=")
        kinds[name] = kind or KIND_OF.get(name, "text")
    if word != "synthetic" or "" in kinds or not set(kinds.values()) <= set(KINDS):
        raise InputError("data", text, f"accepted: synthetic, or synthetic:COLUMN,COLUMN=KIND with {', '.join(KINDS)}")
    return kinds


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
    try:
        nbytes = find_gpu(size).capacity_bytes
    except UnknownNameError:
        nbytes = None
    if nbytes is None:
        raise InputError("max_host", size, "accepted: a size such as 8GiB")
    return nbytes
