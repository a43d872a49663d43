"""Temporaries of dion's Muon on sharded matrices: all of one shape at once, each rank orthogonalizing its part of them.

The tasks of three shapes overlap: one waits for its matrices, one computes, one waits for its updates.

    task        stack of shards, buffers of the all-to-all | whole matrices, five iterations, parts for their ranks | updates

Source: dion 0.1.0, muon.py (`muon_update_megabatch_async`), megabatch_base.py (`megabatch_orthogonalize_async`), opt_utils.py
(`AsyncRuntime`), polar_express.py. AdamW's fused kernel, for what is no matrix of a layer, makes nothing. Left out: norms of a
few KB.
"""

from __future__ import annotations

from collections.abc import Generator
from math import ceil

from peftplan.optim.community import by_muon
from peftplan.parameters import Parameter
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

ITERATIONS_IN = "bf16"
"""What is sent and orthogonalized, whatever the weights are."""
PRODUCTS = 4
"""What else of the size of x lives when torch's compiled code (2.13, `TORCH_LOGS=output_code`) computes the last product: the
kernel behind it reads those of earlier iterations too."""
BUFFERS = 3
"""Copies of all parameters of a group that AdamW's compiled code makes (axolotl, contribs/mit/dion/scalar_opts.py; rehearsed)."""
WITH_STATE = 3
"""A weight, its gradient and its momentum."""
MOST_TASKS = 3
"""How many shapes are under way at once (`max_concurrent_tasks`)."""


def muon(f: Tape, trained: list[Parameter], ranks: int) -> None:
    """One step over matrices of which each rank holds `1 / ranks` of the rows."""
    _run([_update(f, shape, count, ranks) for shape, count in _matrices(trained).items()])


def muon_in_batches(f: Tape, trained: list[Parameter], ranks: int) -> None:
    """The same in axolotl 0.19.0 (`contribs/mit/muon/dist_muon.py`): as many matrices of a shape at once as there are ranks, each
    of which orthogonalizes one. Momenta in bf16 are what is sent; a batch of fewer is filled up.
    """
    batches = [(shape, min(count - at, ranks)) for shape, count in _matrices(trained).items() for at in range(0, count, ranks)]
    tasks = [_update_batch(f, shape, ranks, missing=ranks - count) for shape, count in batches]
    others = [p for p in trained if not by_muon(p.name, p.shape)]
    tables = [p for p in others if len(p.shape) > 1]
    _run([*tasks, *(_by_adamw(f, group) for group in ([p for p in others if p not in tables], tables) if group)])


def _matrices(trained: list[Parameter]) -> dict[tuple[int, ...], int]:
    """How many matrices have the same shape."""
    counts: dict[tuple[int, ...], int] = {}
    for p in trained:
        if by_muon(p.name, p.shape):
            counts[p.shape] = counts.get(p.shape, 0) + p.copies
    return counts


def _run(waiting: list[Generator[None]]) -> None:
    """The tasks, of which so many are under way at once."""
    running: list[Generator[None]] = []
    while waiting or running:
        started = [waiting.pop(0)] if waiting and len(running) < MOST_TASKS else []
        running = [task for task in (*started, *running) if _goes_on(task)]


def _goes_on(task: Generator[None]) -> bool:
    return next(task, "ended") is None


def _update(f: Tape, shape: tuple[int, ...], count: int, ranks: int) -> Generator[None]:
    """The matrices of one shape; variables of the generator hold its buffers until it has ended."""
    own = ceil(count / ranks)
    _zeros = f.new(shape, ITERATIONS_IN, "zeros_like") if own * ranks > count else None
    _stack = f.new((own * ranks, *shape), ITERATIONS_IN, "stack")
    _received = f.many((own, *shape), ITERATIONS_IN, "empty_like", ranks)
    yield
    whole = f.new((own, shape[0] * ranks, shape[1]), ITERATIONS_IN, "cat")
    whole = _orthogonal(f, whole)
    _parts = f.many((own, *shape), ITERATIONS_IN, "contiguous", ranks) if own > 1 else whole
    updates = f.many((own, *shape), ITERATIONS_IN, "empty_like", ranks)
    yield
    updates = f.new((ranks, own, *shape), ITERATIONS_IN, "stack")
    del updates, whole


def _update_batch(f: Tape, shape: tuple[int, ...], ranks: int, *, missing: int) -> Generator[None]:
    """One matrix of each rank. `missing`: how many stand-ins fill the batch up, each a weight, a gradient and a momentum."""
    _stand_ins = f.many(shape, ITERATIONS_IN, "empty_like", WITH_STATE * missing) if missing else None
    shards = f.many(shape, ITERATIONS_IN, "empty_like", ranks)
    yield
    whole = f.new((1, shape[0] * ranks, shape[1]), ITERATIONS_IN, "cat")
    whole = _orthogonal(f, whole)
    shards = f.many(shape, ITERATIONS_IN, "contiguous", ranks) if shape[0] * ranks > shape[1] else whole
    yield
    del shards, whole


def _by_adamw(f: Tape, group: list[Parameter]) -> Generator[None]:
    """`adamw_update_foreach`, compiled: its buffers go when all of a group is updated."""
    _buffers = [f.many(p.shape, p.dtype, "adamw", BUFFERS * p.copies) for p in group]
    del _buffers
    yield


def _orthogonal(f: Tape, matrices: Tensor) -> Tensor:
    """`polar_express`, five iterations over x: the shorter side's product, its square, and their product with x."""
    own, rows, columns = matrices.dims
    side = min(rows, columns, key=int)
    x = f.new(matrices.dims, ITERATIONS_IN, "div")
    _products = f.many(matrices.dims, ITERATIONS_IN, "bmm", PRODUCTS)
    _square = f.new((own, side, side), ITERATIONS_IN, "bmm")
    return x
