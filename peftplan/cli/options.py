"""The options of the commands: how they are created, and what was typed. Values stay strings; the library checks them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypedDict, cast

from peftplan.cli.command import option
from peftplan.cli.texts import BRIEF, METAVARS, SHORT_HELP
from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.job.words import MEANINGS, twice

if TYPE_CHECKING:
    from peftplan.job.options import JobOptions
    from peftplan.job.setup import Engine

FORMATS = ("table", "json", "csv", "markdown")

NOT_FIELDS = (
    *("model", "method", "peft_config", "quantization_config", "training_args", "gpu", "engine", "advice", "record", "progress"),
    *("script", "strict", "config", "tool", "adapters", "context", "encoder_context", "serving_dtype", "merge"),
)
"""Arguments of `estimate` and `serving` that are no fields of a method, so that --set does not take them."""
INT_LISTS = ("layers_to_transform",)
JSON_VALUES = ("rank_pattern",)


class ByEngine(TypedDict, total=False):
    """What computes an estimate, and who is told how far it is."""

    engine: Engine
    progress: Callable[[str, float], None] | None


Decorated = Callable[..., object]


def group(heading: str, options: dict[str, str], *, several: bool = False) -> Callable[[Decorated], Decorated]:
    """A decorator that adds options in their order: a switch where the name has two halves, else one text.

    `several`: each may be repeated.
    """

    def decorate(command: Decorated) -> Decorated:
        for name, text in reversed(options.items()):
            command = option(
                name,
                default=None,
                help=text,
                heading=heading,
                rare=name not in SHORT_HELP,
                brief=BRIEF.get(name),
                metavar=None if "/" in name else METAVARS[name],
                multiple=several or name == "--set",
            )(command)
        return command

    return decorate


format_option = option(
    "--format", "fmt", default="table", metavar=f"[{'|'.join(FORMATS)}]", show_default=True, help="output format"
)


def chosen(options: Mapping[str, object], *, lists: bool = False) -> JobOptions:
    """The options that were set, lists and JSON values parsed, `--set` fields merged in. `lists`: a value may be several names.

    Raises RefusedError for a field that is set twice, and for several strategies.
    """
    set_options: dict[str, object] = {name: value for name, value in options.items() if name != "set" and value is not None}
    for name in INT_LISTS:
        if name in set_options:
            set_options[name] = _json(name, f"[{set_options[name]}]", set_options[name], "whole numbers, comma-separated")
    for name in JSON_VALUES:
        if name in set_options:
            set_options[name] = _json(name, str(set_options[name]), set_options[name], "a JSON object")
    setters = {name: f"--{name.replace('_', '-')}" for name in set_options}
    fields = options["set"]
    assert isinstance(fields, tuple)
    for word, value in map(_field, fields):
        name = MEANINGS[word].option if word in MEANINGS else word
        if name in setters:
            raise twice(setters[name], f"--set {word}")
        setters[name] = f"--set {word}"
        set_options[word] = value
    if "," in str(set_options.get("strategy", "")) and not lists:
        raise RefusedError("--strategy: accepted: one name here; `peftplan compare` and `sweep` take several, comma-separated")
    return cast("JobOptions", set_options)


def several(options: Mapping[str, tuple[object, ...]]) -> dict[str, object]:
    """The values of repeatable options, as `sweep` takes them: one, or each of several."""
    from peftplan.planning.axes import Each

    by_name: dict[str, list[object]] = {}
    for name, values in options.items():
        for value in values:
            parsed = chosen({name: None if name == "set" else value, "set": (value,) if name == "set" else ()}, lists=True)
            for field, each in parsed.items():
                by_name.setdefault(field, []).append(each)
    return {name: values[0] if len(values) == 1 else Each(values) for name, values in by_name.items()}


def _field(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if not equals or not name or name in NOT_FIELDS:
        raise InputError("--set", text, "accepted: FIELD=VALUE, with a field of `peftplan methods NAME`")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _json(name: str, text: str, typed: object, accepted: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(name, typed, f"accepted: {accepted}") from None


UNCOMPILED = "TORCHDYNAMO_DISABLE"
"""The variable by which torch runs compiled functions as they are."""

torch_option = option(
    "--torch",
    rare=True,
    default=None,
    metavar="VERSION",
    help="torch that will run the job; before 2.13 its allocator places blocks differently",
)
transformers_option = option(
    "--transformers",
    rare=True,
    default=None,
    metavar="VERSION",
    help="transformers that will run the job; before 4.49 the loss keeps a copy of the logits",
)

engine_option = option(
    "--engine", default="analytic", metavar="[analytic|trace]", show_default=True, help="what computes the peak"
)

context_option = option(
    "--context",
    rare=True,
    default=None,
    metavar="INT",
    help="CUDA context in MiB; default: as measured on the card, else assumed",
)


def circumstances(torch: str | None, transformers: str | None, context: str | None) -> JobOptions:
    """The keywords of `estimate` for the versions that will run the job and the context, where they are set."""
    keywords = cast("JobOptions", {} if context is None else {"context": context})  # text, which the library checks
    if torch is None and transformers is None:
        return keywords
    from peftplan.job.script import Script

    return {**keywords, "script": Script.on(torch=torch, transformers=transformers)}


@contextmanager
def computed_by(engine: str) -> Iterator[ByEngine]:
    """The keywords that name the engine; traces, which take seconds, say on a terminal how far they are."""
    if engine != "trace":
        yield {"engine": cast("Engine", engine)}  # another name is refused by the library
        return
    from peftplan.report.progress import waiting

    with _uncompiled(), waiting("tracing") as progress:
        yield {"engine": "trace", "progress": progress}


@contextmanager
def _uncompiled() -> Iterator[None]:
    """No torch.compile: at import bitsandbytes compiles kernels for the CPU, which no trace runs, and that loads the compiler."""
    unset = UNCOMPILED not in os.environ
    os.environ.setdefault(UNCOMPILED, "1")
    try:
        yield
    finally:
        if unset:
            del os.environ[UNCOMPILED]


def counted(gpu: tuple[str, ...], fields: Mapping[str, object]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The cards without how many there are of each, and that number as the option `gpus`. Raises RefusedError for several."""
    from peftplan.planning.verdicts import counted_cards

    groups = counted_cards(gpu)
    if len(groups) > 1:
        raise RefusedError("--gpu: this command takes one number of GPUs (estimate and compare several); run it for each")
    number, names = groups[0] if groups else (None, gpu)
    if number is None:
        return gpu, {}
    if fields.get("gpus") is not None:
        raise InputError("--gpus", fields["gpus"], f"--gpu says how many there are ({number}x…); accepted: one of the two")
    return names, {"gpus": number}


def check_model(model: str | None, chosen: Mapping[str, object], *, also: str = "") -> None:
    """Raises RefusedError where nothing names a model; `also` is an option that may name one too."""
    if model is None and chosen.get("peft_config") is None:
        raise RefusedError(f"MODEL is missing: name a model, or {also}a --peft-config that names its base model")


def check_format(name: str) -> None:
    """Raises UnknownNameError where the output format is unknown."""
    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
