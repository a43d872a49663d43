"""Temporaries of the optimizer's step.

Source: torch, optim/adamw.py, optim/adagrad.py, optim/rmsprop.py (`_multi_tensor_*`), nn/utils/clip_grad.py; schedulefree 1.4.1;
transformers, trainer.py (clipping at 1.0 by default); peft, optimizers/lorafa.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.errors import NeedsTraceError, NoEngineError, RefusedError
from peftplan.memory.looped_steps import LOOPS, Projected, apollo, muon_of_shards
from peftplan.optim import Optimizer
from peftplan.parameters import Parameter
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor
from peftplan.versions import named

FOREACH_COPIES = {
    "adamw_torch": 1,
    "adam": 1,
    "sgd": 0,
    "adagrad": 2,
    "rmsprop": 1,
    "schedule_free_adamw": 1,
    "schedule_free_radam": 1,
    "schedule_free_sgd": 0,
}
"""Copies of all parameters of one dtype that the foreach implementation holds at once."""
STATES = "states"
"""The mark where the first step allocates the optimizer states."""
IN_PLACE = ("fused", "kernel")
LORAFA_REPLACES = ("adamw_torch", "adamw_torch_fused")
"""The optimizers that peft's LoRA-FA optimizer replaces; any other runs as set."""


def has_temporaries(optimizer: Optimizer) -> bool:
    """Whether a step has temporaries of each tensor."""
    if optimizer.temporaries is not None:
        return True
    return optimizer.step_implementation not in IN_PLACE and FOREACH_COPIES.get(optimizer.name) != 0


def optimizer_step(
    f: Tape,
    optimizer: Optimizer,
    trained: list[Parameter],
    *,
    clips: bool,
    freezes_a: bool,
    projected: Mapping[str, Projected],
    ranks: int = 1,
) -> None:
    """Gradient clipping, then the step; `freezes_a`: that of LoRA-FA; `projected`: what APOLLO projects, by name. `ranks`: how
    many hold shards of each parameter.

    Raises NeedsTraceError for optimizers whose temporaries have no formula, NoEngineError for those that no engine knows.
    """
    f.module = ""
    if clips:
        _clip(f, trained)
    if trained or all(what != STATES for _, what in f.marks):  # else the first gradient has marked it
        f.mark(STATES)
    if freezes_a and optimizer.name in LORAFA_REPLACES:
        _lorafa_step(f, trained)
        return
    if not trained:
        return
    if optimizer.name == "lomo" and ranks > 1:  # after backward, over shards: no hook runs
        for p in (p for p in _two_layers(trained) if p.dtype in SIXTEEN_BITS):
            f.module = p.name
            copies_of_one = f.many(p.shape, "fp32", "to", 2)
            del copies_of_one
        f.module = ""
        return
    if optimizer.name == "adalomo" and ranks > 1:
        _adalomo(f, trained)
        return
    if optimizer.step_implementation == "in-backward":
        raise NoEngineError(f"a step of optim {optimizer.name} inside backward with these options (no formula yet)")
    if optimizer.package == "apollo-torch":
        apollo(f, ((p.name, p.shape, p.dtype) for p in _two_layers(trained)), projected)
        f.module = ""
        return
    if optimizer.step_implementation in IN_PLACE:
        if (of_one := optimizer.temporaries) is not None:
            for p in _two_layers(trained):
                f.module = p.name
                _buffers = [f.new(a.dims, a.dtype, a.name) for a in of_one(p.shape)]
                del _buffers
        f.module = ""
        return
    if optimizer.name == "dion_muon":
        from peftplan.memory.dion_step import muon

        muon(f, trained, ranks)
        return
    if optimizer.name == "axolotl_muon":
        if ranks == 1:
            raise NoEngineError("axolotl's Muon of whole matrices")
        from peftplan.memory.dion_step import muon_in_batches

        muon_in_batches(f, trained, ranks)
        return
    if optimizer.name == "moonlight_muon" and ranks > 1:
        muon_of_shards(f, [*_two_layers(trained)], ranks)
        f.module = ""
        return
    if (loop := LOOPS.get(optimizer.name)) is not None:
        loop(f, [*_two_layers(trained)])
        f.module = ""
        return
    copies = FOREACH_COPIES.get(optimizer.name)
    if copies is None:
        raise NeedsTraceError(f"a step of optim {optimizer.name}")
    for number in sorted({p.group for p in trained}):
        _foreach(f, optimizer.name, [p for p in trained if p.group == number], copies)


def _foreach(f: Tape, name: str, group: list[Parameter], copies: int) -> None:
    """One group of parameters. Variables of the loop keep what is of one dtype until the next is there."""
    temporaries: list[Tensor] = []
    for dtype in dict.fromkeys(p.dtype for p in group):
        temporaries = [
            f.many(p.shape, _stored(p) if number else p.dtype, f"{p.name} {name}", p.copies)
            for number in range(copies)
            for p in group
            if p.dtype == dtype
        ]
    del temporaries


def _stored(p: Parameter) -> str:
    """The dtype of a shard whose states are narrower: Adagrad's root has that of its states, its numerator that of a gradient."""
    return next((a.dtype for a in p.allocations if a.name == "weight"), p.dtype) if p.dtype in SIXTEEN_BITS else p.dtype


def _adalomo(f: Tape, trained: list[Parameter]) -> None:
    """AdaLomo's loop behind backward, over vectors in fp32: parts of FSDP1's flat parameters (lomo-optim 0.1.1, adalomo.py,
    `fuse_update`)."""
    update = None
    for p in _two_layers(trained):
        f.module = p.name
        square = f.new(p.shape, "fp32", "pow")
        update = f.new(p.shape, "fp32", "add")
        del square
        update = f.new(p.shape, "fp32", "rsqrt")
    del update
    f.module = ""


def _lorafa_step(f: Tape, trained: list[Parameter]) -> None:
    """`LoraFAOptimizer.step`, one parameter after the other: the loop's names hold the last one's gradient and denominator."""
    inverse = gradient = denominator = None
    for p in _two_layers(trained):
        f.module = p.name
        if p.name.endswith(".lora_B.bias"):
            raise RefusedError(
                f"{named('peft')} refuses it: LoRA-FA's optimizer takes a pair of A and B, not lora_bias: TypeError"
            )
        if ".lora_B." in p.name:
            inverse = _pseudo_inverse(f, p.shape[1], p.dtype)
            narrow = [f.new(dims, "bf16", "to") for dims in ((p.shape, inverse.dims) if p.dtype != "bf16" else (inverse.dims,))]
            product = f.new(p.shape, "bf16", "mm")
            del narrow
            gradient = f.new(p.shape, "bf16", "mul")
            del product
            gradient = f.to(gradient, p.dtype)
        denominator = f.new(p.shape, p.dtype, "sqrt")
    del inverse, gradient, denominator
    f.module = ""


def _two_layers(trained: list[Parameter]) -> Iterator[Parameter]:
    """The parameters in the model's order; of a stack those of two layers, since later layers repeat the second."""
    for of_layers, group in groupby(trained, lambda p: p.layers is not None):
        members = [*group]
        yield from members
        if of_layers:
            yield from (p for p in members if p.copies > 1)


def _pseudo_inverse(f: Tape, rank: int, dtype: str) -> Tensor:
    """`pinv(A @ A.T + delta * eye(r))`: U, Vh, and Vh over the singular values. `dtype`: of A."""
    square = (rank, rank)
    _covariance = f.new(square, dtype, "mm")  # a variable of the loop
    identity = f.new(square, "fp32", "eye")
    scaled = f.new(square, "fp32", "mul")
    del identity
    moved = f.new(square, "fp32", "add")
    del scaled
    vectors = f.many(square, "fp32", "svd", 2)
    scaled = f.new(square, "fp32", "mul")
    inverse = f.new(square, "fp32", "matmul")
    del moved, vectors, scaled
    return inverse


def _clip(f: Tape, trained: list[Parameter]) -> None:
    """`clip_grad_norm_`: the norm of each gradient, their stack, the norm of that, and the factor."""
    count = sum(p.copies for p in trained)
    norms = f.many((), "fp32", "norm of a gradient", count)
    stack = f.new((count,), "fp32", "stack of norms")
    total = f.new((), "fp32", "total norm")
    del stack, norms
    shifted, inverse = f.new((), "fp32", "add"), f.new((), "fp32", "reciprocal")
    factor = f.new((), "fp32", "mul")
    del shifted, inverse
    limited = f.new((), "fp32", "clamp")
    del factor, limited, total
