"""Run a program on an emulated card and read what it left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftplan.errors import InputError, RefusedError
from peftplan.hardware.context import context_for_verdict
from peftplan.hardware.gpus import Gpu
from peftplan.hardware.usable import usable_bytes
from peftplan.planning.verdicts import capability, stated, usable_and_room
from peftplan.rehearse import scratch
from peftplan.rehearse.card import library
from peftplan.rehearse.settings import VARIABLE, Settings
from peftplan.rehearse.settings import environment as ranked
from peftplan.results.estimate import TIGHT, Verdict
from peftplan.results.rehearsal import Alive, OutOfMemory, Rank, Rehearsal, Step
from peftplan.units import GIB, MIB

UNLIMITED = 1000 * GIB
"""The memory of a card where none is named."""
GRACE = 5
"""Seconds that a program has to end once it was told to."""
SITE = Path(__file__).parent / "inside" / "site"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled", "COMET_MODE": "disabled"}
"""What keeps libraries from asking a network that is not there."""


def rehearse(
    command: Sequence[str],
    *,
    card: Gpu | None = None,
    cards: int = 1,
    world_size: int = 1,
    rank: int = 0,
    steps: int = 3,
    timeout: float | None = None,
    keep_writes: bool = False,
    network: bool = False,
    max_host: int | None = None,
    snapshot: Path | None = None,
    stdout: int | None = None,
) -> Rehearsal:
    """Run `command` until `steps` optimizer steps are done, on `cards` cards like `card`, as one rank of a world.

    `max_host`: bytes of host memory that the scratch layer may take, else 80 % of what is free. `stdout`: a file descriptor for
    the program's output, else ours. Raises RefusedError where nothing can be started.
    """
    preload = library()
    with tempfile.TemporaryDirectory(prefix="peftplan-rehearsal-") as name:
        folder = Path(name)
        settings = Settings(name, steps, rank, world_size, snapshot is not None, not keep_writes)
        environment = _environment(settings, card, cards, preload, network=network)
        layer = [sys.executable, "-m", "peftplan.rehearse.scratch", name, str(_host_mib(max_host))]
        layer += ["1" if network else "0", "1" if keep_writes else "0"]
        code, timed_out, seconds = _run([*layer, *command], environment, timeout=timeout, stdout=stdout)
        if code == scratch.FAILED and not list(folder.glob("started")):
            raise RefusedError(
                "this system lets no user make namespaces, which keep the program from your files and the network; "
                "to run it without them, add --keep-writes --network"
            )
        if code == NOT_THERE and not list(folder.glob("*.json")):
            raise InputError("COMMAND", command[0], "accepted: a program that is on PATH")
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank*.json"))]
        stand_ins = _lines(folder / "stand-ins.txt")
        if snapshot is not None and (pickles := sorted(folder.glob("*.pickle"))):
            snapshot.write_bytes(pickles[0].read_bytes())
    world_size = max((report["world_size"] for report in reports), default=world_size)  # a launcher says it
    settings = settings._replace(world_size=world_size)
    replaced = [*stand_ins, *_replaced(settings, keep_writes=keep_writes, network=network)]
    return _result(command, reports, code, card, timed_out=timed_out, seconds=seconds, settings=settings, replaced=replaced)


def _lines(path: Path) -> list[str]:
    return list(dict.fromkeys(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


NOT_THERE = 127
"""A shell's exit code for a command that is not there."""


def _environment(settings: Settings, card: Gpu | None, cards: int, preload: Path, *, network: bool) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    context = context_for_verdict(card).bytes if card else 0
    environment |= {
        VARIABLE: settings.to_text(),
        "PEFTPLAN_PRELOAD": _first(preload / "card.so", environment.get("LD_PRELOAD")),
        "LD_LIBRARY_PATH": _first(preload, environment.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _first(SITE, environment.get("PYTHONPATH")),
        "PATH": _first(Path(sys.executable).parent, environment.get("PATH")),
        "EMULATED_COUNT": str(max(cards, min(settings.world_size, MOST_LOCAL))),
        "EMULATED_BYTES": str(usable_bytes(card).bytes if card else UNLIMITED),
        "EMULATED_CONTEXT": str(context),
        "EMULATED_CAPABILITY": capability(card),
        "EMULATED_NAME": card.name if card else "emulated card",
        **({} if network else OFFLINE),
    }
    if settings.world_size > 1:
        environment |= ranked(settings.rank, world_size=settings.world_size, local=min(settings.world_size, MOST_LOCAL))
    return environment


MOST_LOCAL = 8
"""Cards of one node."""


def _first(path: Path, others: str | None) -> str:
    return f"{path}{os.pathsep}{others}" if others else str(path)


def _host_mib(max_host: int | None) -> int:
    if max_host is not None:
        return max_host // MIB
    free = next(
        line for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable")
    )
    return int(int(free.split()[1]) / 1024 * 0.8)


def _run(
    command: list[str], environment: Mapping[str, str], *, timeout: float | None, stdout: int | None
) -> tuple[int, bool, float]:
    """Exit code, whether the time was up, seconds. Nothing that the program started is left behind."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=dict(environment), stdout=stdout, start_new_session=True)
    timed_out = False
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
    except KeyboardInterrupt:
        _end(process, signal.SIGINT)
        raise
    finally:
        _end(process, signal.SIGTERM)
    return process.returncode, timed_out, time.monotonic() - began


def _end(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    """End what is left of the program's process group, gently first."""
    for kind in (first, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _result(
    command: Sequence[str],
    reports: list[dict[str, Any]],
    code: int,
    card: Gpu | None,
    *,
    timed_out: bool,
    seconds: float,
    settings: Settings,
    replaced: Sequence[str],
) -> Rehearsal:
    reports = [report for report in reports if report["steps_taken"]] or reports[:1]
    context = context_for_verdict(card).bytes if card else 0
    ranks = tuple(rank for report in reports for rank in _ranks(report, context))
    ooms = [_out_of_memory(report) for report in reports if report["oom"] and (code or report["program_exit"])]
    steps = max((report["steps_taken"] for report in reports), default=0)
    reached = settings.steps and steps >= settings.steps
    endings = {"timeout": timed_out, "out_of_memory": ooms, "steps": reached, "program": True}
    ended = next(ending for ending, happened in endings.items() if happened)
    return Rehearsal(
        command=tuple(command),
        ended=ended,
        program_exit=code,
        steps=steps,
        ranks=ranks,
        oom=ooms[0] if ooms else None,
        gpus=() if card is None or not (ranks or ooms) else (_verdict(card, ranks, out_of_memory=bool(ooms), steps=steps),),
        replaced=tuple(replaced),
        notes=tuple(_notes(ranks, steps, settings)),
        seconds=round(seconds, 1),
    )


def _ranks(report: Mapping[str, Any], context: int) -> Iterator[Rank]:
    for device in report["devices"]:
        yield Rank(
            rank=report["rank"],
            device_total=device["peak_reserved"] + context,
            steps=tuple(Step(**row) for row in device["steps"]),
            largest=tuple(Alive(**row) for row in device["largest"]),
            host=report["host"],
            **{name: device[name] for name in OF_A_DEVICE},
        )


OF_A_DEVICE = (
    *("device", "peak_allocated", "peak_reserved", "peak_by_phase", "reserved_by_phase", "by_category", "cache_released"),
)
"""Fields of a report that `Rank` takes as they are."""


def _out_of_memory(report: Mapping[str, Any]) -> OutOfMemory:
    failed = dict(report["oom"])
    return OutOfMemory(rank=report["rank"], alive=tuple(Alive(**row) for row in failed.pop("alive")), **failed)


def _verdict(card: Gpu, ranks: Iterable[Rank], *, out_of_memory: bool, steps: int) -> Verdict:
    """The rules of `planning.verdicts`, on what ran. A program that never stepped decides nothing but that it does not fit."""
    usable, room = usable_and_room(card)
    reserved = max((rank.peak_reserved for rank in ranks), default=0)
    released = any(rank.cache_released for rank in ranks)
    enough = room - reserved >= TIGHT * usable and not released
    word = "does_not_fit" if out_of_memory else "unknown" if not steps else "fits" if enough else "tight"
    undecided = out_of_memory or not steps
    return stated(card, word, reserved, lower_bound=undecided, runs_by_releasing_cache=released and not out_of_memory)


def _replaced(settings: Settings, *, keep_writes: bool, network: bool) -> Iterator[str]:
    yield "kernels do nothing: numbers read from the card are zero, counts of labels are those of the batch"
    if settings.world_size > 1:
        yield f"collectives do nothing: this process plays rank {settings.rank} of {settings.world_size} alone"
    if not keep_writes:
        yield "saved tensors are files of the true length without data"
        yield "writes went to a scratch layer and are gone"
    if not network:
        yield "the network was out of reach"


def _notes(ranks: Iterable[Rank], steps: int, settings: Settings) -> Iterator[str]:
    if not steps:
        yield "no optimizer step was completed: the peaks are those of what ran until the end"
    elif steps < settings.steps:
        yield f"the program ended after {steps} of {settings.steps} steps"
    for rank in ranks:
        peaks = [max(step.peak_by_phase.values(), default=0) for step in rank.steps]
        if len(peaks) > 2 and peaks[1] < peaks[-1]:
            more = peaks[-1] - peaks[1]
            yield f"rank {rank.rank}: step {len(peaks)} held {more:,} bytes more than step 2 (a longer batch, or a leak)"
