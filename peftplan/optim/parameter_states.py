"""The entry points of this package: states of one parameter, and what an optimizer stores once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftplan.dtypes import MODEL_DTYPES, parse_dtype
from peftplan.errors import InputError, MissingError, UnknownNameError
from peftplan.ledger import Allocation
from peftplan.optim.names import parse_optim
from peftplan.optim.optimizer import Optimizer, Param


def states(
    optim: str | Optimizer,
    *,
    shape: tuple[int, ...],
    dtype: str,
    name: str = "",
    in_embedding: bool = False,
    in_target: bool | None = None,
    frozen: bool = False,
    optim_args: Mapping[str, str] | None = None,
) -> tuple[Allocation, ...]:
    """The tensors that exist for one parameter after a step, named as in `optimizer.state[p]`, with the dtypes and dims there.

    `dims` are those of the storage that stays alive. `place` is "host" for CPU tensors, "managed" for paged states.
    `name`: the parameter's, by which Muon and Adam-mini choose.
    `in_embedding`: the parameter is the `weight` of an `nn.Embedding` and transformers' Trainer makes the optimizer (it
    registers 32-bit states for those with 8-bit bitsandbytes optimizers; a hand-written loop does not).
    `in_target`: whether `optim_target_modules` selects it; GaLore and APOLLO need to know.
    `frozen`: it never gets a gradient; `shape` and `dtype` are then those of its stored data. Only AdaLomo keeps states.
    """
    optimizer = parse_optim(optim) if isinstance(optim, str) else optim
    args = _checked(optimizer, optim_args or {})
    if frozen and not optimizer.states_for_frozen:
        return ()
    if optimizer.low_rank and in_target is None:
        raise MissingError("in_target", f"{optimizer.name} needs optim_target_modules; accepted: True or False")
    short = parse_dtype(dtype) if frozen else parse_dtype(dtype, accepted=MODEL_DTYPES)
    return optimizer.param_states(Param(tuple(shape), short, in_embedding, bool(in_target), name), args)


def shared_states(optim: str | Optimizer, *, states: Iterable[Allocation]) -> tuple[Allocation, ...]:
    """The tensors that the optimizer holds once, given the states of all its parameters.

    Only the code tables of 8-bit bitsandbytes states (1024 B each); where every parameter has its own (torchao,
    layer-wise GaLore), they are among its states.
    """
    optimizer = parse_optim(optim) if isinstance(optim, str) else optim
    return optimizer.shared(states)


def parse_optim_args(text: str | None) -> dict[str, str]:
    """`TrainingArguments.optim_args`, "rank=64,scale=0.5", split as transformers splits it (`_parse_optim_args`)."""
    if not text:
        return {}
    parts = text.replace(" ", "").split(",")
    if any(part.count("=") != 1 for part in parts):
        raise InputError("optim_args", text, "accepted: key=value, separated by commas")
    return dict(part.split("=") for part in parts)


def _checked(optimizer: Optimizer, optim_args: Mapping[str, str]) -> Mapping[str, str]:
    """The mapping itself. Raises UnknownNameError for a key that transformers does not read, InputError for a bad value."""
    for key, value in optim_args.items():
        if not optimizer.reads:
            raise InputError("optim_args", f"{key}={value}", f"{optimizer.name} takes none")
        if key not in optimizer.reads:
            raise UnknownNameError("optim_args", key, optimizer.reads)
        reader = optimizer.reads[key]
        try:
            reader(value)
        except ValueError:
            raise InputError(f"optim_args.{key}", value, f"transformers reads it as {reader.__name__}") from None
    return optim_args
