"""One input, drawn from a seed: a command line with the files that it names, or a Python call."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
from pydantic import ValidationError

import peftplan
from peftplan.cli import COMMANDS
from peftplan.job.configs.facts import facts
from peftplan.job.script import Script
from peftplan.methods import METHODS
from tools.fuzz import paths
from tools.fuzz.values import ABSURD, field_value, fields_of, json_value, model_text, odd_object, text_for

WEIGHTS = {"estimate": 9, "serve": 3, "replay": 4, "inspect": 2, "check": 2, "measure": 1}
"""How often a command is drawn; any other: 1."""
RUNS_PROGRAMS = ("rehearse",)
"""Commands that run what they are handed: they are not drawn."""
WRITES = ("report", "update_baseline", "yes")
"""Options of `check` that write into the project, and that of `sweep` which lifts its limit."""
FILES = {"peft_config": "peft_config", "baseline": "baseline", "suite": "suite", "files": "records"}
"""Parameters that are files, and what they hold."""
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 4096,
}  # fmt: skip
TRAINING_OBJECT = tuple(sorted({*facts("transformers").schema, *facts("trl").schema, "activation_checkpointing_kwargs"}))


class Case(NamedTuple):
    """A command line, or a call with its text. `strict`: what the command prints must be JSON."""

    text: str
    args: tuple[str, ...] | None = None
    call: Callable[[], Any] | None = None
    strict: bool = False


def draw(seed: str, folder: Path, *, trace: bool) -> Case:
    """The input of a seed; files are made in the folder."""
    dice = Random(seed)
    if trace:
        return _traced(dice, folder)
    return _call(dice, folder) if dice.random() < 0.25 else _command(dice, folder)


def _command(dice: Random, folder: Path) -> Case:
    names = [name for name in COMMANDS if name not in RUNS_PROGRAMS]
    name = dice.choices(names, [WEIGHTS.get(name, 1) for name in names])[0]
    params = import_module(f"peftplan.cli.{name.replace('-', '_')}").command.params
    options = [p for p in params if isinstance(p, click.Option) and not (p.name in WRITES or p.is_eager)]  # eager: help
    chosen = dice.sample(options, min(len(options), dice.choice([0, 1, 1, 2, 3, 4, 6])))
    args = [word for option in chosen for word in _option(dice, option, folder)]
    for argument in (p for p in params if isinstance(p, click.Argument)):
        if argument.required or dice.random() < 0.7:
            args.insert(0, _argument(dice, name, str(argument.name), folder))
    if name == "check" and dice.random() < 0.97:
        args += ["--sample", "1"]
    if "--require-fit" in args and dice.random() < 0.9:
        args += {"estimate": ["--gpu", "t4"], "replay": ["--capacity", "1GiB"]}.get(name, [])
    if dice.random() < 0.03:
        args.insert(dice.randrange(len(args) + 1), dice.choice(ABSURD))
    if dice.random() < 0.01:
        name = dice.choice(ABSURD)
    json = [i for i, word in enumerate(args) if word == "--format"]
    strict = bool(json) and args[json[-1] + 1 : json[-1] + 2] == ["json"] and "--explain" not in args and name != "check"
    return Case(f"peftplan {' '.join(map(repr, (name, *args)))}", (name, *args), strict=strict)


def _option(dice: Random, option: click.Option, folder: Path) -> tuple[str, ...]:
    flag = dice.choice([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return (flag,)
    name = str(option.name)
    if name in FILES:
        return flag, paths.path(dice, folder, FILES[name])
    if name in ("timeline", "snapshot", "output", "plot"):
        return flag, str(folder / dice.choice(["t.json", "t.html", "t.png", "no/t.json", "x" * 300 + ".json", "t\0.json"]))
    return flag, text_for(dice, name)


def _argument(dice: Random, command: str, name: str, folder: Path) -> str:
    if name in FILES:
        return paths.path(dice, folder, FILES[name])
    if name in ("file", "source"):
        return paths.path(dice, folder, dice.choice(["log", "snapshot"]))
    if name == "model":
        return paths.path(dice, folder, "model") if dice.random() < 0.45 else model_text(dice)
    return text_for(dice, name)


def _call(dice: Random, folder: Path) -> Case:
    method = field_value(dice, "method") if dice.random() < 0.5 else None
    options = {name: field_value(dice, name) for name in dice.sample(fields_of(method), dice.choice([0, 0, 1, 2, 3]))}
    options |= {} if method is None else {"method": method}
    kind = dice.choice(["options", "objects", "objects", "model", "at", "script", "inspect", "serving"])
    model: Any = model_text(dice) if dice.random() < 0.6 else paths.config(dice)
    if kind == "objects":
        name = dice.choice(
            ["peft_config", "quantization_config", "training_args", "gpu", "engine", "script", "progress", "record"]
        )
        options[name] = _object(dice, name)
    elif kind == "model":
        model = odd_object(dice) if dice.random() < 0.5 else paths.damaged(dice, TINY, changes=2)
    elif kind == "script":
        facts = {name: field_value(dice, name) for name in dice.sample(sorted(Script.model_fields), 2)}
        return Case(_as_text("Script", facts), call=lambda: peftplan.estimate("gpt2", script=_script(facts)).to_dict())
    elif kind == "inspect":
        few = {
            "pattern": field_value(dice, "pattern"),
            "dtype": field_value(dice, "dtype"),
            "task_type": field_value(dice, "task_type"),
        }
        few = {name: few[name] for name in dice.sample(sorted(few), dice.randint(1, 2))}
        return Case(_as_text("inspect", {"model": model, **few}), call=lambda: peftplan.inspect(model, **few) and {})
    elif kind == "serving":
        options |= {name: field_value(dice, name) for name in dice.sample(["adapters", "batch_size", "context", "merge"], 2)}
        return Case(_as_text("serving", {"model": model, **options}), call=lambda: peftplan.serving(model, **options).to_dict())
    elif kind == "at":
        sizes = {name: field_value(dice, name) for name in ("batch_size", "seq_len")}
        known = dice.choice(sorted(METHODS))
        call = lambda: peftplan.estimate(dice.choice(["gpt2", "t5-small"]), method=known).at(**sizes).to_dict()  # noqa: E731
        return Case(_as_text(f"estimate(…, method={known!r}).at", sizes), call=call)
    return Case(_as_text("estimate", {"model": model, **options}), call=lambda: _answered(model, options))


def _script(facts: dict[str, Any]) -> Any:
    """A script where pydantic takes the facts, else the facts themselves."""
    try:
        return Script(**facts)
    except ValidationError:
        return facts


def _answered(model: Any, options: dict[str, Any]) -> Any:
    result = peftplan.estimate(model, **options)
    peftplan.explain(result)
    peftplan.advice(result)
    return result.to_dict()


def _object(dice: Random, name: str) -> Any:
    """One of the ecosystem's objects, nearly."""
    if dice.random() < 0.25:
        return odd_object(dice)
    if name == "peft_config":
        return paths.adapter(dice)
    if name == "quantization_config":
        fields = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "llm_int8_skip_modules")
        return {"load_in_4bit": True, **{field: odd_object(dice) for field in dice.sample(fields, 2)}}
    if name == "training_args":
        drawn = {
            field: dice.choice([None, 1, True, odd_object(dice), json_value(dice)]) for field in dice.sample(TRAINING_OBJECT, 3)
        }
        return SimpleNamespace(**{"per_device_train_batch_size": 1, **drawn})
    return field_value(dice, {"gpu": "gpus"}.get(name, name))


def _traced(dice: Random, folder: Path) -> Case:
    """A small model by the trace engine, with some options of the setup."""
    model = paths.damaged(dice, TINY, changes=dice.choice([0, 1]))
    names = (
        "method",
        "optim",
        "quant",
        "seq_len",
        "loss",
        "trainer",
        "target_modules",
        "attn_implementation",
        "dtype",
        "padding",
    )
    options = {name: field_value(dice, name) for name in dice.sample(names, dice.choice([0, 1, 1, 2, 3]))}
    whole = {"model": model, "engine": "trace", **options}
    return Case(_as_text("estimate", whole), call=lambda: peftplan.estimate(model, engine="trace", **options).to_dict())


def _as_text(function: str, arguments: dict[str, Any]) -> str:
    from peftplan.errors import quoted

    return f"{function}({', '.join(f'{name}={quoted(value)}' for name, value in arguments.items())})"
