"""The first step under ZeRO-3, whose coordinator does not know the order of the modules yet: what it leaves, and the step itself.

The order is that of the model's code. It does not depend on how many ranks there are, what they hold on the host, or how their
optimizer steps: jobs that differ in these alone share it. So the first step is run again only where a replay reads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from peftplan.analytic import ranks
from peftplan.analytic.running import facts_of
from peftplan.arch.modules import Architecture
from peftplan.depth.written import write_skipped
from peftplan.distributed.any_world import as_recorded
from peftplan.job.setup import Setup
from peftplan.memory.step import steady_step
from peftplan.memory.zero3 import Zero3
from peftplan.memory.zero3_modules import Earlier

if TYPE_CHECKING:
    from peftplan.job.inventory import Inventory
    from peftplan.memory.model import Model
    from peftplan.memory.program import Program

KEPT = 64
"""Orders that are kept."""
NOT_OF_ORDER = ("gpus", "nodes", "offload_optimizer", "offload_params")
"""Fields of a strategy that do not decide the order."""
NOT_OF_STEP = ("batch_size", "seq_len", "gradient_accumulation_steps", "optim", "optim_args")
"""Fields of a setup that do not decide it beside what `facts_of` says of sizes, and how many micro batches are run."""
_OF_SETUP = attrgetter(*(name for name in Setup.model_fields if name not in NOT_OF_STEP))


class Known(NamedTuple):
    """What a first step leaves. `architecture`: whose id is in the key, which must stay alive."""

    architecture: Architecture
    earlier: Earlier
    asks_card: bool
    """Whether the multiprocessors of a card decide one of its buffers."""


_KNOWN: OrderedDict[tuple[object, ...], Known] = OrderedDict()
_LAST: list[tuple[Inventory, str, Model]] = []
"""The job whose first step was run last, for which kernels, and its model: a replay may read it next."""


def left_by_first(
    inventory: Inventory, new_model: Callable[[], Model], program: Program, *, compute_capability: str
) -> Known | None:
    """What the first step of a job leaves to the second under ZeRO-3; None elsewhere."""
    job = inventory.job
    if job.distributed is None or job.distributed.strategy != "zero3":
        return None
    model = new_model()
    in_full = model.left_out is None
    strategy = tuple((name, value) for name, value in job.distributed if name not in NOT_OF_ORDER)
    running = model.running._replace(config=None, batch_size=0, seq_len=0)  # what goes by these is among the facts
    described = repr(job.config and vars(job.config)), repr(job.quant), as_recorded(running)
    trained = tuple((p.name, p.layers) for p in model.parameters.all if p.trainable)
    method = job.method and job.method.name
    (rows,) = as_recorded((job.setup.batch_size,))
    facts = facts_of(job._replace(setup=job.setup.model_copy(update={"batch_size": rows})), compute_capability)
    micro_batches = min(job.setup.gradient_accumulation_steps, Zero3.micro_batches)
    of_setup = (*facts, micro_batches, as_recorded(_OF_SETUP(job.setup)), job.second_config)
    key = (in_full, id(job.architecture), method, *described, job.script, strategy, trained, of_setup)
    if key not in _KNOWN:
        _run(inventory, model, program, compute_capability)
        assert isinstance(model.units, Zero3)
        _KNOWN[key] = Known(job.architecture, model.units.left, model.tape.asks_card)
        if len(_KNOWN) > KEPT:
            _KNOWN.popitem(last=False)
    return _KNOWN[key]


def left_by_steps(
    inventory: Inventory, new_model: Callable[[], Model], program: Program, *, compute_capability: str
) -> Earlier | None:
    """What the first step leaves, with what a later one decides for all that follow."""
    known = left_by_first(inventory, new_model, program, compute_capability=compute_capability)
    if known is None:
        return None
    model, earlier = new_model(), known.earlier
    program = ranks.divided(inventory, model, program, earlier)
    steady_step(model, program, reference=ranks.reference_on_rank(inventory.job, model, earlier))
    assert isinstance(model.units, Zero3)
    left = model.units.left
    later = left.reference
    of_second = earlier.reference and later and earlier.reference._replace(decided=later.decided, follows=later.follows)
    return earlier._replace(decided=left.decided, reference=of_second)


def first_step(inventory: Inventory, new_model: Callable[[], Model], program: Program, *, compute_capability: str) -> Model:
    """The model after the first step of a job under ZeRO-3, for the kernels of a compute capability."""
    for of, of_kernels, model in _LAST:
        if of is inventory and of_kernels == compute_capability:
            return model
    return _run(inventory, new_model(), program, compute_capability)


def _run(inventory: Inventory, model: Model, program: Program, compute_capability: str) -> Model:
    program = ranks.divided(inventory, model, program, None)
    steady_step(model, program, reference=ranks.reference_on_rank(inventory.job, model, None))
    if model.left_out:
        write_skipped(model.tape, model.left_out)
    _LAST[:] = [(inventory, compute_capability, model)]
    return model
