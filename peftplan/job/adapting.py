"""The method of a request: its checked config, and the tensors that it adds to a model, by formula or as peft counts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import ConfigDict

import peftplan.methods as methods
from peftplan.arch.modules import Architecture
from peftplan.errors import InputError, MissingExtraError, RefusedError, UnknownNameError, UnknownOptionError, nearest
from peftplan.job import sources
from peftplan.job.setup import Setup
from peftplan.job.tasks import as_told
from peftplan.job.words import MEANINGS, NO_EFFECT, without_effect
from peftplan.methods.adaptation import Adaptation, MethodConfig, NeedsPeftError
from peftplan.methods.targets import LayeredConfig, Names

BESIDE = ("model", "method", "peft_config", "config", "engine", "gpu")
"""Arguments of `estimate` that are no options of a job."""
PEFT_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
"""peft's `TaskType`; `PeftConfigMixin.__post_init__` refuses any other."""


class OptionsOfAnyType(LayeredConfig):
    """The options of the command line that are fields of several peft types: peft takes neither numbers nor lists as text."""

    model_config = ConfigDict(extra="allow")
    r: int | None = None
    num_virtual_tokens: int | None = None
    target_parameters: Names = None


def _options_beside() -> Iterator[str]:
    """The options of `estimate` that are no method's; only an error asks."""
    from peftplan.distributed.strategy import Distributed

    yield from (*BESIDE, *Setup.model_fields, *Distributed.model_fields, *MEANINGS)


def method_of(
    name: str | None, peft_config: Mapping[str, object] | None, options: Mapping[str, object]
) -> tuple[methods.Method | None, MethodConfig | None, dict[str, object]]:
    """The method and its checked config; without them, the adapter config that only peft itself can count.

    A method named beside an adapter config must be of its peft type; it adds what its name presets (`lora-fa`, `qlora`).
    """
    if peft_config is None and (other := methods.other_peft_type(name)) is not None:
        from peftplan.libraries.count import check_fields

        raw = {"peft_type": other, **options}
        check_fields(raw)
        return None, None, raw | _not_as_text(options)
    if peft_config is None:
        try:
            method, config = methods.configure("lora" if name is None else name, options, beside=_options_beside())
        except UnknownOptionError as error:
            if without_effect(error.field):
                raise RefusedError(f"{error.field}: {NO_EFFECT}") from None
            raise
        return method, config, {}
    raw = {"task_type": None, **peft_config}
    _check_peft_task(raw)
    named_method = methods.method_named(name) if name else None
    if named_method is not None and named_method.peft_type != _peft_type(raw):
        raise InputError("method", name, f"the peft_config is of type {_peft_type(raw)}; accepted: a method of that type")
    presets = {key: value for key, value in (named_method.defaults if named_method else {}).items() if key != "target_modules"}
    raw = {**raw, **presets, **options}
    try:
        method, config = methods.from_peft_config(raw)
        return named_method or method, config, raw
    except NeedsPeftError:
        if presets:
            raise
        _check_peft_type(_peft_type(raw))
        return named_method, None, raw | _not_as_text(options)


def _not_as_text(options: Mapping[str, object]) -> dict[str, object]:
    """Options with numbers as numbers and names as lists. Raises InputError."""
    read = methods.validated(OptionsOfAnyType, options).model_dump(exclude_unset=True)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in read.items()}


def _check_peft_task(raw: Mapping[str, object]) -> None:
    task = getattr(raw.get("task_type"), "value", raw.get("task_type"))
    if task is not None and (not isinstance(task, str) or task not in PEFT_TASKS):
        raise UnknownNameError("peft_config: task_type", task, PEFT_TASKS)


def _check_peft_type(name: str) -> None:
    """Raise UnknownNameError for a misspelled type, before peft is loaded, which may know a type that peftplan does not."""
    known = (*methods.OTHER_PEFT_TYPES, *(method.peft_type for method in methods.METHODS.values() if method.peft_type))
    if name not in known and (near := nearest(name.upper(), known, most=1)):
        raise UnknownNameError("peft_config: peft_type", name, set(known), meant={name.lower(): near[0]})


def _peft_type(raw: Mapping[str, object]) -> str:
    return str(getattr(raw.get("peft_type"), "value", raw.get("peft_type")))


def adapted(
    architecture: Architecture,
    model: object,
    method: methods.Method | None,
    config: MethodConfig | None,
    adapter: Mapping[str, object],
    setup: Setup,
) -> Adaptation:
    """What the method adds to the model; as peft counts it where it has no formula. Raises MissingExtraError without peft."""
    try:
        if method is not None and config is not None:
            # Unsloth adds the experts itself (unsloth 2026.10.9, import_fixes.py:9476, `_convert_peft_config_moe_unsloth`).
            apart = setup.by.own_lora or (setup.by_unsloth and bool(getattr(config, "target_parameters", None)))
            by_peft = not (apart and method.peft_type == "LORA")
            return methods.adapt(as_told(architecture, adapter), method, config, by_peft=by_peft)
    except NeedsPeftError:
        if not adapter:
            raise
    from peftplan.libraries.count import count_with_peft

    try:
        return count_with_peft(config_of(model, setup), adapter, task_type=architecture.task_type)
    except MissingExtraError as missing:
        raise MissingExtraError(f"{_why_peft(adapter)}: counting with peft", missing.extra) from None


def _why_peft(adapter: Mapping[str, object]) -> str:
    """The part of an adapter config that has no formula here."""
    try:
        methods.from_peft_config(adapter)
    except NeedsPeftError as reason:
        return f"peft_config: no formula for {reason}"
    return f"no formula for {_peft_type(adapter)} on this model"


def ignored_fields(adapter: Mapping[str, object]) -> tuple[str, ...]:
    """A warning for each set field that the installed peft does not know and therefore ignores."""
    from peftplan.libraries.count import unknown_fields

    names = [name for name in unknown_fields(adapter) if adapter[name] not in methods.UNSET]
    peft_type = _peft_type(adapter)
    return tuple(f"peft_config: {name!r} is ignored: the installed peft has no such field of {peft_type}" for name in names)


def config_of(model: object, setup: Setup) -> dict[str, object]:
    """The config of the checkpoint that is loaded, with the setup's number of labels."""
    labels = {} if setup.num_labels is None else {"num_labels": setup.num_labels}
    config = sources.load_config(model)
    if setup.by_unsloth:
        from peftplan.job.built import config_unsloth_loads

        config = config_unsloth_loads(config)
    return {**config, **labels}
