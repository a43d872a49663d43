"""Inputs of checkpointed layers that wait on the host, in the analytic engine: hand sums, and the trace."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from peftplan import estimate
from peftplan.rehearse import rehearse
from tests.memory.engines import LLAMA, TOLERANCE, by_phase, phases, shallow
from tests.memory.families import T5

BATCH, TOKENS, LAYERS = 2, 128, 5
STATES = 2 * BATCH * TOKENS * LLAMA["hidden_size"]
"""Bytes of one layer's hidden states in bf16: a power of two."""


PROGRAM = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(**{config})).to(torch.bfloat16).cuda().train()
model.activation_checkpointing_enable(activation_checkpointing_kwargs={{"use_reentrant": False}}, offload=True)
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(0, 100, ({batch}, {tokens})).cuda()
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_the_forward_keeps_none_and_the_host_keeps_all() -> None:
    """The first layer's input is the embedding, which its own leaf keeps: 4 of 5 go, and 5 wait on the host."""
    options: dict[str, Any] = {"method": "lora", "batch_size": BATCH, "seq_len": TOKENS}
    here, away = (phases(LLAMA, "analytic", **options, offload_checkpoints=x) for x in (False, True))
    assert here["forward"] - away["forward"] == (LAYERS - 1) * STATES
    assert (away["load"], away["step"]) == (here["load"], here["step"])
    assert estimate(LLAMA, **options, offload_checkpoints=True).assumptions["offloaded_bytes"] == LAYERS * STATES
    assert estimate(LLAMA, **options, offload_checkpoints=True, every_n_layers=2).assumptions["offloaded_bytes"] == 3 * STATES
    assert "offloaded_bytes" not in estimate(LLAMA, **options).assumptions


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (LLAMA, {"method": "qlora"}),
        (LLAMA, {"method": "lora", "every_n_layers": 2, "use_reentrant": True, "gradient_accumulation_steps": 2}),
        ("gpt2", {"method": "full", "attn_implementation": "eager"}),
        ({**T5, "num_layers": 4, "num_decoder_layers": 4}, {"method": "lora"}),
        ("bert-base-uncased", {"method": "lora", "padding": True, "every_n_layers": 3}),
        ("deberta-v3-base", {"method": "full", "task_type": "SEQ_CLS", "num_labels": 3}),  # it holds what every layer returns
    ],
)
def test_both_engines_agree(model: Any, options: dict[str, Any]) -> None:
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    config = shallow(model, 4) if isinstance(model, str) else model
    job = {"batch_size": BATCH, "seq_len": TOKENS, "offload_checkpoints": True, **options}
    analytic, traced = (estimate(config, engine=engine, **job) for engine in ("analytic", "trace"))
    for phase, expected in by_phase(traced).items():
        assert by_phase(analytic)[phase] == pytest.approx(expected, rel=TOLERANCE), phase
    assert analytic.assumptions["offloaded_bytes"] == traced.assumptions["offloaded_bytes"]


@pytest.mark.parametrize(("tokens", "block"), [(256, 2**19), (384, 2**20), (257, 2**20)])
def test_the_host_holds_pinned_blocks_of_a_power_of_two(tokens: int, block: int) -> None:
    """A layer's input of 2 × 256 × 512 in bf16 fills a block; one token more, and every block is twice as large."""
    config = {**LLAMA, "hidden_size": 512}
    options: dict[str, Any] = {"method": "full", "optim": "adamw_bnb_8bit", "gradient_checkpointing": True}
    result = estimate(config, **options, batch_size=2, seq_len=tokens, offload_checkpoints=True)
    assert result.assumptions["offloaded_bytes"] == result.host.offloaded == LAYERS * block  # type: ignore[union-attr]


@pytest.mark.parametrize(("batch", "tokens", "hidden"), [(4, 256, 512), (4, 256, 768), (1, 300, 640)])
@pytest.mark.rehearse
def test_a_rehearsed_step_pins_as_much(tmp_path: Path, batch: int, tokens: int, hidden: int) -> None:
    """`cudaHostAlloc` is asked for these bytes by torch's own allocator of pinned memory."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    config = {**LLAMA, "hidden_size": hidden}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(config=config, batch=batch, tokens=tokens), encoding="utf-8")
    (rank,) = rehearse([sys.executable, str(program)], gpu="l4").to_dict()["ranks"]
    options: dict[str, Any] = {"method": "full", "trainer": "plain", "dtype": "bf16", "autocast": "none", "optim": "adamw_torch"}
    result = estimate(config, **options, gradient_checkpointing=True, batch_size=batch, seq_len=tokens, offload_checkpoints=True)
    assert rank["host"]["pinned"] == result.assumptions["offloaded_bytes"]
