"""Traced peaks against peaks that other people's runs measured: prints a Markdown page, `--write` writes docs/trace-drift.md.

`python tools/trace_drift.py [--lengths BEFORE/LONGEST ...] [--write]`. The rows are data/published/peaks_t4.jsonl (allocated
bytes by phase, reserved bytes), data/published/peft_metamath.jsonl (reserved bytes) and peft_metamath_unscored.jsonl
(configurations without a run). Needs the extra `trace`; takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from peftplan.arch.sources import load_config
from peftplan.errors import RefusedError
from peftplan.memory.allocator import replay
from peftplan.planning.setup import parse_setup, resolved
from peftplan.report.markdown import table
from peftplan.storage import parse_quant
from peftplan.trace.engine import Traced, trace
from peftplan.trace.meta import quiet_transformers
from peftplan.trace.peft_steps import lorafa_optimizer
from peftplan.trace.scripted import repeating_kv, with_empty_cache
from peftplan.units import MIB

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "data" / "published"
OUTPUT = ROOT / "docs" / "trace-drift.md"
Row = dict[str, Any]

PHASES = ("forward", "backward", "step")
RESERVED = "reserved"
TURING, ADA = (7, 5), (8, 9)
LLAMA = "llama-3.2-3b"

Lengths = tuple[int, int]
"""Length of the batch before the longest one, and of the longest one."""
LENGTHS: tuple[Lengths, ...] = ((104, 690), (120, 688))
"""Of peft's benchmark, which does not record them: the first was chosen by the rows in `CHOSEN_BY`, the second is a neighbour."""

CHOSEN_BY = ("lora/llama-3.2-3B-rank32", "ia3/llama-3.2-3B-default")
LORA_FA = "lora/llama-3.2-3B-rank32-lorafa"
OTHER_CODE = (LORA_FA, "osf/llama-3.2-3B-rank128")
"""Rows whose run did not do what peft documents or what peft 0.21 does: causes on the page."""
BENCHMARK = {"dtype": "bfloat16", "autocast_adapter_dtype": True, "batch_size": 4, "gradient_checkpointing": False}
"""What the benchmark's runs share, for configurations without a run."""

INTRO = """# Drift of traced peaks

Peaks that other people's runs measured on a GPU, and what `peftplan.trace` gives for the same run, replayed through its model of
torch's caching allocator. Drift is traced ÷ measured − 1: plus is too much. Nothing is fitted but two lengths that a source does
not record, stated below. Written by `python tools/trace_drift.py --write`; the measured numbers, with source and licence, are in
`data/published/`."""

T4_NOTE = """fitcheck-llm 0.3.1 (MIT), `data/published/peaks_t4.jsonl`: LoRA r 32 on q, k, v, o; fp16 base with fp32 adapters,
AdamW, non-reentrant checkpointing, a plain loop that holds the outputs, exact-length batches, a warm step and then a measured
one; quantized bases (nf4) through `prepare_model_for_kbit_training`; torch 2.10 to 2.14, transformers 5.0 to 5.17. The measurer
expands grouped keys and values itself, and so does the trace. Forward, backward and step are allocated bytes, reserved is
`max_memory_reserved` of the whole run. MiB."""

METAMATH_NOTE = """huggingface/peft (Apache-2.0), `data/published/peft_metamath.jsonl`: Llama-3.2-3B on an L40S, batch 4, bf16
base, SDPA with a padding mask, AdamW, no checkpointing, torch 2.13; `max_memory_reserved` of the whole run, evaluation included.
Traced: two steps in which the outputs live until the next forward has returned. After each comes `empty_cache()`, which the
gradients outlive, since that loop calls `zero_grad` at the start of a step. GB = 10⁹ bytes.

The logits of the batch before are alive in the forward of the longest one, and all rows say that it was a short one, as buckets
of samples sorted from long to short give it. Neither length is recorded. {before} and {longest} tokens were chosen by the LoRA
and the IA3 row, which the summary leaves out; with two steps of one length, LoRA fits 668 tokens, and the rows scatter from -0.7
to +2.4 %. The second column says what other lengths change."""

UNSCORED_NOTE = """`data/published/peft_metamath_unscored.jsonl`: adapter configurations of the same benchmark for which this
project has no measurement. Reserved bytes of the same two steps, {before} and {longest} tokens."""

CAUSES = """## Causes of drift above 1.5 %

- OSF: peft 0.19, which ran, computes each whole weight anew in the forward; peft 0.21, traced here, no longer does. Traced with
  peft 0.19.1, by steps of 668 tokens both, the row came to +0.63 %.
- LoRA-FA: the row is 50 MiB below LoRA's. `create_lorafa_optimizer` freezes every A, and a frozen A saves none of its inputs
  (2.0 GB). If A requires gradients again while the optimizer stays LoRA-FA's, the trace comes to the second LoRA-FA line: A's
  inputs and gradients are there, its two states (42 MiB) are not. Leaving `model.disable_adapter()` does that to a frozen A, as
  does any other `set_adapter`; which of them the benchmark's script calls is not known here.
- Prefix tuning: the training steps are not the run's peak. Evaluation generates with 200 virtual tokens before each prompt, and
  the caches of a layer grow by one token a step, each time in a new block that the old one is too small for. Generation written
  out as allocations (50 prompts, 300 new tokens) reserves 20.7 GiB for prompts of 180 tokens and 19.7 for 200; measured are
  20.4. Without the virtual tokens it reserves 9.9 at most, less than any training step. The evaluation's batch and prompts are
  not recorded, so this is no score. Ruled out: an fp32 cache, another attention kernel (math would save 3.3 GB).

Causes found and mended: logits of the batch before (-0.7 to +2.4 % became ± 0.4 %: prompt tuning, p-tuning, GLoRA, MiSS and the
rest); adaption prompts stay in the base's dtype, since peft does not autocast their model (its file has 2 bytes a parameter);
AdaLoRA's three sensitivities per parameter (210 MiB); BOFT's permutation and FRoD's projections lie on the host and are copied in
each forward; FRoD offloads the base weights that it replaces.

## Known open causes

- Full fine-tuning: reserved bytes depend on the first batches, between whose activations the 12 GB of states come to lie: after
  one step of 400 tokens the row traces to 36,722 MiB instead of the page's, measured are 37,068.
- WaveFT: 1.2 % too much. What is saved is what the code saves (the stack of four coefficient planes, by the transposed
  convolution); what cuDNN takes for it while it runs is not modelled.
- T4: loading a quantized base leaves other holes on each run. What is allocated after it depends on neither batch nor attention,
  yet the 15 quantized TinyLlama rows measured from 1,070.05 to 1,078.05 MiB: allocated bytes are not known closer.
- Reserved bytes depend on every earlier step, since what lasts pins the segments it lies in. Evaluation and saving are not
  replayed.
- The rows were measured with other versions of torch, transformers and peft than those above."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Figure:
    """One measured number and its trace, in bytes."""

    measured: float
    traced: float

    @property
    def drift(self) -> float:
        """Signed, in percent of what was measured."""
        return 100 * (self.traced / self.measured - 1)

    def cell(self, unit: int, decimals: int) -> str:
        """`measured → traced (drift)`."""
        return f"{self.measured / unit:,.{decimals}f} → {self.traced / unit:,.{decimals}f} ({self.drift:+.2f} %)"


Figures = dict[str, Figure]
Done = tuple[Row, Figures]
Refused = tuple[str, str]


def load_rows(name: str) -> list[Row]:
    """The rows of a file of data/published, in its order."""
    return [json.loads(line) for line in (PUBLISHED / name).read_text(encoding="utf-8").splitlines()]


def t4_trace(row: Row) -> Traced:
    """The run of a row of peaks_t4.jsonl."""
    quant = parse_quant("nf4", double_quant=row["double_quant"], compute_dtype="fp16") if row.get("quant") else None
    options = {
        "trainer": "plain",
        "dtype": "fp16",
        "batch_size": row["micro_batch"],
        "seq_len": row["seq_len"],
        "gradient_checkpointing": row["grad_ckpt"],
        "attn_implementation": row["attn"],
        "use_cache": False,
    }
    lora = {
        "peft_type": "LORA",
        "r": row["peft"]["r"],
        "lora_alpha": row["peft"]["alpha"],
        "target_modules": row["peft"]["targets"],
    }
    with repeating_kv(True):
        return trace(
            load_config(row["model"]),
            task_type="CAUSAL_LM",
            peft_config=lora,
            quant=quant,
            setup=resolved(parse_setup(options), quantized=quant is not None, supports_sdpa=True, use_cache=True),
            device=TURING,
        )


def t4_figures(row: Row) -> Figures:
    """Allocated bytes by phase and reserved bytes."""
    replayed = t4_trace(row).replayed
    traced = {phase: replayed.by_phase[phase].allocated for phase in PHASES} | {RESERVED: replayed.peaks.reserved}
    return {name: Figure(row["measured_mib"][name] * MIB, traced[name]) for name in traced}


def metamath_trace(row: Row, *, lengths: Lengths) -> Traced:
    """Two steps of a row of peft_metamath.jsonl: a batch of the first length, then one of the second."""
    before, longest = lengths
    options = {
        "trainer": "plain",
        "dtype": row["dtype"],
        "adapter_dtype": "fp32" if row["autocast_adapter_dtype"] else row["dtype"],
        "batch_size": row["batch_size"],
        "seq_len": longest,
        "padding": True,
        "gradient_checkpointing": row["gradient_checkpointing"],
    }
    adapter = row["adapter_config"]
    return trace(
        load_config(LLAMA),
        task_type="CAUSAL_LM",
        peft_config={**adapter, "freeze_a": True} if row["experiment"] == LORA_FA else adapter,
        setup=resolved(parse_setup(options), quantized=False, supports_sdpa=True, use_cache=True),
        device=ADA,
        outputs_outlive_step=True,
        earlier_seq_lens=(before,),
    )


def reserved(row: Row, *, lengths: Lengths) -> int:
    """Reserved bytes of a row's two steps."""
    return replay(with_empty_cache(metamath_trace(row, lengths=lengths))).peaks.reserved


def metamath_figures(row: Row, *, lengths: Sequence[Lengths]) -> Figures:
    """Reserved bytes of the whole run, by the lengths of its last two batches."""
    return {_head(pair): Figure(row["max_memory_reserved_bytes"], reserved(row, lengths=pair)) for pair in lengths}


def with_a_training(row: Row, *, lengths: Sequence[Lengths]) -> Done:
    """The LoRA-FA row with gradients of A, which its optimizer leaves alone."""

    def unfrozen(model: Any, *, learning_rate: float) -> Any:
        made = lorafa_optimizer(model, learning_rate=learning_rate)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "lora_A" in name)
        return made

    with patch("peftplan.trace.optimizers.lorafa_optimizer", unfrozen):
        return {**row, "experiment": f"{row['experiment']}, A with gradients"}, metamath_figures(row, lengths=lengths)


def _facts(lengths: Lengths) -> dict[str, int]:
    return {"before": lengths[0], "longest": lengths[1]}


def _head(lengths: Lengths) -> str:
    return "{} after {}".format(*reversed(lengths))


def tried(rows: Sequence[Row], figures: Callable[[Row], Figures], *, key: str) -> tuple[list[Done], list[Refused]]:
    """What every row comes to; and which rows cannot be traced, with the reason."""
    done: list[Done] = []
    refused: list[Refused] = []
    for row in rows:
        try:
            done.append((row, figures(row)))
        except RefusedError as error:
            refused.append((row[key], str(error)))
    return done, refused


def summary(found: Sequence[Figures], head: str) -> str:
    """Median, median of the absolute drift, and both ends, by column."""
    lines = []
    for name in found[0]:
        drifts = [figures[name].drift for figures in found]
        ends = (median(drifts), min(drifts), max(drifts))
        lines.append((name, str(len(drifts)), f"{median(map(abs, drifts)):.2f} %", *(f"{end:+.2f} %" for end in ends)))
    return table((head, "rows", "median without sign", "median", "lowest", "highest"), lines)


def page(*, lengths: Sequence[Lengths]) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in LIBRARIES)
    t4, t4_refused = tried(load_rows("peaks_t4.jsonl"), t4_figures, key="id")
    metamath, refused = _metamath(lengths)
    scored = [(row["experiment"], figures) for row, figures in metamath if row["experiment"] not in CHOSEN_BY]
    same_code = [figures for name, figures in scored if not name.startswith(OTHER_CODE)]
    unscored, untraced = _unscored(lengths[-1])
    missing = t4_refused + refused + untraced
    parts = [
        INTRO,
        f"Traced with {versions}.",
        "## Tesla T4, by phase",
        T4_NOTE,
        summary([figures for _, figures in t4], "peak"),
        table(("id", "model", "base", "attention", "batch × tokens", *PHASES, RESERVED), [_t4_line(*one) for one in t4]),
        "## peft's benchmark, reserved bytes by method",
        METAMATH_NOTE.format(**_facts(lengths[0])),
        summary([figures for name, figures in scored if "," not in name], "tokens"),
        "Without OSF and LoRA-FA, whose runs did other things than are traced (causes below):",
        summary(same_code, "tokens"),
        table(("run", *map(_head, lengths)), [_metamath_line(*one) for one in metamath]),
        "## peft's benchmark, configurations without a measurement",
        UNSCORED_NOTE.format(**_facts(lengths[-1])),
        table(("configuration", "trainable", "traced reserved, GB"), unscored),
        "## Not traced",
        table(("row", "why"), missing) if missing else "Every row was traced.",
        CAUSES,
    ]
    return "\n\n".join(parts) + "\n"


def _metamath(lengths: Sequence[Lengths]) -> tuple[list[Done], list[Refused]]:
    every = sorted(load_rows("peft_metamath.jsonl"), key=lambda row: row["experiment"] not in CHOSEN_BY)
    done, refused = tried(every, lambda row: metamath_figures(row, lengths=lengths), key="experiment")
    place = next(at for at, (row, _) in enumerate(done) if row["experiment"] == LORA_FA)
    done.insert(place + 1, with_a_training(done[place][0], lengths=lengths))
    return done, refused


def _unscored(lengths: Lengths) -> tuple[list[tuple[str, ...]], list[Refused]]:
    lines: list[tuple[str, ...]] = []
    refused: list[Refused] = []
    for row in load_rows("peft_metamath_unscored.jsonl"):
        try:
            traced = metamath_trace({**BENCHMARK, **row}, lengths=lengths)
        except RefusedError as error:
            refused.append((row["experiment"], str(error)))
            continue
        found = replay(with_empty_cache(traced)).peaks.reserved
        lines.append((row["experiment"], f"{traced.num_trainable:,}", f"{found / 10**9:.2f}"))
    return lines, refused


def _t4_line(row: Row, figures: Figures) -> tuple[str, ...]:
    name = row["model"].partition("/")[2]
    shape = f"{row['micro_batch']} × {row['seq_len']}"
    cells = (figures[peak].cell(MIB, 1) for peak in (*PHASES, RESERVED))
    return row["id"], name, row.get("quant") or "fp16", row["attn"], shape, *cells


def _metamath_line(row: Row, figures: Figures) -> tuple[str, ...]:
    return row["experiment"], *(figure.cell(10**9, 2) for figure in figures.values())


def _lengths(text: str) -> Lengths:
    before, longest = map(int, text.split("/"))
    return before, longest


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", help="last two batches of peft's benchmark, as BEFORE/LONGEST")
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT.relative_to(ROOT)}")
    args = parser.parse_args()
    with quiet_transformers():
        text = page(lengths=[_lengths(text) for text in args.lengths] if args.lengths else LENGTHS)
    if args.write:
        OUTPUT.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
