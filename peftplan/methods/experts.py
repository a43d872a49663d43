"""How peft rewrites LoRA targets for models whose experts transformers 5 fuses into 3-D parameters.

Source: peft, `utils/transformers_weight_conversion.py` (`_convert_peft_config_moe`, `_resolve_string_target_modules`).
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from peftplan.arch.modules import LINEAR_KINDS, Architecture
from peftplan.errors import RefusedError
from peftplan.methods.targets import ALL_LINEAR, LINEAR_NAMES, PEFT_DEFAULT, part

_QWEN2_MOE = (
    "Dots3NoteTextModel UnlimitedOcrTextModel afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 "
    "ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash "
    "mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla "
    "solar_open"
)
CONVERSIONS: dict[str, str] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), "mixtral"),
    **dict.fromkeys(_QWEN2_MOE.split(), "qwen2_moe"),
}
"""model_type → whose rewriting rules apply (`_MODEL_TO_CONVERSION_PATTERN`, transformers `conversion_mapping.py`, to which
peft adds mixtral). `qwen2_moe` lends its name to the rules but is not in that mapping, so its own experts are left alone."""

RENAMED: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
"""Name of an expert projection before transformers 5 → the fused parameter that holds it now."""
ROUTER = "gate"
"""The renamed module that is not an expert."""
FUSED: dict[str, tuple[str, str]] = {"mixtral": ("w1", "w3"), "qwen2_moe": ("gate_proj", "up_proj")}
"""The two projections fused in `gate_up_proj`. Both must be targeted, and the rank doubles."""
GATE_UP = "gate_up_proj"
FIRST_APART = ".experts.0."
"""In the names of modules that an expert has for itself."""


class ResolvedTargets(NamedTuple):
    """Targets after the rewriting: modules, parameters, and the ranks that change."""

    target_modules: tuple[str, ...] | str | None
    target_parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = MappingProxyType({})


class _Config(Protocol):
    @property
    def r(self) -> int: ...
    @property
    def target_parameters(self) -> tuple[str, ...] | None: ...


def fused_rank(r: int) -> dict[str, int]:
    """The `rank_pattern` that peft gives two projections fused into one."""
    return {rf".*\.{re.escape(GATE_UP)}": 2 * r}


def fused_expert_targets(
    arch: Architecture, config: _Config, target_modules: tuple[str, ...] | str, *, left_out: Callable[[str], bool]
) -> ResolvedTargets:
    """Rewrite expert names to parameters, as peft does for LoRA on these model types; others pass unchanged.

    `left_out` tells the names that no regular expression matches (see `targets.excluded`). Raises RefusedError if only one of
    the two fused projections is targeted, as peft does.
    """
    parameters = tuple(config.target_parameters or ())
    base = CONVERSIONS.get(arch.model_type)
    if base is None or any(FIRST_APART in module.name for module in arch.modules):
        return ResolvedTargets(target_modules, parameters)
    if target_modules == PEFT_DEFAULT:
        if parameters:
            return ResolvedTargets((), parameters)
        # peft turns None into an empty set of targets here, before it looks up its default, and then finds none.
        raise RefusedError(f"target_modules: peft has no default targets for model_type {arch.model_type!r}; name them")
    renamed = RENAMED[base]
    names = _leaf_names(arch, target_modules, renamed, left_out) if isinstance(target_modules, str) else target_modules
    if names is None:
        return ResolvedTargets(target_modules, parameters)
    moved = {n: old for n in names for old in renamed if n == old or n.endswith("." + old)}
    present = {old for old in moved.values() if old in FUSED[base]}
    if len(present) == 1:
        missing = next(old for old in FUSED[base] if old not in present)
        raise RefusedError(
            f"target_modules: cannot convert {present.pop()} without also targeting {missing}: they are fused into gate_up_proj"
        )
    return ResolvedTargets(
        target_modules=tuple(n for n in names if n not in moved),
        target_parameters=tuple(sorted({*parameters, *(renamed[old] for old in moved.values())})),
        rank_pattern=fused_rank(config.r) if present else {},
    )


def _leaf_names(
    arch: Architecture, target: str, renamed: dict[str, str], left_out: Callable[[str], bool]
) -> tuple[str, ...] | None:
    """The leaf names that a word or a regular expression selects in the unfused model; None if it is not rewritten."""
    if target == "mlp":
        return tuple(name for name in renamed if name != ROUTER)
    if target == "attention":
        return part(arch, attention=True)
    if target in (ALL_LINEAR, LINEAR_NAMES):
        linear = {m.leaf for m in arch.modules if m.kind in LINEAR_KINDS and m.name != arch.output_embedding}
        return tuple(sorted(linear | renamed.keys() if target == ALL_LINEAR else linear))
    pattern = re.compile(target)

    def matches(name: str) -> bool:
        return pattern.fullmatch(name) is not None and not left_out(name)

    modules = [name for m in arch.modules for name in m.names()]
    params = [f"{name}.{p}" for m in arch.modules for name in m.names() for p, _ in m.params]
    leaf_names = {name.rpartition(".")[2] for name in (*modules, *params) if matches(name)}
    for old, new in renamed.items():
        holders = (name.rpartition(".")[0] for name in params if name.endswith("." + new))
        if any(matches(f"{holder}.{old}") for holder in holders):
            leaf_names.add(old)
    return tuple(sorted(leaf_names)) or None
