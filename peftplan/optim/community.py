"""Optimizers from small packages: schedulefree, torch-optimi (StableAdamW), grokadamw, flashoptim, adam-mini, badam; Muon.

Counted: every tensor in `optimizer.state[p]` (grokadamw: in the parameter group).
Source: schedulefree 1.4.1 `{adamw,radam,sgd}_schedulefree.py`; torch-optimi 0.3.3 `stableadamw.py`; grokadamw 0.1.2
`grokadamw.py`; flashoptim 0.1.4 `optimizers.py` (`_MaybeQuantizedTensor`, `quantize`); adam-mini 1.1.1 `adam_mini.py`;
badam 1.4 `block_optim.py`; llamafactory 0.9.5 `third_party/muon/muon.py`, `train/trainer_utils.py` (`_create_muon_optimizer`,
`_create_adam_mini_optimizer`); axolotl 0.19.0 `contribs/mit/muon/dist_muon.py`; transformers `trainer_optimizer.py`.
Left out: optimi's `step`, one int32 CPU scalar per parameter group; temporaries of the step.
"""

from __future__ import annotations

from math import prod
from typing import Literal

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.ledger import Allocation
from peftplan.optim.optimizer import OptimArgs, Param, like, scalar, truth
from peftplan.units import ceil_div

SCALED_TOGETHER = 32
"""Elements of a moment that share one scale of flashoptim (`quantize`)."""
MASTER_BITS = 24
"""Bits of its master weights where none are named."""
COPY = "copy"
"""The weights that BAdam steps in place of the model's."""
NOT_ORTHOGONALIZED = ("embed", "lm_head")
"""What names of matrices hold that Muon leaves to its AdamW."""
BIASES = ("bias",)
OF_HEADS = ("k_proj", "q_proj", "wq", "wk", "query", "key")
OF_ROWS = ("embed", "embd", "wte", "lm_head", "output", "final_layer", "v_proj", "wv", "value", "feed_forward", "linear", "mlp")
OF_ROWS_TOO = ("o_proj", "wo", "attn.proj")
"""What names hold of parameters that Adam-mini divides into heads, or into rows."""


def schedule_free_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """AdamWScheduleFree and RAdamScheduleFree: the base point `z`, a copy of the parameter, and one moment."""
    return (like(param, "z"), like(param, "exp_avg_sq"))


def schedule_free_sgd(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """SGDScheduleFree: the base point `z` only."""
    return (like(param, "z"),)


def stable_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Two moments, a Kahan compensation for half precision, and device scalars.

    On CUDA optimi takes its Triton path (Triton comes with torch there), which adds `mean_square` and replaces a missing
    compensation by one byte. transformers reads `kahan_sum` with `bool(text)`: any text is true, even "False".
    """
    wants_kahan = optim_args.get("kahan_sum") != ""
    if wants_kahan and param.dtype in SIXTEEN_BITS:
        kahan_comp = like(param, "kahan_comp")
    else:
        kahan_comp = Allocation("kahan_comp", "uint8", (1,))
    return (
        like(param, "exp_avg"),
        like(param, "exp_avg_sq"),
        scalar("eps_sq", dtype=param.dtype),
        kahan_comp,
        Allocation("mean_square", "fp32", (1,)),
    )


def grokadamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Three averages of the parameter's shape, kept on the CPU. The step moves those of one parameter at a time to the device."""
    return tuple(like(param, name, place="host") for name in ("exp_avg", "exp_avg_sq", "grok_ema"))


def flash_adamw(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """FlashAdamW: two moments in 8 bits with their scales, and what a weight in 16 bits lacks of a master weight of 24 or 32.

    A weight in fp32 has no such bits. `step` is on the host.
    """
    scales = (ceil_div(prod(param.shape), SCALED_TOGETHER),)
    moments = (("exp_avg", "int8"), ("exp_avg_sq", "uint8"))
    states = [
        a for name, dtype in moments for a in (like(param, name, dtype=dtype), Allocation(f"{name} scales", "fp16", scales))
    ]
    bits = int(optim_args.get("master_weight_bits", MASTER_BITS))
    if param.dtype in SIXTEEN_BITS:
        states.append(like(param, "error_bits", dtype="int8" if bits == MASTER_BITS else "int16"))
    return (*states, scalar("step", dtype="int64", place="host"))


def badam(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """BAdam's BlockOptimizer of the block that trains: a copy in fp32, which the fused AdamW below it steps, and its moments."""
    return (
        like(param, COPY, dtype="fp32"),
        scalar("step"),
        *(like(param, name, dtype="fp32") for name in ("exp_avg", "exp_avg_sq")),
    )


def by_muon(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon orthogonalizes the updates of this parameter."""
    return len(shape) == 2 and not any(part in name for part in NOT_ORTHOGONALIZED)


def moonlight_muon(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Moonlight's Muon, as LLaMA-Factory makes it: a momentum for matrices inside layers, AdamW's two moments for all else."""
    if by_muon(param.name, param.shape):
        return (like(param, "momentum_buffer"),)
    return (like(param, "moment1"), like(param, "moment2"))


def dion_muon(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """dion's Muon: a momentum for matrices inside layers, AdamW's two moments and a step for all else."""
    if by_muon(param.name, param.shape):
        return (like(param, "momentum"),)
    return (like(param, "momentum"), like(param, "variance"), scalar("step_dev"))


def axolotl_muon(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """axolotl's Muon of sharded matrices: as dion's, with its step on the host."""
    if by_muon(param.name, param.shape):
        return (like(param, "momentum"),)
    return (like(param, "momentum"), like(param, "variance"))


MOMENTS = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
"""What files call a moment's dtype → the dtype."""


def moment(text: str) -> str:
    """A dtype of `MOMENTS`; raises ValueError for another."""
    if text not in MOMENTS:
        raise ValueError(text)
    return text


def te_fused_adam(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """FusedAdam: two moments in fp32, or bf16 with a scale each, and with `master_weights` a master weight in fp32, of bf16 with
    `store_param_remainders` the 16 bits that the weight lacks (transformer-engine 2.20.2, fused_adam.py:397).
    """
    states: tuple[Allocation, ...] = ()
    for state in ("exp_avg", "exp_avg_sq"):
        dtype = MOMENTS[optim_args.get(f"{state}_dtype", "torch.float32")]
        states += (like(param, state, dtype=dtype), *([scalar(f"{state} scale")] if dtype != "fp32" else []))
    if not truth(optim_args.get("master_weights", "False")):
        return states
    remainders = truth(optim_args.get("store_param_remainders", "False")) and param.dtype == "bf16"
    return (*states, like(param, "master_param", dtype="int16" if remainders else "fp32"))


def blocks(name: str) -> Literal["elements", "heads", "rows", "tensor"]:
    """What of a parameter shares a second moment of Adam-mini."""
    lowered = name.lower()
    if any(part in lowered for part in BIASES):
        return "elements"
    if any(part in lowered for part in OF_HEADS):
        return "heads"
    return "rows" if any(part in lowered for part in (*OF_ROWS, *OF_ROWS_TOO)) else "tensor"


def adam_mini(param: Param, optim_args: OptimArgs) -> tuple[Allocation, ...]:
    """Adam_mini: one moment, and a second moment per head of queries and keys, per row of other matrices, per norm, in the
    parameter's dtype. `dim` and `n_heads` are those of the model.
    """
    moment, of = like(param, "m"), blocks(param.name)
    if of == "elements":
        return (moment, like(param, "v"))
    if of == "tensor":
        return (moment, scalar("vmean", dtype=param.dtype))
    dim, heads = int(optim_args.get("dim", 2048)), int(optim_args.get("n_heads", 32))
    count = prod(param.shape) // (dim * dim // heads) if of == "heads" else param.shape[0]
    return (moment, Allocation("vmean", param.dtype, (count, 1)))
