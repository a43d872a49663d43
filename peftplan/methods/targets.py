"""Which modules a PEFT config targets: peft's matching rules, applied to families.

Source: peft, `tuners/tuners_utils.py` (`check_target_module_exists`, `_maybe_include_all_linear_layers`) and
`utils/other.py` (`get_pattern_key`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, ClassVar, TypedDict, TypeVar

from pydantic import AfterValidator, BeforeValidator

from peftplan import datafiles
from peftplan.arch.modules import LINEAR_KINDS, Architecture, Module
from peftplan.errors import InputError, RefusedError, near_names, nearest
from peftplan.methods.adaptation import MethodConfig, restricted
from peftplan.methods.condensed import exact_names
from peftplan.methods.saved import never_targeted
from peftplan.validation import listed

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"
EVERY_LINEAR = "every-linear"
LINEAR_NAMES = "linear-names"
"""The linear layers but the output by name, as axolotl, LLaMA-Factory and ms-swift list them: no expert is one of them."""
PEFT_DEFAULT = "peft-default"
WORDS = (ALL_LINEAR, EVERY_LINEAR, LINEAR_NAMES, PEFT_DEFAULT, "attention", "mlp")
"""Words for `target_modules`: peft's own `all-linear`, and ours. They are resolved to lists of names, which are printed."""
OURS = frozenset(WORDS) - {ALL_LINEAR}
"""Those that are a name or a pattern to peft and to other tools."""

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_ATTENTION = re.compile(r"(attn|attention)", re.IGNORECASE)
SEQ_CLS_HEADS = ("score", "classifier")
"""`SEQ_CLS_HEAD_NAMES` (peft/utils/constants.py): heads that `all-linear` leaves out for peft's task type SEQ_CLS."""


class PeftTargets(TypedDict):
    """The modules that peft adapts unless a config names some: peft type → model type → names, or a word."""

    target_modules: dict[str, dict[str, list[str] | str]]
    feedforward_modules: dict[str, dict[str, list[str]]]


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


def _words(value: object) -> object:
    """Split a comma-separated string into names, as on the command line. An empty string has none; a word or a regex stays."""
    if isinstance(value, str):
        if value.lower() in WORDS:
            return value.lower()
        if re.fullmatch(r" *[\w.-]+ *(, *[\w.-]+ *)*", value):
            return listed(value)
        return _regex(value) if value else ()
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else value


def reads_as_names(targets: object) -> tuple[str, ...]:
    """The names in a `target_modules`; empty if it is a word, a regular expression or unset."""
    names = _words(targets) if isinstance(targets, (str, set, frozenset)) else targets
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, (list, tuple)) else ()


Targets = Annotated[tuple[str, ...] | str | None, BeforeValidator(_words)]
"""Module names (matched as whole suffixes), one regular expression (matched in full), or a word."""
Pattern = Annotated[str, AfterValidator(_regex)]
"""A string that peft puts into a regular expression."""
Names = Annotated[tuple[Pattern, ...] | None, BeforeValidator(listed)]


class TargetedConfig(MethodConfig):
    """The fields that all of peft's targeted methods share."""

    target_modules: Targets = None
    exclude_modules: Targets = None
    modules_to_save: Names = None


class LayeredConfig(TargetedConfig):
    """The fields of the methods that can leave out layers.

    `refuses_layers` names those fields that peft's config class refuses beside a `target_modules` that is one string: a regular
    expression or `all-linear`. Where it does not refuse them, it ignores them.
    """

    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names = None
    refuses_layers: ClassVar[tuple[str, ...]] = ()


def match(
    arch: Architecture, config: TargetedConfig, targets: tuple[str, ...] | str, *, may_be_none: bool = False
) -> tuple[Module, ...]:
    """The module families that the config targets, each over the layers that match.

    `targets` is `config.target_modules` once words are resolved. Raises InputError if nothing matches (near names are
    shown) unless that may be, RefusedError if a container module matches, which peft refuses too.
    """
    in_targets = _matcher(targets)
    templates = frozenset(t for t in targets if "{" in t) if isinstance(targets, tuple) else frozenset()
    left_out = excluded(arch, config)
    layers = config if isinstance(config, LayeredConfig) and _uses_layers(config) else None
    exact = exact_names(arch, targets) if layers else frozenset()

    def matches(name: str, template: str) -> bool:
        if left_out(name) or not (template in templates or in_targets(name)):
            return False
        return layers is None or name in exact or _in_layers(name, layers)

    names_layers = any(map(_has_digit, (*_flat(targets), *_flat(config.exclude_modules)))) or layers is not None
    matched = [m for module in arch.modules if (m := _matching_layers(module, matches, alike=not names_layers)) is not None]
    container = next((c for c in sorted(arch.containers) if matches(c.replace("{}", "0"), c)), None)
    if container is not None:
        raise RefusedError(f"target_modules: {container} is not a layer that can be adapted; peft refuses it as not supported")
    if not matched and not may_be_none:
        elsewhere = (in_targets(name) or module.name in templates for module in arch.modules for name in module.names())
        if layers is not None and any(elsewhere):
            accepted = f"no target in these layers; accepted: {_layers(arch)}"
            raise InputError("layers_to_transform", layers.layers_to_transform, accepted)
        raise InputError("target_modules", targets, _nothing_matched(arch, targets, config))
    return tuple(matched)


def excluded(arch: Architecture, config: TargetedConfig) -> Callable[[str], bool]:
    """Whether a name is excluded before targets are matched: by `exclude_modules`, or as part of a saved module."""
    unwanted = _matcher(config.exclude_modules) if config.exclude_modules else lambda _: False
    saved = [re.compile(rf"(^|.*\.){m}($|\..*)") for m in never_targeted(arch, config)]
    return lambda name: unwanted(name) or any(pattern.match(name) for pattern in saved)


def resolve_targets(arch: Architecture, target_modules: tuple[str, ...] | str | None, *, peft_type: str) -> tuple[str, ...] | str:
    """Turn a word (or nothing: peft's own mapping) into the names that peft would match.

    Raises RefusedError if peft has no default for the model type, InputError if a word finds no module.
    """
    if target_modules in (None, PEFT_DEFAULT):
        mapping = _defaults(peft_type)
        if arch.model_type not in mapping:
            raise RefusedError(
                f"target_modules: peft has no default {peft_type} targets for model_type {arch.model_type!r}; name them"
            )
        defaults = mapping[arch.model_type]
        return defaults if isinstance(defaults, str) else tuple(defaults)
    if target_modules in (ALL_LINEAR, EVERY_LINEAR, LINEAR_NAMES):
        return all_linear(arch, with_output=target_modules == EVERY_LINEAR)
    if target_modules in ("attention", "mlp"):
        return part(arch, attention=target_modules == "attention")
    assert target_modules is not None
    return target_modules


def has_default(arch: Architecture, *, peft_type: str) -> bool:
    """Whether peft has targets of its own for the model type."""
    return arch.model_type in _defaults(peft_type)


def _defaults(peft_type: str) -> Mapping[str, list[str] | str]:
    return datafiles.load("peft_targets.json", PeftTargets)["target_modules"].get(peft_type, {})


def all_linear(arch: Architecture, *, with_output: bool = False) -> tuple[str, ...]:
    """Name templates of every `nn.Linear` and `Conv1D`, the output embedding or a SEQ_CLS head left out, as peft does it."""
    skip = set() if with_output else {arch.output_embedding}
    if arch.output_embedding is None and arch.task_type == "SEQ_CLS":
        skip = {name for name in SEQ_CLS_HEADS if any(m.name == name for m in arch.modules)}
    names = tuple(m.name for m in arch.modules if m.kind in LINEAR_KINDS and m.name not in skip)
    if not names:
        raise InputError("target_modules", ALL_LINEAR, "this model has no nn.Linear or Conv1D modules")
    return names


def part(arch: Architecture, *, attention: bool) -> tuple[str, ...]:
    """Names of the linear layers inside attention modules, or of the others inside layers.

    Each is the shortest end of a name that matches no module of another part, such as `attn.c_proj` in GPT-2. It is a whole
    template if nothing shorter suffices, such as BERT's `bert.encoder.layer.{}.output.dense`.
    """
    linears = [m for m in arch.modules if m.kind in LINEAR_KINDS and m.layers is not None and _in_attention(m) == attention]
    others = [m.name for m in arch.modules if m not in linears]
    if not linears:
        what = "attention" if attention else "mlp"
        raise InputError("target_modules", what, "no nn.Linear there (fused experts are parameters: use target_parameters)")
    return tuple(dict.fromkeys(_own_end(m.name, others) for m in linears))


def _in_attention(module: Module) -> bool:
    return bool(_ATTENTION.search(module.name.rpartition(".")[0].rpartition("{}")[2]))


def _own_end(name: str, others: list[str]) -> str:
    parts = name.split(".")
    for size in range(1, len(parts)):
        end = ".".join(parts[-size:])
        if "{}" in end:
            break
        if not any(other == end or other.endswith("." + end) for other in others):
            return end
    return name


_PLAIN = re.compile(r"(?:[A-Za-z_]|\\\.|\.\*)*")
"""Patterns of letters, dots and `.*` alone: they match all layers or none."""


def rank_of(name: str, *, r: int, rank_pattern: Mapping[str, int]) -> int:
    """The rank of one module: the first pattern that matches the end of its name (`get_pattern_key`), else r."""
    for pattern, rank in rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return r


def by_rank(module: Module, *, r: int, rank_pattern: Mapping[str, int], suffix: str = "") -> list[tuple[Module, int]]:
    """Split a family into one family per rank that `rank_pattern` gives its layers.

    If no pattern can tell layers apart, one layer decides for all.
    """
    if not rank_pattern:
        return [(module, r)]
    if all(map(_PLAIN.fullmatch, rank_pattern)):
        return [(module, rank_of(next(module.names()) + suffix, r=r, rank_pattern=rank_pattern))]
    return split(module, lambda name: rank_of(name + suffix, r=r, rank_pattern=rank_pattern))


def split(module: Module, value: Callable[[str], Value]) -> list[tuple[Module, Value]]:
    """Split a family into one family per value that its modules' names give."""
    if module.layers is None:
        return [(module, value(module.name))]
    groups: dict[Value, list[int]] = {}
    for layer, name in zip(module.layers, module.names(), strict=True):
        groups.setdefault(value(name), []).append(layer)
    return [(restricted(module, tuple(layers)), key) for key, layers in groups.items()]


def _matcher(targets: tuple[str, ...] | str) -> Callable[[str], bool]:
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError("target_modules", targets, f"not a regular expression: {error}") from None
        return lambda name: pattern.fullmatch(name) is not None
    names, suffixes = frozenset(targets), tuple("." + t for t in targets)
    return lambda name: name in names or name.endswith(suffixes)


def _matching_layers(module: Module, matches: Callable[[str, str], bool], *, alike: bool) -> Module | None:
    """The family over the layers that match. `alike`: the targets do not tell layers apart, so one layer decides for all."""
    if module.layers is None or alike:
        return module if matches(module.name, module.name) else None
    layers = tuple(i for i, name in zip(module.layers, module.names(), strict=True) if matches(name, module.name))
    return restricted(module, layers) if layers else None


def _uses_layers(config: LayeredConfig) -> bool:
    """Whether layers are selected by index. Raises RefusedError for what peft's config class refuses."""
    one_text = isinstance(config.target_modules, str) and config.target_modules not in ("attention", "mlp", PEFT_DEFAULT)
    for name in config.refuses_layers:
        if one_text and getattr(config, name) is not None:
            raise RefusedError(f"{name}: peft refuses it with a target_modules that is not a list of names")
    if config.layers_pattern and config.layers_to_transform is None:
        raise RefusedError("layers_pattern: peft requires layers_to_transform with it")
    return config.layers_to_transform not in (None, ()) and (not one_text or config.target_modules == ALL_LINEAR)


def _in_layers(name: str, config: LayeredConfig) -> bool:
    position = None
    if not config.layers_pattern:
        position = _LAYER_INDEX.match(name)
    else:
        for pattern in config.layers_pattern:
            if (position := re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)) is not None:
                break
    layers = config.layers_to_transform
    return position is not None and int(position["idx"]) in ((layers,) if isinstance(layers, int) else layers or ())


def _layers(arch: Architecture) -> str:
    return f"0 to {max((layer for module in arch.modules for layer in module.layers or ()), default=0)}"


@lru_cache(maxsize=1024)
def _has_digit(text: str) -> bool:
    return any(char.isdigit() for char in text)


def _flat(targets: tuple[str, ...] | str | None) -> tuple[str, ...]:
    # A regular expression may tell layers apart in ways that its text does not show, so assume that it does.
    return () if targets is None else ("0",) if isinstance(targets, str) else targets


def _nothing_matched(arch: Architecture, targets: tuple[str, ...] | str, config: TargetedConfig) -> str:
    names = (targets,) if isinstance(targets, str) else targets
    if names and set(names) <= set(config.modules_to_save or ()):
        return "modules_to_save names it too, and a module that is trained as a copy has no adapter; accepted: one of the two"
    near = near_names(names, leaves(arch))
    words = {word: None for name in names for word in nearest(name, WORDS) if word != name}
    meant = f"did you mean {' or '.join(words)}? " if words else ""
    commas = "; names are separated by commas" if any(" " in name.strip() for name in names) else ""
    return f"no module of {arch.model_type} matches; {meant}{near}{commas}"


def leaves(arch: Architecture) -> set[str]:
    """The last parts of the names that people target."""
    return {module.leaf for module in arch.modules if module.kind in (*LINEAR_KINDS, "Embedding")}
