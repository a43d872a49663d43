"""Temporaries of optimizers that loop over parameters. Names are those of the source, since a variable of the loop keeps its
tensor until the next parameter replaces it.

Source: torch, optim/adam.py; transformers, optimization.py (`Adafactor.step`); grokadamw 0.1.2, grokadamw.py (`_update_group`);
llamafactory 0.9.5, third_party/muon/muon.py, train/trainer_utils.py; adam-mini 1.1.1, adam_mini.py (`step`); apollo-torch,
apollo.py (`step`), random_projector.py (`get_orthogonal_matrix`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.optim.community import blocks, by_muon
from peftplan.parameters import Parameter
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Tensor

NEWTON_SCHULZ_STEPS = 5
Projected = tuple[Dims, Dims]
"""Shapes of a projected gradient, and of its projection."""


def muon(f: Tape, trained: list[Parameter]) -> None:
    """Muon's matrices, then the parameters of its AdamW."""
    u = g = None
    for p in (p for p in trained if by_muon(p.name, p.shape)):
        f.module = p.name
        g = f.new(p.shape, p.dtype, "add")
        u = _orthogonal(f, g)
    del g
    _by_adamw(f, trained)
    del u


def muon_of_shards(f: Tape, trained: list[Parameter], ranks: int) -> None:
    """The same in LLaMA-Factory's v1 (0.9.6.dev0, v1/plugins/trainer_plugins/optimizers/muon_optimizer.py): each rank gathers a
    matrix of which it holds `1 / ranks` of the rows, and orthogonalizes it."""
    g_use = g_full = u_full = u_dt = None
    for p in (p for p in trained if by_muon(p.name, p.shape)):
        f.module = p.name
        g_use = f.new(p.shape, p.dtype, "add")
        rows, columns = p.shape[0] * ranks, p.shape[1]
        g_full = f.new((rows, columns), p.dtype, "full_tensor")
        u_full = _orthogonal(f, g_full)
        chunks = f.many(p.shape, u_full.dtype, "contiguous", ranks) if rows > columns else None
        u_dt = f.new(p.shape, u_full.dtype, "scatter")
        del chunks
    _by_adamw(f, trained)
    del g_use, g_full, u_full, u_dt


def _by_adamw(f: Tape, trained: list[Parameter]) -> None:
    """The parameters that Muon leaves to AdamW."""
    g = None
    for p in (p for p in trained if not by_muon(p.name, p.shape)):
        f.module = p.name
        g = None
        square = f.new(p.shape, p.dtype, "square")
        del square
        root = f.new(p.shape, p.dtype, "sqrt")
        shifted = f.new(p.shape, p.dtype, "add")
        del root
        g = f.new(p.shape, p.dtype, "div")
        del shifted
    del g


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


def adafactor(f: Tape, trained: list[Parameter]) -> None:
    """Adafactor without a first moment and without a weight decay, as Trainer sets it up. Of a parameter in 16 bits, gradient and
    parameter are cast to fp32."""
    update = gradient = p_data_fp32 = None
    for p in trained:
        f.module, narrow = p.name, p.dtype in SIXTEEN_BITS
        gradient = None
        gradient = f.new(p.shape, "fp32", "to") if narrow else None
        p_data_fp32 = None
        p_data_fp32 = f.new(p.shape, "fp32", "to") if narrow else None
        square = f.new(p.shape, "fp32", "pow")
        update = f.new(p.shape, "fp32", "add")
        del square
        if len(p.shape) < 2:
            update = f.new(p.shape, "fp32", "rsqrt")
        else:
            mean = f.new((1,), "fp32", "mean")
            row, column = f.new(p.shape[:-1], "fp32", "div"), f.new((*p.shape[:-2], p.shape[-1]), "fp32", "rsqrt")
            del mean
            update = f.new(p.shape, "fp32", "mul")
            del row, column
        negative = f.new(p.shape, "fp32", "neg")
        del negative
    del update, gradient, p_data_fp32


def grokadamw(f: Tape, trained: list[Parameter]) -> None:
    """GrokAdamW: copies of one parameter's three averages, which lie on the host."""
    exp_avg = exp_avg_sq = grok_ema = grok_grad = None
    for p in trained:
        f.module = p.name
        exp_avg, exp_avg_sq = f.new(p.shape, p.dtype, "to"), f.new(p.shape, p.dtype, "to")
        grok_ema = f.new(p.shape, p.dtype, "to")
        scaled = f.new(p.shape, p.dtype, "mul")
        grok_grad = f.new(p.shape, p.dtype, "add")
        del scaled
        root = f.new(p.shape, p.dtype, "sqrt")
        del root
    del exp_avg, exp_avg_sq, grok_ema, grok_grad


def apollo(f: Tape, weights: Iterable[tuple[str, Dims, str]], projected: Mapping[str, Projected]) -> None:
    """APOLLO with random projections. `weights`: name, shape and dtype of each; those that are not projected come first, as
    transformers groups them. A projection is drawn anew, as it is every `update_proj_gap` steps, beside a copy of the gradient in
    fp32."""
    grad = denom = norm_grad = scaled_grad = None
    for name, dims, dtype in sorted(weights, key=lambda weight: weight[0] in projected):
        f.module = name
        low, ortho = projected.get(name, (dims, ()))
        if ortho:
            grad = None
            matrix = f.new(dims, "fp32", "float") if dtype in SIXTEEN_BITS else None
            normal = f.new(ortho, "fp32", "randn")
            drawn = f.new(ortho, "fp32", "div")
            del normal
            drawn = f.to(drawn, dtype)
            del drawn, matrix
            grad = f.new(low, dtype, "matmul")
        denom = f.new(low, dtype, "sqrt")
        norm_grad = f.new(low, dtype, "div")
        if ortho:
            scaled_grad = f.new(dims, dtype, "mul")
            scaled_grad = f.new(dims, dtype, "div")
            norm_grad = scaled_grad
    del grad, denom, norm_grad, scaled_grad


def one_by_one(f: Tape, trained: list[Parameter]) -> None:
    """`_single_tensor_adam`: the root of the second moment, and what it becomes by the correction of its bias, which a name holds
    until that of the next parameter is there. Matrices of experts follow each other, of which two are stepped over."""
    _denominator = None
    for p in trained:
        f.module = p.name
        for _ in range(2 if ".experts." in p.name and len(p.shape) == 2 else 1):
            root = f.new(p.shape, p.dtype, "sqrt")
            latest = f.new(p.shape, p.dtype, "div")
            del root
            _denominator = latest
            del latest


LOOPS: dict[str, Callable[[Tape, list[Parameter]], None]] = {
    "adafactor": adafactor,
    "adam_one_by_one": one_by_one,
    "grokadamw": grokadamw,
    "moonlight_muon": muon,
    "adam_mini": adam_mini,
}
"""Name of the optimizer → its step."""
