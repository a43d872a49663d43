"""Logits of the last tokens only: what the real forward makes of `logits_to_keep`, and which models and losses do not take it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from inspect import signature

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peftplan import estimate
from peftplan.arch.readers import READERS
from peftplan.errors import InputError, RefusedError
from peftplan.job.tasks import ALWAYS_ALL_LOGITS
from peftplan.trace.steps import STEPS
from tests.trace.engine_case import HIDDEN, VOCAB, llama, lora, traced

B, S, N = 3, 128, 40
SIZES = {"batch_size": B, "seq_len": S}
SMALL: dict[str, Any] = {
    "d_model": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "vocab_size": 200,
}


def logits(trace: Any, phase: str) -> int:
    return int(trace.by_category(phase)["logits"])


def test_there_are_so_many_rows_of_logits() -> None:
    """bf16 logits, their fp32 copy and fp32 log probabilities; in backward the copy is gone, and two gradients are there."""
    config = llama(vocab_size=16 * VOCAB)
    for count in (N, S):
        trace = traced(config, lora(), trainer="plain", logits_to_keep=count, **SIZES)
        assert logits(trace, "forward") == (2 + 4 + 4) * B * count * 16 * VOCAB
        assert logits(trace, "backward") == (2 + 4 + 4 + 4) * B * count * 16 * VOCAB


def test_the_trained_head_keeps_a_copy_of_the_last_hidden_states_of_several_sequences() -> None:
    """Beside all hidden states that the outputs of the inner model hold until forward returns; one sequence's slice is a view."""

    def copies(batch_size: int, peft_config: Any) -> list[Any]:
        trace = traced(llama(), peft_config, trainer="plain", logits_to_keep=N, seq_len=S, batch_size=batch_size)
        return [a for a in trace.peaks["forward"].alive if a.shape == (batch_size, N, HIDDEN)]

    (copy,) = copies(B, None)
    assert (copy.op, copy.dtype, copy.bytes) == ("aten.clone.default", "bf16", 2 * B * N * HIDDEN)
    assert copies(B, lora()) == copies(1, None) == []


def test_the_gradient_of_the_slice_is_as_large_as_the_hidden_states() -> None:
    """Nothing but logits tells a slice of all tokens from no slice, until its backward."""
    options = {"trainer": "plain", "use_cache": False, **SIZES}
    every, kept = (traced(llama(1), None, **options, logits_to_keep=n) for n in (None, S))
    assert every.peak_by_phase["forward"] == kept.peak_by_phase["forward"]
    ops = [[m.storage.op for m in trace.log if m.kind == "alloc"] for trace in (every, kept)]
    before, after = (sum("slice_backward" in op for op in of_run) for of_run in ops)
    assert after - before == STEPS + 1  # full fine-tuning is followed for one step more


def test_liger_takes_a_slice_of_one_sequence() -> None:
    """`LigerForCausalLMLoss` views its hidden states as rows (liger-kernel 0.8.5, transformers/model/loss_utils.py)."""
    one, every = (traced(llama(), lora(), loss="liger", seq_len=S, logits_to_keep=n) for n in (N, None))
    assert one.peak_by_phase["forward"] <= every.peak_by_phase["forward"]
    traced(llama(), lora(), loss="liger", **SIZES, logits_to_keep=S)
    with pytest.raises(
        InputError, match=f"logits_to_keep: {N} is not valid; liger keeps the logits of all tokens, or needs batch_size 1"
    ):
        traced(llama(), lora(), loss="liger", **SIZES, logits_to_keep=N)


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"logits_to_keep": S + 1}, f"accepted: up to {S}, the tokens of a sequence"),
        ({"trainer": "trl"}, "accepted: with loss full or liger, not trl-chunked"),
        ({"trainer": "trl", "loss": "unsloth"}, "accepted: with loss full or liger, not unsloth"),
        ({"trainer": "plain", "loss": "trl-chunked"}, "accepted: with loss full or liger, not trl-chunked"),
        ({"task_type": "SEQ_CLS"}, "the forward of LlamaForSequenceClassification has no such argument"),
    ],
)
@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_what_does_not_take_it_is_refused(options: dict[str, Any], accepted: str, engine: Any) -> None:
    job = {**SIZES, "logits_to_keep": N, **options}
    with pytest.raises(InputError, match=f"logits_to_keep: {job['logits_to_keep']} is not valid; {accepted}"):
        estimate(llama(), engine=engine, **job)


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_at_least_one_is_kept(engine: Any) -> None:
    with pytest.raises(InputError, match=r"logits_to_keep must be at least 1 \(got 0\)"):
        estimate(llama(), engine=engine, **{**SIZES, "logits_to_keep": 0})


def test_labels_of_virtual_tokens_are_too_many() -> None:
    """peft puts theirs before the batch's: b (n + p) labels for b n logits."""
    prompts = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 20}
    with pytest.raises(RefusedError, match=r"Expected input batch_size \(120\) to match target batch_size \(180\)"):
        traced(llama(), prompts, **SIZES, logits_to_keep=N, gradient_checkpointing=False)


def test_a_forward_without_the_argument_is_refused() -> None:
    config = {"model_type": "trocr", "architectures": ["TrOCRForCausalLM"], **SMALL}
    with pytest.raises(InputError, match=f"logits_to_keep: {N} is not valid; the forward of TrOCRFor"):
        traced(config, None, logits_to_keep=N, seq_len=S, attn_implementation="eager")


def test_the_list_of_models_without_the_argument() -> None:
    """Of all model types that the analytic engine knows, and of those on the list."""
    known = {name: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in (*READERS, *ALWAYS_ALL_LOGITS) if name in CAUSAL}
    lacking = {
        name for name, class_name in known.items() if "logits_to_keep" not in signature(_class(class_name).forward).parameters
    }
    assert lacking == set(ALWAYS_ALL_LOGITS)


CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _class(names: Any) -> Any:
    return getattr(transformers, names if isinstance(names, str) else names[0])
