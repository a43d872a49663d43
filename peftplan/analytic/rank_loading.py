"""How a rank of several GPUs loads its part of a model, and what its first step finds."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import peftplan.versions as versions
from peftplan.analytic.ranks import SECOND, cast_parameters, second_architecture, second_of, second_on_rank, shards_on_rank
from peftplan.analytic.shown import FLAT, scans_under_zero2
from peftplan.distributed.ddp import bucket_sizes
from peftplan.distributed.layout import ACCELERATE
from peftplan.distributed.order import in_module_order, tensors
from peftplan.distributed.pipeline import num_layers, on_stages, stages_of
from peftplan.distributed.zero import groups_of, partition
from peftplan.dtypes import ITEMSIZE, SIXTEEN_BITS
from peftplan.job.automodel import builds, merges_experts
from peftplan.job.further_tokens import STACK
from peftplan.job.kernels import SCANNING, kernels_of
from peftplan.job.teacher import trained_together
from peftplan.ledger import Ledger, Line
from peftplan.memory.flat_load import FlatUnits
from peftplan.memory.lasting import TE_WORKSPACE
from peftplan.memory.load import load_into
from peftplan.memory.loaded import Loader, left_by, peak_of
from peftplan.memory.model import Model
from peftplan.memory.reference_load import load_one_then
from peftplan.memory.sharded import flat_units
from peftplan.memory.sharded_load import Loading, whole_sizes
from peftplan.memory.stacked_load import merged
from peftplan.memory.state_dict_load import ByStateDict
from peftplan.memory.synced import synced
from peftplan.memory.unit_groups import grouped, tied
from peftplan.memory.zero0 import WholeLoading
from peftplan.memory.zero_load import FlatLoading, PartLoading
from peftplan.optim import Optimizer, parse_optim
from peftplan.parameters import Parameters

if TYPE_CHECKING:
    from peftplan.job.inventory import Inventory
    from peftplan.job.job import Job

IN_8_BITS = ("minimax_m2",)
"""Model types that are published in 8 bits."""
OF_MIXERS = re.compile(r"language_model\.layers\.\{\}\.(?:self|linear)_attn\..*proj.*\.weight$")
PUBLISHED_DTYPE = "bf16"
"""What `dtype="auto"` loads: the dtype in which most models are published."""


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
        stays = whole_sizes(parameters, shards_on_rank(inventory))
        on_host = distributed.cpu_ram_efficient_loading and job.script.quantizes_to_host
        whole = of_one_gpu if job.quant and not on_host else None
        return flat_units(model, buffers, accumulates=accumulates, whole=whole, stays=stays)
    on_card = job.quant is not None and not job.quant.by_torchao and job.setup.device_map != "cpu"
    whole = of_one_gpu if on_card else None
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
            merged(parameters, job.architecture.model_type) if job.script.converts_in_turn else {},
            in_fp32=job.setup.dtype == "fp32" and job.setup.autocast in SIXTEEN_BITS and not job.setup.by.full_in_fp32,
        )
    if distributed.strategy == "zero0":
        masters = holding.states_of is not None
        states = (line for line in inventory.static if line.category == "optimizer_states" and line not in holding.beside)
        return WholeLoading(cast_parameters(job, parameters), masters, tuple(states) if masters else ())
    if distributed.strategy in FLAT:
        parameters = trained_together(job, parameters)
        cast, world = cast_parameters(job, parameters), distributed.world_size
        trained = groups_of(cast.all, together=bool(distributed.deepspeed_optimizer))
        groups = tuple((frozenset(p.name for p in group), partition(group, world)) for group in trained)
        flat = FlatLoading(parameters, cast, groups, world, distributed.offload_optimizer == "cpu", whole)
        # ms-swift loads each rank's model on its device (model/utils.py:242)
        return flat._replace(stacks=merged(cast, "nemotron_h")) if scans_under_zero2(job) else flat
    layout = job.setup.by.layout
    in_8_bits: tuple[tuple[int, int], ...] = ()
    if job.architecture.model_type in IN_8_BITS and builds(job):
        in_8_bits = _matrices_of_stages(job, parameters, holding.parameters, holding.rank or 0)
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
    built = job.architecture.model_type if builds(job) else None
    one_by_one = bool(distributed.cpu_ram_efficient_loading) and job.setup.device_map != "cpu"  # not of `Params4bit`
    casts_shards = versions.FSDP2_UPCASTS_ALL.after(distributed.accelerate) and layout is ACCELERATE and job.quant is None
    if one_by_one and layout is ACCELERATE and job.quant is None and not casts_shards:
        return _by_state_dict(job, parameters, holding.parameters, buffers)
    by_accelerate = layout is ACCELERATE  # other tools' weights arrive with a tower's layers beside the text's
    shards = holding.parameters
    policy = Loading(
        groups=grouped(job.architecture, parameters, shards, distributed, by_units_of, loads=True, towers_apart=by_accelerate),
        buffers=buffers,
        of_one_gpu=whole,
        layout=layout,
        one_by_one=one_by_one,
        stays={**whole_sizes(parameters, holding.parameters), **({} if normed is None else {(normed.bytes(),): 1})},
        keeps_ends=not versions.FSDP2_TAIL_APART.after(distributed.accelerate),
        widened=built == "deepseek_v3" and job.setup.dtype != "fp32",
        in_4_bits=built == "gpt_oss" and kernels.gate is None,
        stacks=kernels.experts is not None and kernels.gate is None,
        reads=kernels.gate is None,  # no checkpoint has a model without routers
        workspaces=(TE_WORKSPACE,) * (0 if kernels.dense is None else kernels.dense.workspaces),
        merged=merges_experts(job),
        in_8_bits=in_8_bits if kernels.gate is None else (),
        states=_states_moved(job, parameters),
        keeps_last=layout is ACCELERATE and versions.FSDP2_TAIL_APART.after(distributed.accelerate),
        casts_shards=casts_shards,
        passing=PASSING[built](holding.parameters) if built in PASSING else (),
        masks=0 if built in (*SCANNING, "gemma4", "ernie4_5_moe") else 3,
    )
    if job.reference != "copy" or layout.loads != "tensors":
        return policy
    full, shards = second_on_rank(job, parameters)
    units = grouped(second_architecture(job), full, shards, distributed, ACCELERATE)
    theirs = Ledger(tuple(line for line in buffers if line.name.startswith(SECOND)))
    second = policy._replace(groups=units, buffers=theirs, stays=whole_sizes(full, shards))
    own = policy._replace(buffers=Ledger(tuple(line for line in buffers if line not in theirs)))
    return partial(load_one_then, first=own, second=second)


def keeps_undivided(job: Job, optimizer: Optimizer) -> bool:
    """Whether states that a constructor made keep what trains as it was before FSDP2 divided it, from the host."""
    on_fsdp2 = job.distributed is not None and job.distributed.strategy == "fsdp2"
    return on_fsdp2 and job.quant is None and job.setup.by.prepares_model and optimizer.made_with_states is True


def _states_moved(job: Job, parameters: Parameters) -> tuple[int, ...]:
    """Bytes of the states that the optimizer's constructor made on the host. Vectors are Trainer's second group."""
    if not keeps_undivided(job, parse_optim(str(job.setup.optim))):
        return ()
    trained = [p for p, _ in tensors(in_module_order(parameters)) if p.trainable]
    return tuple(ITEMSIZE[p.dtype] * p.numel for p in sorted(trained, key=lambda p: len(p.shape) < 2))


def _by_state_dict(job: Job, full: Parameters, shards: Parameters, buffers: Ledger) -> ByStateDict:
    """How the first rank loads for all. `shards`: what it has of each parameter."""
    assert job.distributed is not None
    shard_of = {id(p): shard for p, shard in zip(full.all, shards.all, strict=True)}
    pairs = [(p, shard_of[id(p)]) for p, _ in tensors(in_module_order(full))]
    name = f"{job.architecture.input_embedding}.weight"
    table = [pair for pair in pairs if tied(job.architecture) and pair[0].name == name]
    by_newest = not job.setup.by.own_fsdp2 and not versions.FSDP2_KEEPS_LAST_LOADED.after(job.distributed.accelerate)
    return ByStateDict(pairs, table, buffers, job.distributed.shards, keeps_last=by_newest)


def _matrices_of_stages(job: Job, parameters: Parameters, own: Parameters, rank: int) -> tuple[tuple[int, int], ...]:
    """Of each stage of a rank, or of all of a model: bytes of what it holds of matrices in layers, and of its largest tensor."""
    assert job.distributed is not None
    stages = stages_of(job.distributed, num_layers(parameters.all), rank) if (job.distributed.pp_size or 1) > 1 else ()
    stored = [on_stages(own.all, job.architecture, (stage,)) for stage in stages] or [iter(own.all)]
    sizes = [[(sum(a.nbytes for a in p.allocations), p.copies) for p in of if p.layers and len(p.shape) > 1] for of in stored]
    return tuple((sum(nbytes * copies for nbytes, copies in of), max(nbytes for nbytes, _ in of)) for of in sizes)


def _masks(own: Parameters) -> tuple[int, ...]:
    """Three masks by which `nn.init.trunc_normal_` draws a rank's largest part of a matrix of attention or of a delta rule
    (nemo_automodel 0.7.0, components/models/qwen3_5/model.py, `Qwen3_5DenseBlock.init_weights`)."""
    return (max(p.numel for p in own.all if p.layers and len(p.shape) > 1 and OF_MIXERS.search(p.name)),) * 3


def _stacked_further(own: Parameters) -> tuple[int, ...]:
    """Experts of a layer that predicts a further token are read one by one, gate and up of each are joined, and all stacked
    (the same, qwen3_5_moe/state_dict_adapter.py, `from_hf`), where the checkpoint has them so, as that of Qwen3.5 35B-A3B."""
    stacks = [p for p in own.all if p.name.startswith(STACK) and len(p.shape) > 2]
    return tuple(sum(a.nbytes for a in p.allocations) for p in stacks for _ in range(2 + p.name.endswith("gate_up_proj")))


PASSING = {"qwen3_5": _masks, "qwen3_5_moe": _stacked_further}
"""Model type → what is there together, in bytes, once a rank has all weights."""


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


def shards_left(load: Loader, loaded: Ledger) -> tuple[Line, ...]:
    """What loading leaves beside the tensors that last, until the first forward has returned; empty if nothing."""
    left = left_by(load) - loaded.bytes() if leaves_shards(load) else 0
    source = "torch, _use_sharded_views"
    return (Line("shards before they are cast", "temporaries", "uint8", (left,), 1, source),) if left > 0 else ()


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
