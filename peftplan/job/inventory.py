"""A job with its tensors: the parameters, and the ledger of tensors that last from step to step."""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from peftplan import parameters
from peftplan.arch.text_part import layers_of_images
from peftplan.dtypes import ITEMSIZE
from peftplan.job.job import Job
from peftplan.job.kernels import kernels_of
from peftplan.job.lines import buffer_lines, gradient_lines, optimizer_lines, projected_whole, sensitivity_lines, weight_lines
from peftplan.job.other_sizes import differ_in_sizes
from peftplan.job.setup import Setup
from peftplan.job.trainer import Trainer
from peftplan.ledger import Allocation, Ledger, Line
from peftplan.optim import Optimizer, parse_optim, parse_optim_args
from peftplan.parameters import Parameter, Parameters
from peftplan.units import ceil_div

if TYPE_CHECKING:
    from peftplan.distributed.holding import Holding


class Inventory(NamedTuple):
    """A job, its parameters, and the tensors that last from step to step, gradients included, on the largest rank."""

    job: Job
    parameters: Parameters
    static: Ledger
    holding: "Holding | None" = None
    """The part of the parameters that a rank holds; None on one GPU."""


PATCHES = (1540 // 14) ** 2
"""Patches of the largest picture of Mistral 3, by every published config."""


def _of_release(by: Trainer, model_type: str, buffers: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """The buffers in the release that a tool pins: in that of axolotl 0.19.0 Pixtral's frequencies are a table of all patches
    (transformers, models/pixtral/modeling_pixtral.py, `compute_default_rope_parameters`)."""
    if not by.transformers or model_type != "mistral3":
        return buffers
    tables = {b.name: (PATCHES, 2 * b.shape[0]) for b in buffers if "patch_positional_embedding" in b.name}
    return tuple(
        b._replace(shape=shape, allocations=(b.allocations[0]._replace(dims=shape),)) if (shape := tables.get(b.name)) else b
        for b in buffers
    )


_LATEST: "deque[Inventory]" = deque(maxlen=4)
"""What was named last: a job at many sizes has the same tensors."""


def inventory(job: Job) -> Inventory:
    """Name every tensor of a job, or take those of the same job at other sizes."""
    for latest in _LATEST:
        if differ_in_sizes(job, latest.job):
            return latest._replace(job=job)
    _LATEST.appendleft(named := _inventory(job))
    return named


def _of_own(allocations: tuple[Allocation, ...]) -> tuple[Allocation, ...]:
    """Without the table that all weights share, which `Parameters.shared` has."""
    return tuple(a for a in allocations if a.name != "nested_code")


def _inventory(job: Job) -> Inventory:
    architecture, adaptation, quant, setup = job.architecture, job.adaptation, job.quant, job.setup
    adapter_dtype, trained_dtype = adapter_dtypes(setup)
    built = parameters.build(
        architecture,
        adaptation,
        dtype=setup.dtype,
        adapter_dtype=adapter_dtype,
        quant=quant,
        kbit_prepare=bool(setup.kbit_prepare),
        trained_dtype=adaptation.trained_dtype or trained_dtype,
        cast_back=setup.by.casts_back,
    )
    if job.script.shares_nested_code:
        built = built._replace(all=tuple(p._replace(allocations=_of_own(p.allocations)) for p in built.all))
    buffers = parameters.buffers(
        architecture,
        adaptation,
        dtype=setup.dtype,
        adapter_dtype=adapter_dtype,
        on_host=keeps_on_host(job),
    )
    built = built._replace(buffers=_of_release(setup.by, architecture.model_type, buffers))
    if layers := layers_of_images(architecture):
        built = parameters.apart(built, layers, decoder=architecture.decoder)
    if kernels_of(setup.kernels or ()).embedding is not None:
        built = built._replace(all=tuple(_on_host(p) if p.in_embedding and p.owner == "base" else p for p in built.all))
    own = _holding(job, built, _largest_rank(job, built))
    if own is not None and in_stages(job):
        own = own._replace(rank=None)
    return Inventory(job, built, _lasting(job, built, own), own)


def keeps_on_host(job: Job) -> bool:
    """Whether buffers that peft makes on the host stay there. FSDP2 and DeepSpeed move those of a whole model to the card, over 4
    bits too; one that is made divided is moved nowhere (deepspeed, runtime/engine.py, `_configure_distributed_model`)."""
    distributed, quantized = job.distributed, job.quant is not None
    if distributed is None or not distributed.strategy.startswith(("fsdp2", "zero")):
        return job.setup.by.adapter_on_host(quantized=quantized)
    return distributed.strategy == "zero3" and distributed.zero3_init is not False and not quantized


def _largest_rank(job: Job, built: Parameters) -> int:
    """The rank that is counted for all: the first one, but in a pipeline."""
    if job.distributed is None or job.distributed.pp_size in (None, 1):
        return 0
    from peftplan.distributed.tensor_parallel import largest_stage

    return job.distributed.world_size // job.distributed.pp_size * largest_stage(built.all, job.distributed.pp_size)


def _holding(job: Job, built: Parameters, rank: int) -> "Holding | None":
    if job.distributed is None:
        return None
    from peftplan.distributed.expert_parallel import each_apart
    from peftplan.distributed.shards import holding
    from peftplan.job.teacher import trained_together

    setup, built = job.setup, trained_together(job, built)
    upcasts = job.quant is None and not setup.by.own_fsdp2
    own = holding(built, job.distributed, job.architecture, autocast=str(setup.autocast), upcasts=upcasts, rank=rank)
    if kernels_of(setup.kernels or ()).experts is not None:
        own = each_apart(own)
    if setup.by.reloads_weights and job.distributed.strategy == "zero1":
        own = own._replace(beside=(*own.beside, *_flat_weights(job, own)))
    if job.distributed.strategy == "fsdp1" and own.states_of and parse_optim(str(setup.optim)).made_with_states is True:
        own = own._replace(states_of=own.states_of._replace(all=tuple(_before_cast(p, setup.dtype) for p in own.states_of.all)))
    return own._replace(rank=rank) if rank else own


def _flat_weights(job: Job, own: "Holding") -> list[Line]:
    """The flat weights in 16 bits of ZeRO-1, beside which weights come back from the host as tensors of their own (deepspeed,
    runtime/zero/stage_1_and_2.py, `flatten_dense_tensors_aligned`; ms-swift 4.6.0, rlhf_trainers/rollout_mixin.py:1477)."""
    assert job.distributed is not None
    assert own.states_of is not None
    world, dtype = job.distributed.world_size, str(job.setup.autocast)
    source = "DeepSpeed: bit16_groups_flat"
    return [Line(f"flat {p.name}", "gathered_weights", dtype, (world * p.numel,), 1, source) for p in own.states_of.all]


def _before_cast(p: Parameter, dtype: str) -> Parameter:
    """A view of a flat parameter as a constructor that makes states sees it: accelerate casts flat parameters to fp32, but the
    views are those of the weights as loaded until the first forward (accelerator.py:2044; torch, `_use_sharded_views`)."""
    return p._replace(dtype=dtype) if p.owner == "base" else p


MOST_REPLAYED = 7
"""Of so many further ranks of FSDP1 a verdict knows what they reserve: those of a node of eight GPUs; of ZeRO twice as many."""


def further_ranks(of_largest: Inventory) -> tuple[int, ...]:
    """Ranks that may reserve more than those that may allocate most, in larger worlds evenly spread: of FSDP1 those whose
    optimizer sees parts of other tensors than that of the first one; of ZeRO-1 and ZeRO-2 all, where a 16-bit gradient has a
    segment alone.
    """
    from peftplan.allocator.config import MIN_LARGE_ALLOC
    from peftplan.distributed.alike import alike

    job = of_largest.job
    assert job.distributed is not None
    of_fsdp_1 = job.distributed.strategy == "fsdp1"
    if in_stages(job):
        return ()
    if not of_fsdp_1 and all(2 * p.numel < MIN_LARGE_ALLOC for p in of_largest.parameters.all if p.trainable):
        return ()
    groups = alike(of_largest.parameters, job.distributed, job.architecture, autocast=str(job.setup.autocast))
    ranks = [first for first, *_ in groups[1:]]
    most = MOST_REPLAYED if of_fsdp_1 else 2 * MOST_REPLAYED + 1
    return tuple(reversed(ranks[:: -max(1, ceil_div(len(ranks), most))]))


def on_rank(of_largest: Inventory, rank: int) -> Inventory:
    """A job of FSDP, ZeRO or tensor parallelism as one of its ranks sees it. `of_largest`: as it is seen by the largest."""
    if of_any_device(of_largest._replace(holding=None)) and not in_stages(of_largest.job):  # of ZeRO, whose ranks hold as much
        assert of_largest.holding is not None
        return of_largest._replace(holding=of_largest.holding._replace(rank=rank))
    job, built = of_largest.job, of_largest.parameters
    own = _holding(job, built, rank)
    assert own is not None
    shares_rows = job.distributed is not None and (job.distributed.cp_size or 1) > 1
    own = own._replace(rank=rank) if in_stages(job) or shares_rows else own
    return Inventory(job, built, _lasting(job, built, own), own)


def _on_host(p: Parameter) -> Parameter:
    return p._replace(allocations=tuple(a._replace(place="host") for a in p.allocations))


REPLACED = "deepspeed: DeepSpeedEngine.param_names"
"""The source of lines of weights in whose place others were put before the first step."""
UNLIKE = ("device-map", "zero1", "zero2")
"""Strategies whose GPUs need unlike amounts of memory."""


def in_stages(job: Job) -> bool:
    """Whether the ranks of a job are stages of a pipeline under FSDP2."""
    return job.distributed is not None and job.distributed.strategy == "fsdp2" and (job.distributed.pp_size or 1) > 1


def of_any_device(inventory: Inventory) -> bool:
    """Whether a job whose GPUs need unlike amounts is seen by none of them in particular."""
    distributed, holding = inventory.job.distributed, inventory.holding
    unlike = distributed is not None and (distributed.strategy in UNLIKE or in_stages(inventory.job))
    return unlike and (holding is None or (holding.device is None and holding.rank is None))


def first_ranks(job: Job) -> range:
    """The first rank of each row of a pipeline's ranks."""
    assert job.distributed is not None
    return range(0, job.distributed.world_size, job.distributed.world_size // (job.distributed.pp_size or 1))


def on_each_device(of_any: Inventory) -> list[Inventory]:
    """A job over a `device_map` that is seen by none of its GPUs in particular, as each of them sees it."""
    from peftplan.distributed.device_map import largest, on_devices
    from peftplan.distributed.holding import Holding

    job, built = of_any.job, of_any.parameters
    assert job.distributed is not None
    devices = job.distributed.world_size
    ledgers = {largest(built, devices).like: of_any.static}
    inventories = []
    for device, share in enumerate(on_devices(built, devices)):
        holding = Holding(share.parameters, device=device)
        if share.like not in ledgers:
            ledgers[share.like] = _lasting(job, built, holding)
        inventories.append(Inventory(job, built, ledgers[share.like], holding))
    return inventories


def _lasting(job: Job, built: Parameters, own: "Holding | None") -> Ledger:
    setup, optimizer = job.setup, parse_optim(str(job.setup.optim))
    stepping = optimizer._replace(step_implementation="in-backward") if setup.optimizer_in_backward else optimizer
    on_rank = built if own is None else own.parameters
    states_of = on_rank if own is None else own.states_of or on_rank
    if optimizer.low_rank and job.distributed is not None and job.distributed.strategy == "fsdp2":
        states_of = projected_whole(built, states_of, setup.optim_target_modules or ())
    return (
        weight_lines(on_rank)
        + buffer_lines(built)
        + gradient_lines(on_rank, stepping)
        + Ledger(() if own is None else own.beside)
        + _optimizer(job, states_of, optimizer)
        + states_made_twice(job, built, optimizer)
        + (_states_of_first_step(job, states_of, optimizer) if setup.by.reloads_weights else Ledger(()))
        + (sensitivity_lines(on_rank) if job.script.updates_ranks(setup) else Ledger(()))
        + _second_models(job, on_rank, stepping)
        + _weights_as_loaded(before_merges(job, on_rank))
    )


def _second_models(job: Job, on_rank: Parameters, optimizer: Optimizer) -> Ledger:
    by = job.setup.by
    if not (job.reference == "copy" or by.rewards or by.values or by.taught):
        return Ledger(())
    from peftplan.job.second_models import second_models

    return second_models(job, on_rank, optimizer, states_of=lambda values: _optimizer(job, values, optimizer))


def before_merges(job: Job, built: Parameters) -> Parameters:
    """The 4-bit weights as they were loaded, where the trainer merges an adapter into new ones, and DeepSpeed holds the old:
    those of modules with an adapter (deepspeed, runtime/engine.py:628, `param_names`)."""
    replaced = job.setup.merges_for_vllm and job.quant is not None and job.distributed is not None
    names = {f"{module.name}.weight" for module in job.adaptation.matched} if replaced and job.method_name != "full" else ()
    return built._replace(all=tuple(p for p in built.all if p.name in names), shared=())


def _weights_as_loaded(replaced: Parameters) -> Ledger:
    return Ledger(tuple(line._replace(name=f"before merges: {line.name}", source=REPLACED) for line in weight_lines(replaced)))


def weights_in_vllm(inventory: Inventory) -> int:
    """Bytes of the base's weights: those on this GPU, which Unsloth trains on too, or all of them, of which vLLM has its own."""
    job, built, static, _ = inventory
    if not job.setup.by.sends_at_once:
        return static.bytes(("weights", "quant_state"))
    return sum(p.numel * p.copies for p in built.all if p.owner == "base") * ITEMSIZE[job.setup.dtype]


def adapter_dtypes(setup: Setup) -> tuple[str, str | None]:
    """(the adapter's dtype after peft, the dtype that the trainer casts it to or None). TRL casts to bf16 on a quantized base."""
    if setup.by.casts_adapter(setup.quant) and setup.adapter_dtype == "bf16":
        return "fp32", "bf16"
    return str(setup.adapter_dtype), None


def optim_arguments(job: Job, optimizer: Optimizer) -> dict[str, str]:
    """`optim_args`, and what the optimizer's maker reads of the model's config."""
    prompt = job.architecture.prompt
    of_model = {"dim": job.architecture.hidden_size, "n_heads": prompt and prompt.num_attention_heads}
    named = {name: str(size) for name, size in of_model.items() if size and name in optimizer.reads}
    return named | parse_optim_args(job.setup.optim_args)


def states_made_twice(job: Job, built: Parameters, optimizer: Optimizer, *, divided: bool = True) -> Ledger:
    """What stays of an optimizer whose constructor made states of a whole adapter, under FSDP2 of all weights too. DeepSpeed
    makes another one over its flat masters, and the trainer's stays with states on the card (deepspeed,
    runtime/zero/stage3.py:1358 and stage_1_and_2.py:947). Under FSDP2 its states stay on the host, but the parameters that
    they are of have been moved to the card, and accelerate moves a step of each (optimizer.py, `move_to_device`). Beside a
    quantized base both are on the card. `divided`: the model has been divided since, and those parameters are no longer its
    own.
    """
    distributed = job.distributed
    if distributed is None or optimizer.made_with_states is not True:
        return Ledger(())
    adapter = tuple(p for p in built.all if p.owner == "adapter" and p.trainable)
    if distributed.strategy == "fsdp2":
        if job.method_name == "full" and job.setup.by.prepares_model:  # accelerate casts, then divides
            adapter = tuple(p._replace(dtype="fp32") for p in built.all if p.trainable)
        whole = [(f"{p.name}, whole", p.dtype, p.shape, p.copies) for p in adapter]
        steps = [(f"step of {p.name}, whole", "fp32", (1,), p.copies) for p in adapter]
        on_card = job.quant is not None and job.setup.device_map != "cpu"
        kept = steps if on_card and not divided else (*whole, *steps)
        states = _optimizer(job, built._replace(all=adapter), optimizer) if on_card else ()
        lines = (Line(n, "optimizer_states", t, dims, k, optimizer.source) for n, t, dims, k in kept)
        return Ledger((*lines, *(line for line in states if line.place == "device")))
    divides_first = distributed.strategy == "zero3" and distributed.zero3_init is not False
    if distributed.strategy in ("zero1", "zero2", "zero3") and (job.quant is not None or divides_first):
        return _optimizer(job, built._replace(all=adapter), optimizer)
    return Ledger(())


def _states_of_first_step(job: Job, masters: Parameters, optimizer: Optimizer) -> Ledger:
    """The states that ZeRO-1 made, beside those that came back from the host: what each weight knows of its states are parts of
    the first ones (deepspeed, utils/mixed_precision_linkage.py, `lazy_init_hp_params_optimizer_state`; ms-swift 4.6.0,
    rlhf_trainers/rollout_mixin.py:1535)."""
    if job.distributed is None or job.distributed.strategy != "zero1":
        return Ledger(())
    return Ledger(tuple(line._replace(name=f"of the first step: {line.name}") for line in _optimizer(job, masters, optimizer)))


def _optimizer(job: Job, built: Parameters, optimizer: Optimizer) -> Ledger:
    setup = job.setup
    return optimizer_lines(
        built,
        optimizer,
        optim_arguments(job, optimizer),
        by_trainer=setup.by.makes_optimizer,
        target_modules=setup.optim_target_modules,
    )
