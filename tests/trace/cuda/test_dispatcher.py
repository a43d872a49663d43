"""Autocast of a trace against CUDA's own: torch's rules for CUDA run on fake CUDA tensors, which a CPU build has, too.

Only forwards without gradients: autograd asks for the card. What a forward saves follows from its operations and their dtypes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from peftplan.trace.cuda.dispatcher import CASTS, attention_on, dispatched_as_on_cuda

F = torch.nn.functional
Step = tuple[str, tuple[torch.dtype, ...]]
ROWS, WIDTH = 4, 8


class Steps(TorchDispatchMode):
    """The operations that reach a device, with the dtypes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, torch.Tensor)]
        if tensors:
            self.log.append((str(func), tuple(x.dtype for x in tensors)))
        return out


@contextmanager
def autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """As `torch.autocast`, which turns itself off without a card."""
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)


def steps(make: Callable[[], Callable[[torch.Tensor], Any]], device: str, *, low: torch.dtype, x: torch.dtype) -> list[Step]:
    """What a call does to a tensor of this device under autocast; `make` gives the call, or a module whose tensors are there."""
    rules = dispatched_as_on_cuda() if device == "cpu" else nullcontext()
    with rules, torch.no_grad(), FakeTensorMode(), autocast(device, low):
        with torch.device(device):
            call = make()
        if isinstance(call, torch.nn.Module):
            call.requires_grad_(False)
        tensor = torch.empty(ROWS, WIDTH, device=device, dtype=x)
        with Steps() as seen:
            call(tensor)
    return seen.log


LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", sorted(ACT2FN))
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("x", [*LOW, torch.float32])
def test_every_activation_runs_as_under_cudas_autocast(name: str, low: torch.dtype, x: torch.dtype) -> None:
    expected = steps(lambda: ACT2FN[name], "cuda", low=low, x=x)
    assert steps(lambda: ACT2FN[name], "cpu", low=low, x=x) == expected
    assert expected or name == "linear"


def rows(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(x), dtype=torch.int64, device=x.device)


def row(x: torch.Tensor) -> torch.Tensor:
    return x.select(0, 0)  # Python's indexing asks for the card


CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "square": torch.square,
    "softmin": lambda x: F.softmin(x, dim=-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: (x.norm(), x.norm(dim=-1), torch.linalg.norm(x)),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,)),
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), row(x), row(x)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "sums": lambda x: (x.sum(), x.sum(-1), x.sum(-1, dtype=torch.float64), x.mean(), x.cumsum(0), x.prod(), x.int().sum()),
    "powers": lambda x: (x**2, 2**x, x**x, x.rsqrt(), x.exp(), x.log(), x.reciprocal(), x.sqrt()),
    "cross_entropy": lambda x: F.cross_entropy(x, rows(x)),
    "smoothed cross_entropy": lambda x: F.cross_entropy(x, rows(x), label_smoothing=0.1),
    "losses": lambda x: (
        F.mse_loss(x, x),
        F.l1_loss(x, x),
        F.smooth_l1_loss(x, x),
        F.kl_div(x, x, reduction="sum"),
        F.huber_loss(x, x),
    ),
    "binary loss": lambda x: F.binary_cross_entropy_with_logits(x, x),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cat": lambda x: (torch.cat((x, x.half())), torch.cat((x.bfloat16(), x.float())), torch.stack((x, x.half()))),
    "products": lambda x: (
        x @ x.T,
        F.linear(x, x.float()),
        x.mv(row(x)),
        x.addmm(x, x.new_empty(WIDTH, WIDTH)),
        x.addr(x.select(1, 0), row(x)),
    ),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x.float()),
    "promoted": lambda x: (x.addcmul(x, x.float()), torch.dot(row(x), row(x)), torch.tensordot(x, x.float(), dims=2)),
    "scattered": lambda x: x.scatter_add(0, rows(x).unsqueeze(1).expand(-1, WIDTH), x.float()),
    "interpolated": lambda x: F.interpolate(x.unsqueeze(0), scale_factor=2),
    "convolved": lambda x: F.conv1d(x.unsqueeze(0), x.new_empty(2, ROWS, 3)),
    "not cast": lambda x: (x.quantile(0.5) if x.dtype == torch.float32 else x, x.trace(), F.pad(x, (1, 1), mode="reflect")),
    "softmax": lambda x: (x.softmax(-1, dtype=torch.float64), torch.log_softmax(x, 0, dtype=x.dtype)),
    "fp64": lambda x: (x.double() ** 2, x.double().softmax(-1), x.double() @ x.double().T),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("x", [*LOW, torch.float32])
def test_other_calls_run_as_under_cudas_autocast(name: str, low: torch.dtype, x: torch.dtype) -> None:
    try:
        expected = steps(lambda: CALLS[name], "cuda", low=low, x=x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:60])):
            steps(lambda: CALLS[name], "cpu", low=low, x=x)
    else:
        assert steps(lambda: CALLS[name], "cpu", low=low, x=x) == expected


@pytest.mark.parametrize(
    "run", [lambda x: x.softmax(-1), lambda x: F.log_softmax(x, -1), lambda x: x.softmax(-1, dtype=torch.float32)]
)
def test_softmax_of_fp16_is_one_kernel(run: Callable[[torch.Tensor], Any]) -> None:
    expected = steps(lambda: run, "cuda", low=torch.float16, x=torch.float16)
    assert [dtypes for _, dtypes in expected] == [(torch.float32,)]
    assert steps(lambda: run, "cpu", low=torch.float16, x=torch.float16) == expected


def test_a_loss_that_cuda_refuses_is_refused() -> None:
    for device in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match="binary_cross_entropy_with_logits"):
            steps(lambda: lambda x: F.binary_cross_entropy(x, x), device, low=torch.bfloat16, x=torch.bfloat16)


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the lists are of torch 2.13")
def test_the_lists_are_those_of_torchs_header() -> None:
    """`AT_FORALL_*` of autocast_mode.h, and what torch registers beside them."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text()

    def listed(macro: str) -> set[str]:
        macro_text = re.search(rf"#define AT_FORALL_{macro}\(_\)(.*?)\n\n", text, re.S)
        assert macro_text is not None
        return {name + (overload and f".{overload}") for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", macro_text[1])}

    beside = {
        "lower precision": {"cudnn_convolution", "cudnn_convolution_transpose"},
        "fp32 result": {"norm.Scalar", "norm.ScalarOpt_dim"},
    }
    macros = {"lower precision": "LOWER_PRECISION_FP", "fp32": "FP32", "fp32 result": "FP32_SET_OPT_DTYPE", "promote": "PROMOTE"}
    for policy, macro in macros.items():
        assert set(CASTS[policy].split()) == listed(macro) | beside.get(policy, set())
    registered = {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCUDA") and name.startswith("aten::")
    }
    assert registered == {name for names in CASTS.values() for name in names.split()}


def test_the_rules_of_the_cpu_come_back() -> None:
    with dispatched_as_on_cuda():
        pass
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.square(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert F.cross_entropy(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)).dtype == torch.float32


@pytest.mark.parametrize("made_anew", [False, True])
def test_the_cast_of_a_trainable_mask_is_kept_for_later_attention(made_anew: bool) -> None:
    """Torch's own rule is the witness: `cached_cast` keeps that of a leaf (autocast_mode.cpp), not that of a result."""

    def casts() -> int:
        qkv = [torch.zeros(1, 2, 16, 8)] * 3
        mask = torch.zeros(1, 2, 16, 16, requires_grad=True)
        with autocast("cpu", torch.bfloat16), Steps() as seen:
            for _ in range(2):
                F.scaled_dot_product_attention(*qkv, attn_mask=mask * 2 if made_anew else mask)
        return sum(step == ("aten._to_copy.default", (torch.bfloat16,)) for step in seen.log)

    real = casts()
    with dispatched_as_on_cuda(), attention_on((8, 0)), FakeTensorMode():
        traced = casts()
    inputs = 2 * 3
    assert traced == inputs + (2 if made_anew else 1)
    inside = 2 * 2  # torch's composite on the CPU casts its result and its weights
    assert real == traced + inside
