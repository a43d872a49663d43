"""The analytic engine as an `Estimate` sees it: peaks per phase as ledgers, from the model's forward written on a tape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftplan.errors import NeedsTraceError
from peftplan.hardware.context import cublas_workspace_bytes
from peftplan.memory.attention import FLASH_CAPABILITY
from peftplan.memory.ledger import Ledger, Line
from peftplan.memory.load import load_passing
from peftplan.memory.methods import ADAPTERS
from peftplan.memory.model import Model, Running
from peftplan.memory.models import FORWARDS
from peftplan.memory.quantized import QUANTIZED
from peftplan.memory.step import Program, steady_step
from peftplan.memory.tape import Tape
from peftplan.memory.timeline import Timeline, timeline
from peftplan.optim import parse_optim
from peftplan.parameters import Parameters
from peftplan.planning.result import Peaks
from peftplan.planning.setup import Setup

if TYPE_CHECKING:
    from peftplan.planning.estimate import Job

MULTIPLES = (8, 32, 64, 128)
"""Multiples to which kernels round the sequence."""
SOURCE = "analytic: modeling code on tensors without values"


def analytic_peaks(job: Job, parameters: Parameters, static: Ledger, *, compute_capability: str) -> Peaks:
    """The peaks of a steady step. Raises NeedsTraceError where only the trace engine can tell."""
    architecture, adaptation, setup, quant = job.architecture, job.adaptation, job.setup, job.quant
    peft_type = None if job.method is None else job.method.peft_type
    model = Model(
        Tape(autocast=None if setup.autocast == "none" else setup.autocast),
        architecture,
        parameters,
        adaptation,
        _running(job, compute_capability),
        quant,
        adapter=ADAPTERS.get(str(peft_type)),
    )
    _check(job)
    steady_step(model, Program(setup.trainer, bool(setup.keep_outputs), parse_optim(str(setup.optim))))
    found = timeline(model.tape, model.stacks, vocab=architecture.vocab_size)
    standing = Ledger(
        tuple(line for line in static if line.category != "gradients" and line.place == "device")
        + _workspaces(compute_capability)
    )
    buffers = Ledger(tuple(line for line in static if line.category == "buffers"))
    doubled = quant is not None and bool(quant.double_quant)
    lasting = Ledger(tuple(line for line in standing if line.category not in ("optimizer_states", "workspaces")))
    passing = load_passing(parameters, buffers, dtype=setup.dtype, doubled=doubled)
    return _peaks(found, standing, lasting + Ledger(passing), sizes(setup))


def _check(job: Job) -> None:
    """Raise NeedsTraceError for the parts of a job that have no formulas here."""
    model_type = job.architecture.model_type
    if model_type not in FORWARDS:
        raise NeedsTraceError(f"activations of model type {model_type}")
    if job.method is None:
        raise NeedsTraceError("activations of this peft type")
    if job.adaptation.matched and job.method.peft_type not in ADAPTERS:
        raise NeedsTraceError(f"activations of method {job.method.name}")
    if job.quant is not None and job.quant.name not in QUANTIZED:
        raise NeedsTraceError(f"activations of {job.quant.name} layers")


def _running(job: Job, compute_capability: str) -> Running:
    setup = job.setup
    return Running(
        autocast=None if setup.autocast == "none" else setup.autocast,
        checkpointing=bool(setup.gradient_checkpointing),
        attention=str(setup.attn_implementation),
        padding=setup.padding,
        use_cache=bool(setup.use_cache),
        flash=tuple(map(int, compute_capability.split("."))) >= FLASH_CAPABILITY,
        peft_type=None if job.method is None else job.method.peft_type,
        config=job.config,
        seq_len=setup.seq_len,
        batch_size=setup.batch_size,
    )


def sizes(setup: Setup) -> dict[str, int]:
    """The named sizes of a setup."""
    b, s = setup.batch_size, setup.seq_len
    return {"b": b, "s": s, **{f"s%{multiple}": -(-s // multiple) * multiple for multiple in MULTIPLES}}


def _workspaces(compute_capability: str) -> tuple[Line, ...]:
    cublas = cublas_workspace_bytes(compute_capability)
    return tuple(
        Line(f"cuBLAS workspace, {thread} thread", "workspaces", "uint8", (int(cublas.bytes),), 1, "cuBLAS")
        for thread in ("forward", "backward")
        if cublas.bytes is not None
    )


def _peaks(found: Timeline, standing: Ledger, loading: Ledger, sizes: Mapping[str, int]) -> Peaks:
    base = standing.bytes()
    ledgers = {"load": loading}
    for phase, (_, end) in found.peaks(sizes, base).items():
        lines = (
            line._replace(dims=tuple(d if isinstance(d, int) else sizes[d] for d in line.dims))
            for line in found.lines(end, SOURCE)
        )
        ledgers[phase] = standing + Ledger(tuple(lines))
    return Peaks(ledgers=ledgers)


def _sized(line: Line, sizes: Mapping[str, int]) -> Line:
    return line._replace(dims=tuple(dim if isinstance(dim, int) else sizes[dim] for dim in line.dims))
