"""Several GPUs: the strategy that divides a job over them, with its parameters, checked once.

Parameters have the names of the tool that takes them: accelerate's `FullyShardedDataParallelPlugin` and torch's `fully_shard`,
torch's `DistributedDataParallel`, DeepSpeed's `zero_optimization`. `job.launch` reads them from the tools' own files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from peftplan.distributed.names import (
    ALWAYS,
    DEFAULT,
    MOST_RANKS,
    OF_PIPELINE,
    STRATEGIES,
    Facts,
    Place,
    Prefetch,
    Schedule,
    StrategyName,
    WrapPolicy,
)
from peftplan.dtypes import MODEL_DTYPES, parse_dtype
from peftplan.errors import InputError, OptionError
from peftplan.validation import first_error, listed, no_switches
from peftplan.versions import ADAPTERS_KEPT, LEFTOVERS_RELEASED

Names = Annotated[tuple[str, ...], BeforeValidator(listed)]
MOST = 2**31

Size = Annotated[int, Field(ge=0, le=MOST * 2**10)]
AutoSize = Size | Literal["auto"]
"""A size in elements, or the one that transformers takes from the hidden size."""
Ranks = Annotated[int, Field(ge=1, le=MOST_RANKS)]
Group = Annotated[int, Field(ge=2, le=MOST_RANKS)]
ReduceDtype = Annotated[str, BeforeValidator(lambda v: v if v is None else parse_dtype(v, field="dtype", accepted=MODEL_DTYPES))]


def _resharding(value: object) -> object:
    """Raises InputError for the numbers 0 and 1, which torch and accelerate take differently (torch, _fully_shard/_fsdp_init.py,
    `_get_post_forward_mesh_info`; accelerate, utils/dataclasses.py, `str_to_bool`)."""
    if not isinstance(value, bool) and value in (0, 1, "0", "1"):
        why = "torch takes the number 1 as false, accelerate's files take it as true"
        raise InputError("reshard_after_forward", value, f"{why}; accepted: true, false, or a divisor of the GPUs from 2 on")
    return value


def _release(field: str, example: str) -> AfterValidator:
    """A release as packages number them. Raises InputError."""

    def checked(text: str) -> str:
        if not re.match(r"[0-9]+\.[0-9]+", text):
            raise InputError(field, text, f"accepted: a release, such as {example}")
        return text

    return AfterValidator(checked)


class Distributed(BaseModel):
    """A strategy, the GPUs that it divides a job over, and its parameters; None means: as the tool does it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    strategy: StrategyName = DEFAULT
    gpus: Ranks | None = None
    """GPUs of a node, one process each; of `device-map` all in one process."""
    nodes: Ranks = 1
    accelerate: Annotated[str, _release("accelerate", "1.16")] | None = None
    """The version of accelerate that prepares the model; None: one that behaves as 1.16."""
    # FSDP
    reshard_after_forward: Annotated[bool | Group | None, BeforeValidator(_resharding)] = None
    dp_shard_size: Ranks | None = None
    """Ranks of a shard group; the model is replicated over the groups (HSDP)."""
    offload_params: Place | None = None
    wrap_policy: WrapPolicy | None = None
    transformer_cls_names_to_wrap: Names | None = None
    min_num_params: Size | None = None
    custom_sharded_layers: Names | None = None
    """Units beside the layers, as torchtune names them: `tok_embeddings`, `output`."""
    backward_prefetch: Prefetch | None = None
    forward_prefetch: bool | None = None
    use_orig_params: bool | None = None
    cpu_ram_efficient_loading: bool | None = None
    checkpoints_parts: bool | None = None
    """Whether the modules of each layer are checkpoints within that of the layer, as accelerate makes them of FSDP2's
    `activation_checkpointing` before axolotl does (accelerate, utils/fsdp_utils.py, `fsdp2_apply_ac`; axolotl 0.19.0,
    monkeypatch/accelerate/fsdp2.py:485)."""
    sync_each_batch: bool | None = None
    """Whether gradients are reduced in every micro batch, not only once per optimizer step."""
    param_dtype: ReduceDtype | None = None
    reduce_dtype: ReduceDtype | None = None
    # DDP
    bucket_cap_mb: Annotated[float, Field(gt=0, le=MOST)] | None = None
    gradient_as_bucket_view: bool | None = None
    find_unused_parameters: bool | None = None
    static_graph: bool | None = None
    # DeepSpeed
    offload_optimizer: Place | None = None
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    round_robin_gradients: bool | None = None
    reduce_bucket_size: AutoSize | None = None
    allgather_bucket_size: Size | None = None
    sub_group_size: Size | None = None
    stage3_prefetch_bucket_size: AutoSize | None = None
    stage3_param_persistence_threshold: AutoSize | None = None
    stage3_max_live_parameters: Size | None = None
    stage3_max_reuse_distance: Size | None = None
    zero3_init: bool | None = None
    """Whether `from_pretrained` makes shards at once (`deepspeed.zero.Init`)."""
    deepspeed_version: Annotated[str, _release("deepspeed_version", "0.18.9")] | None = None
    """The release of DeepSpeed that runs ZeRO-3; None: the one that the trainer's package asks for, else one as in
    `versions.READ_IN`."""
    deepspeed_optimizer: bool | None = None
    """Whether DeepSpeed's own fused Adam steps, as where its config names an optimizer."""
    zero_force_ds_cpu_optimizer: bool | None = None
    """Whether accelerate makes DeepSpeed's own optimizer of any that steps on the host; None: as DeepSpeed does, it does."""
    seq_parallel_communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """The dtype in which ranks that share rows reduce gradients."""
    # other dimensions
    tp_size: Ranks | None = None
    cp_size: Ranks | None = None
    sp_size: Ranks | None = None
    """Ranks that share each row by DeepSpeed's Ulysses (accelerate's `sp_backend: deepspeed`)."""
    ep_size: Ranks | None = None
    routing: Literal["balanced", "worst"] | None = None
    """Where tokens go: as many to each expert, or every token of all ranks to the experts of this one."""
    pp_size: Ranks | None = None
    pp_schedule: Schedule | None = None
    pp_microbatches: Ranks | None = None
    """Micro batches of one run of the schedule, each of `batch_size` sequences."""
    pp_layers_per_stage: Annotated[int, Field(ge=1, le=MOST)] | None = None
    pp_round_stages: Literal["up", "down"] | None = None
    """How the number of stages is rounded to a multiple of `pp_size`."""
    pp_stage_is_unit: bool | None = None
    """Whether a stage, or the model where there are none, is a unit of FSDP2 itself. If not, its head is a root beside it, and
    torch's schedule gathers no stage ahead and reduces none behind its last micro batch: the tool does (nemo_automodel 0.7.0,
    components/moe/fsdp_mixin.py), or, with `sync_each_batch`, each backward (`wrap_outer_model`)."""
    whole_tower: bool | None = None
    """Whether every rank holds all of a frozen tower beside the text part (`distributed.towers`)."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return (self.gpus or 1) * self.nodes

    @property
    def shards(self) -> int:
        """The number of ranks that share one copy of the sharded tensors."""
        divided = (self.tp_size or 1) * (self.pp_size or 1) if self.strategy == "fsdp2" else 1
        if self.dp_shard_size is not None:  # beside ranks that share a row, which accelerate shards over too
            return self.dp_shard_size * (self.cp_size or 1)
        return self.world_size // divided

    @property
    def replicas(self) -> int:
        """The number of ranks that read their own batches."""
        if self.strategy == "device-map":
            return 1
        return self.world_size // (self.divided * self.sharing * (self.pp_size or 1))

    @property
    def sharing(self) -> int:
        """The number of ranks that share a row of tokens, in a ring or by Ulysses."""
        return (self.cp_size or 1) * (self.sp_size or 1)

    @property
    def parts(self) -> int:
        """The parts into which they divide it: two for each rank of a ring."""
        ring = self.cp_size or 1
        return 2 * ring if ring > 1 else self.sharing

    @property
    def steps_flat(self) -> bool:
        """Whether the optimizer sees FSDP1's flat parameters, not views of the tensors in them."""
        return self.use_orig_params is False

    @property
    def chunks(self) -> int:
        """Micro batches of one run of a pipeline's schedule: as few as NeMo Automodel accepts unless they are set."""
        return self.pp_microbatches or (self.pp_size or 1 if self.strategy == "fsdp2" else 1)

    @property
    def divided(self) -> int:
        """The number of ranks that share a matrix: under tensor parallelism all of a pipeline's stage unless `tp_size` is set."""
        return self.tp_size or (self.world_size // (self.pp_size or 1) if self.strategy == "tp" else 1)

    def reduced_in(self, dtype: str) -> str:
        """The dtype in which DeepSpeed reduces gradients of this one: under Ulysses fp32, unless its file says otherwise
        (runtime/constants.py), which ZeRO-1 and ZeRO-2 do not read (runtime/zero/stage_1_and_2.py:2373)."""
        if self.sp_size in (None, 1):
            return dtype
        return (self.strategy == "zero3" and self.seq_parallel_communication_data_type) or "fp32"

    def place(self, rank: int) -> tuple[int, int]:
        """A rank's place in its shard group, and among those that share a matrix, which are neighbours (accelerate,
        parallelism_config.py, `_get_mesh`)."""
        return rank // self.divided % self.shards, rank % self.divided

    def ring(self, rank: int) -> tuple[int, int]:
        """How many ranks share a row of tokens, which are neighbours, and a rank's place among them."""
        ranks = self.cp_size or 1
        return ranks, rank // self.divided % ranks

    def stage(self, rank: int) -> int:
        """The stage of a pipeline that a rank is of; ranks of one stage are neighbours (transformers, distributed/utils.py)."""
        return rank * (self.pp_size or 1) // self.world_size

    @property
    def gathers_in_order(self) -> bool:
        """Whether FSDP1 gathers ahead in forward, in the order of the first one."""
        return self.strategy == "fsdp1" and bool(self.forward_prefetch)

    @property
    def keeps_leftovers(self) -> bool:
        """Whether the DeepSpeed that runs ZeRO-3 leaves weights gathered that no hook releases, until the next forward, and lets
        no weight at rest wait for the module that made a checkpoint again."""
        return self.strategy == "zero3" and LEFTOVERS_RELEASED.after(self.deepspeed_version)

    @property
    def casts_adapters(self) -> bool:
        """Whether the DeepSpeed that runs ZeRO-3 casts to 16 bits an adapter that is added to shards too, not the base alone."""
        return self.strategy == "zero3" and ADAPTERS_KEPT.after(self.deepspeed_version)

    @property
    def facts(self) -> Facts:
        """The facts about the strategy."""
        return STRATEGIES[self.strategy]

    @property
    def called(self) -> str:
        """The strategy with its ranks, as a person reads it: `FSDP2 over 8 GPUs`."""
        where = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.facts.called} over {self.world_size} GPUs{where}"


def parse_distributed(options: Mapping[str, object]) -> Distributed | None:
    """The strategy of these options; None for one GPU.

    Raises InputError for a strategy on one GPU, for a parameter that the strategy does not have, and for ranks that do not
    divide.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if not options:
        return None
    try:
        hash(tuple(options.values()))
    except TypeError:  # lists
        return _parsed.__wrapped__(**options)
    return _parsed(**options)


@lru_cache(maxsize=64, typed=True)
def _parsed(**options: object) -> Distributed | None:
    """`parse_distributed` of options that were given; many estimates of a process share them."""
    no_switches(Distributed, options)
    try:
        distributed = Distributed.model_validate(options)
    except ValidationError as error:
        raise first_error(error, nested=False) from None
    if distributed.world_size == 1:
        _refuse_alone(options)
        return None
    _check_taken(distributed, options)
    _check_divisible(distributed)
    size = distributed.reshard_after_forward
    if distributed.strategy == "fsdp2" and type(size) is int and size == distributed.shards:
        return distributed.model_copy(update={"reshard_after_forward": True})  # as torch takes it
    return distributed


def _refuse_alone(options: Mapping[str, object]) -> None:
    """Raise InputError for options that need several GPUs. `gpus=1` is one GPU."""
    names = (name for name in ("strategy", *options) if name in options and name not in ("gpus", "nodes", "accelerate"))
    if (name := next(names, None)) is not None:
        what = (
            f"{options[name]} divides a job over several GPUs" if name == "strategy" else "it takes effect on several GPUs only"
        )
        raise OptionError(name, options[name], f"{what}; add --gpus 2, for example, or --gpu 2xCARD")


def _check_taken(distributed: Distributed, options: Mapping[str, object]) -> None:
    for name in options:
        if name in ALWAYS or name in distributed.facts.takes:
            continue
        having = [other for other, facts in STRATEGIES.items() if name in facts.takes]
        accepted = f"accepted: with --strategy {' or '.join(having)}"
        raise OptionError(name, options[name], f"{distributed.facts.called} has no such parameter; {accepted}")
    if distributed.offload_params == "nvme" and distributed.strategy in ("fsdp1", "fsdp2"):
        raise InputError("offload_params", "nvme", f"{distributed.facts.called} offloads to the host; accepted: none or cpu")


def _check_divisible(distributed: Distributed) -> None:
    world = distributed.world_size
    for name in ("dp_shard_size", "tp_size", "cp_size", "sp_size", "ep_size", "pp_size"):
        size = getattr(distributed, name)
        if size is not None and world % size:
            raise InputError(name, size, f"accepted: a divisor of the {world} GPUs")
    sharing = (distributed.tp_size or 1) * (distributed.pp_size or 1)
    if world % sharing:
        accepted = f"accepted: a size whose product with tp_size, {sharing} here, divides the {world} GPUs"
        raise InputError("pp_size", distributed.pp_size, accepted)
    if distributed.dp_shard_size is not None and world % distributed.shards:
        accepted = f"accepted: a size whose product with dp_shard_size, {distributed.dp_shard_size}, divides the {world} GPUs"
        raise InputError("cp_size", distributed.cp_size, accepted)
    of_stages = [name for name in OF_PIPELINE if getattr(distributed, name) is not None]
    if of_stages and distributed.pp_size in (None, 1):
        raise InputError(of_stages[0], getattr(distributed, of_stages[0]), "accepted: with a pp_size of 2 or more")
    divides = distributed.pp_size not in (None, 1) or distributed.ep_size not in (None, 1)
    if distributed.routing is not None and distributed.ep_size in (None, 1):
        raise InputError("routing", distributed.routing, "accepted: with an ep_size of 2 or more")
    if distributed.pp_stage_is_unit is not None and not divides:
        accepted = "accepted: with a pp_size or an ep_size of 2 or more"
        raise InputError("pp_stage_is_unit", distributed.pp_stage_is_unit, accepted)
    if type(distributed.reshard_after_forward) is int and distributed.shards % distributed.reshard_after_forward:
        raise InputError(
            "reshard_after_forward",
            distributed.reshard_after_forward,
            f"accepted: true, false, or a divisor of the {distributed.shards} GPUs",
        )
