"""Temporaries of optimizers that loop over parameters: Moonlight's Muon and Adam-mini. Names are those of the source, since a
variable of the loop keeps its tensor until the next parameter replaces it.

Source: llamafactory 0.9.5, third_party/muon/muon.py, train/trainer_utils.py; adam-mini 1.1.1, adam_mini.py (`step`).
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.optim.community import blocks, by_muon
from peftplan.parameters import Parameter
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

NEWTON_SCHULZ_STEPS = 5


def muon(f: Tape, trained: list[Parameter]) -> None:
    """Muon's matrices, then the parameters of its AdamW."""
    matrices = [p for p in trained if by_muon(p.name, p.shape)]
    u = g = None
    for p in matrices:
        f.module = p.name
        g = f.new(p.shape, p.dtype, "add")
        u = _orthogonal(f, g)
    for p in (p for p in trained if p not in matrices):
        f.module = p.name
        g = None
        square = f.new(p.shape, p.dtype, "square")
        del square
        root = f.new(p.shape, p.dtype, "sqrt")
        shifted = f.new(p.shape, p.dtype, "add")
        del root
        g = f.new(p.shape, p.dtype, "div")
        del shifted
    del u, g


def _orthogonal(f: Tape, g: Tensor) -> Tensor:
    """`zeropower_via_newtonschulz5`: a quintic iteration in bf16 over the shorter side's k x k products."""
    side = (min(g.dims), min(g.dims))
    x = f.to(g, "bf16")
    norm = f.new((), "bf16", "norm")
    shifted = f.new((), "bf16", "add")
    del norm
    x = f.new(x.dims, "bf16", "div")
    del shifted
    a = b = None
    for _ in range(NEWTON_SCHULZ_STEPS):
        a = f.new(side, "bf16", "mm")
        linear = f.new(side, "bf16", "mul")
        scaled = f.new(side, "bf16", "mul")
        product = f.new(side, "bf16", "mm")
        del scaled
        b = f.new(side, "bf16", "add")
        del linear, product
        scaled = f.new(x.dims, "bf16", "mul")
        product = f.new(x.dims, "bf16", "mm")
        x = f.new(x.dims, "bf16", "add")
        del scaled, product
    del a, b
    return x


def adam_mini(f: Tape, trained: list[Parameter]) -> None:
    """Adam-mini's parameters in the model's order. Left out: what heads have one element of."""
    tmp_lr = update = h = stepsize = None
    for p in trained:
        f.module = p.name
        if blocks(p.name) == "elements":
            root = f.new(p.shape, p.dtype, "sqrt")
            h = f.new(p.shape, p.dtype, "div")
            del root
            continue
        means = (p.shape[0], 1) if blocks(p.name) == "rows" else ()
        square = f.new(p.shape, p.dtype, "mul")
        tmp_lr = f.new(means, p.dtype, "mean")
        del square
        root = f.new(means, p.dtype, "sqrt")
        h = f.new(means, p.dtype, "div")
        del root
        stepsize = f.new(means, p.dtype, "div")
        update = f.new(p.shape, p.dtype, "mul")
        negative = f.new(p.shape, p.dtype, "neg")
        del negative
    del tmp_lr, update, h, stepsize


LOOPS: dict[str, Callable[[Tape, list[Parameter]], None]] = {"moonlight_muon": muon, "adam_mini": adam_mini}
"""Name of the optimizer → its step."""
