"""A job's step on one rank of several GPUs: the differences from one GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from peftplan.analytic.reference_model import reference_of
from peftplan.analytic.shown import FLAT, FSDP, SHARDING, ZERO
from peftplan.distributed.device_map import places_of
from peftplan.distributed.flat_parameters import parts_of
from peftplan.distributed.fsdp1 import Fsdp1
from peftplan.distributed.fsdp2 import COPY_IN_OF_SECOND, Fsdp2, KeptRoot
from peftplan.distributed.lag import Lag
from peftplan.distributed.layout import AXOLOTL
from peftplan.distributed.pipeline import actions_of, as_model, num_layers, on_stages, stages_of
from peftplan.distributed.shards import holding
from peftplan.distributed.tensor_parallel import architecture_on_rank, ranks_of, shards_of
from peftplan.distributed.zero import Key
from peftplan.distributed.zero3 import GATHER_OF_SECOND
from peftplan.distributed.zero_shards import cast_on_rank
from peftplan.errors import NoRankFormulaError
from peftplan.job.setup import Setup
from peftplan.job.teacher import teacher_of, trained_together
from peftplan.memory.bucket_views import BucketViews
from peftplan.memory.model import Model
from peftplan.memory.optimizer import has_temporaries
from peftplan.memory.program import Program
from peftplan.memory.ring_attention import Ring
from peftplan.memory.sharded import computing, computing_dtype, units_of
from peftplan.memory.step import steady_step
from peftplan.memory.stepped import UPDATES, SteppedAgain
from peftplan.memory.tensor_parallel import TensorParallel
from peftplan.memory.zero import Zero
from peftplan.memory.zero0 import Zero0
from peftplan.memory.zero3 import Zero3, switched_off
from peftplan.memory.zero3_left_out import leaving_out
from peftplan.memory.zero3_modules import Earlier, Habits
from peftplan.memory.zero_anywhere import ZeroAnywhere
from peftplan.parameters import Parameters
from peftplan.tape.tape import Tape
from peftplan.versions import PACKED_POSITIONS_CHECKED

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job


SECOND = ("teacher: ", "reference")
"""How the names of a second model's lines begin."""


def setup_on_rank(job: Job) -> Setup:
    """The setup that the model runs under. FSDP2 and DeepSpeed run without autocast: they cast the weights."""
    if job.distributed is None or job.distributed.strategy not in ("fsdp2", *ZERO):  # FSDP1 runs under autocast
        return job.setup
    return job.setup.model_copy(update={"autocast": "none"})


def tape_of(job: Job) -> type[Tape]:
    """The kind of tape that a step runs on."""
    if job.distributed is None or job.distributed.strategy != "device-map":
        return Tape
    from peftplan.tape.devices import DeviceTape

    return DeviceTape


def seen(inventory: Inventory, tape: Tape) -> Tape:
    """What one GPU sees of a tape."""
    device = inventory.holding and inventory.holding.device
    if device is None:
        return tape
    from peftplan.tape.devices import DeviceTape

    assert isinstance(tape, DeviceTape)
    return tape.seen_on(device)


def architecture_of(job: Job) -> Architecture:
    """The architecture that a rank computes."""
    if job.distributed is None or job.distributed.strategy not in ("tp", "fsdp2"):
        return job.architecture
    return architecture_on_rank(job.architecture, job.distributed)


def parameters_on_rank(inventory: Inventory) -> Parameters:
    """The parameters that operations compute with: under FSDP gathered, under DeepSpeed in 16 bits."""
    job, parameters, _, holding = inventory
    if job.distributed is None or holding is None:
        return parameters
    if job.distributed.strategy == "tp":
        return holding.parameters
    if job.distributed.strategy not in SHARDING:
        return parameters
    if job.distributed.strategy in ZERO:
        return cast_parameters(job, parameters)
    part = shards_of(parameters, job.architecture, job.distributed.model_copy(update={"pp_size": None}))
    return computing(part, computing_dtype(job.distributed, str(job.setup.autocast), job.quant), job.distributed)


def shards_on_rank(inventory: Inventory) -> Parameters:
    """A rank's part of each parameter under FSDP, also where it holds flat ones."""
    job, parameters, _, holding = inventory
    assert job.distributed is not None
    assert holding is not None
    if job.distributed.strategy != "fsdp1":
        return holding.parameters
    return parts_of(parameters, job.distributed, autocast=str(job.setup.autocast))


def cast_parameters(job: Job, parameters: Parameters) -> Parameters:
    """The parameters as DeepSpeed leaves them."""
    assert job.distributed is not None
    return parameters._replace(all=cast_on_rank(parameters, job.distributed, autocast=str(job.setup.autocast)))


def first_step(inventory: Inventory, recording: Callable[[], Model], program: Program, *, late: bool) -> Model | None:
    """The model after its first step under FSDP1 that gathers ahead in forward, which knows no order yet; None elsewhere.

    `recording`: makes the model. `late`: as in `divided`. That of ZeRO-3: `first_steps`.
    """
    distributed = inventory.job.distributed
    if distributed is None or distributed.strategy == "zero3" or not distributed.gathers_in_order:
        return None
    model = recording()
    program = divided(inventory, model, program, None, late=late)
    assert isinstance(model.units, Fsdp1)
    model.units.knows_order = False
    steady_step(model, program, reference=reference_on_rank(inventory.job, model, None))
    return model


def reference_on_rank(job: Job, policy: Model, before: Earlier | None) -> Model | None:
    """The reference model as a rank runs it: under ZeRO-3 with hooks around its modules. `before`: what the step before left.

    A second model has an engine of its own (trl `prepare_deepspeed`), which transformers has not yet told what `auto` means;
    DeepSpeed leaves such fields out (runtime/config_utils.py, `DeepSpeedConfigModel`). Behind the first forward of a
    switched-off adapter trl turns checkpointing on again, as its constructor wants it: reentrant
    (`disable_gradient_checkpointing`).
    """
    reference, zero = reference_of(job, policy), policy.units
    if reference is not None and isinstance(zero, Fsdp2) and job.reference == "copy":
        reference.units = _units_of_second(job, reference, policy.parameters)
    if reference is None or not isinstance(zero, Zero3):
        return reference
    if job.reference == "adapter_off":
        if before is not None and job.setup.by.narrow_under_zero3:
            policy.running = policy.running._replace(reentrant=True)
        return switched_off(policy, reference.running)
    assert job.distributed is not None
    told = job.distributed.model_copy(update={name: None for name, value in job.distributed if value == "auto"})
    habits, earlier = _habits(job)._replace(reloads=False), before and before.reference
    reference.units = zero.reference = Zero3(reference, told, dtype=zero.dtype, habits=habits, before=earlier)
    zero.reference.persisting = earlier is not None and earlier.follows
    if zero.reference.overlaps:
        zero.reference.coordinator.stream = GATHER_OF_SECOND
    return reference


def _units_of_second(job: Job, reference: Model, parameters: Parameters) -> Fsdp2:
    """The units of a second model under FSDP2, which does not train. `parameters`: the policy's."""
    distributed, layout = job.distributed, job.setup.by.layout
    assert distributed is not None
    full, shards = second_on_rank(job, parameters)
    dtype = computing_dtype(distributed, str(job.setup.autocast))
    kind = KeptRoot if job.setup.by.own_modules and not layout.frees_root else Fsdp2
    units = units_of(reference, full, shards, distributed, layout, dtype=dtype, kind=kind)
    units.copy_in = COPY_IN_OF_SECOND
    return units


def second_on_rank(job: Job, parameters: Parameters) -> tuple[Parameters, Parameters]:
    """The parameters of a second model, and what a rank holds of each under FSDP2. `parameters`: the policy's."""
    assert job.distributed is not None
    full, arch = second_of(job, parameters), second_architecture(job)
    return full, holding(full, job.distributed, arch, autocast=str(job.setup.autocast), upcasts=False).parameters


def second_architecture(job: Job) -> Architecture:
    """The architecture of a teacher, or of the policy, of which the second model is a copy."""
    teacher = teacher_of(job)
    return job.architecture if teacher is None else teacher.architecture


def second_of(job: Job, parameters: Parameters) -> Parameters:
    """The parameters of a second model, which is loaded as the policy is and does not train. `parameters`: the policy's."""
    if job.setup.by.teaches:
        teacher = teacher_of(job)
        assert teacher is not None
        return teacher.parameters
    cast = cast_parameters(job, parameters)
    return cast._replace(all=tuple(p._replace(trainable=False) for p in cast.all if p.owner == "base"))


def divided(inventory: Inventory, model: Model, program: Program, before: Earlier | None, *, late: bool = False) -> Program:
    """The program of the step on this rank. It also sets `model.units`, which gathers and reduces around its parts.

    `before`: what the first step left, where it differs. `late`: the GPU is as late as FSDP1 lets it be.
    """
    job, parameters, _, holding = inventory
    if job.distributed is not None and job.distributed.strategy == "tp":
        model.units = TensorParallel(model, job.distributed, parameters.all)
    if job.distributed is not None and job.distributed.strategy == "ddp" and job.quant is not None:
        from peftplan.memory.synced import sent_in_forward

        program = program._replace(sent=sent_in_forward(parameters))
    if job.distributed is not None and job.distributed.gradient_as_bucket_view:
        model.units = BucketViews(model.tape)
    elif _steps_again(job, program):
        model.units = SteppedAgain(model.tape, UPDATES[program.optimizer.name], parameters.all)
    if job.distributed is not None and job.distributed.strategy == "device-map":
        from peftplan.memory.devices import Devices

        places = places_of(parameters, job.distributed.world_size)
        used = {*places.layers.values(), *places.modules.values()}
        if len(used) == 1:  # then Trainer copies the model to each GPU
            raise NoRankFormulaError(f"a step with {job.distributed.called}, of which transformers places all on one")
        if 0 not in used:  # to which Trainer moves the batch, and hooks of accelerate the logits
            raise NoRankFormulaError(f"a step with {job.distributed.called}, of which transformers leaves the first one empty")
        model.units = Devices(model, places)
    if job.distributed is None or holding is None or job.distributed.strategy not in SHARDING:
        return program
    if (job.distributed.pp_size or 1) > 1:
        return _pipelined(inventory, model, program)
    if job.distributed.strategy in FSDP:
        dtype, by = computing_dtype(job.distributed, str(job.setup.autocast), job.quant), job.setup.by
        shards, in_checkpoints = shards_on_rank(inventory), job.script.checkpoints_units
        part = shards_of(parameters, job.architecture, job.distributed)
        layout = AXOLOTL if by.own_fsdp2 and job.distributed.strategy == "fsdp2" else by.layout
        model.units = units_of(
            model,
            part,
            shards,
            job.distributed,
            layout,
            dtype=dtype,
            checkpoints_units=in_checkpoints,
            kind=_kind_of_units(job),
        )
        if (job.distributed.cp_size or 1) > 1:
            model.running = model.running._replace(ring=Ring(*job.distributed.ring(holding.rank or 0)))
        if ranks_of(job.distributed) > 1:
            model.units.one_by_one = job.setup.optim == "adamw_torch"
            TensorParallel(model, job.distributed, parameters.all)
        if late and isinstance(model.units, Fsdp1):
            model.units.lag = Lag()
            model.units.reads_masks = not PACKED_POSITIONS_CHECKED.after(job.script.transformers)
        apart = job.distributed.strategy == "fsdp1" or layout.leaves_apart
        if apart and dtype not in (None, str(job.setup.adapter_dtype)):
            model.running = model.running._replace(adapter_shards=str(job.setup.adapter_dtype))
        of_each = job.distributed.strategy == "fsdp2" or has_temporaries(program.optimizer)
        own = holding.states_of if of_each else None  # without the padding of short shards, and views of flat ones
        return program._replace(
            shards=(own or holding.parameters).all,
            syncs_each_batch=bool(job.distributed.sync_each_batch) or by.layout.syncs_each_batch,
        )
    masters, dtype = holding.states_of.all if holding.states_of else (), str(job.setup.autocast)
    if job.distributed.strategy == "zero0":
        model.units = Zero0(model, masters, job.distributed, dtype=dtype)
        return program._replace(shards=masters or holding.parameters.all, steps_in_backward=True)
    if job.distributed.strategy in FLAT:
        assert holding.rank is not None, "each rank is compiled apart"
        trained = trained_together(job, model.parameters)
        plain = job.distributed.reduced_in(dtype) == dtype
        kind = ZeroAnywhere if plain and type(holding.rank) is not int else Zero
        model.units = kind(model, masters, job.distributed, dtype=dtype, rank=holding.rank, trained=trained)
    else:
        # ends the order (trl, models/utils.py, `add_hooks`), which the next step on rows of the data has again
        writes = job.setup.by.generates and not job.setup.use_vllm and job.setup.by.compares_at_once is None
        of_before = None if writes else before
        model.units = Zero3(model, job.distributed, dtype=dtype, habits=_habits(job), before=of_before)
        model.leaves_out = partial(leaving_out, model.units)
    return program._replace(shards=masters, steps_in_backward=True)


def _habits(job: Job) -> Habits:
    assert job.distributed is not None
    by = job.setup.by
    follows, full = not by.gathers_when_called, job.method_name == "full"
    return Habits(follows=follows, keeps_in_backward=full, keeps=job.distributed.keeps_leftovers, reloads=by.reloads_weights)


def _kind_of_units(job: Job) -> type[Fsdp2]:
    if job.distributed is None or job.distributed.pp_stage_is_unit is not False:
        return Fsdp2
    from peftplan.memory.pipeline import HeadApart

    return HeadApart


def _steps_again(job: Job, program: Program) -> bool:
    """Whether LOMO steps under DDP in every backward."""
    by_ddp = job.distributed is not None and job.distributed.strategy == "ddp" and job.setup.by.prepares_model
    return by_ddp and program.optimizer.name in UPDATES and program.accumulation == 1


def reduced(model: Model) -> tuple[Key, ...]:
    """The tensors in the order in which ZeRO-1 and ZeRO-2 reduce their gradients; none elsewhere."""
    return tuple(model.units.order) if isinstance(model.units, Zero) else ()


def _pipelined(inventory: Inventory, model: Model, program: Program) -> Program:
    """The program of the stages that a rank of a pipeline has."""
    from peftplan.memory.pipeline import OfRank, Staged, kind_of

    job, parameters, _, holding = inventory
    assert job.distributed is not None
    assert holding is not None
    rank, layers = holding.rank or 0, num_layers(parameters.all)
    stages = stages_of(job.distributed, layers, rank)
    models, dtype = [], computing_dtype(job.distributed, str(job.setup.autocast), job.quant)
    for number, stage in enumerate(stages):
        arch, of_stage = as_model(model.parameters, model.arch, stage)
        _, shards = as_model(holding.parameters, model.arch, stage)
        running = model.running._replace(use_cache=False)  # a stage's forward hands its layers a cache under a name they ignore
        own = Model(model.tape, arch, of_stage, model.adaptation, running, model.quant, model.adapter, stacks=model.stacks)
        units = units_of(own, of_stage, shards, job.distributed, job.setup.by.layout, dtype=dtype, kind=kind_of(job.distributed))
        assert isinstance(units, Staged)
        units.number, own.units, own.ends = number, units, stage.last
        models.append(own)
    of_rank = OfRank(stages, tuple(models), actions_of(job.distributed, stages, rank), job.distributed.chunks)
    stepped = holding.states_of or holding.parameters
    of_rank.steps_over = tuple(tuple(on_stages(stepped.all, model.arch, (stage,))) for stage in stages)
    model.units = of_rank
    if ranks_of(job.distributed) > 1:
        TensorParallel(model, job.distributed, parameters.all)
    return program._replace(shards=stepped.all, schedule=of_rank)
