"""The analytic engine against the trace engine over a grid of jobs: prints a page, `--write` writes docs/analytic-drift.md.

    python -m tools.analytic_grid [--sample N] [--seed S] [--jobs J] [--model-type T ...] [--traces FILE] [--write]

Every model type with an adapter, at the widths of a published model and a few layers; every method, dtype, kernel, trainer and
optimizer of `AXES`, drawn for each cell with a seed; then the rest of the methods, and what is rare (`RARE`). Drift is
analytic ÷ traced − 1, of the allocated peak, of each phase, and of reserved bytes. What one engine refuses the other must refuse
too, for the same reason. `--traces` keeps what was traced (`tools.engines`): the tool goes on where it stopped, and another run
over the same file evaluates the formulas alone. Needs the extra `trace`; the whole grid takes an hour on one core.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from peftplan.arch import catalogue
from peftplan.arch.readers import READERS
from peftplan.job.kernels import SCANNING
from peftplan.job.sources import load, load_config
from peftplan.methods import METHODS as REGISTRY
from peftplan.report.markdown import table
from tools.engines import RESERVED, KeptTraces, Peaks, peaks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "analytic-drift.md"
PLAIN = tuple(name for name in READERS if name not in SCANNING)
"""Model types whose formula is not that of a kernel, which no trace runs."""
LAYERS = 6
LAYER_FIELDS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
PHASES = ("load", "forward", "backward", "step")

Options = dict[str, Any]
DRAWN = tuple(name for name in REGISTRY if name not in ("partial", "lisa", "llama-pro"))
"""Methods of the draws; the others are compared with traces and rehearsals in tests of their own."""
METHODS: tuple[Options, ...] = (
    {"method": "full"},
    {"method": "lora"},
    {"method": "lora", "target_modules": "attention"},
    {"method": "lora", "target_modules": "peft-default"},
    {"method": "qlora"},
    {"method": "qlora", "double_quant": False},
    {"method": "dora"},
    {"method": "ia3"},
    {"method": "prefix-tuning", "num_virtual_tokens": 30},
    {"method": "prompt-tuning", "num_virtual_tokens": 30},
    {"method": "pfeiffer"},
)
DRIFTS = ("median absolute error", "median", "lowest", "highest")
DRAWS = 3
"""Cells per model type and method."""
CHECKPOINTED: dict[str, tuple[int, Options]] = {
    "reentrant": (2, {"use_reentrant": True}),
    "every second": (1, {"every_n_layers": 2}),
    "on the host": (1, {"offload_checkpoints": True}),
}
"""Further cells per model type, of any method that allows checkpointing: how many, and how it is done."""
RARE: dict[str, Options] = {
    "flash_attention_2": {"attn_implementation": "flash_attention_2", "padding": False},
    "accumulation": {"gradient_accumulation_steps": 4},
    "few logits": {"logits_to_keep": 32},
    "trl-chunked": {"trainer": "trl", "loss": "trl-chunked"},
    "liger": {"trainer": "transformers", "loss": "liger"},
    "unsloth": {"trainer": "transformers", "loss": "unsloth"},
    "int8": {"quant": "int8", "dtype": "bf16"},
}
"""A further cell per model type and entry, of any method that allows it."""
VIRTUAL = ("prefix-tuning", "prompt-tuning", "p-tuning")
OF_METHOD: dict[str, Options] = {"p-tuning": {"num_virtual_tokens": 30}, "bitfit": {}, "houlsby": {}, "ln-tuning": {}}
"""Options of the methods that have no targets, or that have them by themselves."""
TRAINING = [method for method in METHODS if method["method"] not in VIRTUAL]
AXES: dict[str, tuple[Options, ...]] = {
    "trainer": ({"trainer": "plain"}, {"trainer": "transformers"}, {"trainer": "trl"}),
    "precision": (
        {"dtype": "fp32", "autocast": "none"},
        {"dtype": "bf16", "autocast": "none"},
        {"dtype": "fp16", "autocast": "none"},
        {"dtype": "fp32", "autocast": "bf16"},
        {"dtype": "bf16", "autocast": "bf16"},
    ),
    "checkpointing": ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
    "attention": ({"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}),
    "dropout": ({}, {"lora_dropout": 0.1}),
    "padding": ({"padding": False}, {"padding": True}),
    "shape": (
        {"batch_size": 1, "seq_len": 448},
        {"batch_size": 2, "seq_len": 256},
        {"batch_size": 4, "seq_len": 384},
        {"batch_size": 3, "seq_len": 250},
    ),
    "optim": ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}, {"optim": "adamw_8bit"}),
}
SEQUENCES: Options = {"task_type": "SEQ_CLS", "num_labels": 3}
TOKENS: Options = {"task_type": "TOKEN_CLS", "num_labels": 9}
PICTURES: Options = {"task_type": "IMAGE_CLS", "num_labels": 10}
TASKS: dict[str, tuple[Options, ...]] = {
    "deberta-v2": (SEQUENCES, TOKENS),
    "vit": (PICTURES,),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "modernbert"), ({}, SEQUENCES, TOKENS)),
}
"""What the types train that state no task, or that are trained on more than one."""
DROPOUT_METHODS = ("lora", "qlora", "dora")


class Cell(NamedTuple):
    """One job: a model at reduced depth, and its options."""

    model_type: str
    model: str
    options: tuple[tuple[str, Any], ...]
    rare: str = ""
    """The entry of `RARE` that it has."""

    @property
    def command(self) -> str:
        """The call that repeats it."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options)
        return f"peftplan.estimate(analytic_grid.shallow({self.model!r}), {options})"


class Outcome(NamedTuple):
    """Bytes by phase of both engines and what they reserve, or why one has none."""

    cell: Cell
    analytic: Peaks
    traced: Peaks

    def drift(self, phase: str) -> float | None:
        """Analytic ÷ traced − 1 of a phase, of the overall `peak` or of `RESERVED`; None where an engine has no number."""
        if isinstance(self.analytic, str) or isinstance(self.traced, str):
            return None
        ours, theirs = self.analytic, self.traced
        if phase == "peak":
            return max(ours[name] for name in PHASES) / max(theirs[name] for name in PHASES) - 1
        return ours[phase] / theirs[phase] - 1 if phase in ours and phase in theirs else None


MADE_UP: dict[str, dict[str, Any]] = {
    "granitemoe": {
        "model_type": "granitemoe", "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24, "vocab_size": 49155,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8,
    },
    "ministral3": {
        "model_type": "ministral3", "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 131072,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Configs of the types that no built-in model has."""
TEXT_OF = {
    "gemma4_text": "gemma-4-31b",
    "gemma4_unified_text": "gemma-4-12b-it",
    "qwen3_5_text": "qwen3.5-0.8b",
    "qwen3_5_moe_text": "qwen3.5-35b-a3b",
}
"""Types of a text part alone → the built-in model that has it."""


@cache
def _model_of(model_type: str) -> str:
    """The built-in model of a type with the fewest parameters, or the type itself where there is none."""
    entries = [entry for entry in catalogue.models() if load_config(entry.name).get("model_type") == model_type]
    return min(entries, key=lambda entry: load(entry.name).num_parameters).name if entries else model_type


def whole(model: str) -> dict[str, Any]:
    """The config of a built-in model, or of a type that none has."""
    if model in TEXT_OF:
        return dict(load_config(TEXT_OF[model])["text_config"])
    return dict(MADE_UP[model]) if model in MADE_UP else load_config(model)


def shallow(model: str) -> dict[str, Any]:
    """The config of a built-in model with at most `LAYERS` layers in each stack, its width as it is."""
    config = whole(model)
    deep = max((config[field] for field in LAYER_FIELDS if isinstance(config.get(field), int)), default=0)
    for field in LAYER_FIELDS:
        if isinstance(config.get(field), int):
            config[field] = min(config[field], LAYERS)
    for field, value in config.items():
        if isinstance(value, list) and len(value) == deep > LAYERS:
            config[field] = value[:LAYERS]
    return config


def cells(*, model_types: Iterable[str] | None = None) -> Iterator[Cell]:
    """The whole grid; every cell's options depend on its model type, method and number alone, or on type and number."""
    chosen = list(model_types or PLAIN)
    for model_type in chosen:
        for method in METHODS:
            for number in range(DRAWS):
                yield _cell(model_type, method, random.Random(f"{model_type} {sorted(method.items())} {number}"))
    checkpointed = [method for method in METHODS if method["method"] != "prefix-tuning"]
    for model_type in chosen:
        for way, (draws, settings) in CHECKPOINTED.items():
            for number in range(draws):
                draw = random.Random(f"{model_type} {way} {number}")
                yield _cell(model_type, draw.choice(checkpointed), draw, gradient_checkpointing=True, **settings)


def further_cells(*, model_types: Iterable[str] | None = None) -> Iterator[Cell]:
    """A cell per model type of each method that `METHODS` lacks and of what is rare, drawn as `cells` are."""
    others = [name for name in DRAWN if name not in {method["method"] for method in METHODS}]
    for model_type in model_types or PLAIN:
        for name in others:
            method = {"method": name, **OF_METHOD.get(name, {"target_modules": "attention"})}
            yield _cell(model_type, method, random.Random(f"{model_type} {name}"))
        for rare, settings in RARE.items():
            draw = random.Random(f"{model_type} {rare}")
            method = draw.choice([method for method in METHODS if method["method"] in ("lora", "dora", "ia3")])
            method = method if "quant" in settings else draw.choice(TRAINING)
            yield _cell(model_type, method, draw, **settings)._replace(rare=rare)


def _cell(model_type: str, method: Options, draw: random.Random, **settings: Any) -> Cell:
    options: Options = dict(method)
    for axis, choices in AXES.items():
        if axis == "dropout" and method["method"] not in DROPOUT_METHODS:
            continue
        options |= draw.choice(choices)
    if options["method"] in ("qlora", "qdora") and options["dtype"] == "fp32":
        options["dtype"] = "bf16"
    options |= draw.choice(TASKS.get(model_type, ({},)))
    return Cell(model_type, _model_of(model_type), tuple((options | settings).items()))


def outcome(cell: Cell, traced: Peaks | None = None) -> Outcome:
    """Both engines on one cell; the formulas alone where it was traced."""
    config, options = shallow(cell.model), dict(cell.options)
    return Outcome(cell, peaks(config, options, "analytic"), traced or peaks(config, options, "trace"))


def run(chosen: list[Cell], *, jobs: int, traces: KeptTraces | None = None) -> list[Outcome]:
    """All cells, in processes of their own where `jobs` is more than one; what is traced is kept at once."""
    traces = traces or KeptTraces(None)
    known = [traces.get(shallow(cell.model), dict(cell.options)) for cell in chosen]
    outcomes = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        answers = pool.map(outcome, chosen, known, chunksize=4) if pool else map(outcome, chosen, known)
        for answer in answers:
            traces.keep(shallow(answer.cell.model), dict(answer.cell.options), answer.traced)
            outcomes.append(answer)
    return outcomes


def page(outcomes: list[Outcome], *, worst: int = 25) -> str:
    """The drift of all cells, by phase, by model type and by method; the worst cells, and those without a number."""
    scored = [o for o in outcomes if o.drift("peak") is not None]
    parts = [f"{len(outcomes)} cells: {len(scored)} scored, {sum(map(_refused_by_both, outcomes))} refused by both engines."]
    phases = [(phase, *_summary(scored, phase)) for phase in ("peak", *PHASES, RESERVED)]
    parts.append(table(("peak of", "cells", *DRIFTS), phases))
    by = (("model type", _model_type), ("method", _method), ("trainer", _of("trainer")), ("rare", lambda o: o.cell.rare))
    for title, key in by:
        groups: dict[str, list[Outcome]] = defaultdict(list)
        for o in scored:
            groups[key(o)].append(o)
        rows = [(name, *_summary(members, "peak"), *_summary(members, RESERVED)[1:]) for name, members in groups.items() if name]
        parts.append(table((title, "cells", *DRIFTS, *(f"{RESERVED}: {name}" for name in DRIFTS)), rows))
    columns = ("peak", *PHASES, RESERVED)
    for title, farthest in (("The farthest cells", _farthest), ("The farthest of reserved bytes", _farthest_reserved)):
        ordered = sorted(scored, key=farthest, reverse=True)[:worst]
        rows = [(*(_percent(o.drift(name)) for name in columns), f"`{o.cell.command}`") for o in ordered]
        parts.append(f"## {title}\n\n" + table((*columns, "repeat"), rows))
    refused = Counter((reason(o.analytic), reason(o.traced)) for o in outcomes if _refused_by_both(o))
    rows = [(str(count), ours, "the same" if ours == theirs else theirs) for (ours, theirs), count in refused.most_common()]
    parts.append("## Cells that both engines refuse\n\n" + table(("cells", "analytic", "traced"), rows))
    missing = [o for o in outcomes if o.drift("peak") is None and not _refused_by_both(o)]
    if missing:
        rows = [(reason(o.analytic), reason(o.traced), f"`{o.cell.command}`") for o in missing]
        parts.append("## Cells that one engine alone has no number for\n\n" + table(("analytic", "traced", "repeat"), rows))
    return "\n\n".join(parts) + "\n"


def _model_type(o: Outcome) -> str:
    return o.cell.model_type


def _farthest_reserved(o: Outcome) -> float:
    return abs(o.drift(RESERVED) or 0)


def _of(option: str) -> Any:
    return lambda o: str(dict(o.cell.options)[option])


def _method(o: Outcome) -> str:
    options = dict(o.cell.options)
    return " ".join(str(options[name]) for name in ("method", "target_modules", "double_quant") if name in options)


def _farthest(o: Outcome) -> float:
    return max(abs(o.drift(phase) or 0) for phase in ("peak", *PHASES))


def _refused_by_both(o: Outcome) -> bool:
    return all(isinstance(answer, str) and answer.startswith("refused") for answer in (o.analytic, o.traced))


def reason(answer: Peaks) -> str:
    """Why there is no number: a library's error without its place and counts, else our own message."""
    if not isinstance(answer, str):
        return "a number"
    raised = re.search(r"\w+(Error|Exception): .*", answer)
    return re.sub(r"\d+", "N", raised[0]) if raised else answer.partition(": ")[2]


def _summary(outcomes: list[Outcome], phase: str) -> tuple[str, ...]:
    drifts = [d for o in outcomes if (d := o.drift(phase)) is not None]
    if not drifts:
        return ("0", "", "", "", "")
    statistics = (median(map(abs, drifts)), median(drifts), min(drifts), max(drifts))
    return (str(len(drifts)), f"{100 * statistics[0]:.3f} %", *map(_percent, statistics[1:]))


def _percent(drift: float | None) -> str:
    return "" if drift is None else f"{100 * drift:+.3f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many cells, drawn with --seed, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model-type", nargs="*", choices=sorted(READERS))
    parser.add_argument("--traces", type=Path, help="a file of kept traces, read and added to")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    chosen = [*cells(model_types=args.model_type), *further_cells(model_types=args.model_type)]
    drawn = ""
    if args.sample:
        drawn = f"Drawn from {len(chosen)} cells: `--sample {args.sample} --seed {args.seed}`.\n\n"
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    text = drawn + page(run(chosen, jobs=args.jobs, traces=KeptTraces(args.traces)))
    print(text)
    if args.write:
        PAGE.write_text(HEADER + text, encoding="utf-8")


HEADER = """# Drift of analytic peaks from traced ones

How closely do the formulas follow a real training step? The analytic engine computes a peak in milliseconds; the trace engine
runs the real transformers and peft code on fake tensors. This page compares both on a random sample of jobs. Drift is
analytic ÷ traced − 1, so plus means that the formulas are too high. It is the drift of allocated bytes unless *reserved* is said.

The jobs are drawn with a seed from every supported model type (its smallest built-in model, cut to at most six layers) and every
method, dtype, attention, trainer, loss, optimizer and shape in `tools/analytic_grid.py`. Both engines count the unused ends of
blocks that the allocator does not split, each from a replay of its own events, which also gives the reserved bytes.
`python -m tools.analytic_grid --write` writes this page.

"""

if __name__ == "__main__":
    main()
