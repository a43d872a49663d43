"""The JSON of a verdict, and of the advice for one card."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from peftplan.ledger import Category

VerdictName = Literal["fits", "tight", "does_not_fit", "does_not_run", "unknown"]


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
    """The verdict with these options; `null` if it was not computed."""
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
    """`text` if the job's images are not counted."""
    reason: str | None
    """Why the job does not run."""
    needed_bytes: int
    """Reserved bytes and the CUDA context."""
    needed_is_lower_bound: bool
    needed_is_upper_bound: NotRequired[bool]
    """Whether keys of a file, which no option says, make the job need less."""
    vllm_bytes: NotRequired[int]
    """The memory of vLLM, if it generates on the training GPU."""
    context_bytes: int
    context_assumed: bool
    """Whether the context is that of another card."""
    context_source: str
    runtime_context: int | None
    device_total: int | None
    headroom_bytes: int
    """Usable bytes − needed bytes."""
    runs_by_releasing_cache: bool
    """Whether the job runs only because torch releases cached memory."""


class CardDocument(VerdictDocument):
    """A verdict with advice."""

    largest_line: LargestLineDocument
    advice: list[AdviceDocument]
    """The first entry makes the job fit, if any does; the others follow by what they save."""
    advice_engine: str | None
    smallest_card: str | None
    """The smallest card that can run the job, if no change helps."""
    several_gpus: AdviceDocument | None
    """The fewest GPUs of this card that can run the job, divided by FSDP2, if on one only another method, other target modules or
    shorter sequences help, or nothing does."""
    weights_alone: int | None
    """Bytes of the base's weights, if these alone exceed the card."""
