"""The analytic engine as an `Estimate` sees it: peaks per phase as ledgers, from the model's forward written on a tape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peftplan.arch.modules import Architecture
from peftplan.errors import NeedsTraceError
from peftplan.hardware.context import CUBLASLT_WORKSPACE_BYTES, cublas_workspace_bytes
from peftplan.memory.attention import FLASH_CAPABILITY, MASK_MULTIPLE
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
    from peftplan.planning.job import Job

MULTIPLES = (8, 32, 64, 128)
"""Multiples to which kernels round the sequence."""


def analytic_peaks(job: Job, parameters: Parameters, static: Ledger, *, compute_capability: str) -> Peaks:
    """The peaks of a steady step. Raises NeedsTraceError where only the trace engine can tell."""
    found, passing = compiled(job, parameters, static, compute_capability=compute_capability)
    standing = Ledger(
        tuple(line for line in static if line.category != "gradients" and line.place == "device")
        + _workspaces(found.products, compute_capability)
    )
    named = sizes(job.setup)
    loaded = (line for line in standing if line.category not in ("optimizer_states", "workspaces"))
    ledgers = {"load": Ledger((*loaded, *passing))}
    for phase, (_, end) in found.peaks(named, standing.bytes()).items():
        ledgers[phase] = standing + Ledger(found.lines(end, named))
    return Peaks(ledgers=ledgers)


COMPILED: OrderedDict[tuple[Any, ...], tuple[Architecture, Timeline, tuple[Line, ...]]] = OrderedDict()
"""Timelines of the last jobs, and what loading takes: they hold for every batch and sequence on the same side of what `_shape_facts` tells."""
COMPILED_KEPT = 256


def compiled(job: Job, parameters: Parameters, static: Ledger, *, compute_capability: str) -> tuple[Timeline, tuple[Line, ...]]:
    """The timeline of a job and what loading takes in passing, made once for all sizes that run the same operations."""
    setup = job.setup
    key = (
        id(job.architecture), job.method and job.method.name, repr(job.config), repr(job.quant), compute_capability, *_shape_facts(job),
        *(getattr(setup, name) for name in Setup.model_fields if name not in SIZES),
    )  # fmt: skip
    if key in COMPILED:
        COMPILED.move_to_end(key)
        return COMPILED[key][1:]
    _check(job)
    model = Model(
        Tape(autocast=None if setup.autocast == "none" else setup.autocast),
        job.architecture,
        parameters,
        job.adaptation,
        _running(job, compute_capability),
        job.quant,
        adapter=ADAPTERS.get(str(job.method and job.method.peft_type)),
    )
    steady_step(model, Program(setup.trainer, bool(setup.keep_outputs), parse_optim(str(setup.optim))))
    found = timeline(model.tape, model.stacks, vocab=job.architecture.vocab_size)
    buffers = Ledger(tuple(line for line in static if line.category == "buffers"))
    doubled = job.quant is not None and bool(job.quant.double_quant)
    passing = load_passing(parameters, buffers, dtype=job.setup.dtype, doubled=doubled)
    COMPILED[key] = (job.architecture, found, passing)
    if len(COMPILED) > COMPILED_KEPT:
        COMPILED.popitem(last=False)
    return found, passing


SIZES = ("batch_size", "seq_len")
"""Fields of the setup that only size tensors, but for `_shape_facts`."""


def _shape_facts(job: Job) -> tuple[bool, ...]:
    """What of batch and sequence decides which operations run: one sequence, a ragged mask, windows shorter than the sequence."""
    b, s = job.setup.batch_size, job.setup.seq_len
    windows = sorted({a.window for block in job.architecture.blocks for a in block.attentions if a.window})
    return (b > 1, s % MASK_MULTIPLE > 0, *(s > window for window in windows))


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


def _workspaces(products: Iterable[tuple[str, str]], compute_capability: str) -> tuple[Line, ...]:
    """One workspace per library and thread that multiplies matrices, from the first product on."""
    nbytes = {"cuBLAS": cublas_workspace_bytes(compute_capability).bytes, "cuBLASLt": CUBLASLT_WORKSPACE_BYTES}
    return tuple(
        Line(f"{library} workspace, {thread} thread", "workspaces", "uint8", (int(size),), 1, library)
        for library, thread in sorted(products, reverse=True)
        if (size := nbytes[library]) is not None
    )
