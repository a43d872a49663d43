"""Integers whose values the host knows: what a batch brought to the card, and what follows from it alone.

A tensor on the card that was copied from the host keeps a copy of its values there, and so does the result of a small operation
on such tensors. Sizes that depend on values (masks, grids of pictures, lengths) are then the real ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

MOST = 1 << 20
"""Elements of a tensor whose values are followed."""
MOST_OF_FLOATS = 1 << 16
"""The same of a matrix of floats that is no parameter, such as the ones that peft puts before a mask (peft_model.py:2133)."""
VIEWS = ("expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "unbind", "detach")
"""Operations that make no copy on the host either, whatever the length."""
MOST_EXPERTS = 1024
"""Scores of a row among which a router chooses; a vocabulary has more."""
ROUTED: list[Callable[[], None]] = []
"""Called where the length of a result follows from experts that were made up for the tokens: from a tensor that is `routed`."""
COUNT = "EMULATED_INT"
"""What the card answers where a kernel counts."""
COMPARED = ("eq", "ne", "lt", "gt", "le", "ge")
COMPARED_BY_WORD = ("greater", "less", "greater_equal", "less_equal", "not_equal")
COUNTED = (
    *("nonzero", "masked_select", "masked_scatter", "unique", "unique_consecutive", "repeat_interleave", "__getitem__"),
    "bincount",
)
"""Operations whose results are as long as values say."""
FOLLOWED = (
    *COUNTED, *COMPARED, *COMPARED_BY_WORD,
    *(f"__{name}__" for name in COMPARED), "__invert__", "__and__", "__or__", "__xor__", "__add__",
    "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__mod__", "__truediv__", "__neg__", "logical_not",
    "logical_and", "logical_or", "bitwise_not", "bool", "int", "long", "float", "type", "view", "reshape", "flatten", "squeeze",
    "unsqueeze", "expand", "repeat", "contiguous", "clone", "detach", "sum", "mean", "count_nonzero", "prod", "max",
    "min", "amax", "amin", "any", "all", "argmax", "argmin", "cumsum", "diff", "masked_fill", "where", "cat", "stack",
    "isin", "split", "chunk", "unbind", "flip", "roll", "t", "transpose", "permute", "index_select",
    "index_fill", "gather", "scatter", "sort", "argsort", "clamp", "minimum", "pad", "maximum", "_is_all_true", "full_like",
    "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones",
)  # fmt: skip
CHANGING = (
    "__setitem__", "masked_fill_", "fill_", "zero_", "copy_", "add_", "mul_", "sub_", "clamp_", "scatter_", "index_fill_",
    "__iand__", "__ior__", "__iadd__", "__isub__", "__imul__", "index_add_", "scatter_add_",
)  # fmt: skip
CREATING = ("arange", "tensor", "as_tensor", "full", "ones", "zeros")
READ = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")


def remember(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Keep the values of what the host sends to the card; give them back where it reads them."""
    values = of(before)
    if after.device.type == "cpu" and values is not None:
        return values.to(after.dtype).clone()
    if before.device.type == "cpu":
        values = before if before.numel() <= (MOST_OF_FLOATS if before.is_floating_point() else MOST) else None
        if before.is_floating_point() and (before.dim() != 2 or type(before) is not torch.Tensor or before.requires_grad):
            values = None
    if after is not before and after.device.type == "cuda" and values is not None:
        copied = values.to(after.dtype)
        after.known = copied if copied.numel() > MOST else copied.clone()  # type: ignore[attr-defined]
    return after


def of(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor's values, where the host knows them."""
    known: torch.Tensor | None = getattr(tensor, "known", None)
    return known


def start() -> None:
    """Follow values through the operations that programs use on batches."""
    from torch.utils._device import _device_constructors

    _device_constructors()  # cached: torch's own functions, which `with torch.device(…)` knows
    for name in FOLLOWED:
        for owner in (torch.Tensor, torch, torch.nn.functional):
            if callable(getattr(owner, name, None)):  # torch.float is a dtype
                operation = getattr(owner, name)
                setattr(owner, name, scripted(operation, _followed(operation, counted=name in COUNTED, is_view=name in VIEWS)))
    torch.Tensor.expand_as = lambda self, other: self.expand(other.shape)  # type: ignore[method-assign]
    for name in CHANGING:
        setattr(torch.Tensor, name, _changing(getattr(torch.Tensor, name)))
    for name in CREATING:
        setattr(torch, name, scripted(getattr(torch, name), _creating(getattr(torch, name))))
    for name in READ:
        setattr(torch.Tensor, name, _read(getattr(torch.Tensor, name)))


def scripted(operation: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """TorchScript knows torch's functions by their identity."""
    from torch.jit import _builtins

    if (name := _builtins._find_builtin(operation)) is not None:  # type: ignore[no-untyped-call]
        _builtins._register_builtin(ours, name)
    return ours


def _followed(operation: Callable[..., Any], *, counted: bool, is_view: bool) -> Callable[..., Any]:
    def followed(*args: Any, **kwargs: Any) -> Any:
        is_known = any(hasattr(arg, "known") for arg in _flat(args))
        if (counted or _finds_places(operation, args, kwargs)) and (is_known or any(_is_mask(arg) for arg in _flat(args))):
            masked = any(_is_mask(arg) for arg in _flat(args))
            trained = masked and torch.is_grad_enabled() and any(getattr(arg, "requires_grad", False) for arg in args)
            _tell_of_routing(operation, args)
            with _answering(_count(operation, args, kwargs), backward=trained):
                result = operation(*args, **kwargs)
        else:
            result = operation(*args, **kwargs)
        if not is_known:
            return result
        if is_view or _small(result) or (operation.__name__ == "__getitem__" and _selects(args[1])):
            _attach(result, operation, _with_table(operation, args), kwargs)
        return result

    return followed


def _tell_of_routing(operation: Callable[..., Any], args: Any) -> None:
    """Of an index, the length follows from a mask alone: places give as many as they are."""
    indexed = operation.__name__ == "__getitem__"
    deciding = filter(_is_mask, _flat(args[1:])) if indexed else _flat(args)
    if any(hasattr(arg, "routed") for arg in deciding):
        for tell in ROUTED:
            tell()


def _with_table(operation: Callable[..., Any], args: Any) -> Any:
    """The arguments; of `scatter` into a new table its zeros, which nobody follows otherwise, since anything may fill it."""
    if operation.__name__ != "scatter" or not hasattr(args[0], "is_table"):
        return args
    _tell_of_routing(operation, args)
    return (torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:])


def _selects(index: Any) -> bool:
    """Whether an index makes a view: numbers and slices."""
    parts = index if isinstance(index, tuple) else (index,)
    numbers = (not part.dim() and part.dtype is not torch.bool for part in parts if isinstance(part, torch.Tensor))
    return all(numbers) and not any(isinstance(part, list) for part in parts)


def _finds_places(operation: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether it is `where(mask)`, which gives the true places of a mask as `nonzero` does."""
    return operation.__name__ == "where" and len(args) == 1 and not kwargs


def _flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from _flat(arg)
        else:
            yield arg


def _count(operation: Callable[..., Any], args: Any, kwargs: Any) -> int | None:
    """How long a result is: as many places as a mask has that are true, else as long as on the host, or as repeats add up to."""
    tensors = [arg for arg in _flat(args) if isinstance(arg, torch.Tensor)]
    if masks := [tensor for tensor in tensors if _is_mask(tensor)]:
        return _places(masks[-1])
    if operation.__name__ == "__getitem__" and isinstance(args[1], torch.Tensor) and not args[1].dim():
        known = of(args[1])
        return None if known is None else int(known)  # torch reads the number itself
    with suppress(*NOT_ON_HOST):
        result = operation(*_on_host(args), **_on_host_by_name(kwargs))
        length = len(result[0] if isinstance(result, tuple) else result)
        return length - 1 if operation.__name__ == "bincount" else length  # it asks for the highest number
    values = [known for tensor in tensors if (known := of(tensor)) is not None]
    return int(values[-1].sum()) if values else None


def _is_mask(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor) and thing.dtype is torch.bool and thing.device.type == "cuda"


def _places(mask: torch.Tensor) -> int:
    """True places of a mask; one that nobody knows hides nothing."""
    known = of(mask)
    return mask.numel() if known is None else int(known.count_nonzero())


@contextmanager
def _answering(count: int | None, *, backward: bool = False) -> Iterator[None]:
    """Let the card count so many; from then on where backward will ask again."""
    before = os.environ.get(COUNT)
    if count is not None:
        os.environ[COUNT] = str(count)
    try:
        yield
    finally:
        if count is not None and not backward:
            del os.environ[COUNT]
            os.environ |= {} if before is None else {COUNT: before}


def _small(result: Any) -> bool:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return all(not isinstance(one, torch.Tensor) or one.numel() <= MOST for one in results)


def _attach(result: Any, operation: Callable[..., Any], args: Any, kwargs: Any) -> None:
    try:
        known = operation(*_on_host(args), **_on_host_by_name(kwargs))
    except NOT_ON_HOST:
        return
    pairs = zip(result, known, strict=False) if isinstance(result, (tuple, list)) else ((result, known),)
    routed = any(hasattr(arg, "routed") for arg in _flat(args))
    for ours, theirs in pairs:
        if isinstance(ours, torch.Tensor) and ours.device.type == "cuda" and ours.shape == theirs.shape:
            ours.known = theirs  # type: ignore[attr-defined]
            if routed:
                ours.routed = True  # type: ignore[attr-defined]


class _UnknownError(Exception):
    """A tensor on the card has values that nobody knows."""


NOT_ON_HOST = (_UnknownError, RuntimeError, TypeError, IndexError, ValueError)
"""What an operation raises that cannot be repeated on the host."""


def _on_host_by_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(kwargs, _on_host(kwargs.values()), strict=True))


def _on_host(args: Any) -> list[Any]:
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, (tuple, list)):
            values.append(type(arg)(_on_host(arg)))
        elif isinstance(arg, torch.device) or (isinstance(arg, str) and arg.startswith("cuda")):
            values.append("cpu")
        elif isinstance(arg, torch.Tensor) and arg.device.type == "cuda":
            if (known := of(arg)) is None:
                raise _UnknownError
            values.append(known)
        else:
            values.append(arg)
    return values


def _changing(operation: Callable[..., Any]) -> Callable[..., Any]:
    def changing(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        masks = [arg for arg in _flat(args) if _is_mask(arg)]
        with _answering(_places(masks[0]) if masks else None):
            result = operation(self, *args, **kwargs)
        if not hasattr(self, "known"):
            return result
        try:
            operation(self.known, *_on_host(args), **_on_host_by_name(kwargs))
        except NOT_ON_HOST:
            del self.known
        return result

    return changing


def _numbers(value: Any) -> Any:
    """Tensors of one number, in a list, as numbers: torch takes them for sequences, because `__getitem__` is ours."""
    if not isinstance(value, (tuple, list)):
        return value
    return [each.item() if isinstance(each, torch.Tensor) and not each.dim() else _numbers(each) for each in value]


def _creating(operation: Callable[..., Any]) -> Callable[..., Any]:
    ends = operation.__name__ == "arange"  # which takes tensors of one number for its ends

    def creating(*args: Any, **kwargs: Any) -> Any:
        result = operation(*(_numbers([arg])[0] if ends else _numbers(arg) for arg in args), **kwargs)
        if result.device.type == "cuda" and result.numel() <= MOST and not hasattr(result, "known"):
            if not result.is_floating_point():
                _attach(result, operation, args, {**kwargs, "device": "cpu"})
            elif operation.__name__ == "zeros" and _is_table(result):
                result.is_table = True
        return result

    return creating


def _is_table(tensor: torch.Tensor) -> bool:
    """A row for each token and a few columns, such as those into which a router scatters a token's experts."""
    return tensor.dim() == 2 and tensor.shape[-1] <= MOST_EXPERTS


def _read(reading: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: torch.Tensor) -> Any:
        known = of(self)
        if known is not None:  # who reads a value waits for it
            torch.cuda.current_stream(self.device).synchronize()
        return reading(self if known is None else known)

    return read
