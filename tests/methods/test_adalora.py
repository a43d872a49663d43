"""AdaLoRA at its initial rank, against peft and a hand sum."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peft import AdaLoraConfig

from peftplan.errors import InputError, RefusedError
from peftplan.methods.adaptation import NeedsPeftError
from tests.methods.tiny import assert_like_peft, ours, total


def test_hand_sum() -> None:
    adaptation = ours("llama", "adalora", init_r=4, target_modules=["q_proj", "v_proj"])
    # per layer: q A 4·48, E 4, B 48·4; v A 4·48, E 4, B 16·4; and two frozen ranknums; three layers
    assert adaptation.num_trainable == 3 * (192 + 4 + 192 + 192 + 4 + 64)
    assert total(adaptation.added) - adaptation.num_trainable == 3 * 2


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        ("llama", "SEQ_CLS", {"init_r": 5, "target_modules": "all-linear"}),
        ("gpt2", None, {"bias": "all"}),
        ("bert", "SEQ_CLS", {"init_r": 3, "modules_to_save": ["pooler"]}),
        ("t5", None, {"target_modules": ["q", "wi"], "bias": "lora_only"}),
        ("qwen2", None, {"target_modules": ["q_proj"], "layers_to_transform": 1, "trainable_token_indices": [3]}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "adalora", task, device="cpu", total_step=10, **options)


def test_r_is_ignored_as_peft_ignores_it() -> None:
    adaptation = ours("llama", "adalora", r=64)
    assert adaptation.num_trainable == ours("llama", "adalora").num_trainable
    assert "init_r=12" in adaptation.notes[0]


def test_a_schedule_leaves_steps_to_allocate_ranks_in() -> None:
    """As peft's config does (tuners/adalora/config.py, `__post_init__`)."""
    schedule = {"tinit": 6, "tfinal": 3}
    with pytest.raises(ValueError, match="don't allow for a budgeting phase"):
        AdaLoraConfig(total_step=9, **schedule)
    with pytest.raises(InputError, match=r"total_step: 9 is not valid; accepted: more than tinit \(6\) \+ tfinal \(3\)"):
        ours("llama", "adalora", total_step=9, **schedule)
    assert ours("llama", "adalora", total_step=10, **schedule).added == ours("llama", "adalora").added


def test_refused() -> None:
    with pytest.raises(RefusedError, match="does not support DoRA"):
        ours("llama", "adalora", use_dora=True)
    with pytest.raises(NeedsPeftError, match="target_parameters"):
        ours("mixtral", "adalora", target_parameters=["down_proj"])
