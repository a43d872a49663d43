"""Where fake tensors are said to be."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftplan.trace.fake import FakeOn, fake_batch, fake_device, to_fake
from tests.trace.engine_case import llama, traced


@pytest.mark.parametrize(
    ("choice", "card", "device"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cpu", False, "cpu")]
)
def test_fake_tensors_are_on_a_card_where_one_is_there_and_asked_for(
    monkeypatch: pytest.MonkeyPatch, choice: FakeOn, card: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    assert fake_device(choice) == torch.device(device)


def test_everything_of_a_model_and_its_batch_goes_to_that_device() -> None:
    """A stand-in for CUDA, which needs a card: any other device type that fake tensors can have."""
    device, mode = torch.device("xla"), FakeTensorMode(allow_non_fake_inputs=True)
    model = nn.BatchNorm1d(4, device="meta")
    to_fake(model, mode, lambda module: device)
    batch = fake_batch({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "use_cache": False}, mode, device)
    assert {t.device.type for t in (*model.parameters(), *model.buffers(), batch["input_ids"])} == {"xla"}
    on_cpu = fake_batch({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, mode, torch.device("cpu"))
    assert type(on_cpu["input_ids"]) is torch.Tensor


def test_without_a_card_auto_traces_what_cpu_traces() -> None:
    assert not torch.cuda.is_available() or pytest.skip("a card is there")
    by_device = [
        traced(llama(layers=1), seq_len=8, trainer="plain", fake_on=fake_on).peak_by_phase for fake_on in ("cpu", "auto")
    ]
    assert by_device[0] == by_device[1]
