"""Write docs/configs.md: what is read of every published training config that is kept here: `python -m tools.config_page`.

With `--trace` the configs that have no formula, but a model that can be traced, are traced again (half a minute of a core each)
and kept in `tests/job/configs/traced.json`, which the page reads.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from peftplan.arch import catalogue
from peftplan.arch.text_part import TEXT_PARTS
from peftplan.datafiles import load
from peftplan.errors import PeftplanError
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.with_file import effect_of
from peftplan.planning.configs import ConfigEntry, of_plan
from tests.job.configs.published import plan, records

TRACED = Path(__file__).parents[1] / "tests" / "job" / "configs" / "traced.json"

PAGE = Path(__file__).parents[1] / "docs" / "configs.md"
MOST_KEYS, MOST_MODELS, MOST_REASONS = 40, 40, 15
MEGATRON = "Megatron"
TOOLS_REFUSE = {
    "peft's ParamWrapper, which adapts": "peft 0.21, tuners/lora/layer.py (`ParamWrapper`)",
    "peft refuses out_proj in": "peft 0.21, tuners/tuners_utils.py (`_check_lora_target_modules_mamba`)",
}
"""Part of an error → the library of the tool that raises for such a config, with file and line."""


RAISES = " raises "
"""What a tool's table says of a key with which the tool ends in a traceback, with file and line."""


STATED = 8
"""Cells of a row up to the peaks that are stated."""


class Case(NamedTuple):
    """A config, what was read of it, and its entry."""

    path: str
    plan: ConfigPlan
    entry: ConfigEntry

    @property
    def known(self) -> bool:
        """Whether the model is built in, under one of its names."""
        return self.plan.model is not None and catalogue.find(self.plan.model) is not None

    @property
    def has_pictures(self) -> bool:
        """Whether the model reads more than text (transformers' `vision_config`, `audio_config`, or what its class sees)."""
        entry = catalogue.find(self.plan.model) if self.plan.model is not None else None
        config = entry.facts()["config"] if entry is not None else {}
        return config.get("model_type") in TEXT_PARTS or any(config.get(key) for key in ("vision_config", "audio_config"))

    @property
    def by_trace(self) -> bool:
        """Whether the trace engine has an exact peak, and no formula has."""
        traced = _traced().get(self.path)
        has_peak = traced is not None and traced["peak_allocated"] is not None and traced["bound"] is None
        return has_peak and self.entry.peak_allocated is None and not self.entry.unsupported

    @property
    def of_text(self) -> bool:
        """Whether a peak without unsupported keys, by formula or by trace, is that of the text part alone."""
        scope = _traced()[self.path]["scope"] if self.by_trace else self.entry.scope
        return scope == "text" and (self.by_trace or self.entry.bound is None)

    @property
    def kind(self) -> str:
        """What the file is: `training`, `launch`, `other`, or training by Megatron."""
        megatron = any(MEGATRON in entry.why for entry in self.plan.unsupported.values())
        return MEGATRON if megatron and self.plan.kind == "training" else self.plan.kind


@cache
def _traced() -> dict[str, dict[str, int | str | None]]:
    """What the trace engine says of configs, by path."""
    return dict(json.loads(TRACED.read_text(encoding="utf-8")))


def trace(read: Sequence[Case]) -> None:
    """Trace what has no formula, and keep the peaks."""
    rows = {}
    for case in read:
        could = "--engine trace" in (case.entry.error or "") and not case.entry.unsupported
        if could and case.kind == "training" and case.known:
            entry = of_plan(case.plan, engine="trace")
            print(entry, flush=True)
            rows[case.path] = {key: getattr(entry, key) for key in ("peak_allocated", "peak_reserved", "scope", "bound", "error")}
    TRACED.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", encoding="utf-8")


def _why(case: Case, key: str) -> tuple[str, str]:
    """Why a key is not supported, and its effect; keys of kernels are read where the model and the launch have formulas."""
    row = case.plan.unsupported.get(key)
    return (
        (
            "kernels of a package, without a formula for this model or launch",
            effect_of(case.plan.options.get("kernels")),
        )
        if row is None
        else (row.why, row.effect)
    )


def cases() -> list[Case]:
    """Every record that is kept. A file that matches two tools counts as unreadable."""
    read = []
    for record in records():
        try:
            of_record = plan(record)
        except PeftplanError as error:
            of_record = ConfigPlan("other", "", (record["path"],), None, {}, kind="other")
            read.append(Case(record["path"], of_record, ConfigEntry(record["path"], "other", None, error=str(error))))
            continue
        read.append(Case(record["path"], of_record, of_plan(of_record)))
    return read


def row(name: str, of: Sequence[Case]) -> tuple[str, ...]:
    """One tool: training configs, those with a known model, and what these have."""
    known = [case for case in of if case.known]
    counted = [case for case in known if case.entry.total_parameters is not None]
    peaks = [case for case in counted if case.entry.peak_allocated is not None]
    bound = [case for case in peaks if case.entry.bound is not None]
    exact = [case for case in peaks if case.entry.bound is None and not case.of_text and case.entry.refused is None]
    changed = [case for case in peaks if case.entry.bound is None and not case.of_text and case.entry.refused is not None]
    of_text = [case for case in counted if case.of_text]
    by_tool = sum(refused_by(case) is not None for case in known)
    by_keys = [case for case in counted if case.entry.peak_allocated is None and case.entry.bound == "unknown"]
    raising = [case for case in counted if refused_by(case) is not None]
    traced = [case for case in counted if case.by_trace and not case.of_text]
    shares = (_of(len(counted), len(known)), _of(len(exact), len(known)))
    stopped = sum(case in by_keys for case in raising)
    numbers = (len(changed), len(traced), len(of_text), len(bound), len(by_keys) - stopped)
    uncounted = len(known) - len(counted) - (by_tool - len(raising))
    without = len(counted) - len(peaks) - len(by_keys) - sum(case.by_trace for case in counted)
    rest = (without, uncounted, by_tool - len(changed))
    return (name, str(len(of)), str(len(known)), *shares, *map(str, numbers + rest))


def refused_by(case: Case) -> str | None:
    """The place in the tool or its libraries that refuses a config; None for one that runs or that only peftplan refuses."""
    for refused in case.plan.refused.values():
        return refused.why
    error = case.entry.error or ""
    if case.entry.total_parameters is not None:
        return next((row.why for row in case.plan.unsupported.values() if RAISES in row.why), None)
    return next((place for text, place in TOOLS_REFUSE.items() if text in error), None)


def _of(part: int, whole: int) -> str:
    """A number, and its share of the whole."""
    return f"{part} ({share(part, whole)})" if whole else str(part)


def share(part: int, whole: int) -> str:
    """A percentage; 100 of all alone."""
    return f"{min(round(100 * part / whole), 100 if part == whole else 99)} %" if whole else "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers stand to the right."""
    rows = list(rows)
    numbers = [all(cell[:1].isdigit() or cell == "-" for cell in column) for column in zip(*rows, strict=True)]
    lines = [header, ["---:" if is_number else "---" for is_number in numbers], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_inferred(case: Case) -> bool:
    """Whether which layers a repository leaves in 16 bits is inferred from the sizes of its files."""
    return case.plan.assumed.get("quant_skip_modules", "").startswith("inferred")


def page(read: Sequence[Case]) -> str:
    """The page."""
    training = [case for case in read if case.kind == "training"]
    known = [case for case in training if case.known]
    text = [case for case in known if not case.has_pictures]
    tools = sorted({case.plan.tool for case in training})
    rows = [row(tool, [case for case in training if case.plan.tool == tool]) for tool in tools]
    rows.append(row("built in: text models", text))
    rows.append(row("built in: vision-language models", [case for case in known if case.has_pictures]))
    rows.append(row("all", training))
    kinds = Counter(case.kind for case in read)
    keys = Counter((key, *_why(case, key)) for case in known for key in case.entry.unsupported)
    models = Counter(case.plan.model or "none is named" for case in training if not case.known)
    errors = Counter(case.entry.error for case in known if case.entry.error and case.entry.bound != "unknown")
    inferred = sum(map(_is_inferred, text))
    inferred_parts = sum(_is_inferred(case) for case in known if case.has_pictures and case.of_text)
    exact = (case.entry for case in text if case.entry.peak_allocated is not None and case.entry.bound is None)
    unreserved = sum(entry.peak_reserved is None for entry in exact)
    runs = sum(refused_by(case) is None for case in text)
    changed = _exact(text, changed=True)
    return f"""# The files people run

<!-- written by tools/config_page.py -->
How many of the training configs that people publish does peftplan read, and for how many does it state a peak? This page shows
the results of `peftplan configs` with the analytic engine for {
        len(read):,} published configs (`tests/job/configs/data`: parsed values, each with
its repository, path, commit and licence). {kinds["training"]:,} of them train a model; {kinds["launch"]} are launch files, {
        kinds[MEGATRON]
    } run Megatron, and
{kinds["other"]} do something else (inference, export, evaluation, data, tools that peftplan does not read).

**Of {len(text)} configs of built-in text models, {share(_exact(text) + changed, len(text))} have an exact peak: {
        _exact(text)
    } as they are, {changed} after a change that the
answer names. Of all {len(known)} configs of built-in models, {share(_counted(known), len(known))} have a count. Of {
        len(known) - len(text)
    } configs of vision-language
models, {sum(case.of_text for case in known)} have a peak of their text part.**

- *counted*: the number of parameters is known.
- *exact peak*: no key is unsupported. *by trace*: the same, but only `--engine trace` has the peak. For {inferred} of
  them, the layers that Unsloth leaves in 16 bits are inferred from the sizes of a repository's files. For {unreserved} of them,
  allocated bytes are known and reserved ones are not.
- *after a change*: the same, but the tool raises an error for the config as it is; the peak is that of the config with a change,
  which the estimate names, such as a kernel turned off.
- *text part*: the same of a vision-language model, by formula or trace, for samples without images (`scope: "text"`): all weights
  are counted, and what the model computes of text. Files whose samples have images need more. For {inferred_parts} of them,
  layers in 16 bits are inferred in the same way.
- *bound*: unsupported keys only lower, or only raise, the peak. *null*: there is no peak, since the effect of a key is not known.
- *no formula*: neither engine has a peak.
- *refusal*: an error with its reason. *tool refuses*: the tool or one of its libraries raises an error for this config.

Shares are of the configs whose model is *built in*.

{
        table(
            ("tool", "training", "built in", "counted", "exact peak", "after a change", "by trace", "text part"),
            [each[:STATED] for each in rows],
        )
    }

The others of the configs whose model is built in:

{table(("tool", "bound", "null", "no formula", "refusal", "tool refuses"), [each[:1] + each[STATED:] for each in rows])}

Targets, of the configs whose model is built in: counts for 95 %, and exact peaks for 90 % of the text models. Counts are at
{_counted(known)} of {len(known)} ({share(_counted(known), len(known))}). Without those after a change, exact peaks are at {
        share(_exact(text), len(text))
    } of all text
configs, and at {share(_exact(text), runs)} of the {runs} that their tools do not refuse.
Of all training configs {share(_counted(known), len(training))} are counted.

## Unsupported keys, most frequent first

{
        table(
            ("key", "why", "effect on the peak", "configs"),
            [(f"`{key}`", _cell(why), effect, str(n)) for (key, why, effect), n in keys.most_common(MOST_KEYS)],
        )
    }

## Why there is no estimate or no formula

{table(("reason", "configs"), [(_cell(str(error)), str(n)) for error, n in errors.most_common(MOST_REASONS)])}

The tool or a library of it raises for {sum(refused_by(case) is not None for case in known)} of them:

{chr(10).join(f"- {place}" for place in dict.fromkeys((*TOOLS_REFUSE.values(), *filter(None, map(refused_by, known)))))}

## Printed memory

[Published figures](published-figures.md) shows what notebooks and scripts among these files printed, beside their estimates.

## Models that are not built in

{table(("model", "configs"), [(f"`{model}`", str(n)) for model, n in models.most_common(MOST_MODELS)])}

And {max(len(models) - MOST_MODELS, 0)} more.

## Round trips

`peftplan export` wrote configs for random jobs (`tests/job/configs/drawn.py`: models, methods, sizes, optimizers, strategies).
Read back, each gives the options and the estimate that its comments state, to the byte: those of the job, with the tool's
defaults for options that were not set (`tests/job/configs/test_writing.py`). The tool's own check accepts it
(`tools/check_exports.py`, if the tool is installed; LLaMA-Factory and ms-swift ran with newer releases of their dependencies
than they require).

{
        table(
            ("tool", "version", "jobs", "accepted", "checked by"),
            [
                (tool, result["version"], str(result["plans"]), str(result["accepted"]), f"`{result['by']}`")
                for tool, result in load("configs/checked.json", dict).items()
            ],
        )
    }
"""


def _counted(known: Sequence[Case]) -> int:
    return sum(case.entry.total_parameters is not None for case in known)


def _exact(known: Sequence[Case], *, changed: bool = False) -> int:
    peaks = [case.entry for case in known if case.entry.peak_allocated is not None and case.entry.bound is None]
    return sum((entry.refused is not None) == changed for entry in peaks)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:160]


if __name__ == "__main__":
    everything = cases()
    if "--trace" in sys.argv:
        trace(everything)
    PAGE.write_text(page(everything), encoding="utf-8")
