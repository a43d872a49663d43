"""Names in `target_modules` that match no module. peft raises only if none of them matches (peft, `inject_adapter`)."""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.arch.modules import Architecture
from peftplan.errors import near_names
from peftplan.methods.adaptation import MethodConfig
from peftplan.methods.targets import WORDS, leaves, reads_as_names

PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj"})
"""Names of an expert's projections where each is a module."""


def unmatched_targets(arch: Architecture, config: MethodConfig | None, adapter: Mapping[str, object]) -> tuple[str, ...]:
    """A warning that names the targets that match nothing; empty if all match.

    `adapter` holds the fields of a config that only peft reads.
    """
    targets = adapter.get("target_modules") if config is None else getattr(config, "target_modules", None)
    listed = reads_as_names(targets)
    names = _unmatched(arch, listed)
    if not names:
        return ()
    quoted = ", ".join(map(repr, names))
    verb = "adapts" if len(names) == 1 else "adapt"
    instead = _of_experts(arch, names) or _instead(arch, names, listed)
    return (f"target_modules: {quoted} {verb} nothing: no module of {arch.model_type} matches; {instead}",)


def _unmatched(arch: Architecture, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The names that equal no module's name and no end of one, as peft compares them."""
    if not targets:
        return ()
    names = {name for module in arch.modules for name in (module.name, *module.names())} | arch.containers
    ends = {name[start:] for name in names for start in (0, *(i + 1 for i, char in enumerate(name) if char == "."))}
    return tuple(target for target in dict.fromkeys(targets) if target not in ends)


def _of_experts(arch: Architecture, names: tuple[str, ...]) -> str | None:
    """Where the names are those of experts that are parameters, how to adapt them, and what Unsloth makes of gpt-oss's."""
    keys = [f"{module.name}.{name}" for module in arch.modules for name, shape in module.params if len(shape) == 3]
    if not keys or not PROJECTIONS.issuperset(names):
        return None
    parameters = ",".join(dict.fromkeys(".".join(key.split(".")[-3:]) for key in keys))
    of_unsloth = "; Unsloth, in 4 bits, makes linear layers of them and adapts each (peftplan reads its scripts: --config)"
    return f"its experts are parameters, which target_parameters {parameters} adapts{of_unsloth * (arch.model_type == 'gpt_oss')}"


def _instead(arch: Architecture, names: tuple[str, ...], listed: tuple[str, ...]) -> str:
    """What was probably meant: near names, or a word such as `all-linear` that has to stand alone."""
    if (word := next((name for name in names if name in WORDS), None)) is not None:
        return f"{word} is a keyword that is used alone, not in a list"
    return near_names(names, leaves(arch).difference(listed))
