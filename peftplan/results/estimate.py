"""The result of an engine: an `Estimate`, the same type for analytic, trace and measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast, overload

from peftplan.errors import InputError, OptionError
from peftplan.frames import as_html, dataframe
from peftplan.ledger import CATEGORIES, OF_SEVERAL_GPUS, Category, Ledger, Line
from peftplan.results.lines import line_documents
from peftplan.results.peaks import PHASES, Peaks
from peftplan.results.verdict import Verdict
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

    from peftplan.arrays import Sizes
    from peftplan.methods.adaptation import Adaptation
    from peftplan.parameters import Parameters
    from peftplan.results.advice import Advised
    from peftplan.results.config_documents import ConfigDocument
    from peftplan.results.distributed import OverGpus
    from peftplan.results.documents import Assumptions, EstimateDocument, LineDocument, MethodDocument, ModelDocument
    from peftplan.results.grid import Grid
    from peftplan.results.host import Host

SCHEMA_VERSION = 1
COUNTED: tuple[Category, ...] = (
    "weights",
    "adapter_weights",
    "quant_state",
    "gradients",
    "optimizer_states",
    "buffers",
)
"""Categories that the analytic engine counts today; the others are null in the JSON, never 0."""
AT_REPLAYS = 64
"""Points of a grid that `Estimate.at` replays, where nothing else is said: less than a second."""


class Origin(Protocol):
    """What an estimate was made from, as data (`planning.question.Question`): it is asked what needs the job again."""

    def at(self, sizes: Mapping[str, Sizes | None], *, replays: int | None) -> Estimate | Grid: ...

    def advice(self, estimate: Estimate) -> dict[str, Advised]: ...

    def advise(self, on_card: Verdict) -> Advised: ...

    def host(self, offloaded: int) -> Host: ...


@dataclass(frozen=True, repr=False)
class Estimate:
    """What a run needs: exact counts, a ledger of lines, what was assumed, what is not modelled, a verdict per card.

    Sizes are whole bytes, counts whole numbers of elements. `peaks` are those of a steady training step, None where a part of
    the job has no formula (`not_modelled` says which); `ledger` has the lines of the overall peak, `static` the persistent
    bytes and the gradients, `assumptions` every value that the numbers depend on, defaults included.
    """

    engine: str
    model: ModelDocument
    method: MethodDocument
    parameters: Parameters
    adaptation: Adaptation
    lasting: Ledger
    """`static` before the peaks say which rank is the largest."""
    assumptions: Assumptions
    not_modelled: tuple[str, ...]
    gpus: tuple[Verdict, ...] = ()
    peaks: Peaks | None = None
    warnings: tuple[str, ...] = ()
    """Options that have no effect, such as a name in `target_modules` that matches no module."""
    chosen: frozenset[str] = frozenset()
    """Assumptions that somebody set; the others were filled in."""
    asides: tuple[str, ...] = ()
    """Notes that change no number: how the model's count was checked."""
    origin: Origin | None = field(default=None, repr=False)
    """The job and its cards, which an estimate at other sizes and advice are made from."""
    distributed: OverGpus | None = None
    """How several GPUs share the job; all other bytes are then those of the largest rank. None on one GPU."""
    config: ConfigDocument | None = None
    """What the file of another tool says, key by key, where one was asked (`job.configs.plan.ConfigPlan.to_dict`)."""

    @property
    def bound(self) -> str | None:
        """`at_least` or `at_most` if unsupported keys of the file raise or lower the peak."""
        if self.peaks is None:
            return None
        return self.config["bound"] if self.config else "at_least" if self.peaks.incomplete else None

    def __repr__(self) -> str:
        peak = f"peak {format_bytes(self.peaks.allocated)} in {self.peaks.phase}" if self.peaks else "no peak stated"
        cards = "".join(f", {verdict.gpu}: {verdict.words}" for verdict in self.gpus)
        name, method = self.model["name"], self.method["name"]
        return f"<Estimate {name} · {method} · {self.engine}: {self.trainable_parameters:,} trainable, {peak}{cards}>"

    def records(self) -> list[dict[str, object]]:
        """The lines of the ledger, one row each, with the bytes at each phase's own peak; pandas and polars accept them."""
        phases = PHASES if self.peaks else ()
        return [
            {name: value for name, value in line.items() if name != "bytes_by_phase"}
            | {f"{phase}_bytes": line["bytes_by_phase"].get(phase, 0) for phase in phases}
            for line in self.lines()
        ]

    def to_dataframe(self) -> DataFrame:
        """`records()` as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)

    @cached_property
    def host(self) -> Host | None:
        """Host memory to load, offload and merge, and what checkpoints take on disk."""
        return None if self.origin is None else self.origin.host(self.assumptions.get("offloaded_bytes", 0))

    @cached_property
    def advice(self) -> dict[str, Advised]:
        """What `peftplan.advice` finds for this job; stored because the JSON contains it."""
        return {} if self.origin is None else self.origin.advice(self)

    @property
    def resizes(self) -> bool:
        """Whether `at` supports this job."""
        return self.engine == "analytic" and self.origin is not None and self.peaks is not None

    @overload
    def at(  # type: ignore[overload-overlap]
        self, *, batch_size: int | None = ..., seq_len: int | None = ..., replays: int | None = ..., **sizes: int | None
    ) -> Estimate: ...
    @overload
    def at(
        self,
        *,
        batch_size: Sizes | None = ...,
        seq_len: Sizes | None = ...,
        replays: int | None = ...,
        **sizes: Sizes | None,
    ) -> Grid: ...
    def at(
        self,
        *,
        batch_size: Sizes | None = None,
        seq_len: Sizes | None = None,
        replays: int | None = AT_REPLAYS,
        **sizes: Sizes | None,
    ) -> Estimate | Grid:
        """The same job at another `batch_size` (per device), `seq_len` (tokens), `r`, or another of its options that is a number.

        Whole numbers give an `Estimate`. Where one is a list or an array, all are broadcast against each other, as numpy does it,
        and the answer is a `results.grid.Grid`: the bytes that tensors request at every point, and for the cards of this
        estimate verdicts. At most `replays` points are replayed (None: all) where bytes do not tell the verdict; where it is
        still open, the verdict is None. Analytic estimates with a peak only. Raises InputError for others, and for sizes that
        are no whole numbers of at least 1.
        """
        if self.engine == "analytic" and self.peaks is None:
            raise OptionError("engine", self.engine, f"analytic states no peak for this job: {self.not_modelled[0]}")
        if self.origin is None or not self.resizes:
            raise InputError("engine", self.engine, "accepted: analytic, whose lines keep their sizes as names")
        return self.origin.at({"batch_size": batch_size, "seq_len": seq_len, **sizes}, replays=replays)

    @property
    def static(self) -> Ledger:
        """The persistent bytes and the gradients; of several ranks those of the one with the largest peak."""
        of_largest = None if self.peaks is None else self.peaks.static
        return self.lasting if of_largest is None else of_largest

    @property
    def ledger(self) -> Ledger:
        """What is alive at the overall peak, or, without a peak, the persistent bytes."""
        return self.peaks.ledgers[self.peaks.phase] if self.peaks else self.static

    @property
    def largest_line(self) -> Line:
        """The line of the ledger that takes most of the device."""
        return max((line for line in self.ledger if line.place == "device"), key=Line.bytes)

    @property
    def counted(self) -> tuple[Category, ...]:
        """The categories that this engine counts."""
        more = OF_SEVERAL_GPUS if self.distributed else ()
        return (*(CATEGORIES if self.peaks else COUNTED), *more)

    @property
    def trainable_parameters(self) -> int:
        """What peft's `get_nb_trainable_parameters()` returns first."""
        return self.parameters.num_trainable

    @property
    def total_parameters(self) -> int:
        """What peft's `get_nb_trainable_parameters()` returns second."""
        return self.parameters.num_total

    @property
    def persistent_bytes(self) -> int:
        """Device bytes that last from one step to the next, plus the gradients."""
        return self.static.bytes()

    @property
    def managed_bytes(self) -> int:
        """Bytes in CUDA managed memory (paged optimizer states): outside torch's allocator, paged out under pressure."""
        return self.static.bytes(place="managed")

    def lines(self) -> list[LineDocument]:
        """One record per line of the ledger; `model.layers.*.mlp.up_proj.weight` stands for the weights of all its layers."""
        return line_documents(self.ledger, self.peaks.ledgers if self.peaks else {})

    def to_dict(self) -> EstimateDocument:
        """The JSON contract, bytes as integers; null is what this engine does not count."""
        by_category, counted = self.ledger.by_category(), self.counted
        line = self.largest_line
        largest = {"category": line.category, "name": line.name.replace("{}", "*"), "bytes": line.bytes()}
        document = {
            "schema_version": SCHEMA_VERSION,
            "engine": self.engine,
            "model": dict(self.model),
            "method": dict(self.method),
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "memory": {
                "lines": self.lines(),
                "by_category": {
                    c: by_category.get(c, 0) if c in counted else None for c in dict.fromkeys((*CATEGORIES, *counted))
                },
                "persistent": self.persistent_bytes,
                "managed": self.managed_bytes,
                **self._peak_facts(),
            },
            "assumptions": dict(self.assumptions),
            "warnings": list(self.warnings),
            "not_modelled": list(self.not_modelled),
            "gpus": [verdict.to_dict() | {"largest_line": largest, **self._advice_facts(verdict.gpu)} for verdict in self.gpus],
            "host": self.host and self.host.to_dict(),
            **({"distributed": self.distributed.to_dict()} if self.distributed else {}),
            **({} if self.config is None else {"config": dict(self.config)}),
        }
        return cast("EstimateDocument", document)

    def _advice_facts(self, gpu: str) -> dict[str, object]:
        """A card's advice, and the engine that counted it."""
        advised = self.advice.get(gpu)
        return {
            "advice": [change.to_dict() for change in advised.changes] if advised else [],
            "advice_engine": "analytic" if advised and advised.counted else None,
            "smallest_card": advised.smallest_card if advised else None,
            "several_gpus": advised.several_gpus.to_dict() if advised and advised.several_gpus else None,
            "weights_alone": advised.weights_alone if advised else None,
        }

    def _peak_facts(self) -> dict[str, object]:
        """The peak's part of the JSON; context and device total are facts of one card, so they need exactly one."""
        peaks = self.peaks
        card = self.gpus[0] if len(self.gpus) == 1 else None
        return {
            "peak_by_phase": peaks.by_phase if peaks else dict.fromkeys(PHASES),
            "peak_phase": peaks.phase if peaks else None,
            "peak_allocated": peaks.allocated if peaks else None,
            "peak_reserved": peaks.reserved if peaks else None,
            **({"peak_reserved_at_most": peaks.reserved_at_most} if peaks and peaks.by_pace else {}),
            **({"scope": peaks.scope} if peaks and peaks.scope else {}),
            "reserved_source": (peaks.unreserved or peaks.reserved_source) if peaks else None,
            "incomplete": list(peaks.incomplete) if peaks else [],
            "runtime_context": card.runtime_context if card else None,
            "device_total": card.device_total if card else None,
        }
