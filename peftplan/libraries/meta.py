"""Any architecture that the installed transformers knows, read from its real model on the meta device: no weights, no memory.

The model is built from a config by transformers' own class and walked once: modules, ties, buffers, embeddings, and what peft's
virtual-token methods read from the config. Remote code is never run. What autograd keeps is not known: `blocks` is empty.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from peftplan.arch.fields import MAX_LABELS, MAX_LAYERS
from peftplan.arch.heads import TASK_TYPES
from peftplan.arch.modules import Architecture
from peftplan.errors import InputError, MissingExtraError, UnknownNameError
from peftplan.libraries.installed import require
from peftplan.versions import TIED_AS_MADE

AUTO_MAPPINGS: dict[str, tuple[str, ...]] = {
    "CAUSAL_LM": ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    "SEQ_2_SEQ_LM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
    "MASKED_LM": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "SEQ_CLS": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",),
    "TOKEN_CLS": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",),
    "QUESTION_ANS": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING",),
    "IMAGE_CLS": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",),
    "FEATURE_EXTRACTION": ("MODEL_MAPPING",),
}
"""Where transformers' `AutoModelFor…` looks a task's class up (`models/auto/modeling_auto.py`)."""

T5_TYPES = ("t5", "mt5", "umt5", "longt5")

_COUNT_FIELD = re.compile(r"(?:^|_)(?:n_layers?|layers|depth|blocks|experts)$")
"""Config fields that say how many modules are made, one by one: each is bounded before any is made."""


def read_architecture(config: Mapping[str, Any], *, name: str, task_type: str | None = None) -> Architecture:
    """The `Architecture` of a parsed config.json, from transformers' model on the meta device.

    The class is the one that `architectures` names, or that `AutoModelFor…` takes for `task_type`. Raises MissingExtraError
    without torch or transformers, UnknownNameError for a model type or task that the installed transformers does not have,
    InputError for a config that its class refuses.
    """
    _transformers(config["model_type"])
    with quiet_transformers():
        hf_config = build_config(config, name=name)
        cls = model_class(config, hf_config, name=name, task_type=task_type)
        model = build_model(config, hf_config, cls, name=name)
    from peftplan.libraries.walk import walk

    return walk(model, model_type=config["model_type"], task_type=task_of(cls.__name__, hf_config) or "")


def is_native(model_type: str) -> bool:
    """Whether the installed transformers has the model type. Raises MissingExtraError without transformers."""
    return model_type in _transformers(model_type).CONFIG_MAPPING


def build_config(config: Mapping[str, Any], *, name: str) -> Any:
    """transformers' config object; `auto_map` and quantization are left out, they change no name and no shape."""
    model_type = config["model_type"]
    if not is_native(model_type):
        raise UnknownNameError(f"{name}: model_type", model_type, _transformers().CONFIG_MAPPING.keys())
    _check_counts(config, name=name)
    fields = {k: v for k, v in config.items() if k not in ("model_type", "auto_map", "quantization_config")}
    try:
        return _transformers().AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each config class raises its own kinds
        raise InputError("model", name, f"transformers' {model_type} config refuses it: {_first_line(error)}") from None


def model_class(config: Mapping[str, Any], hf_config: Any, *, name: str, task_type: str | None) -> Any:
    """The class that the config's `architectures` names where it serves the task, else the one of `AutoModelFor…`."""
    transformers = _transformers()
    names = config.get("architectures")
    class_name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    cls = getattr(transformers, class_name, None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    stated_task = task_of(class_name, hf_config) if class_name else None
    if known and (not task_type or task_type == stated_task):
        return cls
    task = task_type or stated_task
    for candidate in (task,) if task else ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        for mapping in AUTO_MAPPINGS[candidate]:
            classes = getattr(transformers, mapping).get(type(hf_config), None)
            if classes is not None:
                return classes[0] if isinstance(classes, (tuple, list)) else classes
    accepted = [t for t, ms in AUTO_MAPPINGS.items() if any(type(hf_config) in getattr(transformers, m) for m in ms)]
    raise UnknownNameError(f"{name}: task_type (of {hf_config.model_type})", task, accepted)


def build_model(config: Mapping[str, Any], hf_config: Any, cls: Any, *, name: str) -> Any:
    """The model on the meta device, in bf16, so that a float buffer of the model's dtype is told from an fp32 one.

    A T5 has the head of its checkpoint (`untie`).
    """
    import torch

    try:
        with torch.device("meta"):
            model = cls._from_config(hf_config, dtype=torch.bfloat16)
            if TIED_AS_MADE.after(version("transformers")):
                model.tie_weights()
    except Exception as error:  # each model class raises its own kinds
        raise InputError("model", name, f"transformers' {cls.__name__} refuses it: {_first_line(error)}") from None
    untie(model, config)
    return model


def untie(model: Any, config: Mapping[str, Any]) -> None:
    """Give a T5 a head of its own, if its config.json states one.

    The config class forces ties on (and keeps a stated false as `scale_decoder_outputs`), but `from_pretrained` leaves the head
    alone where it differs from the embedding (`tie_weights`), and every checkpoint that states false ships such a head.
    """
    import torch

    head = model.get_output_embeddings() if model.config.model_type in T5_TYPES else None
    if head is not None and False in (config.get("tie_word_embeddings"), config.get("scale_decoder_outputs")):
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))


def task_of(class_name: str, hf_config: Any) -> str | None:
    """The task of a model class by its name, or None if the name ends like none of them."""
    if class_name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if hf_config.is_encoder_decoder else "CAUSAL_LM"
    if class_name.endswith("LMHeadModel"):
        return "CAUSAL_LM"
    if class_name.endswith("MTModel"):
        return "SEQ_2_SEQ_LM"
    return next((task for task, end in sorted(TASK_TYPES.items(), key=lambda t: -len(t[1])) if class_name.endswith(end)), None)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings about config fields and missing kernels: neither changes a shape."""
    logging = _transformers().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _transformers(model_type: str = "any") -> Any:
    what = f"reading model_type {model_type!r} with transformers"
    require(what, "torch", "transformers")
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"{what} ({error.name or error})", "trace") from None
    return transformers


def _check_counts(config: Mapping[str, Any], *, name: str) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value, name=f"{name}: {key}")
        elif isinstance(value, (int, float)) and (most := _most(str(key))) is not None and value > most:
            raise InputError(f"{name}: {key}", value, f"accepted: a whole number up to {most}")


def _most(field: str) -> int | None:
    """The largest value of a field that says how many modules, or labels, are made."""
    return MAX_LABELS if field == "num_labels" else MAX_LAYERS if _COUNT_FIELD.search(field) else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
