"""How peft condenses a long list of target names, which decides where `layers_to_transform` applies.

Source: peft, `tuners/tuners_utils.py` (`BaseTuner.inject_adapter`, `check_target_module_exists`,
`_find_minimal_target_modules`). A target that is a module's full name applies in every layer; the end of a name applies only in
`layers_to_transform`. From `CONDENSED_FROM` names on, peft shortens full names to ends. So `all-linear` respects
`layers_to_transform` in a Llama of three layers, and ignores it in a Llama of two.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.arch.modules import Architecture, Module

CONDENSED_FROM = 20
"""`MIN_TARGET_MODULES_FOR_OPTIMIZATION` (peft/utils/constants.py)."""


def exact_names(arch: Architecture, targets: tuple[str, ...] | str) -> frozenset[str]:
    """The targets, name templates expanded, that name a whole module once peft has condensed them."""
    if isinstance(targets, str):
        return frozenset()
    all_names = {m.name: tuple(m.names()) for m in arch.modules}
    names = {name for target in targets for name in all_names.get(target, (target,))}
    if len(names) < CONDENSED_FROM:
        return frozenset(names)
    every = {name for m in arch.modules for name in (*m.names(), *_holders(m))}
    others = {name for name in every - names if not name.endswith(tuple("." + n for n in names))}
    condensed = _condensed(names, others)
    return frozenset(condensed if len(condensed) < len(names) else names)


def _holders(module: Module) -> Iterator[str]:
    """Names of the modules around a family's members."""
    for name in module.names():
        parts = name.split(".")
        yield from (".".join(parts[:i]) for i in range(1, len(parts)))


def _condensed(names: set[str], others: set[str]) -> set[str]:
    """The shortest ends of names that no other module has (`_find_minimal_target_modules`)."""
    endings = {end for name in others for end in _ends(name)}
    needed: set[str] = set()
    for name in sorted(names, key=_ends):
        for end in _ends(name):
            if end not in needed and end not in endings and not any(name.endswith("." + n) for n in needed):
                needed.add(end)
                break
    return needed or names


def _ends(name: str) -> list[str]:
    """`a.b.c` → `c`, `b.c`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]
