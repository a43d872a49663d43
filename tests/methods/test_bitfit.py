"""BitFit, which peft does not have: biases and a classification head, against the real model's parameter names."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from peftplan.errors import InputError
from tests.methods import tiny


@pytest.mark.parametrize(
    ("model", "task", "head"),
    [
        ("gpt2", None, ()),
        ("qwen2", None, ()),
        ("bert", None, ()),
        ("bert", "SEQ_CLS", ("classifier.",)),
        ("roberta", "SEQ_CLS", ("classifier.",)),
        ("bert", "QUESTION_ANS", ("qa_outputs.",)),
        ("qwen2", "TOKEN_CLS", ("score.",)),
        ("vit", None, ("classifier.",)),
    ],
)
def test_biases_and_head(model: str, task: str | None, head: tuple[str, ...]) -> None:
    adaptation = tiny.ours(model, "bitfit", task)
    expected = {n for n, _ in tiny.real(model, task).named_parameters() if n.endswith("bias") or (head and n.startswith(head))}
    assert {f"{p.module}.{p.param}".replace("{}", str(i)) for p in adaptation.trained for i in p.layers or (0,)} == expected
    assert adaptation.num_added == 0


def test_hand_sum() -> None:
    # per layer of GPT-2, h 48: c_attn 144, c_proj 48, c_fc 192, c_proj 48, two norms 96; then ln_f
    assert tiny.ours("gpt2", "bitfit").num_trainable == 3 * (144 + 48 + 192 + 48 + 96) + 48


def test_no_bias_is_an_error() -> None:
    with pytest.raises(InputError, match="llama has no biases"):
        tiny.ours("llama", "bitfit")
