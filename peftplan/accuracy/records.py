"""The run record: one training run that somebody measured, in peftplan's own words, with its circumstances.

Bytes are integers as torch counts them (`max_memory_allocated`, `max_memory_reserved`) or as the driver does (`device_bytes`).
A record says what its source left open (`unknown`) and what its setup cannot say (`differs`); a record with neither is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from peftplan.distributed.strategy import parse_distributed
from peftplan.errors import InputError
from peftplan.job.options import JobOptions
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.setup import parse_setup
from peftplan.job.trainer import Defaults

SCHEMA_VERSION = 1

Phase = Literal["load", "forward", "backward", "step"]
PHASES: tuple[Phase, ...] = ("load", "forward", "backward", "step")
Metric = Literal["allocated", "reserved", "device"]

SetupSaid = Literal["as labelled", "with an inferred stack", "leaves something open"]
SETUPS: tuple[SetupSaid, ...] = ("as labelled", "with an inferred stack", "leaves something open")
"""What ran is known and labelled so; is known, but part of it was inferred (`Record.inferred`); or is not all known."""

MOST = 2**63 - 1
"""Largest number of bytes or parameters: what torch's own counters hold."""
NumBytes = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Text = Annotated[str, Field(min_length=1)]

PINNED = frozenset({"trainer", "dtype", "adapter_dtype", "batch_size", "seq_len", "gradient_accumulation_steps"}) | frozenset(
    {"attn_implementation", "padding", "keep_gradients", *Defaults._fields}
) - {"device_map"}
"""Options that every record states, so that no default of a later peftplan changes what was measured. Records without a
`device_map` are of models that were loaded on the host.
"""


class Part(BaseModel):
    """A part of a record: frozen, strict in its types, closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Run(Part):
    """What ran: the arguments of `peftplan.estimate`.

    `model`: a built-in name, a Hub id, or a whole config. `method` with `method_config` (its fields, under peft's names), or
    `peft_config` (a whole adapter config), or both, where the method adds to the config what its name implies. `options` are
    fields of `job.setup.Setup`; those in `PINNED` must be there. `distributed`: fields of `distributed.strategy.Distributed`,
    `strategy` and `gpus` among them, where several GPUs ran; all else is then that of a rank. `script`: what the program did
    besides.
    """

    model: Text | dict[str, object]
    method: Text | None = None
    peft_config: dict[str, object] | None = None
    method_config: dict[str, object] = {}
    options: dict[str, object]
    distributed: dict[str, object] = {}
    script: Script = NO_SCRIPT

    @field_validator("options")
    @classmethod
    def _options(cls, options: dict[str, object]) -> dict[str, object]:
        parse_setup(options)
        missing = sorted(name for name in PINNED if options.get(name) is None)
        if missing:
            raise ValueError(f"a record states every option; missing: {', '.join(missing)}")
        return options

    @field_validator("distributed")
    @classmethod
    def _distributed(cls, distributed: dict[str, object]) -> dict[str, object]:
        if distributed and (parse_distributed(distributed) is None or distributed.get("strategy") is None):
            raise ValueError("a record of several GPUs states gpus (2 or more) and strategy")
        return distributed

    @model_validator(mode="after")
    def _method(self) -> Run:
        if self.method is None and self.peft_config is None:
            raise ValueError("either method or peft_config is needed")
        return self

    @property
    def model_name(self) -> str:
        """The model as it is shown."""
        return self.model if isinstance(self.model, str) else str(self.model.get("_name_or_path") or self.model.get("model_type"))

    @property
    def method_name(self) -> str:
        """The method as it is shown: its name, or the peft type of its config."""
        return self.method or str((self.peft_config or {}).get("peft_type", "")).lower()

    @property
    def strategy(self) -> str | None:
        """What divides the job over several GPUs; None on one."""
        return None if not self.distributed else str(self.distributed["strategy"])

    def arguments(self) -> JobOptions:
        """The keyword arguments of `peftplan.estimate` besides the model, the card and the engine."""
        named = {"method": self.method, "peft_config": self.peft_config, "script": self.script}
        return cast("JobOptions", {"device_map": "none", **self.method_config, **self.options, **self.distributed, **named})


class Circumstances(Part):
    """Where, when and with what it ran, and who published it."""

    gpu: Text
    gpu_id: str | None = None
    """The card's id in peftplan's catalogue, where it is there."""
    compute_capability: str | None = None
    num_gpus: Annotated[int, Field(ge=1)] = 1
    rank: Annotated[int, Field(ge=0)] = 0
    """The rank whose peaks the record has."""
    driver: str | None = None
    cuda: str | None = None
    versions: dict[str, str] = {}
    """Package → version: torch, transformers, peft, bitsandbytes, trl, accelerate, …"""
    allocator: str | None = None
    """`PYTORCH_ALLOC_CONF` as it was set; None where it was unset or is not stated."""
    framework: str | None = None
    commit: str | None = None
    date: str | None = None
    source: Text
    """Who measured: the name by which drift is grouped."""
    repo: str | None = None
    path: str | None = None
    licence: Text


class Peak(Part):
    """A peak as torch's allocator counts it; None where it was not read."""

    allocated: NumBytes | None = None
    reserved: NumBytes | None = None


class Measured(Part):
    """The peaks of a run. `by_phase` holds each phase's own, with the counters reset in between; `overall` is that of the run."""

    by_phase: dict[Phase, Peak] = {}
    overall: Peak = Peak()
    device_bytes: NumBytes | None = None
    """What the device showed for the process or as used (NVML, nvidia-smi): reserved, context and all else."""
    context_bytes: NumBytes | None = None
    """The part of `device_bytes` that was there before the first tensor, where it was measured."""
    rounding_bytes: NumBytes = 0
    """The last digit that the source printed: 0.01 GiB is 10,737,418 bytes; 0 where bytes were printed."""

    def figure(self, metric: Metric, phase: Phase | None = None) -> int | None:
        """The measured number of bytes, or None."""
        if metric == "device":
            return None if phase else self.device_bytes
        peak = self.by_phase.get(phase, Peak()) if phase else self.overall
        return peak.allocated if metric == "allocated" else peak.reserved


class Counts(Part):
    """Parameters as the run printed them."""

    trainable: Count | None = None
    total: Count | None = None


class Tolerance(Part):
    """The largest absolute drift, in percent, that an engine may show: of overall peaks, and of each phase."""

    allocated: Annotated[float, Field(gt=0)] | None = None
    reserved: Annotated[float, Field(gt=0)] | None = None
    device: Annotated[float, Field(gt=0)] | None = None
    phases: Annotated[float, Field(gt=0)] | None = None


class Inference(Part):
    """A choice in a record's setup that the source does not state, or states otherwise, and what it was chosen by."""

    what: Text
    evidence: Literal["measured bytes", "files of the source"]
    """`measured bytes`: chosen by comparing what was measured with what other choices would give, of these runs or of others."""


class Record(Part):
    """One measured run."""

    schema_version: Literal[1] = 1
    id: Text
    run: Run
    circumstances: Circumstances
    outcome: Literal["ok", "oom", "failed"]
    error: str | None = None
    """The first line of what an oom or a failed run said."""
    covers: Literal["steady-step", "training", "whole-run"]
    """What the overall peak is the maximum over: one steady step; training without loading; or the process, loading included."""
    peaks: Measured = Measured()
    counts: Counts = Counts()
    kept_alive: tuple[Text, ...] = ()
    """What the program held on to from forward to the end of the step, or longer: outputs, gradients, kv cache, …"""
    steps: tuple[dict[str, object], ...] = ()
    """Raw figures as the program read them, step by step."""
    unknown: tuple[Text, ...] = ()
    """What the source does not say, and what the setup assumes instead."""
    differs: tuple[Text, ...] = ()
    """What ran differently from what the setup says."""
    inferred: tuple[Inference, ...] = ()
    """What the setup takes against the record's label, or where its source says nothing, with the evidence for it."""
    tolerance: dict[Literal["analytic", "trace"], Tolerance] = {}
    note: str | None = None

    @model_validator(mode="after")
    def _measured(self) -> Record:
        overall = self.peaks.overall
        if self.outcome == "ok" and (overall.allocated, overall.reserved, self.peaks.device_bytes) == (None, None, None):
            raise ValueError("a run with outcome ok needs at least one overall peak")
        return self

    @model_validator(mode="after")
    def _ranks(self) -> Record:
        strategy, where = parse_distributed(self.run.distributed), self.circumstances
        if strategy is not None and (where.num_gpus != strategy.world_size or where.rank >= where.num_gpus):
            accepted = f"run.distributed makes {strategy.world_size} ranks; accepted: one of them"
            raise InputError("circumstances", f"rank {where.rank} of {where.num_gpus}", accepted)
        return self

    @cached_property
    def exact(self) -> bool:
        """Whether the setup states everything that ran: only then is drift the engine's own."""
        return not self.unknown and not self.differs

    @property
    def setup(self) -> SetupSaid:
        """How far the setup can be taken for what ran."""
        return "leaves something open" if not self.exact else "with an inferred stack" if self.inferred else "as labelled"

    def payload(self) -> dict[str, object]:
        """The record as JSON: fields with their default value are left out."""
        return {"schema_version": self.schema_version, **self.model_dump(mode="json", exclude_defaults=True)}


def full_options(options: Mapping[str, object]) -> dict[str, object]:
    """The options of a resolved setup that say something, as a record states them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if value is not None}
