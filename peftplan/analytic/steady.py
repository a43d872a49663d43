"""A steady step on the tape: the model that a job describes, after the code of its step has run."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from peftplan.analytic.reference_model import reference_of
from peftplan.analytic.running import OF_MODULES, autocast_of, program_of, running_of
from peftplan.arch.modules import NO_DROPOUT
from peftplan.errors import NoEngineError
from peftplan.job.lines import is_target
from peftplan.job.loss_sizes import CUT
from peftplan.memory.looped_steps import Projected
from peftplan.memory.methods import adapter_of
from peftplan.memory.model import Model
from peftplan.memory.step import steady_step
from peftplan.optim import parse_optim, parse_optim_args, states
from peftplan.parameters import Parameter, Parameters
from peftplan.tape.tape import Tape

if TYPE_CHECKING:
    from peftplan.analytic.first_steps import Known
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job
    from peftplan.memory.program import Program


Steps = tuple[Model, Model | None, "Known | None"]
"""The model after a steady step; after the first one where that differs; and what that leaves where it is run when it is read."""

_RUN: "dict[tuple[object, ...], Steps]" = {}
"""The last step over a `device_map`, by its `step_key`: all GPUs see the same one."""


def run(inventory: "Inventory", step_key: tuple[object, ...], *, compute_capability: str, late: bool) -> "Steps":
    """As `_steady`, which runs once for all GPUs of a `device_map`. `step_key`: what decides the step."""
    if inventory.holding is None or inventory.holding.device is None:
        return _steady(inventory, compute_capability=compute_capability, late=late)
    if step_key not in _RUN:
        _RUN.clear()
        _RUN[step_key] = _steady(inventory, compute_capability=compute_capability, late=late)
    return _RUN[step_key]


def first_step(inventory: "Inventory", *, compute_capability: str) -> Model:
    """The model after the first step, where that is run apart."""
    from peftplan.analytic import first_steps

    def run(*, in_full: bool) -> Model:
        new_model, program = prepared(inventory, compute_capability=compute_capability, in_full=in_full)
        return first_steps.first_step(inventory, new_model, program, compute_capability=compute_capability)

    return _left_out_or_in_full(inventory.job, run)


def prepared(inventory: "Inventory", *, compute_capability: str, in_full: bool = True) -> "tuple[Callable[[], Model], Program]":
    """What makes a job's model on a new tape, and the program of its step. `in_full`: all layers run."""
    job, parameters, _, _ = inventory
    setup, computing, on_rank = job.setup, parameters.all, job.architecture
    if job.distributed is not None:
        from peftplan.analytic import ranks

        setup, computing = ranks.setup_on_rank(job), ranks.parameters_on_rank(inventory).all
        on_rank = ranks.architecture_of(job)
    if setup.by.disables_dropout and on_rank.model_type in OF_MODULES:
        on_rank = replace(on_rank, dropout=NO_DROPOUT)
    trained_again = _trained_again(job, parameters)
    kind_of_tape = Tape if job.distributed is None else ranks.tape_of(job)
    on_tape = partial(
        Model,
        arch=on_rank,
        parameters=parameters._replace(
            all=tuple(p._replace(trainable=p.trainable or (p.name, p.layers) in trained_again) for p in computing)
        ),
        adaptation=job.adaptation,
        running=running_of(job._replace(setup=setup), compute_capability),
        quant=job.quant,
        adapter=adapter_of(job.method and job.method.peft_type, own_lora=setup.by.own_lora),
    )
    program = program_of(job)._replace(
        left_alone=frozenset(name for name, _ in trained_again), projected=projected(job, computing)
    )

    def new_model() -> Model:
        model = on_tape(kind_of_tape(autocast=autocast_of(setup), several=setup.rows > 1))
        model.left_out = None if in_full else []
        return model

    return new_model, program


def _steady(inventory: "Inventory", *, compute_capability: str, late: bool) -> "Steps":
    """The model after its steady step, and after the first one where that differs."""
    return _left_out_or_in_full(inventory.job, partial(_run, inventory, compute_capability=compute_capability, late=late))


_NOT_ALIKE: set[tuple[object, ...]] = set()
"""Kinds of jobs of which all layers ran after all."""
T = TypeVar("T")


def _left_out_or_in_full(job: "Job", run: Callable[..., T]) -> T:
    """Run a step without the layers that may be left out, or in full where they turn out to differ."""
    kind = id(job.architecture), job.method_name, job.setup.trainer, job.setup.gradient_accumulation_steps > 1
    if leaves_out(job) and kind not in _NOT_ALIKE:
        from peftplan.depth.skipped import NotAlikeError

        try:
            return run(in_full=False)
        except NotAlikeError:
            _NOT_ALIKE.add(kind)
    return run(in_full=True)


def leaves_out(job: "Job") -> bool:
    """Whether layers may be left out of a step: under ZeRO-3, where nothing runs beside it. Left out: a quantized base, whose
    gathered weights stay, and full fine-tuning, which fills a bucket in any layer."""
    alone = (
        job.reference == "none" and not job.setup.by.generates and job.setup.eval_batch_size is None and not job.setup.by.values
    )
    plain = job.quant is None and job.method_name != "full"
    return job.distributed is not None and job.distributed.strategy == "zero3" and alone and plain


def _run(inventory: "Inventory", *, compute_capability: str, late: bool, in_full: bool) -> "Steps":
    """`in_full`: all layers run."""
    job, setup = inventory.job, inventory.job.setup
    new_model, program = prepared(inventory, compute_capability=compute_capability, in_full=in_full)
    model, first, known = new_model(), None, None
    if job.distributed is not None:
        from peftplan.analytic import first_steps, ranks

        first = ranks.first_step(inventory, new_model, program, late=late)
        known = first_steps.left_by_first(inventory, new_model, program, compute_capability=compute_capability)
        program = ranks.divided(inventory, model, program, known and known.earlier, late=late)
        reference = ranks.reference_on_rank(job, model, known and known.earlier)
    else:
        if model.running.recorded is not None or setup.loss == CUT:
            first = new_model()
            first.running = first.running._replace(tunes=True)
            steady_step(first, program, reference=reference_of(job, first))
        elif setup.optimizer_in_backward or (program.optimizer.step_implementation == "in-backward" and setup.by.prepares_model):
            from peftplan.memory.stepped import stepping_in_backward

            model.units = stepping_in_backward(model.tape, program.optimizer.name, program.projected)
        reference = reference_of(job, model)
    steady_step(model, program, reference=reference)
    if model.left_out:
        from peftplan.depth.written import write_skipped

        write_skipped(model.tape, model.left_out)
    return model, first, known


def projected(job: "Job", parameters: Iterable[Parameter]) -> dict[str, Projected]:
    """The shapes of what APOLLO projects. Raises NoEngineError for an optimizer whose step on the GPU no engine knows."""
    optimizer, optim_args = parse_optim(str(job.setup.optim)), parse_optim_args(job.setup.optim_args)
    on_host = job.distributed is not None and job.distributed.strategy == "fsdp2" and job.distributed.offload_params == "cpu"
    if (unknown := optimizer.unknown(optim_args)) and not on_host:
        raise NoEngineError(f"optim {optimizer.name}: {unknown}")
    targets = (job.setup.optim_target_modules or ()) if optimizer.package == "apollo-torch" else ()
    of_each = {
        p.name: {a.name: a.dims for a in states(optimizer, shape=p.shape, dtype=p.dtype, in_target=True, optim_args=optim_args)}
        for p in parameters
        if p.trainable and is_target(p, targets)
    }
    return {name: (dims["exp_avg"], dims["projector.ortho_matrix"]) for name, dims in of_each.items()}


def _trained_again(job: "Job", parameters: Parameters) -> "frozenset[tuple[str, frozenset[int] | None]]":
    """Name and layers of what gets gradients though it is frozen: what shares a unit of FSDP1 with what trains, and LoRA-FA's A
    matrices if the script makes adapters require gradients again."""
    if job.distributed is not None and job.distributed.strategy == "fsdp1":
        from peftplan.distributed.flat_parameters import beside_trained

        return frozenset((p.name, p.layers) for p in beside_trained(parameters, job.distributed))
    if not (job.script.enables_adapters_again and getattr(job.config, "freeze_a", False)):
        return frozenset()
    return frozenset((p.name, p.layers) for p in parameters.all if p.owner == "adapter" and ".lora_A." in p.name)
