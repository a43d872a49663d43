"""A job's step on one rank of several GPUs: the differences from one GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import peftplan.versions as versions
from peftplan.analytic.running import reference_of
from peftplan.analytic.shown import FLAT, FSDP, SHARDING, ZERO
from peftplan.distributed.ddp import bucket_sizes
from peftplan.distributed.device_map import places_of
from peftplan.distributed.fsdp1 import Fsdp1, Lag
from peftplan.distributed.fsdp2 import Fsdp2, KeptRoot
from peftplan.distributed.layout import ACCELERATE, AXOLOTL
from peftplan.distributed.pipeline import actions_of, as_model, num_layers, on_stages, stages_of
from peftplan.distributed.shards import holding
from peftplan.distributed.tensor_parallel import architecture_on_rank, ranks_of, shards_of
from peftplan.distributed.zero import Key, groups_of, partition
from peftplan.distributed.zero_shards import cast_on_rank
from peftplan.job.automodel import builds, merges_experts
from peftplan.job.kernels import SCANNING, kernels_of
from peftplan.job.setup import Setup
from peftplan.job.teacher import teacher_of
from peftplan.ledger import Ledger, Line
from peftplan.memory.bucket_views import BucketViews
from peftplan.memory.flat_load import FlatUnits
from peftplan.memory.lasting import TE_WORKSPACE
from peftplan.memory.load import load_into
from peftplan.memory.loaded import Loader, peak_of
from peftplan.memory.model import Model
from peftplan.memory.optimizer import has_temporaries
from peftplan.memory.program import Program
from peftplan.memory.reference_load import load_one_then
from peftplan.memory.ring_attention import Ring
from peftplan.memory.sharded import computing, computing_dtype, flat_units, grouped, tied, units_of
from peftplan.memory.sharded_load import Loading, whole_sizes
from peftplan.memory.step import steady_step
from peftplan.memory.stepped import UPDATES, SteppedAgain
from peftplan.memory.synced import synced
from peftplan.memory.tensor_parallel import TensorParallel
from peftplan.memory.zero import Zero
from peftplan.memory.zero0 import WholeLoading, Zero0
from peftplan.memory.zero3 import Zero3, switched_off
from peftplan.memory.zero_load import FlatLoading, PartLoading
from peftplan.parameters import Parameters
from peftplan.tape.tape import Tape

if TYPE_CHECKING:
    from peftplan.arch.modules import Architecture
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job

PUBLISHED_DTYPE = "bf16"
"""What `dtype="auto"` loads: the dtype in which most models are published."""


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
    return computing(part, computing_dtype(job.distributed, str(job.setup.autocast)))


def cast_parameters(job: Job, parameters: Parameters) -> Parameters:
    """The parameters as DeepSpeed leaves them."""
    assert job.distributed is not None
    return parameters._replace(all=cast_on_rank(parameters, job.distributed, autocast=str(job.setup.autocast)))


def first_step(inventory: Inventory, recording: Callable[[], Model], program: Program) -> Model | None:
    """The model after its first step under ZeRO-3, whose coordinator then knows no order; None elsewhere.

    `recording`: makes the model.
    """
    if inventory.job.distributed is None or inventory.job.distributed.strategy != "zero3":
        return None
    model = recording()
    program = divided(inventory, model, program, None)
    steady_step(model, program, reference=reference_on_rank(inventory.job, model, None))
    return model


def reference_on_rank(job: Job, policy: Model, before: Model | None) -> Model | None:
    """The reference model as a rank runs it: under ZeRO-3 with hooks around its modules. `before`: the policy of the step before.

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
    earlier = before.units.reference if before is not None and isinstance(before.units, Zero3) else None
    follows = not job.setup.by.gathers_when_called
    reference.units = zero.reference = Zero3(reference, told, dtype=zero.dtype, before=earlier, follows=follows)
    return reference


def _units_of_second(job: Job, reference: Model, parameters: Parameters) -> Fsdp2:
    """The units of a second model under FSDP2, which does not train. `parameters`: the policy's."""
    distributed, layout = job.distributed, job.setup.by.layout
    assert distributed is not None
    full, shards = second_on_rank(job, parameters)
    dtype = computing_dtype(distributed, str(job.setup.autocast))
    kind = KeptRoot if job.setup.by.own_modules and not layout.frees_root else Fsdp2
    return units_of(reference, full, shards, distributed, layout, dtype=dtype, kind=kind)


def second_on_rank(job: Job, parameters: Parameters) -> tuple[Parameters, Parameters]:
    """The parameters of a second model, and what a rank holds of each under FSDP2. `parameters`: the policy's."""
    assert job.distributed is not None
    full, arch = second_of(job, parameters), second_architecture(job)
    return full, holding(full, job.distributed, arch, autocast=str(job.setup.autocast), upcasts=False).parameters


def second_architecture(job: Job) -> Architecture:
    """The architecture of a teacher, or of the policy, of which the second model is a copy."""
    teacher = teacher_of(job)
    return job.architecture if teacher is None else teacher.architecture


def divided(inventory: Inventory, model: Model, program: Program, before: Model | None, *, late: bool = False) -> Program:
    """The program of the step on this rank. It also sets `model.units`, which gathers and reduces around its parts.

    `before`: the model after the first step, where there is one. `late`: the GPU is as late as FSDP1 lets it be.
    """
    job, parameters, _, holding = inventory
    if job.distributed is not None and job.distributed.strategy == "tp":
        model.units = TensorParallel(model, job.distributed, parameters.all)
    if job.distributed is not None and job.distributed.gradient_as_bucket_view:
        model.units = BucketViews(model.tape)
    elif _steps_again(job, program):
        model.units = SteppedAgain(model.tape, UPDATES[program.optimizer.name], parameters.all)
    if job.distributed is not None and job.distributed.strategy == "device-map":
        from peftplan.memory.devices import Devices

        model.units = Devices(model, places_of(parameters, job.distributed.world_size))
    if job.distributed is None or holding is None or job.distributed.strategy not in SHARDING:
        return program
    if (job.distributed.pp_size or 1) > 1:
        return _pipelined(inventory, model, program)
    if job.distributed.strategy in FSDP:
        dtype, by = computing_dtype(job.distributed, str(job.setup.autocast)), job.setup.by
        shards, in_checkpoints = holding.each or holding.parameters, job.script.checkpoints_units
        part = shards_of(parameters, job.architecture, job.distributed)
        layout = AXOLOTL if by.own_fsdp2 and job.distributed.strategy == "fsdp2" else by.layout
        model.units = units_of(model, part, shards, job.distributed, layout, dtype=dtype, checkpoints_units=in_checkpoints)
        if (job.distributed.cp_size or 1) > 1:
            model.running = model.running._replace(ring=Ring(*job.distributed.ring(holding.rank or 0)))
        if ranks_of(job.distributed) > 1:
            model.units.one_by_one = job.setup.optim == "adamw_torch"
            TensorParallel(model, job.distributed, parameters.all)
        if late and isinstance(model.units, Fsdp1):
            model.units.lag = Lag()
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
        model.units = Zero(model, masters, job.distributed, dtype=dtype, rank=holding.rank)
    else:
        # ends the order (trl, models/utils.py, `add_hooks`), which the next step on rows of the data has again
        writes = job.setup.by.generates and not job.setup.use_vllm and job.setup.by.compares_at_once is None
        of_before = before.units if before is not None and isinstance(before.units, Zero3) and not writes else None
        follows = not job.setup.by.gathers_when_called
        reloads = job.setup.by.reloads_weights
        model.units = Zero3(model, job.distributed, dtype=dtype, before=of_before, follows=follows, reloads=reloads)
    return program._replace(shards=masters, steps_in_backward=True)


def _steps_again(job: Job, program: Program) -> bool:
    """Whether LOMO steps under DDP in every backward."""
    by_ddp = job.distributed is not None and job.distributed.strategy == "ddp" and job.setup.by.prepares_model
    return by_ddp and program.optimizer.name in UPDATES and program.accumulation == 1


def reduced(model: Model) -> tuple[Key, ...]:
    """The tensors in the order in which ZeRO-1 and ZeRO-2 reduce their gradients; none elsewhere."""
    return tuple(model.units.order) if isinstance(model.units, Zero) else ()


def _pipelined(inventory: Inventory, model: Model, program: Program) -> Program:
    """The program of the stages that a rank of a pipeline has."""
    from peftplan.memory.pipeline import OfRank, Staged

    job, parameters, _, holding = inventory
    assert job.distributed is not None
    assert holding is not None
    rank, layers = holding.rank or 0, num_layers(parameters.all)
    stages = stages_of(job.distributed, layers, rank)
    models, dtype = [], computing_dtype(job.distributed, str(job.setup.autocast))
    for number, stage in enumerate(stages):
        arch, of_stage = as_model(model.parameters, model.arch, stage)
        _, shards = as_model(holding.parameters, model.arch, stage)
        running = model.running._replace(use_cache=False)  # a stage's forward hands its layers a cache under a name they ignore
        own = Model(model.tape, arch, of_stage, model.adaptation, running, model.quant, model.adapter, stacks=model.stacks)
        units = units_of(own, of_stage, shards, job.distributed, job.setup.by.layout, dtype=dtype, kind=Staged)
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


def loaded_on_rank(inventory: Inventory, model: Model, buffers: Ledger, of_one_gpu: Loader, normed: Line | None) -> Loader:
    """How a rank loads the model. `of_one_gpu`: how one GPU loads what is not divided; `normed`: the workspace that it takes."""
    job, parameters, _, holding = inventory
    distributed = job.distributed
    if distributed is None or holding is None or distributed.facts.loads_on_device:
        return of_one_gpu
    if distributed.strategy == "ddp":
        return synced(parameters, buffers, distributed, of_one_gpu)
    if distributed.strategy == "fsdp1":
        accumulates = job.setup.gradient_accumulation_steps > 1 and not distributed.sync_each_batch
        stays = whole_sizes(parameters, holding.each or holding.parameters)
        on_host = distributed.cpu_ram_efficient_loading and job.script.quantizes_to_host
        whole = of_one_gpu if job.quant and not on_host else None
        return flat_units(model, buffers, accumulates=accumulates, whole=whole, stays=stays)
    whole = of_one_gpu if job.quant is not None and not job.quant.by_torchao else None
    if distributed.strategy == "zero3":
        table = next((p.numel for p in parameters.all if p.name == f"{job.architecture.input_embedding}.weight"), 0)
        return PartLoading(
            parameters,
            cast_parameters(job, parameters),
            distributed,
            job.architecture.hidden_size or 0,
            str(job.setup.autocast),
            whole,
            table if tied(job.architecture) else 0,
            second_of(job, parameters) if job.reference == "copy" else None,
        )
    if distributed.strategy == "zero0":
        masters = holding.states_of is not None
        states = (line for line in inventory.static if line.category == "optimizer_states" and line not in holding.beside)
        return WholeLoading(cast_parameters(job, parameters), masters, tuple(states) if masters else ())
    if distributed.strategy in FLAT:
        cast, world = cast_parameters(job, parameters), distributed.world_size
        trained = groups_of(cast.all, together=bool(distributed.deepspeed_optimizer))
        groups = tuple((frozenset(p.name for p in group), partition(group, world)) for group in trained)
        return FlatLoading(parameters, cast, groups, world, distributed.offload_optimizer == "cpu", whole)
    layout = job.setup.by.layout
    if (distributed.pp_size or 1) > 1:
        of_rank = stages_of(distributed, num_layers(parameters.all), holding.rank or 0)
        parameters = parameters._replace(all=tuple(on_stages(parameters.all, job.architecture, of_rank)))
    if layout.loads == "model" and job.quant is None:
        # from_pretrained(dtype="auto", device_map=the device), and `.to(torch.float32)` behind it
        whole = partial(
            load_into,
            parameters=parameters,
            quant=None,
            dtype=PUBLISHED_DTYPE,
            dtype_of=lambda _: PUBLISHED_DTYPE,
            prepared=False,
            arrives=True,
        )
    kernels = kernels_of(job.setup.kernels or ())
    # A dense model arrives in the order of accelerate's units with any tool: embedding, layers and head.
    by_units_of = layout if whole is not None and (layout.streams or layout.leaves_apart) else ACCELERATE
    policy = Loading(
        grouped(job.architecture, parameters, holding.parameters, distributed, by_units_of),
        buffers,
        whole,
        layout,
        bool(distributed.cpu_ram_efficient_loading),
        {**whole_sizes(parameters, holding.parameters), **({} if normed is None else {(normed.bytes(),): 1})},
        not versions.FSDP2_TAIL_APART.after(distributed.accelerate),
        builds(job) and job.architecture.model_type == "deepseek_v3",
        builds(job) and job.architecture.model_type == "gpt_oss",
        kernels.experts is not None,
        (TE_WORKSPACE,) if kernels.dense is not None else (),
        merges_experts(job),
        0 if builds(job) and job.architecture.model_type in SCANNING else 3,
        (TE_WORKSPACE,) if kernels.dense is not None else (),
    )
    if job.reference != "copy" or layout.loads != "tensors":
        return policy
    full, shards = second_on_rank(job, parameters)
    units = grouped(second_architecture(job), full, shards, distributed, ACCELERATE)
    theirs = Ledger(tuple(line for line in buffers if line.name.startswith(SECOND)))
    second = policy._replace(groups=units, buffers=theirs, stays=whole_sizes(full, shards))
    own = policy._replace(buffers=Ledger(tuple(line for line in buffers if line not in theirs)))
    return partial(load_one_then, first=own, second=second)


def second_of(job: Job, parameters: Parameters) -> Parameters:
    """The parameters of a second model, which is loaded as the policy is and does not train. `parameters`: the policy's."""
    if job.setup.by.teaches:
        teacher = teacher_of(job)
        assert teacher is not None
        return teacher.parameters
    cast = cast_parameters(job, parameters)
    return cast._replace(all=tuple(p._replace(trainable=False) for p in cast.all if p.owner == "base"))


def tied_bytes(job: Job, parameters: Parameters) -> int:
    """Bytes of the embedding that the head reads too; none where it has a weight of its own."""
    table = next(p for p in parameters.all if p.name == f"{job.architecture.input_embedding}.weight")
    return sum(a.nbytes for a in table.allocations) if tied(job.architecture) else 0


def first_run(load: Loader) -> Loader | None:
    """What the first forward alone makes and frees."""
    if isinstance(load, WholeLoading):
        return load.first_run if load.masters else None
    return load.first_run if isinstance(load, FlatUnits) and not load.accumulates else None


def leaves_shards(load: Loader) -> bool:
    """Whether what loading does not free goes when the first forward has returned."""
    return isinstance(load, FlatUnits) and load.leaves_shards


def stepped_first(load: Loader) -> tuple[Line, ...]:
    """The states that `first_run` makes."""
    return load.states if isinstance(load, WholeLoading) else ()


def loaded_if_full(load: Loader) -> Loader | None:
    """How a rank loads where the card has no room for `load`; None if it fails then."""
    return load._replace(on_host=True) if isinstance(load, FlatLoading) else None


def buckets_of(inventory: Inventory) -> tuple[int, ...]:
    """Bytes of each of DDP's buckets, in the order in which they are made; none elsewhere."""
    distributed = inventory.job.distributed
    is_ddp = distributed is not None and distributed.strategy == "ddp"
    return bucket_sizes(inventory.parameters, distributed) if distributed is not None and is_ddp else ()


def passing_on_rank(load: Loader, loaded: Ledger) -> tuple[Line, ...]:
    """What the peak of loading holds beyond the tensors that last; empty if nothing."""
    passing = peak_of(load) - loaded.bytes()
    source = "shards and flat copies while they are made"
    return (Line("weights while they are divided", "temporaries", "uint8", (passing,), 1, source),) if passing > 0 else ()
