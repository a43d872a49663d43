"""What `DenseMode` knows is what torch would make: torch's own answer to every operation; arguments that are almost the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peftplan
from peftplan.trace import fake_mode
from peftplan.trace.fake_mode import DenseMode
from tests.memory.families import MODELS
from tests.trace.engine_case import llama

JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qlora": (llama(1), {"method": "qlora"}),
    "fp16 eager": (llama(1), {"method": "dora", "autocast": "fp16", "dtype": "fp32", "attn_implementation": "eager"}),
    "encoder and decoder": (MODELS["t5"][0], {"method": "full", "trainer": "plain"}),
    "experts": (MODELS["mixtral"][0], {"method": "lora", "trainer": "plain"}),
}


@pytest.mark.parametrize("name", JOBS)
def test_torch_agrees_with_every_known_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation is also left to torch, which makes anew what its cache remembers."""
    agreed = Counter[str]()

    class Checking(DenseMode):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.cache_crosscheck_enabled = True

        def known(self, func: Any, args: Any, kwargs: Any) -> Any:
            """Let the tracker go on to where this mode runs."""
            return NotImplemented

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            known = super().known(func, args, kwargs or {})
            out = self.by_torch(func, types, args, kwargs or {})
            if known is not NotImplemented:
                assert facts(known) == facts(out), func
                assert lies_in(known, args) == lies_in(out, args), func
                agreed[str(func)] += 1
            return out

    monkeypatch.setattr("peftplan.trace.engine.DenseMode", Checking)
    fake_mode.forget()
    model, options = JOBS[name]
    assert peftplan.estimate(model, engine="trace", batch_size=2, seq_len=16, **options).peaks is not None
    assert agreed.total() > 500
    assert len(agreed) > 20


def test_outputs_as_torch_2_15_remembers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes them without the operation (`_subclasses/fake_tensor.py`, `_output_from_cache_entry`)."""
    model, options = JOBS["qlora"]
    before = peftplan.estimate(model, engine="trace", batch_size=2, seq_len=16, **options).to_dict()["memory"]
    original = FakeTensorMode._get_output_tensor_from_cache_entry

    def tensor(self: Any, state: Any, entry: Any, key: Any, args: Any) -> Any:
        return original(self, state, entry, key, None, args)

    def output(self: Any, state: Any, entry: Any, key: Any, args: Any) -> Any:
        made_anew = [self._get_output_tensor_from_cache_entry(state, info, key, args) for info in entry.output_infos]
        return tuple(made_anew) if entry.is_output_tuple else made_anew[0]

    if fake_mode.TAKES_OPERATION:
        monkeypatch.setattr(FakeTensorMode, "_get_output_tensor_from_cache_entry", tensor)
        monkeypatch.setattr(FakeTensorMode, "_output_from_cache_entry", output)
        monkeypatch.setattr(fake_mode, "TAKES_OPERATION", False)
    assert peftplan.estimate(model, engine="trace", batch_size=2, seq_len=16, **options).to_dict()["memory"] == before


def meta(**facts: Any) -> torch.Tensor:
    return torch.empty(4, 6, **facts)


OPERATIONS: list[Callable[[], Any]] = [
    lambda: meta() * 1,
    lambda: meta() * 1.0,
    lambda: meta() * True,
    lambda: meta(dtype=torch.int64) * 1,
    lambda: meta(dtype=torch.int64) * 1.0,  # equal to 1, and a product of another dtype
    lambda: meta(dtype=torch.bfloat16) * 1,
    lambda: meta(requires_grad=True) * 1,
    lambda: meta().t() * 1,
    lambda: meta()[1:] * 1,
    lambda: meta()[:, 1:] * 1,
    lambda: torch.empty(6, 4) * 1,  # the transposed one has its shape
    lambda: meta()[1:],
    lambda: meta()[:2][1:],
    lambda: meta()[2:][1:],
    lambda: meta().view(2, 12)[1:],
    lambda: torch.ops.aten._unsafe_view(meta() * 1, [2, 12])[1:],
    lambda: meta().sum(0),
    lambda: meta().sum(0, keepdim=True),
    lambda: meta().sum((0, 1)),
    lambda: meta().to(torch.float64),
    lambda: meta().split([1, 3]),
    lambda: meta().split([2, 2]),
    lambda: torch.nn.functional.layer_norm(meta(), (6,)),
    lambda: meta().add_(1),
    lambda: meta(dtype=torch.complex64).conj() * 1,
]


def facts(output: Any) -> Any:
    """All that the tracker can see of a tensor."""
    if isinstance(output, list | tuple):
        return tuple(map(facts, output))
    if output is None:
        return None
    names = ("dtype", "shape", "device", "requires_grad")
    stored = (
        output.stride(),
        output.storage_offset(),
        output.untyped_storage().nbytes(),
        output.is_conj(),
        output.is_inference(),
    )
    return *(getattr(output, name) for name in names), *stored


def lies_in(output: Any, args: Any) -> Any:
    """The numbers of the arguments in whose storage each output is."""
    if isinstance(output, list | tuple):
        return [lies_in(each, args) for each in output]
    tensors = [(number, x) for number, x in enumerate(args) if isinstance(x, torch.Tensor)]
    return output is None or [n for n, x in tensors if x.untyped_storage()._cdata == output.untyped_storage()._cdata]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_almost_equal_arguments_are_told_apart(mode: Any) -> None:
    """Twice each, in one order and in the other, so that each output is remembered while the others are."""
    fake_mode.forget()
    with mode():
        with FakeTensorMode():
            plain = [facts(operation()) for operation in OPERATIONS]
        with DenseMode():
            for _ in range(2):
                assert [facts(operation()) for operation in OPERATIONS] == plain
            assert [facts(operation()) for operation in reversed(OPERATIONS)] == plain[::-1]


def test_real_positions_are_told_apart_from_fake_ones() -> None:
    """Positions of a batch are real. The rows of a table are fake for either kind; a view of real positions lies on the host."""
    real = torch.arange(4)
    fake_mode.forget()
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain = [facts(torch.embedding(meta(), real)), facts(real.unsqueeze(0))]
    with DenseMode(allow_non_fake_inputs=True):
        fake = torch.empty(4, dtype=torch.int64)
        for positions in (fake, real, fake, real):
            assert [facts(torch.embedding(meta(), positions)), facts(positions.unsqueeze(0))] == plain


def test_a_remembered_view_lies_in_its_base() -> None:
    with DenseMode():
        for _ in range(2):
            base = meta()
            assert base[1:].untyped_storage()._cdata == base.untyped_storage()._cdata


def test_views_lie_where_torch_puts_them() -> None:
    """Slices with steps, from behind, past the end and empty ones; views of views, whose place is remembered."""

    def places(mode: FakeTensorMode) -> list[tuple[Any, ...]]:
        with mode:
            x = torch.empty(6, 8)
            y = x.narrow(0, 2, 3)
            views = [x[1:4], x[:, ::3], x[-2:], x[5:2], x[100:], x[3:100:2, 1:5], y[1:], y.view(-1)[3:9], y.t()[2:5]]
            views += [part.view(8, -1) for part in (x, y)] + [part.t() for part in (x, y)] + [part.detach() for part in (x, y)]
            views += [x.view(6, 1, 8).view(-1), x.view(-1).narrow(0, 48, 0)]
            same = x.untyped_storage()._cdata
            return [
                (v.shape, v.stride(), v.storage_offset(), v.dtype, v.device, v.untyped_storage()._cdata == same) for v in views
            ]

    assert places(DenseMode()) == places(FakeTensorMode())
