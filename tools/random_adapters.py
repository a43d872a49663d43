"""Random adapter configs: our counts against those of peft's own model on the meta device."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import peftplan.methods as methods
from peftplan.errors import PeftplanError
from peftplan.job.adapting import PEFT_TASKS
from peftplan.job.kernels import SCANNING
from peftplan.job.prepare import prepare
from peftplan.job.sources import load
from peftplan.job.tasks import as_told
from peftplan.memory.models import FORWARDS
from peftplan.methods.adaptation import NeedsPeftError
from tools.random_draws import PROMPTS, draw_config, draw_method


class ReportLine(NamedTuple):
    """A line of the report, and whether it tells of a fault."""

    text: str
    fault: bool = False


Counts = tuple[int, int] | str
"""Trainable and total parameters; or why there are none."""

TYPES = {
    name: method.peft_type
    for name, method in methods.METHODS.items()
    if method.peft_type is not None and name not in ("qlora", "qdora", "lora-fa")
}
"""Method → what an adapter_config.json calls it."""
EXTRA: dict[str, tuple[dict[str, Any], ...]] = {
    "LOHA": ({}, {"r": 4}, {"r": 3, "rank_dropout": 0.1}),
    "LOKR": ({}, {"decompose_both": True}, {"decompose_factor": 8}, {"r": 3}, {"r": 200}),
    "OFT": ({}, {"oft_block_size": 64}, {"oft_block_size": 0, "r": 8}, {"block_share": True}, {"coft": True}),
    "BOFT": ({}, {"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4}),
    "VERA": ({}, {"r": 64}, {"save_projection": False}),
    "FOURIERFT": ({}, {"n_frequency": 100}),
    "ADALORA": ({"total_step": 1000}, {"total_step": 1000, "init_r": 6, "target_r": 4}),
    "PREFIX_TUNING": ({}, {"prefix_projection": True, "encoder_hidden_size": 64}),
    "P_TUNING": ({}, {"encoder_hidden_size": 64}, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 64}),
}


def draw_adapter(seed: int, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's config, and an adapter_config.json's content; a config that its reader refuses is drawn again."""
    draw = random.Random(f"adapter {seed} {number}")
    while True:
        config = draw_config(draw, draw.choice([name for name in FORWARDS if name not in SCANNING]), deep=0)
        try:
            return config, _draw_fields(draw, config)
        except PeftplanError:
            continue


def _draw_fields(draw: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    method = draw.choice(tuple(TYPES))
    fields = draw_method(draw, method, config, None)
    if fields.get("target_modules") in ("attention", "mlp", "peft-default"):
        del fields["target_modules"]
    fields |= draw.choice(EXTRA.get(str(TYPES[method]), ({},)))
    fields |= {} if method in PROMPTS else dict(methods.METHODS[method].defaults) | fields
    if fields.get("target_modules") == "peft-default":
        del fields["target_modules"]
    task = load(config).task_type  # peft has no name for masked language models and for pictures
    task = task if task in PEFT_TASKS else "FEATURE_EXTRACTION"
    task_field = {"task_type": task} if method in PROMPTS or draw.random() < 0.7 else {}
    return {"peft_type": TYPES[method], **task_field, **fields}


def counts(config: dict[str, Any], adapter: dict[str, Any]) -> Counts:
    """Ours, as a user gets them; without a formula, peft itself would count."""
    try:
        methods.adapt(as_told(load(config), adapter), *methods.from_peft_config(adapter))
        job = prepare(config, peft_config=adapter)
    except NeedsPeftError as needs:
        return f"no formula: {needs}"
    except PeftplanError as error:
        return f"refused: {error}"
    return job.adaptation.num_trainable, job.architecture.num_parameters + job.adaptation.num_added


def counts_of_peft(config: dict[str, Any], adapter: dict[str, Any]) -> Counts:
    """`get_nb_trainable_parameters()` of peft's own model."""
    import peft

    from peftplan.libraries.count import on_meta
    from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers

    task = load(config).task_type
    with quiet_transformers():
        hf_config = build_config(config, name="model")
        model = build_model(config, hf_config, model_class(config, hf_config, name="model", task_type=task), name="model")
        try:
            of_peft = peft.PeftConfig.from_peft_type(**adapter)
            adapted = on_meta(model, of_peft)
        except Exception as error:  # peft raises whatever its code meets
            return f"refused: {type(error).__name__}: {error}"
    trainable, total = adapted.get_nb_trainable_parameters()
    return int(trainable), int(total)


def compare_counts(seed: int, number: int) -> Iterator[ReportLine]:
    """What differs, then one line of totals; nothing where nothing is asked for."""
    kinds: Counter[str] = Counter()
    for each in range(number):
        config, adapter = draw_adapter(seed, each)
        ours, theirs = counts(config, adapter), counts_of_peft(config, adapter)
        if isinstance(ours, str) and ours.startswith("no formula"):
            kinds["without a formula"] += 1
            continue
        both_refuse = isinstance(ours, str) and isinstance(theirs, str)
        kinds["refused by both" if both_refuse else "equal" if ours == theirs else "differ"] += 1
        if not both_refuse and ours != theirs:
            yield ReportLine(f"adapter {each}: ours {ours}, peft's {theirs}\n      {json.dumps([config, adapter])}", fault=True)
    if number:
        yield ReportLine(f"{number} adapter configs: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
