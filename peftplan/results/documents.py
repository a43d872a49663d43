"""The JSON of an estimate, field by field: what `Estimate.to_dict()` returns, bytes as whole numbers.

`peftplan schema` prints these types as JSON Schema; `tests/report/test_schema.py` validates results against it.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from peftplan.ledger import Category, Place
from peftplan.results.config_documents import ConfigDocument
from peftplan.results.verdict_documents import CardDocument

Phase = Literal["load", "generate", "forward", "backward", "step", "evaluate"]


class ModelDocument(TypedDict):
    """The base model."""

    name: str
    model_type: str
    """transformers' `model_type`."""
    model_class: str
    """The class of transformers that the job loads."""
    num_parameters: int
    """Parameters of the base, tied tensors once."""
    source: str
    """Where the config comes from."""


class MethodDocument(TypedDict):
    """The PEFT method."""

    name: str
    config: dict[str, object]
    """Its fields under peft's names."""


class LineDocument(TypedDict):
    """Tensors of one name and shape that are alive at the overall peak."""

    category: Category
    name: str
    """`*` is the number of a layer."""
    bytes: int
    """Bytes at the overall peak."""
    bytes_by_phase: dict[Phase, int]
    """Bytes of the same tensors at the peak of each phase."""
    place: Place
    """`device`: counted by torch's allocator. `managed`: paged optimizer states. `host`: in the CPU's memory."""
    formula: str
    """copies × round512(itemsize × dims)"""
    source: str
    """The library's code that makes the tensor."""


class MemoryDocument(TypedDict):
    """Bytes of a steady training step. `null` is what the engine does not know."""

    lines: list[LineDocument]
    """Their sum is `peak_allocated`."""
    by_category: dict[Category, int | None]
    """The same bytes by category."""
    persistent: int
    """Device bytes that last from step to step, and the gradients."""
    managed: int
    """Bytes of paged optimizer states, outside torch's allocator."""
    peak_by_phase: dict[Phase, int | None]
    peak_phase: Phase | None
    peak_allocated: int | None
    """Comparable with `torch.cuda.max_memory_allocated()`."""
    peak_reserved: int | None
    """Comparable with `torch.cuda.max_memory_reserved()`."""
    peak_reserved_at_most: NotRequired[int | None]
    """Under FSDP1, whose reserved bytes depend on the GPU's pace: those of the rank that reserves most with a GPU as late as
    `limit_all_gathers` lets it be, which verdicts count. `peak_reserved` are those of a GPU that is never late."""
    scope: NotRequired[str]
    """`text` if the peaks count no images."""
    reserved_source: str | None
    """How the reserved bytes were computed, or why they are not known."""
    incomplete: list[str]
    """What the engine could not follow; the peaks are lower bounds then."""
    runtime_context: int | None
    """The CUDA context of the card, if one card was named and its context is known."""
    device_total: int | None
    """What nvidia-smi shows for the process on that card."""


class LoadingDocument(TypedDict):
    """Host memory that loading the model takes."""

    bytes: int
    largest_tensor: int
    """What passes through host memory at least."""
    how: str


class CheckpointFilesDocument(TypedDict):
    """The large files of one checkpoint of Trainer."""

    model_name: str
    model: int | None
    """The adapter's file, or the model's files if the base trains."""
    optimizer: int
    """`optimizer.pt`."""
    optimizer_exact: bool
    """Whether `optimizer` is exact; of optimizers that torch does not have, the file's frame is close only."""
    scheduler: int
    """`scheduler.pt`."""
    total: int


class NodeDocument(TypedDict):
    """Host memory of a node, in bytes of all its ranks."""

    loading: int
    """What its ranks load; pages of a file that is mapped are counted, though they share them."""
    offloaded: int
    memory: int | None
    """What it has (`host_memory`)."""


class HostDocument(TypedDict):
    """Host memory and disk."""

    loading: LoadingDocument
    offloaded: int
    """What waits in host memory during a step."""
    paged: int
    """Paged optimizer states, which leave a full card for host memory."""
    merging: int | None
    """The peak of `merge_and_unload` on the CPU."""
    checkpoint: CheckpointFilesDocument
    save_total_limit: int | None
    disk_kept: int | None
    """All checkpoints that are kept; `null` without `save_total_limit`."""
    disk_peak: int | None
    """The same while a new checkpoint is written beside them."""
    ranks_per_node: int
    per_node: NodeDocument


class PeakTensorDocument(TypedDict):
    """Tensors of one name at the peak: `--explain-peak`."""

    category: Category
    name: str
    made_by: str
    """The operation of the trace; empty for formulas."""
    dtype: str
    shape: list[int | str]
    copies: int
    bytes: int
    share: float
    """Part of the peak, 0 to 1."""


class RankRangeDocument(TypedDict):
    """Ranks with the same numbers, by their indices."""

    first: int
    last: int
    count: int
    words: str
    """All of them: `0, 2-7`."""


class RankGroupDocument(TypedDict):
    """What these ranks need."""

    ranks: RankRangeDocument
    persistent: int
    """Device bytes that last from step to step, and the gradients."""
    peak_by_phase: dict[Phase, int] | None
    """null: not counted. Of more than 16 unlike ranks, and in a trace, only those are that can be the largest."""
    peak_allocated: int | None
    peak_reserved: int | None
    lines: list[LineDocument]
    """As in `memory`, of the group's first rank; without a peak, what lasts from step to step."""


class GroupsDocument(TypedDict):
    """Sizes of the groups of ranks."""

    shard: int
    """Ranks over which one copy of the weights is divided."""
    replicas: int
    """Ranks that read batches of their own."""


class HostOfRanksDocument(TypedDict):
    """Host memory of what is offloaded."""

    per_rank: int
    per_node: int


class WorstRoutingDocument(TypedDict):
    """The rank to whose experts all ranks send every token."""

    peak_allocated: int
    peak_reserved: int | None
    peak_by_phase: dict[str, int]


class DistributedDocument(TypedDict):
    """How several GPUs share the job; `memory` and `gpus` are of the rank with the largest peak."""

    strategy: str
    world_size: int
    gpus_per_node: int
    nodes: int
    groups: GroupsDocument
    parameters: dict[str, object]
    """Parameters of the strategy that were set, under their tools' names."""
    batch_size_per_rank: int
    global_batch_size: int
    """Sequences of an optimizer step over all ranks."""
    ranks: list[RankGroupDocument]
    host: HostOfRanksDocument
    worst_routing: WorstRoutingDocument | None
    """Where ranks divide experts, and it has a formula."""
    not_counted: list[str]


class Assumptions(TypedDict, total=False):
    """What the numbers rest on: every value of `planning.assumed`. The keys that code reads are named here."""

    trainer: str
    batch_size: int
    seq_len: int
    dtype: str
    serving_dtype: str
    quant: str
    kernels: list[str]
    strategy: str
    world_size: int
    offloaded_bytes: int
    notes: list[str]


class EstimateDocument(TypedDict):
    """What a fine-tuning run needs: `peftplan estimate --format json`, `Estimate.to_dict()`."""

    schema_version: Literal[1]
    """1 as long as fields are only added."""
    engine: str
    model: ModelDocument
    method: MethodDocument
    trainable_parameters: int
    """What peft's `get_nb_trainable_parameters()` returns first."""
    total_parameters: int
    """What it returns second."""
    memory: MemoryDocument
    assumptions: dict[str, object]
    """Every value that the numbers depend on, defaults included."""
    warnings: list[str]
    not_modelled: list[str]
    """What the numbers leave out."""
    host: HostDocument | None
    """Host memory to load, offload and merge, and what checkpoints take on disk."""
    gpus: list[CardDocument]
    """One entry for each card that was named."""
    largest: NotRequired[list[PeakTensorDocument]]
    """With `--explain-peak` only."""
    distributed: NotRequired[DistributedDocument]
    """On several GPUs only."""
    config: NotRequired[ConfigDocument]
    """With `--config` only."""
