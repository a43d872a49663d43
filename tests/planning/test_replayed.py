"""An estimate as torch's allocator counts it: tails of blocks, in lines; loading tensor by tensor, as the trace engine loads."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.memory.ledger import Ledger, Line
from peftplan.planning.result import PHASES, Peaks
from peftplan.units import MIB

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def peaks(**options: Any) -> Peaks:
    found = peftplan.estimate(SMALL, **{"seq_len": 128, **options}).peaks
    assert found is not None
    return found


def test_a_tail_is_a_line_by_hand() -> None:
    ledger = Ledger((Line("weight", "weights", "bf16", (1024, 1024), 1, "hand"),))
    assert ledger.with_tails(2 * MIB) is ledger
    assert ledger.with_tails(3 * MIB).bytes(["temporaries"]) == MIB


def test_lines_add_up_before_and_after() -> None:
    instant = peaks(method="lora")
    for found in (instant, instant.replayed):
        assert {phase: found.ledgers[phase].bytes() for phase in PHASES} == found.by_phase
    assert all(instant.replayed.by_phase[phase] >= instant.by_phase[phase] for phase in PHASES)
    assert (instant.reserved, instant.replayed.replayed) == (None, instant.replayed)


def test_json_is_replayed() -> None:
    estimate = peftplan.estimate(SMALL, method="lora", seq_len=128, gpu="a100-80gb")
    memory, replayed = estimate.to_dict()["memory"], estimate.replayed().peaks
    assert replayed is not None
    assert (memory["peak_by_phase"], memory["peak_reserved"]) == (replayed.by_phase, replayed.reserved)
    assert sum(line["bytes"] for line in memory["lines"]) == memory["peak_allocated"]
    (verdict,) = estimate.gpus
    assert verdict.headroom_bytes == verdict.usable_bytes - replayed.reserved - verdict.context_bytes  # type: ignore[operator]


def test_weights_of_five_mebibytes_by_hand() -> None:
    """Three of 5.5 MiB fill a segment of 20 MiB up to 3.5 MiB, which stay free; 19.5 MiB in one leave a tail of half a MiB."""
    from peftplan.memory.allocator.core import Allocator

    allocator = Allocator()
    for number in range(3):
        allocator.malloc(number, 11 * MIB // 2)
    assert (allocator.allocated, allocator.reserved) == (33 * MIB // 2, 20 * MIB)
    other = Allocator()
    other.malloc(0, 39 * MIB // 2)
    assert other.allocated == 20 * MIB


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full", "dtype": "fp32"},
        {"method": "lora", "dtype": "bf16"},
        {"method": "qlora"},
        {"method": "qlora", "double_quant": False, "kbit_prepare": False},
        {"method": "lora", "quant": "int8"},
    ],
    ids=["full", "lora", "qlora", "nf4", "int8"],
)
def test_loading_is_the_traces_to_the_byte(options: dict[str, Any]) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    assert peaks(**options).replayed.by_phase["load"] == peaks(engine="trace", **options).by_phase["load"]
