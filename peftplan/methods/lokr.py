"""LoKr (LyCORIS, Yeh et al. 2023, arXiv 2309.14859, §3): ΔW = W1 ⊗ W2, each factor whole or low-rank.

A weight (out, in) with out = l·k and in = m·n: W1 is (l, m), W2 is (k, n). W2 stays whole where r ≥ max(k, n) / 2, else it is
(k, r)·(r, n); W1 is split likewise only with `decompose_both`.
Source: peft, `tuners/lokr/layer.py` (`LoKrLayer.update_layer`, `factorization`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from peftplan.arch.modules import Architecture, Module, Shape
from peftplan.methods.adaptation import Adaptation, AddedTensor
from peftplan.methods.loha import Probability, Rank
from peftplan.methods.targets import LayeredConfig, Pattern, by_rank
from peftplan.methods.tuner import LINEAR, require_kind, tune

NEAR_SQUARE = -1
"""`decompose_factor` that asks for divisors near the square root."""


class LoKrConfig(LayeredConfig):
    """peft's `LoKrConfig`, less what changes no tensor; `use_effective_conv2d` concerns convolutions only."""

    r: Rank = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    decompose_both: bool = False
    decompose_factor: int = Field(default=NEAR_SQUARE, ge=NEAR_SQUARE)
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict)
    no_effect: ClassVar[frozenset[str]] = frozenset(
        {"alpha", "alpha_pattern", "init_weights", "use_effective_conv2d", "rank_dropout_scale"}
    )


def lokr(arch: Architecture, config: LoKrConfig) -> Adaptation:
    """The tensors that `get_peft_model` adds for a LoKrConfig."""

    def tensors(module: Module) -> list[AddedTensor]:
        families = by_rank(module, r=config.r, rank_pattern=config.rank_pattern)
        return [
            AddedTensor(f"{family.name}.{part}", shape, family.layers)
            for family, r in families
            for part, shape in _shapes(family, r, config).items()
        ]

    return tune(arch, config, tensors, peft_type="LOKR")


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """Two numbers m ≤ n (or m = `factor` where it divides) whose product is `dimension`, as peft's function of this name."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == NEAR_SQUARE else factor
    m, n = 1, dimension
    while m < n:
        larger = next(d for d in range(m + 1, dimension + 1) if dimension % d == 0)
        if larger + dimension // larger > m + n or larger > limit:
            break
        m, n = larger, dimension // larger
    return min(m, n), max(m, n)


def _shapes(module: Module, r: int, config: LoKrConfig) -> dict[str, Shape]:
    require_kind(module, LINEAR, method="LOKR", by_peft=("Conv1d", "Conv2d"))
    m, n = factorization(module.in_features, config.decompose_factor)
    l, k = factorization(module.out_features, config.decompose_factor)  # noqa: E741 the paper's letters
    whole_w1 = not (config.decompose_both and r < max(l, m) / 2)
    w1: dict[str, Shape] = {"lokr_w1": (l, m)} if whole_w1 else {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)}
    w2: dict[str, Shape] = {"lokr_w2": (k, n)} if r >= max(k, n) / 2 else {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n)}
    return w1 | w2
