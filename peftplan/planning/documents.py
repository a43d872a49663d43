"""The JSON of plans, comparisons and grids, field by field: what `to_dict()` and `records()` of these results return."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from peftplan.job.options import MethodOptions, SetupOptions, StrategyOptions
from peftplan.job.setup import Engine
from peftplan.ledger import Category
from peftplan.results.documents import Phase
from peftplan.results.verdict_documents import VerdictName


class BindingDocument(TypedDict):
    """What keeps a plan from the next larger size."""

    phase: Phase
    category: Category
    line: str
    """The line that grows most towards the next larger size, or the largest one if nothing fits."""
    line_bytes: int
    verdict: VerdictName
    headroom_bytes: int
    """Negative by what is missing."""


class PlanFacts(TypedDict):
    """A job with its largest size, and its numbers at that size or, where nothing fits, at the smallest."""

    method: str
    batch_size: int
    seq_len: int
    r: int | None
    trainable_parameters: int
    peak_allocated: int
    needed_bytes: int
    """Reserved bytes and the CUDA context."""
    usable_bytes: int
    headroom_bytes: int
    verdict: VerdictName
    reason: str | None
    """Why the job does not run."""
    context_bytes: int
    context_assumed: bool
    """Whether the context is that of another card."""
    fits_again: int | None
    """The largest size beyond the answer that fits, because reserved bytes are not monotone."""
    asked_from: int
    """Every size from here to the answer was checked individually."""
    bounded: bool
    """Whether the search ended before the card was full."""
    next_larger: NotRequired[str | None]
    """Where models were searched: the next larger one, which does not fit."""
    tokens_per_step: int
    """Tokens of one micro batch on one card; 0 if nothing fits."""
    model: NotRequired[str | None]
    """Where models were searched: the largest one that fits."""


class PlanDocument(PlanFacts):
    """A job with its largest size; if nothing fits, that size is 0, and the model `null`."""

    changes: dict[str, object]
    """Options that differ from the job as typed, besides the size."""
    binding: BindingDocument | None


class PlanRow(PlanFacts):
    """A plan as a flat row."""

    changes: str
    """`option=value, …`"""
    binding: str | None


class OtherCardDocument(TypedDict):
    """The smallest card of the catalogue that takes a job which no size makes fit."""

    gpu: str
    model: str
    changes: dict[str, object]
    """As those of a plan."""
    usable_bytes: int
    needed_bytes: int


class FitDocument(TypedDict):
    """Plans for one card."""

    schema_version: Literal[1]
    engine: Engine
    model: str
    gpu: str
    max: Literal["batch_size", "seq_len", "r", "model"]
    """The size that was maximized."""
    warnings: list[str]
    plans: list[PlanDocument]
    """The job as typed, then other plans that fit, ranked."""
    nearest: list[PlanDocument]
    """Plans that come near and do not fit."""
    other_card: OtherCardDocument | None
    """Where no plan fits: the smallest card that takes the one that comes nearest."""


class ComparedFacts(TypedDict):
    """A method on a card; without a card, the method alone. `null` is what is not known."""

    method: str
    gpu: str | None
    trainable_parameters: int | None
    peak_allocated: int | None
    peak_phase: Phase | None
    needed_bytes: int | None
    needed_is_lower_bound: bool
    """True if there is no peak: `needed_bytes` are then the persistent bytes."""
    usable_bytes: int | None
    headroom_bytes: int | None
    verdict: VerdictName | None
    adapter_bytes: int | None
    """The adapter's file."""
    error: str | None
    """Why the method has no numbers."""
    reason: str | None
    """Why the method does not run on the card."""
    strategy: NotRequired[str | None]
    """Where several ways are compared: how the GPUs share the job; `null` on one."""
    world_size: NotRequired[int]
    """Where several ways are compared: how many GPUs."""
    needed_is_upper_bound: NotRequired[bool]
    """Where a row has one: whether `needed_bytes` have a margin, since reserved bytes are not known."""


class ComparedDocument(ComparedFacts):
    """A method on a card; without a card, the method alone. `null` is what is not known."""

    by_category: dict[Category, int] | None
    """The peak, by what it consists of."""
    warnings: list[str]


class ComparedRow(ComparedFacts):
    """The same as a flat row, with the bytes of each category that any row has: none where the peak is not known."""

    warnings: str
    weights: NotRequired[int | None]
    adapter_weights: NotRequired[int | None]
    quant_state: NotRequired[int | None]
    gradients: NotRequired[int | None]
    optimizer_states: NotRequired[int | None]
    activations: NotRequired[int | None]
    logits: NotRequired[int | None]
    temporaries: NotRequired[int | None]
    buffers: NotRequired[int | None]
    workspaces: NotRequired[int | None]
    gathered_weights: NotRequired[int | None]
    communication: NotRequired[int | None]


class CompareDocument(TypedDict):
    """A row for each method on each card."""

    schema_version: Literal[1]
    engine: Engine
    model: str
    rows: list[ComparedDocument]
    over: NotRequired[str]
    """On several GPUs: how they share each job."""


class SweepRowDocument(TypedDict):
    """One point on one card. Every other option of the grid has a field of its name."""

    model: str
    method: str
    batch_size: int | None
    seq_len: int | None
    r: int | None
    trainable_parameters: int | None
    requested_bytes: int | None
    """What tensors request at the peak, without what the allocator adds."""
    peak_allocated: int | None
    """Of a point that was replayed."""
    peak_reserved: int | None
    gpu: str | None
    usable_bytes: int | None
    context_bytes: int | None
    needed_bytes: int | None
    headroom_bytes: int | None
    verdict: VerdictName | None
    """`null` if more points would have to be replayed."""
    decided_by: Literal["requested", "bound", "replay"] | None
    """How the verdict came about."""
    error: str | None
    """Why this combination is refused."""


class SweepRow(SweepRowDocument, SetupOptions, StrategyOptions, MethodOptions, total=False):
    """One point on one card, with those other options that the grid has."""
