"""The JSON of an estimate, field by field: what `Estimate.to_dict()` returns, bytes as whole numbers.

`peftplan schema` prints these types as JSON Schema; `tests/report/test_schema.py` validates results against it.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from peftplan.ledger import Category, Place

Phase = Literal["load", "generate", "forward", "backward", "step"]
VerdictName = Literal["fits", "tight", "does_not_fit", "does_not_run", "unknown"]


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
    """`*` stands for the number of a layer."""
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
    reserved_source: str | None
    """How the reserved bytes were computed."""
    incomplete: list[str]
    """What the engine could not follow; the peaks are lower bounds then."""
    runtime_context: int | None
    """The CUDA context of the one card that was named, where it is known."""
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
    """The adapter's file, or the model's files where its base trains."""
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


class LargestLineDocument(TypedDict):
    """The line that takes most of the card."""

    category: Category
    name: str
    bytes: int


class AdviceDocument(TypedDict):
    """Options to change together."""

    options: dict[str, object]
    """Keywords of `peftplan.estimate` → new values."""
    saving_bytes: int
    tensor_bytes: int
    """Bytes of the tensors at the new peak."""
    verdict: str | None
    """The verdict with these options; `null` where it was not computed."""
    peak_allocated: int | None
    headroom_bytes: int | None


class VerdictDocument(TypedDict):
    """Whether the job fits one card."""

    name: str
    """The card, as `peftplan gpus` names it, or a size."""
    usable_bytes: int
    """What a program can use of the card."""
    usable_source: str
    verdict: VerdictName
    scope: NotRequired[str]
    """`text` where the job's pictures are not counted."""
    reason: str | None
    """Why the job does not run."""
    needed_bytes: int
    """Reserved bytes and the CUDA context."""
    needed_is_lower_bound: bool
    needed_is_upper_bound: NotRequired[bool]
    """Whether keys of a file, which no option says, make the job need less."""
    vllm_bytes: NotRequired[int]
    """What vLLM takes of the card, where it generates for the trainer."""
    context_bytes: int
    context_assumed: bool
    """Whether the context is that of another card."""
    context_source: str
    runtime_context: int | None
    device_total: int | None
    headroom_bytes: int
    """Usable bytes − needed bytes."""
    runs_by_releasing_cache: bool
    """Whether the job runs only because torch gives cached memory back."""


class CardDocument(VerdictDocument):
    """A verdict with advice."""

    largest_line: LargestLineDocument
    advice: list[AdviceDocument]
    """The first entry makes the job fit, if any does; the others follow by what they save."""
    advice_engine: str | None
    smallest_card: str | None
    """The smallest card that takes the job, where no change helps."""
    weights_alone: int | None
    """Bytes of the base's weights, where these alone are more than the card has."""


class PeakTensorDocument(TypedDict):
    """Tensors of one name at the peak: `--explain-peak`."""

    category: Category
    name: str
    made_by: str
    """The operation of the trace; empty where formulas made it."""
    dtype: str
    shape: list[int | str]
    copies: int
    bytes: int
    share: float
    """Part of the peak, 0 to 1."""


class RankRangeDocument(TypedDict):
    """Ranks that hold the same, by their numbers."""

    first: int
    last: int
    count: int


class RankGroupDocument(TypedDict):
    """What these ranks need."""

    ranks: RankRangeDocument
    persistent: int
    """Device bytes that last from step to step, and the gradients."""
    peak_by_phase: dict[Phase, int] | None
    peak_allocated: int | None
    peak_reserved: int | None


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
    not_counted: list[str]


class ReadKeyDocument(TypedDict):
    """A key of a file that decides options."""

    value: object
    option: str
    """The options, comma-separated."""
    why: str


class IgnoredKeyDocument(TypedDict):
    """A key that does not change memory."""

    value: object
    why: str
    at: str
    """The tool's file and line."""


class UnsupportedKeyDocument(TypedDict):
    """A key that changes memory, or may, and that no option says."""

    value: object
    why: str
    effect: Literal["lowers", "raises", "unknown"]
    """What it does to the true peak."""
    option: str | None
    """The option that takes its place where it is set."""


class ConfigDocument(TypedDict):
    """What the file of another training tool says: `--config`."""

    tool: str
    version: str
    """The version whose defaults are known."""
    files: list[str]
    model: str | None
    options: dict[str, object]
    """peftplan's options, the tool's defaults included."""
    launch: dict[str, object]
    read: dict[str, ReadKeyDocument]
    ignored: dict[str, IgnoredKeyDocument]
    unsupported: dict[str, UnsupportedKeyDocument]
    defaults: dict[str, str]
    """Option that the file leaves to the tool → the tool's file and line."""
    assumed: dict[str, str]
    """What the file leaves to the data or the launcher."""
    bound: Literal["at_most", "at_least", "unknown"] | None
    """What the peak is where a key is not supported."""


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
    """Every value that the numbers rest on, defaults included."""
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
