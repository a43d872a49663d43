"""Any peft method, counted by the installed peft itself on a model without weights.

`get_peft_model` runs on the meta device, so that names, shapes and what trains are peft's own and no memory is needed. A method
that needs values there, and has no stand-in for them, is refused, never guessed.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

from peftplan.arch.modules import Shape
from peftplan.errors import MissingExtraError, PeftplanError, RefusedError, UnknownNameError, UnknownOptionError
from peftplan.libraries.installed import require
from peftplan.libraries.meta import build_config, build_model, model_class, quiet_transformers
from peftplan.libraries.stand_ins import stand_ins
from peftplan.methods.adaptation import Adaptation, AddedTensor, TrainedParam
from peftplan.methods.lora import NOT_PEFTS

PREFIXES = {True: "base_model.", False: "base_model.model."}
"""What peft puts before the base model's own names, by whether the method is one of virtual tokens."""
COPIES = (".modules_to_save.", ".ln_tuning_layers.", ".adaption_prompt", ".adaption_gate")
"""Tensors that keep the base's dtype: copies of the base's, and adaption prompts, whose model peft does not autocast."""
_ADAPTER = re.compile(r"\.default(?=\.|$)")
LORAFA_LR = 1e-4
"""A learning rate, which `create_lorafa_optimizer` asks for and which changes no count."""


def count_with_peft(config: Mapping[str, Any], peft_config: Mapping[str, Any] | Any, *, task_type: str | None) -> Adaptation:
    """What the installed peft adds to the model of a Hugging Face `config`, and what it trains.

    `peft_config` is a peft config object or the dict of an `adapter_config.json` of any peft type; `freeze_a` in the dict asks
    for LoRA-FA, whose optimizer freezes every A. `task_type` chooses the model class (None: the one that the config names).
    Raises MissingExtraError without torch, transformers or peft, RefusedError with peft's reason where peft refuses.
    """
    peft = _peft()
    freeze_a = isinstance(peft_config, Mapping) and bool(peft_config.get("freeze_a"))
    with quiet_transformers():
        hf_config = build_config(config, name="model")
        cls = model_class(config, hf_config, name="model", task_type=task_type)
        model = build_model(config, hf_config, cls, name="model")
        base = Base.of(model)
        try:
            method = _config_object(peft_config, task_type)
            adapted = on_meta(model, method)
            if freeze_a:
                peft.optimizers.create_lorafa_optimizer(adapted, r=method.r, lora_alpha=method.lora_alpha, lr=LORAFA_LR)
            freeze_adapter(adapted, peft_config)
        except PeftplanError:
            raise
        except Exception as error:  # peft raises whatever its code meets
            raise RefusedError(f"peft {peft.__version__} refuses it: {type(error).__name__}: {_first_line(error)}") from None
    return _checked(_adaptation(base, adapted, method), base, adapted)


def freeze_adapter(model: Any, peft_config: Mapping[str, Any] | Any) -> None:
    """What a program does that freezes all of a model, the adapter too."""
    if isinstance(peft_config, Mapping) and peft_config.get("freeze_adapter"):
        model.requires_grad_(False)


@dataclass(frozen=True)
class Base:
    """The model before peft: its parameters as objects, since peft moves them to other names but keeps them."""

    params: tuple[tuple[str, Any], ...]
    modules: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> Base:
        """The parameters (ties once) and the module names of a model."""
        return cls(tuple(model.named_parameters()), frozenset(name for name, _ in model.named_modules()))

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(param): name for name, param in self.params}

    def name_of(self, param: Any) -> str | None:
        """The name that a parameter has in the base, None if peft made it."""
        return self._names.get(id(param))

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(param.numel() for _, param in self.params)


def on_meta(model: Any, method: Any) -> Any:
    """`get_peft_model` of a model on the meta device."""
    import torch

    with stand_ins(method.peft_type.value), torch.device("meta"):
        return _peft().get_peft_model(model, method)


def check_fields(peft_config: Mapping[str, Any]) -> None:
    """Raises UnknownNameError for a field that the config class of its peft type does not have; peft only warns of it."""
    if unknown := unknown_fields(peft_config):
        raise UnknownOptionError(unknown[0], str(peft_config["peft_type"]), _known_fields(peft_config))


def unknown_fields(peft_config: Mapping[str, Any]) -> list[str]:
    """The fields that the installed peft does not have for that peft type, those of what a program does later aside."""
    known = {*_known_fields(peft_config), *NOT_PEFTS}
    return [name for name in peft_config if name not in known]


def _known_fields(peft_config: Mapping[str, Any]) -> list[str]:
    return list(field_defaults(str(peft_config["peft_type"])))


def field_defaults(peft_type: str) -> dict[str, object]:
    """The fields of a peft type in the installed peft, with their defaults. Raises MissingExtraError without peft."""
    peft = _peft()
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default for field in fields(config)
    }


def wrapped_task(model: Any, task_type: str | None) -> str | None:
    """The task whose wrapper peft puts around a model. The wrappers hand on `input_ids` and `inputs_embeds` (peft,
    peft_model.py): None for a model that takes no tokens, or, as CLIP, pictures beside them and no embeddings of tokens.
    """
    takes = inspect.signature(model.forward).parameters
    of_pictures = "pixel_values" in takes and "inputs_embeds" not in takes
    return task_type if "input_ids" in takes and not of_pictures else None


def _config_object(peft_config: Mapping[str, Any] | Any, task_type: str | None) -> Any:
    """A peft config for one use: peft resolves `target_modules` in place. Initialisation that needs values or files is undone.

    `task_type` is of the model; it stands in for that of a dict which has no such key. None under the key is told to peft.
    """
    peft = _peft()
    if isinstance(peft_config, Mapping):
        fields = {key: value for key, value in peft_config.items() if key not in NOT_PEFTS}
        types = {t.value for t in peft.PeftType}
        if fields.get("peft_type") not in types:
            raise UnknownNameError("peft_config: peft_type", fields.get("peft_type"), types)
        method = peft.PeftConfig.from_peft_type(**fields)
    else:
        method = copy.deepcopy(peft_config)
    unstated = isinstance(peft_config, Mapping) and "task_type" not in peft_config
    if unstated and task_type in {t.value for t in peft.TaskType}:
        method.task_type = task_type
    if getattr(method, "prompt_tuning_init", None) in ("TEXT", "SAMPLE_VOCAB"):
        method.prompt_tuning_init = "RANDOM"
    if method.peft_type.value == "ADAMSS" and method.subspace_rank > 1:
        raise RefusedError(
            f"subspace_rank: with {method.subspace_rank}, what AdaMSS adds depends on how it clusters the weights; only a "
            "subspace_rank of 1 has a count without them"
        )
    if method.peft_type.value == "SHIRA":
        method.mask_fn = None  # its stand-in makes what the mask would: the places of r·(in + out) entries
    return method


def _adaptation(base: Base, adapted: Any, method: Any) -> Adaptation:
    """The differences between the base and the adapted model, as families."""
    import torch

    embeddings = {f"{name}.weight" for name, m in adapted.named_modules() if isinstance(m, torch.nn.Embedding)}
    prefix = PREFIXES[method.is_prompt_learning]
    added: dict[tuple[str, Shape, bool, bool], list[int | None]] = {}
    trained: dict[tuple[str, str, Shape], list[int | None]] = {}
    for full, param in adapted.named_parameters():
        own = base.name_of(param)
        template, layer = _family(own or _ADAPTER.sub("", full.removeprefix(prefix)), base.modules)
        if own is None:
            key = (template, tuple(param.shape), param.requires_grad, full in embeddings)
            added.setdefault(key, []).append(layer)
        elif param.requires_grad:
            module, _, leaf = template.rpartition(".")
            trained.setdefault((module, leaf, tuple(param.shape)), []).append(layer)
    return Adaptation(
        added=tuple(
            AddedTensor(name, shape, _layers(layers), trains, "base" if any(c in name for c in COPIES) else "adapter", embedding)
            for (name, shape, trains, embedding), layers in added.items()
        ),
        trained=tuple(TrainedParam(m, p, shape, _layers(layers)) for (m, p, shape), layers in trained.items()),
        resolved=(("target_modules", _listed(getattr(method, "target_modules", None))),),
    )


def _checked(adaptation: Adaptation, base: Base, adapted: Any) -> Adaptation:
    """The adaptation, after checking its sums against peft's two counts."""
    numbers = adapted.get_nb_trainable_parameters()
    total = base.numel + adaptation.num_added
    if (adaptation.num_trainable, total) != numbers:
        raise RefusedError(
            f"peft counts {numbers[0]} of {numbers[1]}, the tensors that differ {adaptation.num_trainable} of {total}"
        )
    return adaptation


def _family(name: str, modules: frozenset[str]) -> tuple[str, int | None]:
    """The name with its layer index as `{}`, and the index, where a layer of the base lies there."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit() and ".".join(parts[: place + 1]) in modules:
            return ".".join((*parts[:place], "{}", *parts[place + 1 :])), int(part)
    return name, None


def _layers(indices: list[int | None]) -> tuple[int, ...] | None:
    numbered = tuple(i for i in indices if i is not None)
    return numbered or None


def _listed(targets: Any) -> Any:
    return tuple(sorted(targets)) if isinstance(targets, (set, list, tuple)) else targets


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:200]


def _peft() -> Any:
    require("counting with peft")
    try:
        import peft
        import peft.optimizers
    except ImportError as error:
        raise MissingExtraError(f"counting with peft ({error.name or error})", "trace") from None
    return peft
