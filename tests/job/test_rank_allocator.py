"""AdaLoRA's `init_r` against its `target_r`: peft's own allocator on a real model, a few steps on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
import transformers

import peftplan
from peftplan.errors import RefusedError

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 50,
}  # fmt: skip
LOOP: dict[str, Any] = {"trainer": "plain", "seq_len": 16}
"""A loop calls `update_and_allocate`."""
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}


def steps(init_r: int, target_r: int) -> None:
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=init_r, target_r=target_r, tinit=1, tfinal=1, total_step=4
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), config)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    for step in range(1, 4):
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.base_model.update_and_allocate(step)


@pytest.mark.parametrize(("init_r", "target_r"), [(12, 8), (9, 8), (8, 8), (4, 8), (4, 3)])
def test_an_estimate_is_refused_where_the_allocator_fails(init_r: int, target_r: int) -> None:
    fails = init_r <= target_r
    if fails:
        with pytest.raises(RuntimeError, match="kthvalue"):
            steps(init_r, target_r)
    else:
        steps(init_r, target_r)
    options: dict[str, Any] = {"init_r": init_r, "target_r": target_r, "target_modules": ("q_proj",)}
    raw = {"peft_type": "ADALORA", "task_type": "CAUSAL_LM", "init_r": init_r, "target_r": target_r, "target_modules": ["q_proj"]}
    for engine in ("analytic", "trace"):
        for how in ({"method": "adalora", **options}, {"peft_config": raw}):
            assert peftplan.estimate(LLAMA, engine=engine, seq_len=16, **how).peaks.allocated  # Trainer does not call it
            if fails:
                with pytest.raises(RefusedError, match=f"init_r: {init_r} .* target_r {target_r},.*accepted: an init_r above"):
                    peftplan.estimate(LLAMA, engine=engine, **how, **LOOP)
            else:
                assert peftplan.estimate(LLAMA, engine=engine, **how, **LOOP).peaks.allocated


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_boft_says_that_more_factors_need_the_extension(engine: str) -> None:
    """`get_fbd_cuda` of peft, which falls back to one factor."""
    estimate = peftplan.estimate(
        LLAMA, method="boft", boft_n_butterfly_factor=2, target_modules=("q_proj",), seq_len=16, engine=engine
    )
    assert "above 1 needs peft's CUDA extension" in str(estimate.assumptions["notes"])
