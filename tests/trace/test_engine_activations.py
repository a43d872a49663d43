"""What one more layer keeps for backward, against sums over named tensors.

Letters: h hidden, i MLP width, kv key/value width, a heads, r rank; bytes per token of one layer.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peftplan.trace.events.peaks import alive_at
from tests.trace.engine_case import ALL_LINEAR, HEADS, HIDDEN, KV, MLP, llama, lora, traced

h, i, kv, a, r = HIDDEN, MLP, KV, HEADS, 8
TOKENS = 2 * 512
RNG = 2 * 512 / TOKENS
"""Flash attention's random state: two tensors per layer, of 16 and 8 bytes, each rounded to 512."""

# two norms' fp32 inputs 8h and rstd 8; q and output 4h; k, v 4kv; logsumexp 4a; gate, act, up 6i
COMMON = 8 * h + 8 + 4 * h + 4 * kv + 4 * a + 6 * i + RNG
INPUTS = 6 * h + i
"""Σ in_features of the seven linear layers."""
ADAPTER = r * (2 * 2 * h + 2 * (h + kv) + 3 * (h + i))
"""LoRA's parameters of one layer: q, o (h + h), k, v (h + kv), gate, up, down (h + i), each times r."""


def kept_by_a_layer(peft_config: dict[str, Any] | None, **options: Any) -> float:
    """Bytes per token alive when the steady forward ends, of three layers less two."""
    at_depth = []
    for layers in (2, 3):
        trace = traced(
            llama(layers),
            peft_config,
            **{"trainer": "transformers", "gradient_checkpointing": False, "autocast": "none", **options},
            seq_len=512,
            batch_size=2,
        )
        end = next(window.end for window in trace.windows if window.phase == "forward")
        at_depth.append(
            sum(group.bytes for group in alive_at(trace.log, end) if group.category in ("activations", "temporaries"))
        )
    return (at_depth[1] - at_depth[0]) / TOKENS


@pytest.mark.parametrize(
    ("peft_config", "options", "expected"),
    [
        pytest.param(
            None, {}, COMMON + 8 * h + 2 * i, id="full"
        ),  # inputs of qkv and gate/up, normed 2h each; of o 2h, of down 2i
        pytest.param(lora(), {"adapter_dtype": "bf16"}, COMMON + 4 * h + 2 * i + 7 * 2 * r, id="bf16 adapters"),
        pytest.param(lora(), {}, COMMON + 4 * INPUTS + 7 * 4 * r, id="fp32 adapters"),
        pytest.param(
            lora(), {"autocast": "bf16"}, COMMON + 2 * INPUTS + 7 * 2 * r + 2 * ADAPTER / TOKENS, id="fp32 adapters, autocast"
        ),
        pytest.param(lora(lora_dropout=0.1), {}, COMMON + 4 * INPUTS + INPUTS + 7 * 4 * r, id="dropout, mask of 1 byte"),
        pytest.param(lora(), {"gradient_checkpointing": True}, 2 * h, id="checkpointed"),
        # expanded keys and values, 2(h − kv) each; padded mask as a 2-byte float, s per token (b × 1 × s × s over b × s tokens);
        # the memory-efficient kernel, which takes masks, keeps no random state
        pytest.param(
            lora(ALL_LINEAR), {"padding": True}, COMMON - RNG + 4 * INPUTS + 7 * 4 * r + 4 * (h - kv) + 2 * 512, id="padding"
        ),
    ],
)
def test_kept_by_a_layer(peft_config: dict[str, Any] | None, options: dict[str, Any], expected: float) -> None:
    assert kept_by_a_layer(peft_config, **options) == expected
