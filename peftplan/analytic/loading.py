"""How a job is loaded: which of memory's loaders runs, and what is alive only while it does."""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.automodel import builds
from peftplan.job.kernels import kernels_of
from peftplan.job.repositories import PACKED
from peftplan.job.setup import Setup
from peftplan.ledger import Ledger, Line
from peftplan.memory.copied_load import SOURCE as COPIED
from peftplan.memory.dora_load import norms
from peftplan.memory.load import MOVED_LAST, arrives_in, dtypes_before, load_into, load_passing
from peftplan.memory.load import SOURCE as LOAD
from peftplan.memory.loaded import Loader, peak_of
from peftplan.memory.methods import ADAPTERS
from peftplan.memory.model import Model
from peftplan.memory.recast import SOURCE as RECAST
from peftplan.memory.recast import is_recast, is_table, load_narrowed, load_recast
from peftplan.memory.stacked_load import SOURCE as STACKED
from peftplan.memory.stacked_load import gathered, merged
from peftplan.parameters import PREPARED, loaded_dtype

if TYPE_CHECKING:
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job


class Loading(NamedTuple):
    """How a job is loaded."""

    load: Loader
    """Loads the model tensor by tensor."""
    passing: tuple[Line, ...]
    """What is alive at its peak, and not when it ends."""


def loading_of(
    inventory: "Inventory", model: Model, setup: Setup, *, loaded: tuple[Line, ...], buffers: Ledger, normed: Line | None
) -> Loading:
    """How a job is loaded. `setup`: that of the rank. `loaded`: what is there when loading ends; `buffers`: its buffers.

    `normed`: the workspace that norms of DoRA's layers take then, if they are made on the device.
    """
    job, parameters, _, holding = inventory
    dtype = setup.dtype if job.distributed is not None else arrives_in(setup, full=job.method_name == "full")
    dtype_of = partial(loaded_dtype, job.architecture, dtype=dtype)
    doubled = job.quant is not None and bool(job.quant.double_quant)
    # A repository in 4 bits (unsloth, models/mapper.py). Left out in SFT, where reserved bytes were rehearsed without it.
    packed = setup.packs_completions and kernels_of(setup.kernels or ()).layers is not None
    packed = packed or (job.quant is not None and job.quant.name in PACKED)
    passing = load_passing(
        parameters,
        buffers,
        dtype=setup.dtype,
        dtype_of=dtype_of,
        doubled=doubled,
        packed=packed,
        adapters_pass_in=_passed_in(job),
    )
    stacks = gathered(parameters, job.quant, job.architecture.model_type)
    by_map = setup.device_map not in ("none", "cpu")
    arrives = by_map or (job.distributed is not None and job.distributed.facts.loads_on_device)
    load_whole = partial(
        load_into,
        parameters=parameters if holding is None or not arrives else holding.parameters,
        quant=job.quant,
        dtype=dtype,
        dtype_of=dtype_of,
        prepared=job.quant is not None and bool(setup.kbit_prepare) and job.quant.name in PREPARED,
        adapters_pass_in=_passed_in(job),
        moved=job.quant is None and not setup.by.loads_on_device,
        arrives=arrives,
        stacks=stacks,
        warms_up=not stacks and (not setup.by.layout.streams or any(b.mlp.variant == "moe" for b in job.architecture.blocks)),
        asks_for_room=setup.device_map == "auto" or (holding is not None and holding.device is not None),
        packed=packed,
        workspace=None if normed is None else normed.bytes(),
    )
    base = parameters._replace(all=tuple(p for p in parameters.all if p.owner == "base"))
    load: Loader = load_whole
    if job.method is not None and job.method.name == "llama-pro":
        from peftplan.memory.copied_load import load_copied

        on_device = parameters if holding is None or not arrives else holding.parameters
        frozen = on_device._replace(all=tuple(p for p in on_device.all if not p.trainable))
        load = partial(load_copied, load=partial(load_whole, parameters=frozen), parameters=on_device)
        beyond_end = peak_of(load) - Ledger(loaded).bytes()
        passing = (Line("projections made anew", "temporaries", "uint8", (beyond_end,), 1, COPIED),)
    if stacks:
        beyond_end = peak_of(load) - Ledger(loaded).bytes()
        passing = (Line("experts while loading", "temporaries", "uint8", (beyond_end,), 1, STACKED),) if beyond_end > 0 else ()
    if normed is not None:
        from peftplan.analytic import rank_loading

        passing = (normed, *rank_loading.passing_on_rank(load, Ledger((*loaded, normed))))
    if job.quant is not None and job.quant.by_torchao:
        from peftplan.analytic import rank_loading
        from peftplan.memory.torchao_load import load_nf4

        load = partial(
            load_nf4,
            parameters=parameters,
            quant=job.quant,
            dtype=setup.dtype,
            norms=norms(parameters, job.quant, dtype=setup.dtype, passing=()).values(),
            workspace=None if normed is None else normed.bytes(),
        )
        taken = () if normed is None else (normed,)
        passing = (*taken, *rank_loading.passing_on_rank(load, Ledger((*loaded, *taken))))
    if job.distributed is None and setup.by.layout.loads == "shards" and job.quant is None:
        from peftplan.analytic import rank_loading
        from peftplan.memory.sharded_load import load_empty

        load = partial(load_empty, load=load, head=rank_loading.tied_bytes(job, parameters))
        passing = rank_loading.passing_on_rank(load, Ledger(loaded))
    if job.distributed is None and builds(job) and job.architecture.model_type == "gpt_oss":
        from peftplan.memory.lasting import TE_WORKSPACE
        from peftplan.memory.mxfp4_load import SOURCE as WIDENED
        from peftplan.memory.mxfp4_load import load_widened

        workspaces = (TE_WORKSPACE,) if kernels_of(setup.kernels or ()).dense is not None else ()
        load = partial(load_widened, load=load, parameters=parameters, workspaces=workspaces)
        passing = (Line("experts in 4 bits", "temporaries", "uint8", (peak_of(load) - Ledger(loaded).bytes(),), 1, WIDENED),)
    if job.reference == "copy" and setup.by.block:
        from peftplan.job.second_models import as_copied
        from peftplan.memory.reference_load import load_with_copy

        load = partial(load_with_copy, load=load, policy=parameters, copy=as_copied(job, parameters))
    elif job.reference == "copy":
        from peftplan.job.second_models import as_copied
        from peftplan.job.teacher import teacher_of
        from peftplan.memory.reference_load import load_both

        teacher = teacher_of(job)
        moved = job.distributed is not None or setup.by.rewards
        second, moved = (as_copied(job, parameters), moved) if teacher is None else (teacher.parameters, True)
        load = partial(load_both, load=load, reference=second, moved=moved)
    if setup.by.rewards:
        from peftplan.job.teacher import reward_of
        from peftplan.memory.reference_load import load_both

        reward = reward_of(job)
        assert reward is not None
        load = partial(load_both, load=load, reference=reward.parameters, moved=True)
        if setup.by.values:
            load = partial(load_both, load=load, reference=reward.parameters, moved=True)
    if job.distributed is not None:
        from peftplan.analytic import rank_loading, ranks

        moves_last = job.distributed.strategy.startswith("zero") or job.distributed.strategy == "fsdp2"
        if moves_last and job.quant is not None and load is load_whole:
            at_once = tuple(p for p in parameters.buffers if not p.name.endswith(MOVED_LAST))
            load = partial(load_whole, parameters=parameters._replace(buffers=at_once))
        load = rank_loading.loaded_on_rank(inventory, model, buffers, load, normed)
        if setup.by.taught:
            from peftplan.job.teacher import divided_teacher_of
            from peftplan.memory.reference_load import load_beside_teacher

            divided = divided_teacher_of(job)
            assert divided is not None
            policy = ranks.cast_parameters(job, parameters)
            load = partial(load_beside_teacher, load=load, policy=policy, teacher=divided[0].parameters, shards=divided[1])
        if setup.by.layout.loads == "shards" and job.reference == "copy":
            from peftplan.memory.reference_load import load_shards_behind

            load = partial(load_shards_behind, load=load, shards=ranks.second_on_rank(job, parameters)[1])
        elif job.reference == "copy" and job.distributed.strategy not in ("ddp", "zero3", "fsdp2"):
            from peftplan.job.teacher import reward_of
            from peftplan.memory.reference_load import load_after_reference

            cast, reward = ranks.cast_parameters(job, parameters), reward_of(job)
            scores = () if reward is None else (reward.parameters,)
            others = (*scores, cast) if setup.by.values else (cast, *scores)
            load = partial(load_after_reference, load=load, references=others, last=setup.by.values)
        beyond = rank_loading.passing_on_rank(load, Ledger(loaded))
        passing = beyond or (passing if job.distributed.strategy == "ddp" else ())
    if dtype != setup.dtype:
        passing = (Line("weights in 16 bits", "temporaries", "uint8", (peak_of(load) - Ledger(loaded).bytes(),), 1, LOAD),)
    if is_recast(setup, job.quant, job.distributed, adapted=job.method_name != "full"):
        dense = [p.name for p in base.all if not p.quantized]
        tables = frozenset(name for name in dense if any(map(is_table, job.architecture.names_of(name))))
        load_cast = partial(load_whole, recast=tables, merged=merged(base, job.architecture.model_type))
        if job.distributed is None:
            load = load_cast
        else:
            load = partial(load_recast, load=load, of_base=partial(load_cast, parameters=base, arrives=True))
        beyond_end = peak_of(load) - Ledger(loaded).bytes()
        passing = (
            (Line("embedding and head in fp32", "temporaries", "uint8", (beyond_end,), 1, RECAST),) if beyond_end > 0 else ()
        )
    if setup.by.narrows:
        load = partial(load_narrowed, load=load_whole, parameters=parameters, names=setup.by.narrows)
        passing = (
            Line("embedding and head in fp32", "temporaries", "uint8", (peak_of(load) - Ledger(loaded).bytes(),), 1, LOAD),
        )
    return Loading(load, passing)


def _passed_in(job: "Job") -> tuple[str, ...]:
    """The dtypes of adapters before their own, where peft's layers put them beside a base on the device."""
    on_device = job.setup.adapter_on_device or (job.distributed is not None and job.distributed.facts.loads_on_device)
    if job.method is None or job.method.peft_type not in ADAPTERS or not (job.quant or on_device):
        return ()
    return dtypes_before(job.setup, job.quant)
