"""Real steps of real models on the CPU, the double counting in CUDA's place: what is read in which phase, and its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.measure.tiny import TINY

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch

import peftplan
from peftplan.accuracy.jsonl import append, read
from peftplan.accuracy.records import Record
from peftplan.errors import InputError, RefusedError
from peftplan.job.prepare import prepare
from peftplan.measure import cuda
from peftplan.measure.identity import key, run_of
from peftplan.measure.model import make
from peftplan.measure.record import record_of
from peftplan.measure.run import Outcome, measure
from tests.measure.double import CONTEXT, Double

SEQ_LEN = 64
VOCAB, HIDDEN, MLP, KV, LAYERS = 512, 64, 128, 32, 2
# q, o: 64×64; k, v: 32×64; gate, up, down: 128×64; two norms; embedding, head and the last norm
PARAMETERS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * MLP * HIDDEN + 2 * HIDDEN) + 2 * VOCAB * HIDDEN + HIDDEN
# all seven linears: in + out of each, times r 8
LORA_R8 = 8 * LAYERS * (4 * HIDDEN + 2 * (HIDDEN + KV) + 3 * (HIDDEN + MLP))


@pytest.fixture(autouse=True)
def _in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the double sees this thread's operations only


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as device:
        yield device


def measured(device: Any, config: dict[str, Any] | None = None, **options: Any) -> tuple[Outcome, Record]:
    job = prepare(config or TINY, seq_len=SEQ_LEN, **options)
    outcome = measure(job, device)
    return outcome, record_of(job, outcome, device)


def test_phases_of_every_step_in_order(double: Double) -> None:
    outcome, record = measured(double, method="lora", gradient_accumulation_steps=2)
    assert outcome.error is None
    of_step = ("forward", "backward", "forward", "backward", "step")
    assert [(f.step, f.phase) for f in outcome.figures] == [(0, "load"), *((s, p) for s in (1, 2, 3) for p in of_step)]
    assert double.synchronized >= len(outcome.figures)
    assert len(record.steps) == len(outcome.figures)


def test_the_steady_steps_are_steady(double: Double) -> None:
    outcome, _ = measured(double, method="lora")
    second, third = ([(f.phase, f.allocated, f.allocated_after) for f in outcome.figures if f.step == n] for n in (2, 3))
    assert second == third


def test_full_fine_tuning_by_hand(double: Double) -> None:
    """fp32 weights, AdamW, a plain loop: after the first step weights (4 B) and two states (8 B) are alive, after backward the
    gradients (4 B) too. A parameter has a step counter (512 B on the device here); 9 per layer and 3 beside them. The five norms'
    256 B take 512 each time."""
    outcome, record = measured(double, method="full", trainer="plain", dtype="fp32", keep_outputs=False)
    after = {(f.step, f.phase): f.allocated_after for f in outcome.figures}
    counters, rounding = 512 * (9 * LAYERS + 3), 256 * (2 * LAYERS + 1)
    assert after[2, "backward"] - after[1, "step"] == 4 * PARAMETERS + rounding
    assert after[2, "step"] == after[1, "step"]
    batch_and_rope = 4 * 512 * 8
    assert 0 <= after[1, "step"] - 12 * PARAMETERS - 3 * rounding - counters <= batch_and_rope
    assert (record.counts.trainable, record.counts.total) == (PARAMETERS, PARAMETERS)


def test_lora_counts_and_gradients_by_hand(double: Double) -> None:
    outcome, record = measured(double, method="lora")
    assert (record.counts.trainable, record.counts.total) == (LORA_R8, PARAMETERS + LORA_R8)
    after = {(f.step, f.phase): f.allocated_after for f in outcome.figures}
    assert after[2, "backward"] - after[1, "step"] == 4 * LORA_R8  # fp32


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora", "gradient_checkpointing": False},
        {"method": "lora", "trainer": "plain", "optim": "adamw_torch_fused"},
        {"method": "qlora"},
        {"method": "dora"},
        {"method": "lora-fa"},
        {"method": "lora", "optim": "adafactor", "gradient_accumulation_steps": 2},
        {"method": "ia3", "padding": True, "attn_implementation": "eager"},
        {"method": "full", "trainer": "plain", "optim": "sgd"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_trace_engine_says_the_same(double: Double, options: dict[str, Any]) -> None:
    """Two engines, one loop: fake tensors against real ones, within 1 % (nearly all within 0.2 %, scalars in blocks of 512 B).

    The trace adds cuBLAS's two workspaces. Left out is what a CPU does otherwise: foreach optimizers and dropout (whole
    temporaries, a mask of the input's dtype), TRL's chunks (fp32 copies of tiles), int8 products.
    """
    outcome, record = measured(double, **options)
    assert outcome.error is None
    traced = peftplan.estimate(TINY, seq_len=SEQ_LEN, engine="trace", gpu="a100-80gb", **options)
    assert traced.peaks is not None
    assert record.counts.trainable == traced.trainable_parameters
    for phase in ("forward", "backward", "step"):
        workspaces = traced.peaks.ledgers[phase].bytes(["workspaces"])
        ours = record.peaks.by_phase[phase].allocated  # type: ignore[index]
        assert ours is not None
        assert ours == pytest.approx(traced.peaks.by_phase[phase] - workspaces, rel=0.01), phase


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"trainer": "plain"}, ("outputs", "kv cache")),
        ({"trainer": "plain", "use_cache": False, "keep_gradients": True}, ("outputs", "gradients")),
        ({}, ()),
    ],
    ids=["plain", "gradients", "trainer"],
)
def test_what_was_kept_alive_is_said_and_seen(double: Double, options: dict[str, Any], kept: tuple[str, ...]) -> None:
    outcome, record = measured(double, method="lora", **options)
    assert record.kept_alive == kept
    after = {(f.step, f.phase): f.allocated_after for f in outcome.figures}
    logits = 2 * SEQ_LEN * VOCAB
    left_by_backward = after[2, "backward"] - after[1, "step"]
    alive = (logits + 512) * ("outputs" in kept) + 4 * LORA_R8 * ("gradients" not in kept)
    cache = 2 * 2 * LAYERS * SEQ_LEN * KV * ("kv cache" in kept)
    assert left_by_backward == alive + cache


def test_quantized_layers_are_really_quantized(double: Double) -> None:
    built = make(prepare(TINY, method="qlora"), torch.device("cpu"))
    packed = [
        m for m in built.base.modules() if type(m).__name__ == "Linear4bit" and type(m).__module__.startswith("bitsandbytes")
    ]
    assert len(packed) == 7 * LAYERS
    assert all(m.weight.dtype == torch.uint8 and m.weight.quant_state.nested for m in packed)
    assert built.base.lm_head.weight.dtype == torch.float32  # kbit preparation
    # half a byte per weight of the seven linears
    stored = sum(m.weight.untyped_storage().nbytes() for m in packed)
    assert stored == LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * MLP * HIDDEN) // 2


def test_weights_are_random_and_ties_are_kept() -> None:
    built = make(prepare({**TINY, "tie_word_embeddings": True}, method="lora"), torch.device("cpu"))
    base = built.base
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert 0.01 < float(base.model.embed_tokens.weight.float().std()) < 0.03
    # the rotary table is the real one: 1 / 10000^(2i/16)
    assert base.model.rotary_emb.inv_freq[1] == pytest.approx(10000 ** (-2 / 16))


BOTH_SIDES = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu",
    "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 512,
}  # fmt: skip


def test_a_head_that_the_config_states_is_not_tied() -> None:
    """transformers' loader ties two tensors of the same values, which T5 1.1 and Flan-T5 do not ship."""
    base = make(prepare({**BOTH_SIDES, "tie_word_embeddings": False}, method="lora"), torch.device("cpu")).base
    assert base.lm_head.weight is not base.shared.weight


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TINY, {"method": "lora", "trainer": "trl"}),
        (TINY, {"method": "qlora", "trainer": "trl"}),
        (TINY, {"method": "dora", "lora_dropout": 0.1}),
        (TINY, {"method": "prefix-tuning", "num_virtual_tokens": 4, "gradient_checkpointing": False}),
        (TINY, {"method": "adalora", "dtype": "fp32"}),  # on a 16-bit base peft trains `ranknum` by accident
        (TINY, {"method": "lora", "optim": "adafactor", "use_reentrant": True}),
        (TINY, {"method": "lora", "optim": "paged_adamw_8bit", "quant": "int8"}),
        (TINY, {"method": "lora-fa", "dtype": "fp16", "autocast": "fp16"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "method" in value else None,
)
def test_what_else_runs(double: Double, config: dict[str, Any], options: dict[str, Any]) -> None:
    outcome, record = measured(double, config, **options)
    assert outcome.error is None
    expected = peftplan.estimate(config, seq_len=SEQ_LEN, **options)
    assert (record.counts.trainable, record.counts.total) == (expected.trainable_parameters, expected.total_parameters)


def test_an_encoder_both_sides_and_a_mixture_run(double: Double) -> None:
    encoder = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 64, "type_vocab_size": 2,
    }  # fmt: skip
    outcome, record = measured(double, encoder, method="lora", padding=True, task_type="SEQ_CLS", num_labels=3)
    assert outcome.error is None
    assert record.run.options["num_labels"] == 3
    outcome, _ = measured(double, BOTH_SIDES, method="lora", gradient_checkpointing=False)
    assert outcome.error is None
    mixture = {
        **TINY, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    outcome, _ = measured(double, mixture, method="lora", target_modules="attention")
    assert outcome.error is None


def test_out_of_memory_is_a_record(tmp_path: Path) -> None:
    """The card holds the loaded model but not a forward over 64 × 64 tokens of 512 words in fp32 (8 MiB of logits)."""
    with Double(capacity=10 * 2**20) as double:
        job = prepare(TINY, method="lora", seq_len=64, batch_size=64)
        outcome = measure(job, double)
        record = record_of(job, outcome, double)
    assert record.outcome == "oom"
    assert record.error is not None
    assert record.error.startswith("forward: OutOfMemoryError: CUDA out of memory. Tried to allocate")
    assert "\n" not in record.error
    assert record.peaks.overall.allocated is not None
    assert record.peaks.overall.allocated <= 10 * 2**20
    append(tmp_path / "runs.jsonl", [record])
    assert read(tmp_path / "runs.jsonl") == [record]


def test_any_other_failure_is_a_record(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no\nsuch kernel")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", broken)
    outcome, record = measured(double, method="full", trainer="plain")
    assert (outcome.outcome, record.error) == ("failed", "forward: ValueError: no")
    assert record.counts.trainable == PARAMETERS


def test_the_record_asks_peftplan_the_same_question(double: Double, tmp_path: Path) -> None:
    job = prepare("pythia-14m", method="qlora", r=4, target_modules="query_key_value", seq_len=32)
    record = record_of(job, measure(job, double), double)
    append(tmp_path / "runs.jsonl", [record])
    (again,) = read(tmp_path / "runs.jsonl")
    assert again == record
    estimate = peftplan.estimate(again.run.model, **again.run.arguments())
    assert estimate.trainable_parameters == record.counts.trainable
    assert key(run_of(prepare(again.run.model, **again.run.arguments()))) == key(record.run)
    older = {name: value for name, value in record.run.options.items() if name != "device_map"}
    assert key(record.run.model_copy(update={"options": older})) == key(record.run)
    facts = record.circumstances
    assert (facts.gpu_id, facts.compute_capability, facts.versions["torch"]) == ("a100-80gb", "8.0", torch.__version__)


@pytest.mark.parametrize("known", [True, False])
def test_the_drivers_figure_is_the_process_or_what_it_added(known: bool) -> None:
    with Double(process_known=known) as double:
        _, record = measured(double, method="lora")
    assert record.peaks.context_bytes == CONTEXT
    assert record.peaks.device_bytes == CONTEXT + record.peaks.overall.reserved  # type: ignore[operator]


def test_the_snapshot_is_saved(double: Double, tmp_path: Path) -> None:
    measure(prepare(TINY, method="lora", seq_len=8), double, snapshot=tmp_path / "memory.pickle")
    assert double.saved == [tmp_path / "memory.pickle"]


def test_counts_that_make_no_sense_and_what_cannot_run_are_refused(double: Double) -> None:
    job = prepare(TINY, method="lora", seq_len=8)
    for warmup, steps in ((0, 0), (-1, 2)):
        with pytest.raises(InputError, match="steps"):
            measure(job, double, warmup=warmup, steps=steps)
    with pytest.raises(RefusedError, match="gptq cannot be measured"):
        measure(prepare(TINY, method="lora", quant="gptq", quant_bits=4, quant_group_size=64), double)


def test_without_cuda_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(cuda.NoCudaError, match="measure needs a CUDA GPU"):
        cuda.open_device()


def test_the_double_answers_all_that_a_device_is_asked() -> None:
    """The double and the real class have every method of the protocol, with the same arguments."""
    import inspect

    for name, method in inspect.getmembers(cuda.Device, inspect.isfunction):
        if not name.startswith("_"):
            wanted = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(cuda.Cuda, name)).parameters) == wanted, name
            assert list(inspect.signature(getattr(Double, name)).parameters) == wanted, name
