"""The result of an engine: an `Estimate`, the same type for analytic, trace and measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peftplan.memory.ledger import CATEGORIES, Category, Ledger
from peftplan.methods.adaptation import Adaptation
from peftplan.parameters import Parameters

SCHEMA_VERSION = 1
PHASES = ("load", "forward", "backward", "step")
COUNTED: tuple[Category, ...] = (
    "weights",
    "adapter_weights",
    "quant_state",
    "gradients",
    "optimizer_states",
    "buffers",
)
"""Categories that the analytic engine counts today; the others are null in the JSON, never 0."""


class Verdict(NamedTuple):
    """Whether a job fits a card: `does_not_fit` where what is counted alone exceeds it, else `unknown` without a peak."""

    gpu: str
    usable_bytes: int
    why: str
    verdict: str
    headroom_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """One entry of `gpus` in the JSON."""
        return {
            "name": self.gpu,
            "usable_bytes": self.usable_bytes,
            "usable_source": self.why,
            "verdict": self.verdict,
            "headroom_bytes": self.headroom_bytes,
        }


@dataclass(frozen=True)
class Estimate:
    """What a run needs: exact counts, a ledger of lines, what was assumed, what is not modelled, a verdict per card."""

    engine: str
    model: Mapping[str, Any]
    method: Mapping[str, Any]
    parameters: Parameters
    adaptation: Adaptation
    ledger: Ledger
    assumptions: Mapping[str, Any]
    not_modelled: tuple[str, ...]
    gpus: tuple[Verdict, ...] = ()

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
        """Device bytes of all that is counted: what lasts from one step to the next, plus the gradients."""
        return self.ledger.bytes()

    @property
    def managed_bytes(self) -> int:
        """Bytes in CUDA managed memory (paged optimizer states): outside torch's allocator, paged out under pressure."""
        return self.ledger.bytes(place="managed")

    def lines(self) -> list[dict[str, Any]]:
        """One record per line of the ledger; `model.layers.*.mlp.up_proj.weight` stands for the weights of all its layers."""
        return [
            {
                "category": line.category,
                "name": line.name.replace("{}", "*"),
                "bytes": line.bytes(),
                "bytes_by_phase": {},
                "place": line.place,
                "formula": line.formula,
                "source": line.source,
            }
            for line in self.ledger
        ]

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract, bytes as integers; null is what this engine does not count."""
        by_category = self.ledger.by_category()
        return {
            "schema_version": SCHEMA_VERSION,
            "engine": self.engine,
            "model": dict(self.model),
            "method": dict(self.method),
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            "memory": {
                "lines": self.lines(),
                "by_category": {c: by_category[c] if c in COUNTED else None for c in CATEGORIES},
                "persistent": self.persistent_bytes,
                "managed": self.managed_bytes,
                "peak_by_phase": dict.fromkeys(PHASES),
                "peak_phase": None,
                "peak_allocated": None,
                "peak_reserved": None,
                "reserved_source": None,
                "runtime_context": None,
                "device_total": None,
            },
            "assumptions": dict(self.assumptions),
            "not_modelled": list(self.not_modelled),
            "gpus": [verdict.to_dict() for verdict in self.gpus],
        }
