"""What torch takes while it times a kernel that it compiled, in the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Dim
from peftplan.memory.timeline import Timeline
from peftplan.optim import Optimizer
from peftplan.parameters import Parameter

FLUSHED_BYTES = 256 * 2**20
"""The buffer with which inductor clears the card's cache before it times a kernel (torch,
_inductor/runtime/benchmarking.py, `benchmark_gpu`)."""
UNPACKED = "unpacked"
"""The result of gptqmodel's compiled `dequantize_weight`, which the first step times for each shape."""
COMPILED = ("relu2", UNPACKED)
"""Last words of the names of results of functions that a model's tool compiles."""


def timed(of_step: Timeline, optimizer: Optimizer, stepped: Iterable[Parameter]) -> Mapping[int, tuple[int, ...]]:
    """Event before which the first step times a kernel → bytes of the copies over which it runs, beside `FLUSHED_BYTES`.

    Behind the first output of a function of Nemotron's experts that NeMo Automodel compiles (`relu2_deepep`), for each shape of
    gptqmodel's `dequantize_weight`, and for each shape and dtype that a compiled optimizer steps over.
    """
    ops = {number: kind.name.rpartition(" ")[2] for number, kind in enumerate(of_step.kinds)}
    compiled = {number: of_step.kinds[number].dims if op == UNPACKED else () for number, op in ops.items() if op in COMPILED}
    first: dict[tuple[Dim, ...], int] = {}
    for at, (kind, count) in enumerate(of_step.events) if compiled else ():
        if count > 0 and kind in compiled:
            first.setdefault(compiled[kind], at + 1)
    of_kernels: dict[int, tuple[int, ...]] = dict.fromkeys(first.values(), ())
    return of_kernels if optimizer.copies is None else of_kernels | _of_optimizer(of_step, optimizer, stepped)


def _of_optimizer(of_step: Timeline, optimizer: Optimizer, stepped: Iterable[Parameter]) -> dict[int, tuple[int, ...]]:
    """Beside the temporaries of a parameter; of what has none, where the states begin, or behind all of these: norms and
    biases are the last group, which is left out where DeepSpeed steps over each group apart: with it a replay reserved 9.5 % more
    than a rehearsal. Left out too: copies of more than `FLUSHED_BYTES`. Those that would raise the peak go to the host
    (torch, _inductor/runtime/triton_heuristics.py, `copy_args_to_cpu_if_needed`): of any fewer bytes the first kernel's buffer
    has made room."""
    assert optimizer.copies is not None
    assert optimizer.temporaries is not None
    last, apart, of_most = {}, {}, 0
    for p in stepped:
        if (copies := optimizer.copies(p.shape, ITEMSIZE[p.dtype])) is None:
            continue
        copies = copies if sum(copies) <= FLUSHED_BYTES else ()
        if temporaries := optimizer.temporaries(p.shape):
            last[f"{p.name} {temporaries[-1].name}"], of_most = ((p.shape, p.dtype), copies), len(temporaries)
        else:
            apart[sum(copies)] = copies
    places = {number: last[kind.name] for number, kind in enumerate(of_step.kinds) if kind.name in last}
    first: dict[object, tuple[int, tuple[int, ...]]] = {}
    end = of_step.states[-1]
    for at, (kind, count) in enumerate(of_step.events):
        if count > 0 and kind in places:
            alike, copies = places[kind]
            first.setdefault(alike, (at + 1, copies))
            end = at + 1 + of_most
    return dict(first.values()) | ({end: apart[max(apart)]} if apart and len(of_step.states) == 1 else {})
