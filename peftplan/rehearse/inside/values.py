"""Values that a program reads from the card, where zeros would mislead it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch

from peftplan.rehearse.inside import known
from peftplan.rehearse.inside.after_import import AfterImport

IGNORED = -100
"""The label that losses leave out (`torch.nn.functional.cross_entropy(ignore_index=)`)."""
CHECKS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False, "isfinite": True}
"""Checks of floats, and what they find in every one."""
TABLES = ("get_torch_obj_rule_map", "get_tensor_method")
"""Functions of `torch._dynamo.trace_rules` that list torch's functions, once."""
LINEAR_ALGEBRA: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def start(also: Callable[[], None]) -> None:
    """Tell the card how many labels a causal loss counts, the first of each row left out, whenever a batch goes to it.

    So many places of a mask are true that is counted there. `also` replaces more of torch, under what follows values.
    """
    owners = (torch, torch.Tensor, torch.nn.functional)
    before = {(owner, name): getattr(owner, name) for owner in owners for name in dir(owner)}
    to, cuda, cpu, tolist = torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.tolist

    def watched_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _counted(self, known.remember(self, _unmasked(self, to(self, *args, **kwargs))))

    def watched_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _counted(self, known.remember(self, cuda(self, *args, **kwargs)))

    def watched_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return known.remember(self, _unmasked(self, cpu(self, *args, **kwargs)))

    def watched_tolist(self: torch.Tensor) -> Any:
        return tolist(watched_cpu(self))

    torch.Tensor.to, torch.Tensor.cuda = watched_to, watched_cuda  # type: ignore[assignment,method-assign]
    torch.Tensor.cpu, torch.Tensor.tolist = watched_cpu, watched_tolist  # type: ignore[assignment,method-assign]
    for name in ("item", "__float__", "__int__", "__bool__"):
        setattr(torch.Tensor, name, _sane(getattr(torch.Tensor, name)))
    torch.all = _true(torch.all)
    for name in ("all", "_is_all_true"):
        setattr(torch.Tensor, name, _true(getattr(torch.Tensor, name)))
    torch.equal = _equal(torch.equal)
    for name, answer in CHECKS.items():
        for owner in (torch, torch.Tensor):
            setattr(owner, name, _always(getattr(owner, name), answer))
    # what a solver says of its own success
    LINEAR_ALGEBRA.impl("_linalg_check_errors", lambda *_, **__: None, "CUDA")
    also()
    known.start()
    # not by identity: a method of a class is another object each time
    watched = [(owner, name, own) for (owner, name), own in before.items() if callable(own) and getattr(owner, name) != own]
    for owner, name, _ in watched:
        _name(getattr(owner, name), owner, name)
    compiles = {"torch._dynamo.convert_frame": ("_compile",), "torch._dynamo.trace_rules": TABLES}
    actions = {module: partial(_with_own, names=names, watched=watched) for module, names in compiles.items()}
    actions["torch._dynamo.guards"] = partial(_unguarded, own={id(own) for _, _, own in watched})
    sys.meta_path.insert(0, AfterImport(actions))


def _name(ours: Any, owner: Any, name: str) -> None:
    """Programs ask for the name of a function of torch, as Lightning does of a reduction, and pickle it by its name."""
    is_class = isinstance(owner, type)
    ours.__name__ = name
    ours.__qualname__ = f"{owner.__qualname__}.{name}" if is_class else name
    ours.__module__ = owner.__module__ if is_class else owner.__name__


def _unguarded(module: Any, *, own: set[int]) -> None:
    """Compiled code runs again though ours have taken the place of torch's own functions since: no guard is on these."""
    builder = module.GuardBuilder
    # older releases have the second alone
    by_identity = "id_match_unchecked" if hasattr(builder, "id_match_unchecked") else "ID_MATCH"
    for name in (by_identity, "CLOSURE_MATCH"):
        guarded = getattr(builder, name)

        def on_others(self: Any, guard: Any, *args: Any, guarded: Any = guarded) -> None:
            if id(self.get(guard)) not in own:
                guarded(self, guard, *args)

        setattr(builder, name, wraps(guarded)(on_others))


def _with_own(module: Any, *, names: Sequence[str], watched: Sequence[tuple[Any, str, Any]]) -> None:
    """What torch compiles calls torch's own functions: a function that follows values would split its graph.

    So the code is translated with these in place, and the tables by which torch knows its functions are made with them.
    """
    for name in names:
        function = getattr(module, name)
        replaced = wraps(function)(partial(_call_with_own, function, watched))
        if name in TABLES:
            replaced.cache_clear = function.cache_clear  # type: ignore[attr-defined]
        setattr(module, name, replaced)


def _call_with_own(function: Any, watched: Sequence[tuple[Any, str, Any]], /, *args: Any, **kwargs: Any) -> Any:
    ours = [getattr(owner, name) for owner, name, _ in watched]
    try:
        for owner, name, own in watched:
            setattr(owner, name, own)
        return function(*args, **kwargs)
    finally:
        for (owner, name, _), followed in zip(watched, ours, strict=True):
            setattr(owner, name, followed)


def _sane(read: Any) -> Any:
    """A number that is read from the card: a float is zero, as is a byte, and a condition holds only where it is of `all`.

    So no gradient is infinite, no mask has padding, and no sequence has ended.
    """

    def reading(self: torch.Tensor) -> Any:
        value = read(self)
        if self.device.type != "cuda":
            return value
        if self.dtype is torch.bool:
            return type(value)(hasattr(self, "of_all"))
        return type(value)() if self.is_floating_point() or self.element_size() == 1 else value

    return reading


def _true(reduce: Any) -> Any:
    def reduced(*args: Any, **kwargs: Any) -> Any:
        result = reduce(*args, **kwargs)
        result.of_all = True
        return result

    return reduced


def _equal(compare: Any) -> Any:
    """Weights at two places of the card differ, as a head differs from the embedding that its checkpoint ships beside it.

    Tables of numbers are equal, such as the values of 4 bits that each quantized weight keeps.
    """

    def compared(one: torch.Tensor, other: torch.Tensor) -> bool:
        result: bool = compare(one, other)
        if one.device.type == "cuda" and one.is_floating_point():
            return one.shape == other.shape and (one.dim() == 1 or one.data_ptr() == other.data_ptr())
        return result

    return compared


def _unmasked(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """A mask that comes back from the card hides nothing."""
    if before.dtype is torch.bool and before.dim() and before.device.type == "cuda" and after.device.type == "cpu":
        return after.fill_(True)
    return after


def _counted(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    if after.device.type == "cuda" and before.device.type == "cpu" and before.dtype == torch.int64 and before.dim() == 2:
        counted = before[:, 1:] != IGNORED
        if counted.numel() and (not counted.all() or "EMULATED_INT" not in os.environ):
            os.environ["EMULATED_INT"] = str(int(counted.sum()))
    return after


def _always(check: Any, answer: bool) -> Any:
    """A check of floats on the card finds the same everywhere, and the host knows it."""

    def checked(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        result = check(tensor, *args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device.type == "cuda":
            result.known = torch.tensor(answer).expand(result.shape)  # type: ignore[attr-defined]
        return result

    return checked
