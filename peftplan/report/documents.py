"""What each command prints with `--format json`: the types behind `peftplan schema`."""

from __future__ import annotations

from typing import Literal, NamedTuple

from typing_extensions import NotRequired, TypedDict

from peftplan.allocator.oom import OutOfMemory
from peftplan.arch.catalogue import ModelEntry
from peftplan.hardware.gpus import OF_A_REQUEST, Gpu
from peftplan.oom.causes import Cause
from peftplan.oom.diagnosis import Expected
from peftplan.oom.message import Message
from peftplan.oom.snapshot import Alive
from peftplan.planning.choosing import Member
from peftplan.planning.configs import ConfigEntry
from peftplan.planning.documents import CompareDocument, FitDocument, SweepRowDocument
from peftplan.planning.inspection import Row
from peftplan.planning.practice import Practice
from peftplan.planning.serving_documents import ServingDocument
from peftplan.report.check_documents import CheckDocument
from peftplan.results import rehearsal
from peftplan.results.documents import EstimateDocument
from peftplan.results.verdict_documents import VerdictDocument


class FitsDocument(TypedDict):
    """Plans for several cards."""

    schema_version: Literal[1]
    cards: list[FitDocument]


class DiagnosisDocument(TypedDict):
    """Why a program ran out of memory."""

    schema_version: Literal[1]
    message: Message | None
    """The numbers in torch's message, in bytes; `null` for a snapshot without one."""
    causes: list[Cause]
    """What the message gives evidence for, the likeliest first."""
    alive: list[Alive]
    """From a snapshot: what was alive, by the line of the program that allocated it."""
    expected: Expected | None
    """With `--model`: what the job was expected to need."""


class ReplayPeakDocument(TypedDict):
    """The peak of a phase, or of the whole run."""

    phase: str
    allocated: int
    requested: int
    reserved: int


class FragmentationDocument(TypedDict):
    """At the highest allocated bytes."""

    free_at_peak: int
    """Reserved and free."""
    rounded_at_peak: int
    """Lost to rounding."""


class ReplayEndDocument(TypedDict):
    """When the recording ends."""

    allocated: int
    requested: int
    reserved: int


class ReplayDocument(TypedDict):
    """A recorded run through the allocator's model."""

    schema_version: Literal[1]
    source: str
    title: str
    events: int
    capacity: int | None
    peaks: list[ReplayPeakDocument]
    fragmentation: FragmentationDocument
    at_end: ReplayEndDocument
    recorded_peak_reserved: int | None
    untraced: int
    """Blocks that were allocated before the recording began."""
    out_of_memory: OutOfMemory | None
    """The request that failed."""


class InspectDocument(TypedDict):
    """The modules of a model."""

    name: str
    model_class: str
    num_parameters: int
    dtype: str
    targets: list[str] | str | None
    """How `--match` was resolved."""
    modules: list[Row]


class MethodRowDocument(TypedDict):
    """One PEFT method."""

    name: str
    peft_type: str | None
    summary: str
    source: str
    quant: str | None
    """The storage that the method sets."""


class FieldDocument(TypedDict):
    """One field of a method's config."""

    field: str
    required: bool
    default: object


class Document(NamedTuple):
    """What a command prints: the command, and the type."""

    command: str
    text: str
    type: object


DOCUMENTS: dict[str, Document] = {
    "estimate": Document("peftplan estimate MODEL", "What a fine-tuning run needs.", EstimateDocument),
    "fit": Document("peftplan fit MODEL --gpu CARD", "The largest size that fits, and other plans.", FitDocument),
    "fit-cards": Document("peftplan fit MODEL --gpu CARD,CARD", "The same for several cards.", FitsDocument),
    "which-gpu": Document("peftplan fit MODEL --which-gpu", "The cards that take a job.", list[VerdictDocument]),
    "model-family": Document("peftplan fit --model-family NAME --gpu CARD", "The largest model per method.", list[Member]),
    "compare": Document("peftplan compare MODEL", "One job by several methods, on several cards.", CompareDocument),
    "sweep": Document("peftplan sweep MODEL", "A row of a grid: each line of JSON Lines is one.", SweepRowDocument),
    "explain-oom": Document("peftplan explain-oom FILE", "Why a program ran out of memory.", DiagnosisDocument),
    "serve": Document("peftplan serve MODEL", "What comes after training.", ServingDocument),
    "replay": Document("peftplan replay FILE", "A recorded run through the allocator's model.", ReplayDocument),
    "inspect": Document("peftplan inspect MODEL", "The modules of a model.", InspectDocument),
    "configs": Document("peftplan configs", "What training configs of other tools need.", list[ConfigEntry]),
    "models": Document("peftplan models", "The built-in models.", list[ModelEntry]),
    "methods": Document("peftplan methods", "The PEFT methods.", list[MethodRowDocument]),
    "method": Document("peftplan methods NAME", "The fields of one method.", list[FieldDocument]),
    "advise": Document("peftplan advise", "Advice from practice, with its sources.", list[Practice]),
    "gpus": Document("peftplan gpus", "The cards of the catalogue.", list[Gpu]),
    "rehearse": Document("peftplan rehearse -- COMMAND", "A program's run on an emulated card.", rehearsal.Rehearsal),
    "check": Document("peftplan check", "An engine against measured runs.", CheckDocument),
}
"""Name of a document → what prints it."""


class Shape(NamedTuple):
    """How the JSON of a record differs from the record: fields that are left out, and fields that are added or replaced."""

    left_out: tuple[str, ...] = ()
    added: dict[str, object] = {}  # noqa: RUF012
    name: str | None = None
    """What the record is called, where another one has its name."""


REHEARSED = {"schema_version": Literal[1], "engine": str, "gpus": list[VerdictDocument]}
SHAPES: dict[type, Shape] = {
    rehearsal.Rehearsal: Shape(
        ("recording",), added={**REHEARSED, **dict.fromkeys(("peak_allocated", "peak_reserved"), NotRequired[int])}
    ),
    rehearsal.Alive: Shape(name="MadeBy"),
    rehearsal.OutOfMemory: Shape(name="FailedRequest"),
    Member: Shape(added={"verdict": VerdictDocument | None}),
    Gpu: Shape(OF_A_REQUEST, {"usable_bytes": int, "usable_source": str}),
    OutOfMemory: Shape(
        added={
            **dict.fromkeys(("phase", "op", "module", "category", "name"), str | None),
            "lost_to_fragmentation": bool,
        }
    ),
}
