"""Run a program on an emulated card and read what it left behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftplan.errors import InputError, RefusedError
from peftplan.hardware.context import context_for_verdict
from peftplan.hardware.gpus import Gpu
from peftplan.hardware.usable import usable_bytes
from peftplan.planning.verdicts import capability, kernels_on, stated, usable_and_room
from peftplan.rehearse import figures, keeper, scratch
from peftplan.rehearse.card import library
from peftplan.rehearse.folders import scratch_folder
from peftplan.rehearse.recorded import Recorded
from peftplan.rehearse.request import Request
from peftplan.rehearse.settings import VARIABLE, Settings
from peftplan.rehearse.settings import environment as ranked
from peftplan.results.rehearsal import Alive, OutOfMemory, Rank, Rehearsal, Step
from peftplan.results.verdict import TIGHT, Verdict
from peftplan.units import GIB, MIB

UNLIMITED = 1000 * GIB
"""The memory of a card where none is named."""
SITE = Path(__file__).parent / "inside" / "site"
MONITOR = Path(__file__).with_name("monitor.py")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "DO_NOT_TRACK": "1",
}
"""What keeps libraries from asking a network that is not there."""


def rehearse(request: Request, *, rank: int = 0, stdout: int | None = None) -> Rehearsal:
    """Run the command until the steps that are wanted are done, as one rank of a world.

    `stdout`: a file descriptor for the program's output, else ours. Raises RefusedError where nothing can be started.
    """
    preload = library()
    with scratch_folder() as folder:
        settings = Settings(
            str(folder),
            request.steps,
            rank,
            request.world_size,
            snapshot=request.snapshot is not None,
            stand_ins=not request.keep_writes,
            record=request.record,
            data=request.data,
            seq_len=request.seq_len,
            network=request.network,
            routing=request.routing,
        )
        environment = _environment(settings, request, preload)
        layer = [sys.executable, "-m", "peftplan.rehearse.scratch", str(folder), str(request.max_host // MIB)]
        layer += ["1" if request.network else "0", "1" if request.keep_writes else "0"]
        code, timed_out, seconds = _run([*layer, *request.command], environment, timeout=request.timeout, stdout=stdout)
        if code == scratch.FAILED and not list(folder.glob("started")):
            raise RefusedError(
                "this system does not allow user namespaces, which protect your files and block the network; "
                "add --keep-writes --network to run without them"
            )
        if reason := " ".join(_lines(folder / keeper.NOT_STARTED)):
            raise InputError("COMMAND", request.command[0], f"it does not start: {reason}; accepted: a program on PATH")
        reports = _reports(folder)
        stand_ins, remarks = _lines(folder / "stand-ins.txt"), _lines(folder / "notes.txt")
        host = keeper.read(folder)
        recording = _recording(folder, request)
        pickles = sorted(folder.glob("*.pickle"))
        if request.snapshot is not None and pickles:
            request.snapshot.write_bytes(pickles[0].read_bytes())
    world_size = max((report["world_size"] for report in reports), default=request.world_size)  # a launcher says it
    settings = settings._replace(world_size=world_size)
    result = _result(request, reports, code, timed_out=timed_out, over=host.over, settings=settings)
    return replace(
        result,
        replaced=(*stand_ins, *_replaced(settings, request)),
        notes=(*result.notes, *remarks, *_unrecorded(request, recording, snapshot=bool(pickles))),
        seconds=round(seconds, 1),
        host_bytes=host.host_bytes,
        recording=recording,
    )


def _reports(folder: Path) -> list[dict[str, Any]]:
    """The report of each process that used a device. A process that a signal ended has left only its log, which tells less."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank*.json"))]
    logs = [report for path in sorted(folder.glob(figures.LOG.format(process="*"))) if (report := figures.read_log(path))]
    reported = {report["process"] for report in reports}
    return reports + [{**report, "cut": True} for report in logs if report["process"] not in reported]


def _lines(path: Path) -> list[str]:
    return list(dict.fromkeys(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def _environment(settings: Settings, request: Request, preload: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    card = request.card
    context = context_for_verdict(card).bytes if card else 0
    environment |= {
        VARIABLE: settings.to_text(),
        "PEFTPLAN_PRELOAD": _first(preload / "card.so", environment.get("LD_PRELOAD")),
        "LD_LIBRARY_PATH": _first(preload, environment.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _first(SITE, environment.get("PYTHONPATH")),
        "PATH": _first(_monitor(Path(settings.folder)), _first(Path(sys.executable).parent, environment.get("PATH"))),
        "EMULATED_COUNT": str(max(request.cards, min(settings.world_size, MOST_LOCAL))),
        "EMULATED_BYTES": str(usable_bytes(card).bytes if card else UNLIMITED),
        "EMULATED_CONTEXT": str(context),
        "EMULATED_CAPABILITY": capability(card),
        "EMULATED_MULTIPROCESSORS": str(kernels_on(card)[1].number),
        "EMULATED_THREADS": str(kernels_on(card)[1].threads),
        "EMULATED_NAME": card.name if card else "emulated card",
        "EMULATED_SHARED": str(Path(settings.folder, "cards")),
        **({} if request.network else OFFLINE),
    }
    if settings.world_size > 1:
        environment |= ranked(settings.rank, world_size=settings.world_size, local=min(settings.world_size, MOST_LOCAL))
    return environment


def _monitor(folder: Path) -> Path:
    """A folder that holds an `nvidia-smi` of the emulated cards."""
    script = folder / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(str(MONITOR))} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script.parent


MOST_LOCAL = 8
"""Cards of one node."""


def _first(path: Path, others: str | None) -> str:
    return f"{path}{os.pathsep}{others}" if others else str(path)


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
    """Let the keeper end all that it keeps, gently first."""
    process.send_signal(first)
    try:
        process.wait(3 * keeper.GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _recording(folder: Path, request: Request) -> Recorded | None:
    """What the largest process allocated, where it was to be kept."""
    logs = [Recorded.read(path) for path in sorted(folder.glob("recorded*.json"))] if request.record else []
    return max(logs, key=lambda log: log.peak, default=None)


def _result(
    request: Request, reports: list[dict[str, Any]], code: int, *, timed_out: bool, over: bool, settings: Settings
) -> Rehearsal:
    reports = [report for report in reports if report["steps_taken"]] or reports[:1]
    card = request.card
    context = context_for_verdict(card).bytes if card else 0
    ranks = tuple(rank for report in reports for rank in _ranks(report, context))
    ooms = [_out_of_memory(report) for report in reports if report["oom"] and (code or report["program_exit"])]
    steps = max((report["steps_taken"] for report in reports), default=0)
    reached = settings.steps and steps >= settings.steps
    endings = {"host_memory": over, "timeout": timed_out, "out_of_memory": ooms, "steps": reached, "program": True}
    ended = next(ending for ending, happened in endings.items() if happened)
    return Rehearsal(
        command=request.command,
        ended=ended,
        program_exit=code,
        steps=steps,
        ranks=ranks,
        oom=ooms[0] if ooms else None,
        gpus=() if card is None or not (ranks or ooms) else (_verdict(card, ranks, ooms, steps=steps),),
        replaced=(),
        notes=(*_signalled(code, reports, ended), *_notes(ranks, steps, settings), *_alone(reports, request.cards, settings)),
        seconds=0.0,
        world_size=settings.world_size,
        versions=next((report["versions"] for report in reports), {}),
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


def _verdict(card: Gpu, ranks: Iterable[Rank], ooms: Sequence[OutOfMemory], *, steps: int) -> Verdict:
    """The rules of `planning.verdicts`, on what ran, and on what it requested in vain of a device.

    A program that never stepped decides nothing but that it does not fit.
    """
    usable, room = usable_and_room(card)
    out_of_memory = bool(ooms)
    in_vain = [oom.reserved_bytes + oom.requested_bytes for oom in ooms]
    reserved = max([*(rank.peak_reserved for rank in ranks), *in_vain], default=0)
    released = any(rank.cache_released for rank in ranks)
    enough = room - reserved >= TIGHT * usable and not released
    word = "does_not_fit" if out_of_memory else "unknown" if not steps else "fits" if enough else "tight"
    undecided = out_of_memory or not steps
    return stated(card, word, reserved, lower_bound=undecided, runs_by_releasing_cache=released and not out_of_memory)


def _replaced(settings: Settings, request: Request) -> Iterator[str]:
    yield "kernels do nothing: numbers read from the card are zero, but label counts are those of the batch"
    if settings.world_size > 1:
        each, one = "each rank is played alone, one after another", f"this process plays rank {settings.rank}"
        yield f"collectives do nothing: {each if request.every_rank else f'{one} of {settings.world_size} alone'}"
    if not request.keep_writes:
        yield "saved tensors are files of the true size without data"
        yield "writes went to a scratch layer and are discarded"
    if not request.network:
        yield "there was no network"


def _signalled(code: int, reports: Sequence[Mapping[str, Any]], ended: str) -> Iterator[str]:
    """Which signal ended the program, if one did, and what it left of the report.

    A code that stands for no signal, such as 255 of `sys.exit(-1)`, is the program's own.
    """
    number = -code if code < 0 else code - 128
    if ended == "program" and number in signal.valid_signals():
        name = next((each.name for each in signal.Signals if each == number), f"signal {number}")
        yield f"the program was ended by {name}{BY_WHOM.get(number, '')}" + ("" if reports else "; it had nothing on a card")
    for report in reports:
        if "cut" in report:
            yield f"rank {report['rank']} could not report at its end: its peaks are known, but not what was alive"


BY_WHOM: dict[int, str] = {signal.SIGKILL: ", as the kernel does when the host has no memory left"}


def _unrecorded(request: Request, recording: Recorded | None, *, snapshot: bool) -> Iterator[str]:
    """Files that were wanted of a program that used no card, or could not report when it ended."""
    missing = {"--timeline": request.record and recording is None, "--snapshot": request.snapshot is not None and not snapshot}
    yield from (
        f"{option}: nothing was written, the program left no record of its allocations" for option in missing if missing[option]
    )


def _notes(ranks: Iterable[Rank], steps: int, settings: Settings) -> Iterator[str]:
    if not steps:
        yield "no optimizer step was completed: the peaks are those of what ran until the end"
    elif steps < settings.steps:
        yield f"the program ended after {steps} of {settings.steps} steps"
    for rank in ranks:
        peaks = [max(step.peak_by_phase.values(), default=0) for step in rank.steps]
        if len(peaks) > 2 and peaks[1] < peaks[-1]:
            more = peaks[-1] - peaks[1]
            yield f"rank {rank.rank}: step {len(peaks)} needed {more:,} bytes more than step 2 (a longer batch, or a leak)"


def _alone(reports: Iterable[Mapping[str, Any]], cards: int, settings: Settings) -> Iterator[str]:
    """Several GPUs were asked for, and the program took one process, or one card, for the whole job."""
    used = {device["device"] for report in reports for device in report["devices"]}
    if not used or any(report["process_group"] for report in reports):
        return
    if settings.world_size > 1:
        yield f"the program initialised no process group: it ran as one process, not as one of {settings.world_size} ranks"
    elif cards > len(used):
        yield f"the program used {len(used)} of {cards} cards: a launcher such as torchrun, or --world-size {cards}, makes ranks"
