"""Draw jobs over several GPUs that have a peak by formula, as MODEL and options: `tools.rehearsed_jobs --jobs-from` runs them.

    python -m tools.drawn_ranks --seed 17 --jobs 12 --folder FOLDER > FILE

Strategy, ranks, method, optimizer, trainer, checkpoints, accumulation, offload, dtype and the model, of a few layers and small
widths, are drawn. MODEL is a file in FOLDER, whose config the row of a rehearsal keeps. Gradients are clipped, as Trainer does.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peftplan.errors import PeftplanError
from tools import random_draws
from tools.random_draws import OPTIMIZERS
from tools.rehearsed_jobs import estimated

MODEL_TYPES = ("llama", "qwen2", "qwen3", "gpt_neox", "opt", "mixtral")
STRATEGIES = ("ddp", "fsdp2", "fsdp1", "zero1", "zero2", "zero3")
LORAS = ("lora", "qlora", "dora", "qdora", "rslora", "lora+", "lora-fa")
METHODS = (
    *("full", "full", *LORAS, "ia3", "vera", "oft", "boft", "loha", "lokr", "adalora", "ln-tuning", "bitfit", "partial"),
    *("prompt-tuning", "prefix-tuning", "p-tuning", "fourierft"),
)
OWN_OPTIMIZER = ("lora+", "lora-fa")
"""Methods whose optimizer the program makes, for Trainer alone."""
SIZES: dict[str, Any] = {"WIDTHS": (512, 1280), "FEW_LAYERS": (2, 4), "VOCAB": (1_000, 60_000)}
MOST_POSITIONS = 2048


def words(draw: random.Random, model: str, strategy: str) -> list[str]:
    """The options of one job, which may have no peak."""
    method = draw.choice(METHODS)
    own_optimizer = method in OWN_OPTIMIZER
    trainer = draw.choice(("transformers", "transformers", "trl"))
    chosen = [model, "--trainer", "transformers" if own_optimizer else trainer, "--strategy", strategy]
    chosen += ["--gpus", str(draw.randint(2, 16)), "--method", method]
    chosen += ["--batch-size", str(draw.randint(1, 4)), "--seq-len", str(draw.choice((128, 256, 384, 512, 1024)))]
    chosen += ["--r", str(draw.choice((4, 8, 16, 64)))] if method in LORAS else []
    chosen += ["--target-modules", "all-linear"] if method in ("rslora", *OWN_OPTIMIZER) else []
    chosen += ["--num-virtual-tokens", "20"] if method in ("prompt-tuning", "prefix-tuning", "p-tuning") else []
    quant = draw.choice(("nf4", "int8")) if draw.random() < 0.15 and method not in ("full", "qlora", "qdora") else None
    chosen += ["--quant", quant] if quant else []
    if strategy == "fsdp1" and (quant == "nf4" or method in ("qlora", "qdora")):
        chosen += ["--quant-storage", "bf16", "--no-kbit-prepare"]
    if draw.random() < 0.5 and not own_optimizer:
        chosen += ["--optim", draw.choice(sorted(name for name, optimizer in OPTIMIZERS.items() if not optimizer.untraced))]
    if draw.random() < 0.4 or method == "prefix-tuning":  # which peft refuses with checkpoints
        chosen += ["--no-gradient-checkpointing"]
    elif draw.random() < 0.2:
        chosen += ["--use-reentrant"]
    chosen += ["--gradient-accumulation-steps", str(draw.choice((2, 3)))] if draw.random() < 0.3 else []
    chosen += ["--dtype", "fp16", "--autocast", "fp16"] if draw.random() < 0.15 else []
    if draw.random() < 0.2:
        chosen += ["--offload-params" if strategy.startswith("fsdp") else "--offload-optimizer", "cpu"]
    chosen += [draw.choice(("--overlap-comm", "--no-overlap-comm"))] if strategy.startswith("zero") else []
    return chosen


def drawn(seed: int, jobs: int, folder: Path) -> list[str]:
    """Jobs with a peak, in the order of the draws, each strategy in turn."""
    draw = random.Random(f"ranks {seed}")
    lines: list[str] = []
    with patch.multiple(random_draws, **SIZES):
        while len(lines) < jobs:
            model_type = draw.choice(MODEL_TYPES)
            try:
                config = random_draws.draw_config(draw, model_type, deep=0)
            except (IndexError, ValueError):  # no number of heads fits the widths
                continue
            if config.get("hidden_size", 0) > SIZES["WIDTHS"][1]:
                continue
            if "max_position_embeddings" in config:  # of GPT-2 and its like another name of `n_positions`
                config["max_position_embeddings"] = min(config["max_position_embeddings"], MOST_POSITIONS)
            path = folder / f"{seed}-{len(lines) + 1}-{model_type}" / "config.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config), encoding="utf-8")
            job = shlex.join(words(draw, str(path.parent), STRATEGIES[len(lines) % len(STRATEGIES)]))
            try:
                known = estimated({"job": job}, "analytic").get("allocated")
            except PeftplanError:
                continue
            if known is not None:
                lines.append(job)
    return lines


def main() -> None:
    """Print the jobs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    print("\n".join(drawn(options.seed, options.jobs, options.folder)))


if __name__ == "__main__":
    main()
