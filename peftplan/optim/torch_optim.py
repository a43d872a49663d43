"""torch.optim's own classes, as transformers' Trainer sets them up.

Counted: every tensor in `optimizer.state[p]`, elements × itemsize. States have the parameter's dtype (`zeros_like(p)`).
Source: torch `optim/{adam,sgd,adagrad,rmsprop}.py`, `_init_group`; transformers `trainer_optimizer.py`.
Left out: temporaries of the step, and the 0-dimensional tensors that fused kernels build per call.

`step` is fp32: a tensor on the parameter's device for fused, on the CPU otherwise (a kernel launch per scalar would
cost more than the copy).
"""

from __future__ import annotations

from peftplan.errors import InputError, RefusedError
from peftplan.ledger import Allocation
from peftplan.optim.optimizer import OptimArgs, Param, like, scalar

TRUE_FOR_TORCH_FLAGS = ("true", "1", "yes")
"""What transformers reads as true for `nesterov` and `centered`. Every other string is false."""


def adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """AdamW, foreach: two moments; `step` on the CPU."""
    return (scalar("step", place="host"), like(param, "exp_avg"), like(param, "exp_avg_sq"))


def adamw_fused(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """AdamW, fused: two moments; `step` on the device."""
    return (scalar("step"), like(param, "exp_avg"), like(param, "exp_avg_sq"))


def deepspeed_adam(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """DeepSpeed's FusedAdam and DeepSpeedCPUAdam (ops/adam): two moments; `step` is a number."""
    return (like(param, "exp_avg"), like(param, "exp_avg_sq"))


def deepspeed_lion(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """DeepSpeedCPULion (ops/lion): one moment."""
    return (like(param, "exp_avg"),)


def sgd(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """SGD: nothing at Trainer's default momentum 0, else one buffer with the gradient's shape and dtype."""
    momentum = _momentum(optim_args)
    nesterov = optim_args.get("nesterov", "false").lower() in TRUE_FOR_TORCH_FLAGS
    if nesterov and (momentum == 0 or float(optim_args.get("dampening", 0)) != 0):
        raise RefusedError("torch's SGD refuses nesterov without a momentum, or with a dampening")
    return (like(param, "momentum_buffer"),) if momentum else ()


def adagrad(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Adagrad: the sum of squares, created by the constructor, before the first step."""
    return (scalar("step", place="host"), like(param, "sum"))


def rmsprop(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """RMSprop: the mean square, a buffer if momentum > 0, the mean gradient if `centered`."""
    optional = {
        "momentum_buffer": _momentum(optim_args) > 0,
        "grad_avg": optim_args.get("centered", "false").lower() in TRUE_FOR_TORCH_FLAGS,
    }
    buffers = tuple(like(param, name) for name, there in optional.items() if there)
    return (scalar("step", place="host"), like(param, "square_avg"), *buffers)


def _momentum(optim_args: OptimArgs) -> float:
    momentum = float(optim_args.get("momentum", 0))
    if momentum < 0:
        raise InputError("optim_args.momentum", momentum, "accepted: 0 or more")
    return momentum
