"""Houlsby and Pfeiffer adapters against counts of AdapterHub's own library.

The expected numbers are what adapters 1.3.0 (with transformers 4.57.6) adds and trains for the same small models with
`model.add_adapter("x", config="double_seq_bn" or "seq_bn"); model.train_adapter("x")`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.methods import tiny
from tests.methods.tiny import ours, total

ADAPTER = 339
"""h 48, b 48 // 16 = 3: (3, 48) + 3 + (48, 3) + 48."""

ADAPTERHUB = {
    # model: (double_seq_bn, seq_bn), as adapters 1.3.0 counted them
    "bert": (2034, 1017), "roberta": (2034, 1017), "llama": (2034, 1017), "mistral": (2034, 1017), "gpt2": (2034, 1017),
    "distilbert": (2034, 1017), "vit": (2034, 1017), "t5": (3390, 1695), "bart": (3390, 1695),
}  # fmt: skip


@pytest.mark.parametrize("model", list(ADAPTERHUB))
def test_as_adapterhub_counts(model: str) -> None:
    adaptations = ours(model, "houlsby"), ours(model, "pfeiffer")
    assert tuple(total(f.added) for f in adaptations) == ADAPTERHUB[model]


def test_hand_sum() -> None:
    assert ours("llama", "houlsby").num_trainable == 3 * 2 * ADAPTER
    assert ours("t5", "pfeiffer").num_trainable == (3 + 2) * ADAPTER  # encoder and decoder layers, none at cross-attention


@pytest.mark.parametrize(
    ("model", "task", "trained"),
    [
        # what train_adapter left trainable beside the adapters
        ("bert", None, {"cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"}),
        ("bert", "SEQ_CLS", {"classifier"}),
        ("roberta", "SEQ_CLS", {"classifier.dense", "classifier.out_proj"}),
        ("llama", None, set()),
        ("llama", "SEQ_CLS", {"score"}),
        ("gpt2", None, set()),
        ("t5", None, set()),
        ("distilbert", None, {"vocab_transform", "vocab_layer_norm"}),
        ("vit", None, {"classifier"}),
    ],
)
def test_heads_train_beside_the_adapters(model: str, task: str | None, trained: set[str]) -> None:
    assert {p.module for p in ours(model, "houlsby", task).trained} == trained


@pytest.mark.parametrize(
    ("options", "width"), [({"reduction_factor": 2}, 24), ({"reduction_factor": 100}, 1), ({"bottleneck_size": 7}, 7)]
)
def test_bottleneck_width(options: dict[str, float], width: int) -> None:
    adaptation = ours("llama", "pfeiffer", **options)
    assert dict(adaptation.resolved)["bottleneck_size"] == width
    assert adaptation.num_trainable == 3 * (2 * 48 * width + width + 48)


def test_one_adapter_per_layer_of_every_stack() -> None:
    for model in tiny.CONFIGS:
        layers = sum(len(block.layers) for block in tiny.architecture(model).blocks)
        assert sum(t.copies for t in ours(model, "pfeiffer").added) == 4 * layers, model
