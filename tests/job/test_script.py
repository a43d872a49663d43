"""What a hand-written program does besides its options: both engines, each the other's witness, and sums by hand."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.analytic.instant import InstantPeaks
from peftplan.errors import InputError
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.results.estimate import Estimate

WIDE: dict[str, Any] = {
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
"""Wide enough for every activation to have a segment of its own."""
RUN: dict[str, Any] = {"method": "lora", "r": 8, "trainer": "plain", "use_cache": False, "batch_size": 4, "seq_len": 512}
LORA_FA = {"method": "lora-fa", "target_modules": ["q_proj", "v_proj"]}
QLORA = {"method": "qlora", "trainer": "transformers"}
AGAIN = Script(enables_adapters_again=True)
LOGITS = 2 * 4 * 512 * 32000
"""Bytes of the bf16 logits: 125 MiB."""


def run(script: Script, *, engine: str = "analytic", **changes: Any) -> Estimate:
    options = {name: value for name, value in {**RUN, **changes}.items() if value is not None}
    return peftplan.estimate(WIDE, engine=engine, script=script, **options)  # type: ignore[arg-type]


def reserved(script: Script, **changes: Any) -> int:
    peaks = run(script, **changes).peaks
    assert peaks is not None
    assert peaks.reserved is not None
    return peaks.reserved


def requested(script: Script) -> dict[str, int]:
    """Phase → the bytes that the formulas add up."""
    peaks = run(script).peaks
    assert isinstance(peaks, InstantPeaks)
    return dict(peaks.requested)


def test_without_facts_nothing_changes() -> None:
    assert reserved(Script()) == reserved(Script(earlier_seq_lens=(512,)))


def test_outputs_that_outlive_the_step_are_there_twice() -> None:
    """Two steps of one length: the first's logits stand through the second's forward, in the way of one fp32 copy of them."""
    more = reserved(Script(outputs_outlive_step=True)) - reserved(Script())
    assert LOGITS <= more <= 2 * LOGITS


def test_a_shorter_step_before_leaves_less_behind() -> None:
    outlive = Script(outputs_outlive_step=True)
    assert reserved(Script(outputs_outlive_step=True, earlier_seq_lens=(64,))) < reserved(outlive)
    kept, alone = requested(outlive), requested(Script())
    assert LOGITS <= kept["forward"] - alone["forward"] <= 2 * LOGITS
    assert {**kept, "forward": alone["forward"]} == alone


def test_an_emptied_cache_gives_the_earlier_step_back() -> None:
    """A step four times as long before: without `empty_cache` its segments stay."""
    longer = (2048,)
    kept = reserved(Script(earlier_seq_lens=longer))
    emptied = reserved(Script(earlier_seq_lens=longer, empties_cache=True))
    assert emptied <= kept


def test_repeated_keys_and_values_by_hand() -> None:
    """On a T4 sdpa of grouped heads is the math kernel, with its scores; repeated, it is the memory-efficient one."""
    card = {"gpu": "t4", "dtype": "fp16"}
    grouped, repeated = (run(script, **card).peaks for script in (Script(), Script(repeats_kv=True)))
    assert grouped is not None
    assert repeated is not None
    scores = 2 * 4 * 16 * 512 * 512  # fp16, one layer: 32 MiB
    assert grouped.allocated - repeated.allocated > scores


def test_adapters_enabled_again_by_hand() -> None:
    """A that requires gradients saves its input, an fp32 cast per adapted module: 4 layers x (q_proj and v_proj)."""
    frozen, again = (run(script, **LORA_FA) for script in (Script(), AGAIN))
    assert frozen.peaks is not None
    assert again.peaks is not None
    saved = 4 * 2 * (4 * 512 * 1024 * 4)
    assert again.peaks.requested["forward"] - frozen.peaks.requested["forward"] == saved
    assert again.trainable_parameters == frozen.trainable_parameters
    assert again.peaks.requested["step"] - frozen.peaks.requested["step"] == 4 * 2 * (8 * 1024 * 4)  # gradients of A


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "adalora"])
def test_peft_enables_other_adapters_as_they_were(method: str) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    once, again = (run(script, engine="trace", method=method, r=None).peaks for script in (Script(), AGAIN))
    assert once is not None
    assert again is not None
    assert once.by_phase == again.by_phase


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (Script(outputs_outlive_step=True, earlier_seq_lens=(96,), empties_cache=True), {"padding": True, "use_cache": True}),
        (Script(outputs_outlive_step=True), {}),
        (Script(earlier_seq_lens=(2048,), empties_cache=True), {"gradient_accumulation_steps": 2}),
        (Script(repeats_kv=True), {"gpu": "t4", "dtype": "fp16", "gradient_checkpointing": True}),
        (AGAIN, LORA_FA),
        (AGAIN, {"method": "full", "r": None}),
    ],
    ids=["peft-benchmark", "outlives", "accumulates", "repeats-kv", "lora-fa-again", "full-again"],
)
def test_the_trace_says_the_same(script: Script, changes: dict[str, Any]) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    traced, estimated = (run(script, engine=engine, **changes).peaks for engine in ("trace", "analytic"))
    assert traced is not None
    assert estimated is not None
    assert estimated.by_phase == {phase: pytest.approx(nbytes, rel=0.01) for phase, nbytes in traced.by_phase.items()}
    assert estimated.reserved == pytest.approx(traced.reserved, rel=0.03)


MISTRAL = WIDE | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
THEN = Script.on(transformers="4.39.3", bitsandbytes="0.43.1")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_trace_says_the_same_of_libraries_of_2024(method: str, reentrant: bool) -> None:
    """Rotary tables in each layer, keys and values repeated before flash-attn, inputs of 4-bit products kept."""
    for module in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(module)
    job = {
        "method": method,
        "attn_implementation": "flash_attention_2",
        "use_reentrant": reentrant,
        "batch_size": 2,
        "seq_len": 512,
    }
    config = MISTRAL | {"max_position_embeddings": 8192}
    traced, estimated = (
        peftplan.estimate(config, engine=engine, script=THEN, gpu="a100-80gb", **job).peaks for engine in ("trace", "analytic")
    )
    assert traced is not None
    assert estimated is not None
    assert estimated.by_phase == {phase: pytest.approx(nbytes, rel=0.002) for phase, nbytes in traced.by_phase.items()}
    assert estimated.reserved == pytest.approx(traced.reserved, rel=0.01)


def test_what_libraries_of_2024_kept() -> None:
    """Of QLoRA with 4 layers of Mistral, 4 x 512 tokens. Tables: 2 x 8192 x 64 in bf16 in each layer. No checkpoint sees what
    4-bit products keep: forward keeps their inputs in all layers. Norms are fp32, so q, k, v, gate and up each cast their own.
    bitsandbytes shared the code of its absmax, 256 x 4 bytes, among the seven weights of each layer."""
    config = MISTRAL | {"max_position_embeddings": 8192}
    job = {"method": "qlora", "attn_implementation": "flash_attention_2", "batch_size": 4, "seq_len": 512}
    now, tables, then = (
        peftplan.estimate(config, script=Script.on(**versions), **job)
        for versions in ({}, {"transformers": "4.39.3"}, {"transformers": "4.39.3", "bitsandbytes": "0.43.1"})
    )
    assert tables.persistent_bytes - now.persistent_bytes == 4 * 2 * 8192 * 64 * 2
    assert then.persistent_bytes == tables.persistent_bytes - 4 * 7 * 1024
    assert tables.peaks is not None
    assert then.peaks is not None
    kept = 4 * (4 * 512) * (6 * 1024 + 2816) * 2
    assert then.peaks.requested["forward"] - tables.peaks.requested["forward"] == pytest.approx(kept, rel=0.01)


def test_outputs_that_outlive_their_step_are_gone_before_backward() -> None:
    """The graph of a model in int8 keeps tensors until its outputs go, here more than the gradients of the logits take."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    job = RUN | {"quant": "int8", "batch_size": 1, "seq_len": 128, "script": Script(outputs_outlive_step=True)}
    traced, estimated = (peftplan.estimate("smollm2-135m", engine=engine, **job).peaks for engine in ("trace", "analytic"))
    assert traced is not None
    assert estimated is not None
    assert estimated.by_phase == {phase: pytest.approx(nbytes, rel=0.001) for phase, nbytes in traced.by_phase.items()}


def test_the_outputs_of_an_earlier_step_are_those_of_its_length() -> None:
    """Full fine-tuning is followed a third time, but not behind earlier steps: outputs of this length would stand there."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    script = Script(outputs_outlive_step=True, earlier_seq_lens=(96,))
    traced, estimated = (run(script, engine=engine, method="full", r=None).peaks for engine in ("trace", "analytic"))
    assert traced is not None
    assert estimated is not None
    assert estimated.by_phase["forward"] == pytest.approx(traced.by_phase["forward"], rel=0.001)


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_an_older_loss_copies_the_logits_without_the_last_position(engine: str) -> None:
    """Where the logits decide the forward's peak: bf16, fp32, the copy, its log probabilities; before 4.46 without the first."""
    if engine == "trace":
        for module in ("torch", "transformers", "peft"):
            pytest.importorskip(module)
    releases = ("4.52.4", "4.48.1", "4.45.2")
    padded, shifted, early = (run(Script(transformers=version), engine=engine).peaks for version in releases)
    assert padded is not None
    assert shifted is not None
    assert early is not None
    copy = 2 * LOGITS * 511 / 512
    assert shifted.by_phase["forward"] - padded.by_phase["forward"] == pytest.approx(copy, rel=0.01)
    assert shifted.by_phase["forward"] - early.by_phase["forward"] == pytest.approx(LOGITS, rel=0.01)  # tails of blocks
    assert shifted.by_phase["step"] == pytest.approx(padded.by_phase["step"], rel=0.01)


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_some_classes_read_logits_in_16_bits(engine: str) -> None:
    """transformers 4.48.1, `GPTNeoXForCausalLM.forward`: logits, a copy of all but the last position and its log probabilities
    in bf16. Today: in bf16, in fp32, and log probabilities in fp32. 50,304 x 4 x 512 x (2 + 4 + 4 - 3 x 2 B) more."""
    if engine == "trace":
        for module in ("torch", "transformers", "peft"):
            pytest.importorskip(module)
    job: dict[str, Any] = {"trainer": "transformers", "autocast": "none", "batch_size": 4, "seq_len": 512, "engine": engine}
    today, then = (
        peftplan.estimate("pythia-160m", method="full", script=Script(transformers=version), **job).peaks
        for version in (None, "4.48.1")
    )
    assert today is not None
    assert then is not None
    assert today.by_phase["forward"] - then.by_phase["forward"] == pytest.approx(50_304 * 4 * 512 * 4, rel=0.01)


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_outputs_that_end_with_backward_are_not_there_in_the_step(engine: str) -> None:
    """The step then has what it has without them, and the other phases what they have with them."""
    if engine == "trace":
        for module in ("torch", "transformers", "peft"):
            pytest.importorskip(module)
    kept, freed, ended = (
        run(script, engine=engine, keep_outputs=keep).peaks
        for script, keep in ((Script(), True), (Script(), False), (Script(outputs_end_with_backward=True), True))
    )
    assert kept is not None
    assert freed is not None
    assert ended is not None
    assert ended.by_phase == {**kept.by_phase, "step": freed.by_phase["step"]}
    assert kept.by_phase["step"] > freed.by_phase["step"]


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_an_older_torch_takes_the_lowest_of_equal_free_blocks(engine: str) -> None:
    """Where QLoRA's load leaves several, an MLP's fp32 product then finds no room; what is allocated stays."""
    if engine == "trace":
        for module in ("torch", "transformers", "peft"):
            pytest.importorskip(module)
    today, newer, older = (run(Script(torch=torch), engine=engine, **QLORA) for torch in (None, "2.13.0", "2.12.1"))
    assert today.peaks is not None
    assert newer.peaks is not None
    assert older.peaks is not None
    assert newer.peaks.reserved == today.peaks.reserved
    assert (older.peaks.reserved or 0) - (today.peaks.reserved or 0) == 4 * 512 * 2816 * 4  # one more segment of 22 MiB
    assert older.peaks.by_phase == today.peaks.by_phase
    if engine == "analytic":
        assert older.at(batch_size=4).peaks.reserved == older.peaks.reserved


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_an_older_torch_gives_cublaslt_workspaces_of_its_own(engine: str) -> None:
    """1 MiB in either thread: products with a bias run in backward too, which computes a layer again."""
    if engine == "trace":
        for module in ("torch", "transformers", "peft"):
            pytest.importorskip(module)
    options = {"attention_bias": True, "gradient_checkpointing": True}
    old, new, older = (taken(Script(torch=torch), engine=engine, **options) for torch in ("2.11.0", "2.12.0", "2.9rc1"))
    assert old - new == 2 * 2**20
    assert older == old


def test_what_one_torch_compiled_is_not_taken_for_another() -> None:
    """The same architecture, which a built-in model has: its products have biases, forward and backward."""
    by_torch = [
        peftplan.estimate("bert-base-uncased", script=Script(torch=torch)).peaks for torch in ("2.11.0", "2.12.0", "2.11.0")
    ]
    old, new, again = (peaks.allocated for peaks in by_torch if peaks)
    assert old == again == new + 2 * 2**20


def taken(script: Script, *, attention_bias: bool, **options: Any) -> int:
    """Bytes of workspaces at the peak."""
    estimate = peftplan.estimate({**WIDE, "attention_bias": attention_bias}, script=script, **{**RUN, **options})
    return estimate.ledger.by_category()["workspaces"]


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_an_older_transformers_has_cublas_make_angles_of_positions(engine: str) -> None:
    """Its workspace then lies before the first layer's tensors. A T4 reserved 2,070 MiB with transformers 5.16.1 (data/runs), and
    torch's own allocator reserves 2,236 with 5.24 (`peftplan rehearse`)."""
    if engine == "trace":
        for module in ("torch", "transformers", "peft"):
            pytest.importorskip(module)
    options = {
        "method": "qlora", "r": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "double_quant": False,
        "gpu": "t4", "trainer": "plain", "dtype": "fp16", "adapter_dtype": "fp32", "compute_dtype": "fp16",
        "gradient_checkpointing": True, "attn_implementation": "eager", "batch_size": 2, "seq_len": 512, "use_cache": False,
    }  # fmt: skip
    older, old, today = (
        peftplan.estimate("tinyllama", engine=engine, script=Script(torch="2.10.0", transformers=version), **options).peaks
        for version in ("5.16.1", "5.18.0", "5.19.0")
    )
    assert older is not None
    assert old is not None
    assert today is not None
    assert (older.reserved, old.reserved, today.reserved) == (2070 * 2**20, 2070 * 2**20, 2236 * 2**20)


def test_weights_copied_in_threads_are_said_not_to_be_modelled() -> None:
    """transformers 5.0 to 5.3, where the base is quantized as it is loaded."""
    threads = [
        version
        for version in ("4.57.6", "5.0.0", "5.3.0", "5.4.0", None)
        if any("threads" in left_out for left_out in run(Script(transformers=version), **QLORA).not_modelled)
    ]
    assert threads == ["5.0.0", "5.3.0"]
    assert "threads" not in " ".join(run(Script(transformers="5.0.0")).not_modelled)


def test_a_script_runs_on_a_stack_unless_it_says_another() -> None:
    stack = {"torch": "2.10.0+cu128", "transformers": "5.0.0", "peft": "0.19.1"}
    assert Script().ran_on(stack) == Script(torch="2.10.0+cu128", transformers="5.0.0", freezes_ranknum=True)
    assert Script(torch="2.14").ran_on({**stack, "peft": "0.21.2"}) == Script(torch="2.14", transformers="5.0.0")
    assert Script().ran_on({}) == Script().ran_on({"torch": "main"}) == Script()
    today = Script()
    assert not any((today.cublaslt_apart, today.ties_by_address, today.rotary_by_product, today.loads_in_threads))


def test_a_version_that_somebody_typed_is_a_version_and_an_assumption() -> None:
    assert Script.on(torch=None, transformers=None) is NO_SCRIPT
    with pytest.raises(InputError, match=r"torch: 'main' is not valid; accepted: a version such as 2\.10"):
        Script.on(torch="main")
    with pytest.raises(InputError, match=r"transformers: 'v5' is not valid; accepted: a version such as 5\.3"):
        Script.on(transformers="v5")
    assumptions = run(Script.on(torch="2.10", transformers="5.3")).assumptions
    assert (assumptions["torch"], assumptions["transformers"]) == ("2.10", "5.3")
    assert not {"torch", "transformers"} & set(run(Script()).assumptions)


def test_a_script_is_closed_to_other_facts() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        Script(evaluates=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="greater than or equal"):
        Script(earlier_seq_lens=(0,))
    with pytest.raises(ValueError, match="should match pattern"):
        Script(torch="main")


def test_weights_of_an_unknown_dtype_train_under_fp16_autocast_in_fp32() -> None:
    """torch unscales no gradients in 16 bits, so a job of fp16 autocast that runs has others."""
    job = {"model": "deberta-v2-xxlarge", "method": "full", "task_type": "SEQ_CLS", "dtype": "auto", "trainer": "transformers"}
    result = peftplan.estimate(**job, autocast="fp16")
    assert (result.assumptions["dtype"], peftplan.estimate(**job).assumptions["dtype"]) == ("fp32", "bf16")
    assert any("not known here; fp32 is counted" in note for note in result.assumptions["notes"])
