"""GaLore and APOLLO: moments of a projected gradient, and the projection itself, for the matrices that
`optim_target_modules` selects (weights of `nn.Linear`); every other parameter gets full-size states.

Letters: a target is an m × n matrix, k = min(m, n), r = rank. Counted: elements × itemsize.
Source: galore-torch `galore_projector.py`, `adamw.py`, `adafactor.py`, `adamw8bit.py`; apollo-torch `apollo.py`,
`random_projector.py`, `svd_projector.py`; transformers `_get_galore_optimizer`, `_get_apollo_optimizer`.
Left out: the SVD's temporaries every `update_proj_gap` steps, the full-size update of the step, and the one-element CPU
tensor of transformers' layer-wise dummy optimizer. `step` and `seed` are Python ints.

**A surprise**: a projection taken from an fp32 SVD is a *view* of its first r rows or columns and keeps the whole factor
alive, k × n or m × k elements, at any rank (run on CPU; torch gives the factors the same sizes on CUDA). From a bf16
gradient it is a converted copy of r rows or columns.
"""

from __future__ import annotations

from math import prod
from typing import Literal

from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.ledger import Allocation
from peftplan.optim import adafactor, bnb
from peftplan.optim.optimizer import OptimArgs, Param, like, scalar
from peftplan.versions import named

DEFAULT_RANK = "128"
DEFAULT_PROJ_TYPE = "std"
"""transformers' default, for both packages."""
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

Side = Literal["left", "right", "full"]
Matrix = tuple[int, int]


def galore_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """GaLoreAdamW: the projection and two moments of the projected gradient, in the parameter's dtype."""
    if not param.in_target:
        return (like(param, "exp_avg"), like(param, "exp_avg_sq"))
    low, projection = _galore(param, param.dtype, optim_args)
    return (*projection, *_moments(low, param.dtype))


def galore_adafactor(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """GaLoreAdafactor: projects the fp32 gradient (so the projection is fp32 for bf16 too), then factors it."""
    if not param.in_target:
        return adafactor.adafactor(param, optim_args)
    low, projection = _galore(param, "fp32", optim_args)
    return (*projection, *adafactor.second_moment(low), scalar("RMS"))


def galore_adamw_8bit(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """GaLoreAdamW8bit: bitsandbytes states of the projected gradient, 8-bit from 4096 *projected* elements on.

    It passes two arguments that bitsandbytes reads as `max_unorm=100, skip_zeros=True`, hence `unorm_vec`. Trainer
    registers no 32-bit embeddings for it.
    """
    low, projection = _galore(param, param.dtype, optim_args) if param.in_target else (param.shape, ())
    states = bnb.quantized_pair(low, prod(low) >= bnb.MIN_8BIT_SIZE, "device")
    return (*projection, *states, Allocation("unorm_vec", "fp32", (1,)))


def galore_adamw_8bit_layerwise(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """The same, with one optimizer per parameter, so that each has its own code tables."""
    states = galore_adamw_8bit(param, optim_args)
    return (*states, *bnb.code_tables(states))


def apollo_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """APOLLOAdamW: two moments of the projected gradient, its projection, and the last update's norm, a scalar."""
    if not param.in_target:
        return (like(param, "exp_avg"), like(param, "exp_avg_sq"))
    if _proj_type(optim_args) == "full":
        raise RefusedError(
            f"optim_args: proj_type=full fails in {named('apollo-torch')}, in the first (random) or second step (svd)"
        )
    proj = _choice(optim_args, "proj", "random", ("random", "svd"))
    low, projection = _random(param, optim_args) if proj == "random" else _svd(param, param.dtype, optim_args)
    _check_scaling(param, low, _choice(optim_args, "scale_type", "channel", ("channel", "tensor")))
    return (*projection, *_moments(low, param.dtype), scalar("scaled_grad", dtype=param.dtype))


def _galore(param: Param, dtype: str, optim_args: OptimArgs) -> tuple[Matrix, tuple[Allocation, ...]]:
    low, projection = _svd(param, dtype, optim_args)
    m, n = _matrix(param)
    if _proj_type(optim_args) == "reverse_std" and m < n and low[1] == m:
        raise RefusedError(
            f"optim_args: proj_type=reverse_std of {named('galore-torch')} fails on a {m} × {n} weight unless rank < {m}"
        )
    return low, projection


def _svd(param: Param, dtype: str, optim_args: OptimArgs) -> tuple[Matrix, tuple[Allocation, ...]]:
    """The projected shape, and the part of U (m × k) or Vh (k × n) that stays alive, for a gradient of this dtype."""
    m, n = _matrix(param)
    k = min(m, n)
    r = min(_rank(optim_args), k)
    columns = k if dtype == "fp32" else r
    left, right = (m, columns), (columns, n)
    name = "projector.ortho_matrix"
    side = _side(m, n, _proj_type(optim_args))
    if side == "left":
        return (r, n), (Allocation(name, dtype, left),)
    if side == "right":
        return (m, r), (Allocation(name, dtype, right),)
    return (r, r), (Allocation(f"{name}.0", dtype, left), Allocation(f"{name}.1", dtype, right))


def _random(param: Param, optim_args: OptimArgs) -> tuple[Matrix, tuple[Allocation, ...]]:
    """A random projection: exactly r rows or columns, even if r > k."""
    m, n = _matrix(param)
    r = _rank(optim_args)
    left = _side(m, n, _proj_type(optim_args)) == "left"
    low, dims = ((r, n), (m, r)) if left else ((m, r), (r, n))
    return low, (Allocation("projector.ortho_matrix", param.dtype, dims),)


def _check_scaling(param: Param, low: Matrix, scale_type: str) -> None:
    """Channel scaling broadcasts one factor per row (m ≥ n) or per column (m < n) of the projected gradient."""
    m, n = _matrix(param)
    channel = 1 if m < n else 0
    if scale_type == "channel" and low[channel] not in (1, (m, n)[channel]):
        raise RefusedError(
            f"optim_args: scale_type=channel of APOLLO cannot scale a {m} × {n} gradient projected to {low[0]} × {low[1]}"
        )


def _side(m: int, n: int, proj_type: str) -> Side:
    """Which side of the gradient is multiplied: `std` shrinks the shorter dimension."""
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return {"left": "left", "right": "right", "full": "full"}[proj_type]  # type: ignore[return-value]


def _moments(low: Matrix, dtype: str) -> tuple[Allocation, ...]:
    return (Allocation("exp_avg", dtype, low), Allocation("exp_avg_sq", dtype, low))


def _matrix(param: Param) -> Matrix:
    if len(param.shape) != 2:
        raise InputError("shape", param.shape, "accepted: a matrix, since low-rank optimizers target nn.Linear weights")
    return param.shape[0], param.shape[1]


def _rank(optim_args: OptimArgs) -> int:
    rank = int(optim_args.get("rank", DEFAULT_RANK))
    if rank < 1:
        raise InputError("optim_args.rank", rank, "accepted: 1 or more")
    return rank


def _proj_type(optim_args: OptimArgs) -> str:
    return _choice(optim_args, "proj_type", DEFAULT_PROJ_TYPE, PROJ_TYPES)


def _choice(optim_args: OptimArgs, key: str, default: str, choices: tuple[str, ...]) -> str:
    value = optim_args.get(key, default)
    if value not in choices:
        raise UnknownNameError(f"optim_args.{key}", value, choices)
    return value
