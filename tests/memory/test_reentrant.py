"""Reentrant checkpointing: torch's own rules on a tape, peaks against the trace of real classes, and what torch refuses."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import RefusedError
from peftplan.tape import ops
from peftplan.tape.reentrant import Leaf, checkpoint
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter, Tensor
from tests.memory.engines import BATCH, LLAMA, TOKENS, phases
from tests.memory.families import GPT2, T5

REENTRANT: dict[str, Any] = {"gradient_checkpointing": True, "use_reentrant": True}
BLOOM = {"model_type": "bloom", "hidden_size": 256, "n_layer": 4, "n_head": 16, "vocab_size": 500}
BART = {
    "model_type": "bart",
    "max_position_embeddings": 512,
    "d_model": 256,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 640,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "vocab_size": 500,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "is_encoder_decoder": True,
}
GPTJ = {"model_type": "gptj", "n_embd": 256, "n_head": 8, "n_layer": 4, "rotary_dim": 16, "vocab_size": 500, "n_positions": 512}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "micro batches under autocast": (
        LLAMA,
        {"method": "lora", "trainer": "transformers", "dtype": "fp32", "gradient_accumulation_steps": 2},
    ),
    "a mask by position": (GPT2, {"method": "full", "trainer": "plain", "attn_implementation": "eager", "padding": True}),
    "casts of gradients": (GPTJ, {"method": "full", "trainer": "transformers"}),
    "attention weights as results": (BLOOM, {"method": "lora", "trainer": "plain", "attn_implementation": "eager"}),
    "states of an encoder": (BART, {"method": "full", "trainer": "transformers", "attn_implementation": "eager"}),
    "positions that layers hand on": (T5 | {"num_layers": 4, "num_decoder_layers": 4}, {"method": "full", "trainer": "plain"}),
    "positions of a frozen table": (T5, {"method": "lora", "trainer": "transformers", "attn_implementation": "eager"}),
}
SAME = 0.002
"""Lists of small integers and scalars, which only the trace has."""


@pytest.mark.parametrize("job", JOBS)
def test_peaks_of_each_phase_are_those_of_the_trace(job: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config, options = JOBS[job]
    analytic, traced = (phases(config, engine, **options, **REENTRANT) for engine in ("analytic", "trace"))
    for phase, nbytes in traced.items():
        assert analytic[phase] == pytest.approx(nbytes, rel=SAME), phase


def test_the_gradient_of_a_layers_output_stays_until_the_layer_is_done() -> None:
    """As on a real model on the CPU (tests/trace/test_checkpointing.py)."""
    options = {"method": "full", "trainer": "plain", "gradient_checkpointing": True, "keep_outputs": False, "use_cache": False}
    without, reentrant = (phases(LLAMA, "analytic", **options, use_reentrant=on) for on in (False, True))
    assert reentrant["backward"] - without["backward"] == 2 * BATCH * TOKENS * 256  # bf16 hidden states


def half(f: Tape, x: Tensor) -> Tensor:
    """Two operations: the first keeps its input, the second its result."""
    return ops.keeps_output(f, ops.keeps_input(f, x, "gelu"), "tanh")


def leaf(f: Tape, *dims: int) -> Tensor:
    x = f.new(dims, "fp32", "input")
    x.node = Leaf(dims, "fp32")
    return x


def most_alive(f: Tape) -> int:
    level = most = 0
    for number in f.log:
        level += 1 if number > 0 else -1
        most = max(most, level)
    return most


def test_the_forward_keeps_the_input_alone() -> None:
    f = Tape()
    x = leaf(f, 8)
    out = checkpoint(f, half, f, x)
    assert [n for n in f.log if n > 0 and -n not in f.log] == [x.storage.number, out.storage.number]  # type: ignore[union-attr]


def test_the_backward_holds_the_results_and_their_gradients() -> None:
    f = Tape()
    x = leaf(f, 8)
    f.backward(checkpoint(f, half, f, x))
    # input, gradient of the output, gelu's and tanh's results again, gradients of tanh and of gelu; the first output, which no
    # name holds but the caller's, has gone
    assert most_alive(f) == 6
    assert x.node.grad is not None  # type: ignore[union-attr]


def test_a_result_that_nothing_reads_gets_a_gradient_of_zeros() -> None:
    f = Tape()
    x = leaf(f, 8)
    out, _ = checkpoint(f, lambda x: (half(f, x), ops.keeps_input(f, x, "gelu")), x)
    f.backward(out)
    assert [f.names[n] for n in f.log if n > 0].count("zeros") == 1


def test_what_a_layer_reads_by_name_has_its_backward_run_by_each_call() -> None:
    f = Tape()
    weight = Parameter("weight", (8,), "fp32", trainable=True)
    outside = ops.mul(f, leaf(f, 8), weight)
    x = leaf(f, 8)
    once = checkpoint(f, lambda x: ops.mul(f, x, outside), x)
    twice = checkpoint(f, lambda x: ops.mul(f, x, outside), once)
    with pytest.raises(RefusedError, match="backward through the graph a second time"):
        f.backward(twice)


def test_deberta_is_refused_where_its_positions_train() -> None:
    job: dict[str, Any] = {"method": "full", "task_type": "SEQ_CLS", "num_labels": 3, "seq_len": 64, **REENTRANT}
    with pytest.raises(RefusedError, match="Trying to backward through the graph a second time"):
        estimate("deberta-v3-base", attn_implementation="eager", **job)


def test_what_gets_no_gradient_has_no_state() -> None:
    """Nothing before a ViT's layers asks for a gradient where bitsandbytes quantized it: its head alone trains."""
    job: dict[str, Any] = {"method": "qlora", "r": 8, "task_type": "IMAGE_CLS", "num_labels": 10, "optim": "adamw_torch"}
    with_states = []
    for use_reentrant in (False, True):
        peaks = estimate("vit-base-patch16-224-in21k", **job, gradient_checkpointing=True, use_reentrant=use_reentrant).peaks
        assert peaks is not None
        with_states.append(
            {line.name.rpartition(".")[0] for line in peaks.ledgers["step"] if line.category == "optimizer_states"}
        )
    assert with_states[1] == {name for name in with_states[0] if name.startswith("classifier")} < with_states[0]


def test_a_quantized_model_that_reads_no_text_has_nothing_that_asks_for_a_gradient() -> None:
    """transformers and peft let the inputs of models of text alone, or of dense ones, ask for gradients."""
    with pytest.raises(RefusedError, match="element 0 of tensors does not require grad"):
        estimate("whisper-tiny", method="qlora", seq_len=64, **REENTRANT)
