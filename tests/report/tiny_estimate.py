"""A result with peaks made by hand, for what is shown of any engine's."""

from __future__ import annotations

from dataclasses import replace

from peftplan.ledger import Ledger, Line
from peftplan.planning.estimate import estimate
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from tests.cli.run import HERE

TRACED = "traced: aten.mul.Tensor"
LINES = (
    Line("base_model.model.model.layers.{}.mlp.up_proj.base_layer.weight", "weights", "bf16", (256, 128), 4, "traced: load"),
    Line("model.layers.{}.mlp", "activations", "fp32", (2, 64, 256), 3, TRACED),
    Line("base_model.model", "logits", "fp32", (128, 512), 1, "traced: aten._log_softmax.default"),
    Line("tails of unsplit blocks", "temporaries", "uint8", (1000,), 1, "replay of torch's allocator"),
    Line("paged", "optimizer_states", "fp32", (999, 999), 1, "bitsandbytes", place="managed"),
)
# 4 × 2 × 256 × 128 = 262,144; 3 × 4 × 2 × 64 × 256 = 393,216; 4 × 128 × 512 = 262,144; 1000 → 1024 (two blocks of 512)
PEAK = 262_144 + 393_216 + 262_144 + 1_024
MANY = tuple(Line(f"model.layers.{{}}.part{n}", "activations", "bf16", (256, n), 2, TRACED) for n in range(1, 31))
# 2 × 512 × n for n = 1 … 30
MANY_PEAK = 2 * 512 * (30 * 31 // 2)


def tiny_estimate(lines: tuple[Line, ...] = LINES, *, incomplete: tuple[str, ...] = ()) -> Estimate:
    """An estimate of the tiny model whose backward has these lines alive, and every other phase the first of them."""
    analytic = estimate(str(HERE / "tiny.json"), target_modules="q_proj", gpu="24GiB")
    ledgers = {phase: Ledger(lines if phase == "backward" else lines[:1]) for phase in ("load", "forward", "backward", "step")}
    return replace(analytic, engine="trace", peaks=Peaks(ledgers, incomplete=incomplete))
