"""What no engine can do is said by both in the same words."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.sources import load_config
from peftplan.storage import FORMATS

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
TRAINED = [name for name, known in FORMATS.items() if known.untrainable is None]
OF_BITSANDBYTES = {"nf4", "fp4", "int8"}
BY_FORMULA = {"gptq"}
"""Formats whose kernels a trace does not run."""


@pytest.mark.parametrize("quant", TRAINED)
def test_a_format_has_a_peak_in_both_engines_or_a_trace_says_why_not(quant: str) -> None:
    pytest.importorskip("transformers")
    analytic = peftplan.estimate(LLAMA, quant=quant, seq_len=32)
    if quant in OF_BITSANDBYTES:
        assert analytic.peaks.allocated
        assert peftplan.estimate(LLAMA, quant=quant, seq_len=32, engine="trace").peaks.allocated
        return
    with pytest.raises(RefusedError, match=f"^a step with {quant} layers: ") as refused:
        peftplan.estimate(LLAMA, quant=quant, seq_len=32, engine="trace")
    if quant in BY_FORMULA:
        assert analytic.peaks.allocated
        return
    assert analytic.not_modelled[0] == str(refused.value)
    assert "trace" not in str(refused.value)


@pytest.mark.parametrize("name", ["gpt-j-6b", "starcoder", "qwen1.5-moe-a2.7b"])
@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_liger_refuses_a_model_that_it_does_not_patch(name: str, engine: str) -> None:
    """None of them is in `MODEL_TYPE_TO_APPLY_LIGER_FN` of liger-kernel 0.8.5."""
    with pytest.raises(RefusedError, match=r"loss: liger-kernel 0\.8\.5 patches no \w+ models; accepted: full, trl-chunked"):
        peftplan.estimate(name, loss="liger", engine=engine)


def test_liger_traces_the_last_token_alone() -> None:
    """The chunk of one row of logits: 1 token; of none there is no chunk."""
    pytest.importorskip("transformers")
    deepseek: dict[str, Any] = {**load_config("deepseek-v2-lite"), "num_hidden_layers": 2}
    one, two = (peftplan.estimate(deepseek, loss="liger", logits_to_keep=n, seq_len=32, engine="trace") for n in (1, 2))
    assert 0 < (one.peaks.allocated or 0) <= (two.peaks.allocated or 0)
