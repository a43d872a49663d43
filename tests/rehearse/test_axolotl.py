"""What peftplan reads of axolotl's config, against `axolotl train` with it on the emulated card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.analytic.of_ranks import OfRanks
from peftplan.errors import InputError, RefusedError
from peftplan.job.configs.read import read_values
from peftplan.tape.offloaded import STASH, Offloaded
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor
from tests.job.configs.published import plan as published
from tests.job.configs.published import records
from tools.rehearsed_axolotl import FIRST, options, plan
from tools.rehearsed_jobs import read

ROWS = read(Path(__file__).with_name("axolotl.jsonl"))
NEWEST = read(Path(__file__).with_name("axolotl_newest.jsonl"))
"""Those that 0.21.0 ran, with the libraries that it pins."""
EXACT = [row for row in [*ROWS, *NEWEST] if not plan(row).unsupported]
LARGEST = {"allocated": 0.003, "reserved": 0.09}
"""Per cent; allocated: norms that are cast to fp32 while others are; reserved: 2 MB of ranks with buckets."""
OF_GROUPS = {"allocated": 0.003, "reserved": 0.5}
"""One segment of 2 MB: states of LoRA+ are counted before the first group's step, and made before that of their own."""
FIGURES = ("allocated", "reserved", "by_phase", "reserved_by_phase")


@pytest.mark.parametrize("row", EXACT, ids=[f"{row['values']['base_model']}-{row.get('gpus', 1)}" for row in EXACT])
def test_formulas_hold_what_axolotl_holds(row: dict[str, Any]) -> None:
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    limits = OF_GROUPS if "loraplus_lr_ratio" in row["values"] else LARGEST
    drift = {what: 100 * (getattr(peaks, what) / row[what] - 1) for what in limits}
    assert {what: number for what, number in drift.items() if abs(number) > limits[what]} == {}


@pytest.mark.parametrize("row", NEWEST, ids=[f"{row['values']['base_model']}-{row.get('gpus', 1)}" for row in NEWEST])
def test_axolotl_0_21_loads_and_checkpoints_otherwise(row: dict[str, Any]) -> None:
    """No table is cast that would be cast back, GPT-NeoX's head is found, and checkpoints are not reentrant; 0.19 differs."""
    ours, older = (peftplan.estimate(**options({**row, "axolotl": release})).peaks for release in ("0.21.0", "0.19.0"))
    assert ours is not None
    assert {phase: 100 * (ours.by_phase[phase] / kept - 1) for phase, kept in row["by_phase"].items()} == {
        phase: pytest.approx(0, abs=0.01) for phase in row["by_phase"]
    }
    moved = row["values"].get("adapter") or "RedPajama" in row["values"]["base_model"]
    assert older is None or not moved or older.by_phase != ours.by_phase or "trust_remote_code" in row["values"]


def test_axolotl_0_21_runs_with_the_libraries_that_it_pins() -> None:
    """Liger 0.8.4 in full fine-tuning of three layers, rehearsed; 0.8.1, which 0.19.0 pins, holds 0.16 % more in forward.

    pyproject.toml of 0.21.0: deepspeed>=0.18.6,<0.20.0; of 0.19.0: <0.19.0, which keeps what no hook releases."""
    values = {"base_model": "Qwen/Qwen2.5-0.5B", "sequence_len": 1024, "gradient_accumulation_steps": 1, "micro_batch_size": 2}
    values |= {"optimizer": "adamw_torch_fused", "sample_packing": False, "attn_implementation": "sdpa", "bf16": True}
    values |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    values |= {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True}
    for release, drift in (("0.21.0", 0), ("0.19.0", 0.158)):
        peaks = peftplan.estimate(**options({"values": values, "layers": 3, "axolotl": release})).peaks
        assert peaks is not None
        assert 100 * (peaks.by_phase["forward"] / 3065132544 - 1) == pytest.approx(drift, abs=0.002)
    sharded: dict[str, Any] = {"trainer": "axolotl", "strategy": "zero3", "gpus": 4, "batch_size": 1, "seq_len": 512}
    for version, deepspeed in ((None, None), ("0.21.0", None), ("0.19.0", "0.18.9"), ("0.19", "0.18.9")):
        distributed = peftplan.estimate("llama-3.2-1b", method="lora", tool_version=version, **sharded).distributed
        assert distributed is not None
        assert distributed.strategy.deepspeed_version == deepspeed


def test_a_pattern_that_no_name_of_an_adapted_model_has_leaves_nothing_to_train() -> None:
    """`^model.` against `base_model.model.model.`: axolotl freezes the adapter, and says so in its log."""
    for row in [row for row in ROWS if "unfrozen_parameters" in row["values"]]:
        estimate = peftplan.estimate(**options(row))
        assert estimate.trainable_parameters == 0
        sums = estimate.ledger.by_category()
        assert (sums["gradients"], sums["optimizer_states"]) == (0, 0)
    published_plans = [published(record) for record in records("axolotl") if "gemma-3-1b-qlora" in record["path"]]
    assert [each.options["freeze_adapter"] for each in published_plans] == [True]


def test_weights_drawn_anew_take_what_loaded_ones_take() -> None:
    drawn, loaded = (row for row in ROWS if "reinit_weights" in row["values"] and "gpus" not in row)
    assert [drawn[what] for what in FIGURES] == [loaded[what] for what in FIGURES]
    assert plan(drawn).ignored["reinit_weights"].at == "loaders/model.py:1362"


@pytest.mark.parametrize("model", ["THUDM/GLM-4-9B-0414", "google/gemma-2-2b", "Qwen/Qwen2.5-7B"])
def test_the_embedding_and_the_head_are_cast_to_fp32_and_back(model: str) -> None:
    """Of so few layers, and of whole models on short rows, loading is the peak (loaders/model.py:446, :486)."""
    (row,) = (row for row in ROWS if row["values"]["base_model"] == model and "adapter" in row["values"])
    assert row["allocated"] == row["by_phase"]["load"]
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {phase: 100 * (peaks.by_phase[phase] / kept - 1) for phase, kept in row["by_phase"].items()}
    assert max(map(abs, drift.values())) < LARGEST["allocated"]


def test_norms_and_the_embedding_stay_in_fp32_without_flash_attention() -> None:
    """Of full fine-tuning on one GPU (loaders/model.py:434): 151,936 rows of 896 in 4 B, and a norm. Under FSDP nothing is cast,
    and over ranks of DDP and ZeRO there is no formula. Other losses and models keep a bound."""
    row = next(row for row in EXACT if row["values"].get("liger_rms_norm") and "gpus" not in row)
    weights = {line.name: line.bytes() for line in peftplan.estimate(**options(row)).ledger if line.category == "weights"}
    assert (weights["model.embed_tokens.weight"], weights["model.norm.weight"]) == (4 * 151_936 * 896, 4 * 896)
    with_flash = peftplan.estimate(**options(row) | {"attn_implementation": "flash_attention_2"}).peaks
    assert with_flash is not None
    assert with_flash.allocated < 0.75 * row["allocated"]
    for strategy in ("ddp", "zero2"):
        assert "norms and embeddings in fp32" in peftplan.estimate(**options(row), gpus=2, strategy=strategy).not_modelled[0]
    for other in ({"liger_fused_linear_cross_entropy": True}, {"base_model": "google/gemma-2-2b"}):
        assert plan({"values": row["values"] | other}).unsupported["attn_implementation"].effect == "raises"


def test_the_trainer_alone_casts_them() -> None:
    """Without a config: `--trainer axolotl` leaves `prepare_model_for_kbit_training` out (loaders/model.py:1129, :1137)."""
    (row,) = (row for row in ROWS if row["values"]["base_model"] == "Qwen/Qwen2.5-7B" and "adapter" in row["values"])
    job: dict[str, Any] = {
        "trainer": "axolotl",
        "method": "qlora",
        "r": 16,
        "lora_dropout": 0.05,
        "batch_size": 1,
        "seq_len": 256,
        "tool_version": "0.19",
    }
    kernels = plan(row).options["kernels"]
    peaks = peftplan.estimate(
        options(row)["model"], kernels=kernels, target_modules="all-linear", use_reentrant=False, **job
    ).peaks
    assert peaks is not None
    assert abs(100 * (peaks.allocated / row["allocated"] - 1)) < LARGEST["allocated"]
    assert abs(100 * (peaks.reserved / row["reserved"] - 1)) < LARGEST["reserved"]


def test_both_engines_cast_them() -> None:
    options: dict[str, Any] = {"trainer": "axolotl", "method": "qlora", "batch_size": 1, "seq_len": 64, "tool_version": "0.19"}
    ours, traced = (peftplan.estimate("smollm2-135m", engine=engine, **options).peaks for engine in ("analytic", "trace"))
    assert ours is not None
    assert traced is not None
    assert (ours.by_phase["load"], ours.reserved) == (traced.by_phase["load"], traced.reserved)


def test_a_table_that_the_head_shares_is_cast_by_the_head_s_name() -> None:
    """GPT-2's is `wte`, which axolotl does not name: 50,257 rows of 768, in 16 bits again behind kbit preparation, and in fp32
    where all is trained without FlashAttention (loaders/utils.py:239, loaders/model.py:434)."""
    options: dict[str, Any] = {"trainer": "axolotl", "batch_size": 1, "seq_len": 64, "tool_version": "0.19"}
    prepared: dict[str, Any] = options | {"method": "qlora", "kbit_prepare": True}
    ours, traced = (peftplan.estimate("gpt2", engine=engine, **prepared).peaks for engine in ("analytic", "trace"))
    assert ours is not None
    assert traced is not None
    assert {phase: peak / traced.by_phase[phase] for phase, peak in ours.by_phase.items()} == pytest.approx(
        dict.fromkeys(ours.by_phase, 1), abs=0.001
    )
    copies = peftplan.estimate("gpt2", **prepared, modules_to_save="wte,lm_head").ledger
    assert {line.bytes() for line in copies if "modules_to_save.weight" in line.name and line.category == "adapter_weights"} == {
        2 * 50_257 * 768
    }
    for job, width in ((prepared, 2), (options | {"method": "full"}, 4)):
        sizes = {line.name: line.bytes() for line in peftplan.estimate("gpt2", **job).ledger if line.category == "weights"}
        assert sizes["transformer.wte.weight"] == pytest.approx(width * 50_257 * 768, abs=512)


@pytest.mark.parametrize(("strategy", "known"), [("zero2", True), ("zero3", False)])
def test_axolotl_does_not_prepare_under_zero_3(strategy: str, *, known: bool) -> None:
    job: dict[str, Any] = {"trainer": "axolotl", "method": "qlora", "kbit_prepare": True, "gpus": 2, "strategy": strategy}
    estimate = peftplan.estimate("smollm2-135m", batch_size=1, seq_len=64, **job)
    assert (estimate.peaks is not None) is known
    assert known or "kbit preparation, which" in estimate.not_modelled[0]


FALCON: dict[str, Any] = {
    "base_model": "tiiuae/falcon-7b", "adapter": "qlora", "load_in_4bit": True, "bf16": "auto", "gradient_checkpointing": True,
    "sequence_len": 512, "micro_batch_size": 1, "optimizer": "adamw_torch", "lora_r": 8, "lora_target_linear": True,
    "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
}  # fmt: skip
CUT = {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"], "cut_cross_entropy": True}


@pytest.mark.parametrize(
    ("changed", "unknown"),
    [({}, set()), ({"rl": "dpo"}, {"load_in_4bit"}), ({"reward_model": True}, {"load_in_4bit"}), (CUT, {"cut_cross_entropy"})],
)
def test_what_stays_in_fp32_was_rehearsed_of_sft(changed: dict[str, Any], unknown: set[str]) -> None:
    """Falcon's class has no `self.model`, which the forward that cut cross entropy puts in its place calls."""
    assert unknown == {*plan({"values": FALCON | changed}).unsupported} & {"load_in_4bit", "cut_cross_entropy"}


def test_what_trains_keeps_its_dtype_under_fsdp2() -> None:
    """axolotl replaces accelerate's `fsdp2_prepare_model`, which casts it to fp32; of adapters it makes more units."""
    values: dict[str, Any] = {"base_model": "Qwen/Qwen2.5-0.5B", "sequence_len": 512, "micro_batch_size": 1, "fsdp_version": 2}
    values["fsdp_config"] = {"reshard_after_forward": True}
    full = peftplan.estimate(config=read_values(values, file="a.yml"))
    by_category = full.ledger.by_category()
    weights = 2 * 494_032_768
    assert by_category["weights"] == pytest.approx(weights / 8, rel=1e-3)
    adapted = peftplan.estimate(
        config=read_values(
            {**values, "adapter": "lora", "lora_r": 8, "lora_target_linear": True, "lora_mlp_kernel": False}, file="a.yml"
        )
    )
    assert adapted.not_modelled[0].startswith("a step with FSDP2 over 8 GPUs and method lora")
    with pytest.raises(RefusedError, match="not FSDP2 as Trainer of axolotl"):
        peftplan.estimate(config=read_values(values, file="a.yml"), engine="trace")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "Seed-OSS" in row["values"]["base_model"]], ids=["kernels", "off", "no kernels"]
)
def test_embeddings_of_adapted_models_require_gradients(row: dict[str, Any]) -> None:
    """With checkpointing and without (loaders/adapter.py:427). Seed-OSS drops out what attention returns, behind its kernel; the
    kernel of its MLP drops out nothing. Backward through that kernel: within 0.14 %, up to 6.3 MB of 4.5 GB."""
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {phase: 100 * (peaks.by_phase[phase] / kept - 1) for phase, kept in row["by_phase"].items()}
    assert max(abs(drift[phase]) for phase in ("load", "forward", "step")) < LARGEST["allocated"]
    assert abs(drift["backward"]) < 0.14


def test_hunyuan_runs_with_lora_kernels() -> None:
    """Whose queries and keys are normed once they are turned, behind the kernel."""
    row, _packed = (row for row in EXACT if "Hunyuan" in row["values"]["base_model"])
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    assert peaks.reserved == row["reserved"]
    assert abs(100 * (peaks.allocated / row["allocated"] - 1)) < LARGEST["allocated"]


def test_the_root_gathers_the_last_layer_when_backward_begins() -> None:
    """axolotl's `fsdp2_prepare_model` makes no unit of the head, as accelerate's does. DistMuon sends matrices to their ranks."""
    rows = [row for row in ROWS if row["values"].get("fsdp_config", {}).get("fsdp_version") == 2]
    assert [row["values"]["optimizer"] for row in rows][:2] == ["adamw_torch_fused", "muon"]
    for row in rows:
        peaks = peftplan.estimate(**options(row)).peaks
        assert peaks is not None
        assert peaks.reserved == row["reserved"]
        assert peaks.by_phase == {phase: pytest.approx(nbytes, rel=1e-4) for phase, nbytes in row["by_phase"].items()}


def test_muon_of_one_process_has_counts_alone() -> None:
    values = {"base_model": "Qwen/Qwen2.5-0.5B", "optimizer": "muon", "sequence_len": 512, "bf16": "auto"}
    plan_of_one = read_values(values, file="a.yml", tool="axolotl")
    estimate = peftplan.estimate("Qwen/Qwen2.5-0.5B", **plan_of_one.options)
    assert estimate.peaks is None
    assert any("axolotl's Muon of whole matrices" in reason for reason in estimate.not_modelled)


EBFT = read(Path(__file__).with_name("axolotl_ebft.jsonl"))


@pytest.mark.parametrize("row", EBFT, ids=[str(row["layers"]) for row in EBFT])
def test_a_reward_reads_all_completions_before_the_step(row: dict[str, Any]) -> None:
    """`features`: what is held between a step and the next forward, where the tokenizer makes `read` tokens of a prompt and
    what was written for it (its stand-in halves completions); the vocabulary was one row larger."""
    job = options(row)
    short = {"seq_len": row["read"], "max_completion_length": row["read"] - row["prompt_tokens"]}
    peaks, reading = peftplan.estimate(**job).peaks, peftplan.estimate(**job | short).peaks
    assert peaks is not None
    assert reading is not None
    stated = {**{phase: peaks.by_phase[phase] for phase in row["by_phase"]}, "features": reading.by_phase["generate"]}
    in_tool = {**row["by_phase"], "features": row["features"]}
    drift = {phase: 100 * (stated[phase] / nbytes - 1) for phase, nbytes in in_tool.items()}
    assert max(map(abs, drift.values())) < 0.01
    of_peak = reading if row["features"] == max(in_tool.values()) else peaks
    assert of_peak.reserved == row["reserved"]


def test_a_reward_of_other_jobs_has_counts_alone() -> None:
    for other in ({"method": "full"}, {"method": "qlora"}, {"method": "lora", "gpus": 2}):
        estimate = peftplan.estimate("llama-3.2-1b", trainer="axolotl-ebft", **other)
        assert estimate.peaks is None
        assert "EBFTTrainer of axolotl" in estimate.not_modelled[0]


STRIDED = read(Path(__file__).with_name("axolotl_strided.jsonl"))


@pytest.mark.parametrize("row", STRIDED, ids=[f"{row['values'].get('adapter', 'full')}-{row['layers']}" for row in STRIDED])
def test_blocks_behind_every_anchor_of_a_document(row: dict[str, Any]) -> None:
    """Writing them is the peak of a few layers, the reward of more. The tool runs both in compute_loss, so that a rehearsal
    counts them in any phase; cuSOLVER's SVD ran without a workspace."""
    assert plan(row).unsupported == {}
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    assert peaks.allocated == peaks.by_phase["forward"] == pytest.approx(row["allocated"], rel=3e-3)
    assert peaks.reserved == pytest.approx(row["reserved"], rel=0.035)  # two layers of Llama 3.1 8B: -3.5 %, others within 2.6


def test_a_cross_entropy_reads_documents_too() -> None:
    """`ce_coef` beside blocks, behind a prompt of two tokens: 30 anchors. Without the logits of documents the peak of four layers
    would be lower; a rehearsal reserved 14 % less than the replay, so nothing is said of reserved bytes."""
    (row,) = read(Path(__file__).with_name("axolotl_scored.jsonl"))
    assert plan(row).unsupported == {}
    job = options(row)
    peaks = peftplan.estimate(**job).peaks
    assert peaks is not None
    assert peaks.allocated == peaks.by_phase["forward"] == pytest.approx(row["allocated"], rel=3e-3)
    assert peaks.reserved is None
    sizes = {"trainer": "axolotl-ebft-strided", "seq_len": 488}
    of_blocks = peftplan.estimate(**job | sizes).peaks
    assert of_blocks is not None
    assert of_blocks.allocated < 0.95 * row["allocated"]


def test_blocks_of_a_model_loaded_otherwise_have_no_peak() -> None:
    sizes = {"trainer": "axolotl-ebft-strided", "seq_len": 504, "max_completion_length": 248, "gradient_checkpointing": True}
    for other in ({"attn_implementation": "flash_attention_2"}, {"method": "full"}, {"gpus": 2}):
        assert peftplan.estimate("llama-3.2-1b", **sizes, **other).peaks is None


def test_blocks_fill_what_a_document_leaves() -> None:
    """strided.py (`_generate_strided_blocks`): behind a document of 1,024 tokens a block of 8 for each stretch of 8 but the
    first, 127 x 8 = 1,016 tokens."""
    by: dict[str, Any] = {"trainer": "axolotl-ebft-strided"}
    alone = peftplan.estimate("llama-3.2-1b", **by)
    assert alone.peaks == peftplan.estimate("llama-3.2-1b", **by, seq_len=1024 + 1016, max_completion_length=1016).peaks
    half = peftplan.estimate("llama-3.2-1b", **by, max_completion_length=512)
    assert half.peaks == peftplan.estimate("llama-3.2-1b", **by, seq_len=520 + 512).peaks
    for sizes, named in (({"seq_len": 1001}, "seq_len: 1001"), ({"max_completion_length": 511}, "max_completion_length: 511")):
        with pytest.raises(InputError, match=named):
            peftplan.estimate("llama-3.2-1b", **by, **sizes)


def test_gpt_oss_restored_to_16_bits_holds_whole_gradients() -> None:
    """Of two micro batches under FSDP2, with the inputs of checkpoints on the host. Backward holds one layer's input longer than
    is counted."""
    (row,) = read(Path(__file__).with_name("axolotl_gpt_oss.jsonl"))
    assert plan(row).unsupported == {}
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {phase: 100 * (peaks.by_phase[phase] / kept - 1) for phase, kept in row["by_phase"].items()}
    drift |= {what: 100 * (getattr(peaks, what) / row[what] - 1) for what in LARGEST}
    assert max(map(abs, drift.values())) < 0.03


OFFLOADED = read(Path(__file__).with_name("axolotl_offload.jsonl"))


@pytest.mark.parametrize("row", OFFLOADED, ids=[str(row["layers"]) for row in OFFLOADED])
def test_activations_wait_on_the_host_beside_checkpoints(row: dict[str, Any]) -> None:
    """`gradient_checkpointing: offload`. Loading is the peak, as it is of the whole model."""
    assert plan(row).unsupported == {}
    assert row["allocated"] == row["by_phase"]["load"]
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    assert peaks.allocated == pytest.approx(row["allocated"], rel=2e-5)
    assert peaks.by_phase == {phase: pytest.approx(nbytes, rel=2e-4) for phase, nbytes in row["by_phase"].items()}
    assert peaks.reserved == pytest.approx(row["reserved"], rel=2e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"gradient_checkpointing": False},
        {"attn_implementation": "sdpa"},
        {"use_reentrant": False},
        {"gpus": 2},
        {"trainer": "transformers", "tool_version": None},
    ],
)
def test_activations_on_the_host_of_other_jobs_have_counts_alone(other: dict[str, Any]) -> None:
    estimate = peftplan.estimate(**options(OFFLOADED[0]) | other)
    assert estimate.peaks is None


def test_a_tensor_that_two_operations_save_stays_on_the_card() -> None:
    """By hand: of x saved once, x saved twice, and five more, three are on the card when forward has ended but for the stash."""
    f = Tape()
    f.offloaded = offloaded = Offloaded(f)
    x, y, *others = (f.new((1024,), "fp32", name) for name in "abcdefg")
    kept = [offloaded.pack(each) for each in (x, y, y, *others)]
    assert [type(each) is Tensor for each in kept] == [False, False, True, *[False] * 5]
    assert len(offloaded.stash) == STASH  # the last five that were saved; x went, y is there for whoever saved it again
    assert offloaded.pack(x) is not x
    assert offloaded.pack(y) is y


MIXTURES = read(Path(__file__).with_name("axolotl_mixtures.jsonl"))


@pytest.mark.parametrize("row", MIXTURES, ids=[f"{row['layers']} layers, {row['gpus']} GPUs" for row in MIXTURES])
def test_experts_are_units_of_fsdp1(row: dict[str, Any]) -> None:
    """`fsdp_transformer_layer_cls_to_wrap: MixtralSparseMoeBlock`: attention is the root's, which stays gathered, and experts
    are not quantized. Loading, which has all of them on the card, is the peak of Mixtral 8x7B's own sizes; backward there misses
    34 MB. Of small experts one or two segments of 20 MB are missing. Of offloaded experts none are stated."""
    assert plan(row).unsupported == {}
    peaks = peftplan.estimate(**options(row)).peaks
    assert isinstance(peaks, OfRanks)
    drift = {phase: abs(100 * (peaks.by_phase[phase] / nbytes - 1)) for phase, nbytes in row["by_phase"].items()}
    assert drift["load"] < 0.001
    assert drift["forward"] < 0.03
    assert drift["backward"] < (0.08 if "sizes" in row else 0.77)
    assert drift["step"] < 0.45  # 0.1 MB
    assert abs(100 * (peaks.allocated / row["allocated"] - 1)) < 0.03
    assert abs(100 * (peaks.replayed_reserved / row["reserved"] - 1)) < (3.5 if "sizes" in row else 0.5)


def test_axolotl_reads_no_prefetch_of_fsdp1() -> None:
    """Its schema drops `fsdp_backward_prefetch: BACKWARD_PRE`. DeepSeek-V2 with LoRA: a layer gathered ahead would be 14 % more.
    Routers are in bf16 in the transformers that it pins, so that FSDP1 takes them."""
    (row,) = read(Path(__file__).with_name("axolotl_fsdp1.jsonl"))
    assert row["values"]["fsdp_config"]["fsdp_backward_prefetch"] == "BACKWARD_PRE"
    assert plan(row).unsupported == {}
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {phase: 100 * (peaks.by_phase[phase] / kept - 1) for phase, kept in row["by_phase"].items()}
    assert max(map(abs, drift.values())) < 0.005
    assert peaks.reserved == row["reserved"]


def test_experts_as_units_in_other_checkpoints_have_no_peak() -> None:
    job = options(MIXTURES[0]) | {"use_reentrant": False}
    assert "transformer_cls_names_to_wrap" in peftplan.estimate(**job).not_modelled[0]


def test_modules_are_checkpoints_within_those_of_their_layers() -> None:
    """`activation_checkpointing` of FSDP2: accelerate 1.13 wraps each module of a layer, axolotl the layer. Attention gets the
    normed hidden states by name, so that they stay: 2,048 tokens x 3,584 in bf16 for each of three layers."""
    (row,) = (row for row in ROWS if row["values"].get("fsdp_config", {}).get("activation_checkpointing"))
    nested, layers = (peftplan.estimate(**options(row) | {"checkpoints_parts": parts}).peaks for parts in (True, None))
    assert nested is not None
    assert layers is not None
    assert nested.by_phase["forward"] - layers.by_phase["forward"] == 3 * 2 * 2048 * 3584
    assert nested.by_phase == {phase: pytest.approx(nbytes, rel=1e-5) for phase, nbytes in row["by_phase"].items()}
    assert nested.reserved == row["reserved"]


@pytest.mark.parametrize(
    "other", [{"use_reentrant": True}, {"trainer": "transformers", "tool_version": None}, {"method": "lora"}]
)
def test_modules_as_checkpoints_in_other_jobs_have_no_peak(other: dict[str, Any]) -> None:
    (row,) = (row for row in ROWS if row["values"].get("fsdp_config", {}).get("activation_checkpointing"))
    assert "checkpoints_parts" in peftplan.estimate(**options(row) | other).not_modelled[0]


def test_a_tied_table_that_rank_0_sends_twice_has_no_peak() -> None:
    """A rehearsal of Qwen2.5 0.5B reserved 3.9 % less."""
    (row,) = (row for row in ROWS if row["values"].get("fsdp_config", {}).get("activation_checkpointing"))
    tied = {"values": row["values"] | {"base_model": "Qwen/Qwen2.5-0.5B"}, "layers": 3, "gpus": 8}
    assert "cpu_ram_efficient_loading of tied embeddings" in peftplan.estimate(**options(tied)).not_modelled[0]


def test_weights_are_rounded_between_the_ends_of_their_groups() -> None:
    """`qat` with int8 activations and int4 weights; `backward`, the peak of three layers, is 3 MB too high."""
    (row,) = read(Path(__file__).with_name("axolotl_qat.jsonl"))
    assert plan(row).unsupported == {}
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {phase: 100 * (peaks.by_phase[phase] / nbytes - 1) for phase, nbytes in row["by_phase"].items()}
    assert max(abs(drift[phase]) for phase in ("load", "forward", "step")) < LARGEST["allocated"]
    assert 0 < drift["backward"] < 0.07
    assert peaks.reserved == row["reserved"]


@pytest.mark.parametrize(
    "other", [{"gpus": None, "strategy": None}, {"loss": "full"}, {"method": "lora"}, {"strategy": "zero2"}], ids=str
)
def test_fake_quantized_layers_of_other_jobs_have_no_peak(other: dict[str, Any]) -> None:
    (row,) = read(Path(__file__).with_name("axolotl_qat.jsonl"))
    job: dict[str, Any] = {"trainer": "axolotl", "kernels": options(row)["kernels"], "loss": "liger", "method": "full"}
    shared: dict[str, Any] = {"strategy": "fsdp2", "gpus": 8}
    stated = {name: value for name, value in (job | shared | other).items() if value is not None}
    assert peftplan.estimate("llama-3.2-3b", **stated).peaks is None


def test_fake_quantized_layers_are_axolotls() -> None:
    with pytest.raises(RefusedError, match="add --trainer axolotl"):
        peftplan.estimate("llama-3.2-3b", kernels="torchao-int4", method="full")


MX = read(Path(__file__).with_name("axolotl_mx.jsonl"))


@pytest.mark.parametrize("row", MX, ids=lambda row: row["values"]["base_model"])
def test_operands_in_mxfp4_are_made_anew(row: dict[str, Any]) -> None:
    """`qat` in MXFP4: three layers of Llama 3.2 3B, and of Qwen 2.5 72B with a small vocabulary, so that layers hold most: over
    20 bytes of each number where the input of `down_proj` is rounded. Of these `backward` is 0.13 % and reserved 1.1 % too
    high."""
    assert plan(row).unsupported == {}
    job = options(row)
    peaks, dense = (peftplan.estimate(**job | {"kernels": kernels}).peaks for kernels in (job["kernels"], "liger"))
    assert peaks is not None
    assert dense is not None
    assert peaks.by_phase == {
        phase: pytest.approx(n, rel=1.4e-3 if "sizes" in row else 1e-4) for phase, n in row["by_phase"].items()
    }
    assert peaks.reserved == pytest.approx(row["reserved"], rel=1.1e-2 if "sizes" in row else 0)
    numbers = row["values"]["micro_batch_size"] * row["values"]["sequence_len"] * job["model"]["intermediate_size"]
    if "sizes" in row:
        assert peaks.by_phase["forward"] - dense.by_phase["forward"] > 20 * numbers


OTHER_THAN_MX: list[dict[str, object]] = [
    {"loss": "full"},
    {"method": "lora"},
    {"gradient_checkpointing": False},
    {"offload_checkpoints": True},
]


@pytest.mark.parametrize("other", OTHER_THAN_MX, ids=str)
def test_layers_in_mxfp4_of_other_jobs_have_no_peak(other: dict[str, Any]) -> None:
    job = options(MX[0])
    assert peftplan.estimate(**job).peaks is not None
    assert peftplan.estimate(**job | other).peaks is None
    assert peftplan.estimate(**job | {"model": "mistral-7b-v0.1"}).peaks is None


FUSED = read(Path(__file__).with_name("axolotl_fused.jsonl"))


@pytest.mark.parametrize("row", FUSED, ids=[str(row["layers"]) for row in FUSED])
def test_a_function_each_norms_and_turns_queries_and_keys(row: dict[str, Any]) -> None:
    """`fused_attn_kernel`, of a small vocabulary, so that layers hold most: without the queries and keys that are normed and not
    yet turned. Backward is 3.1 MB too high, as much as two gradients in the MLP's kernel; reserved is 2.4 % too low."""
    assert plan(row).unsupported == {}
    job = options(row)
    peaks, without = (peftplan.estimate(**job | {"kernels": kernels}).peaks for kernels in (job["kernels"], ("axolotl",)))
    assert peaks is not None
    assert without is not None
    drift = {phase: 100 * (peaks.by_phase[phase] / kept - 1) for phase, kept in row["by_phase"].items()}
    assert max(abs(drift[phase]) for phase in ("load", "forward", "step")) < 0.02
    assert abs(drift["backward"]) < 0.18
    assert abs(100 * (peaks.reserved / row["reserved"] - 1)) < 2.4
    assert without.by_phase["backward"] - peaks.by_phase["backward"] == 2 * 2048 * (32 + 8) * 128
    assert "axolotl's" not in str(peftplan.estimate("qwen3-8b", method="lora", kernels="axolotl,axolotl-fused").not_modelled)
    assert "axolotl-fused's kernels" in str(peftplan.estimate("qwen2.5-7b", method="lora", kernels="axolotl-fused").not_modelled)


def test_layers_of_lisa_take_turns() -> None:
    """Two of six layers of Llama 2 7B at a time, drawn anew in each step: 0 and 1, 0 and 3, 1 and 4. So three had states when the
    last backward began, and four behind it; the formula's six have them. A state is a byte and 4 B for 256 of them."""
    (row,) = read(Path(__file__).with_name("axolotl_lisa.jsonl"))
    assert plan(row).unsupported == {}
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    weights = 4 * 4096 * 4096 + 3 * 4096 * 11008
    states = 2 * (weights + weights // 256 * 4)
    of_pairs = plan(row | {"values": row["values"] | {"rl": "dpo"}})  # no layers take turns (core/builders/causal.py:133)
    assert "lisa_step_interval" in of_pairs.unsupported
    without = row["layers"] - row["trained"]
    resting = {"load": 0, "forward": without, "backward": without, "step": without - 1}
    stated = {phase: nbytes - resting[phase] * states for phase, nbytes in peaks.by_phase.items()}
    assert stated == {phase: pytest.approx(nbytes, rel=3e-5) for phase, nbytes in row["by_phase"].items()}
    assert peaks.reserved is not None
    assert peaks.reserved - without * states == pytest.approx(row["reserved"], rel=3e-3)


@pytest.mark.parametrize(
    "row",
    read(Path(__file__).with_name("axolotl_diffusion.jsonl")),
    ids=lambda row: f"{row['layers']} layers, {row.get('axolotl', FIRST)}",
)
def test_masked_tokens_are_restored(row: dict[str, Any]) -> None:
    """`diffusion`, of two and four rows in one and all their tokens masked. Of two layers of Llama 3.2 1B a rehearsal reserved
    9.7 % more than the replay, so nothing is said of reserved bytes; all 16 reserved what it does. Their `load` is 7 MB more. Of
    documents that see their own tokens alone, beside checkpoints, 3 MB less."""
    assert plan(row).unsupported == {}
    job = options(row)
    peaks = peftplan.estimate(**job).peaks
    assert peaks is not None
    near = {"load": 3e-3}
    assert peaks.by_phase == {phase: pytest.approx(n, rel=near.get(phase, 5e-4)) for phase, n in row["by_phase"].items()}
    by_document = bool(row["values"].get("gradient_checkpointing"))
    assert peaks.allocated == pytest.approx(row["allocated"], rel=3e-4 if by_document else 7e-5)
    reserved = pytest.approx(row["reserved"], rel=1.2e-2 if by_document else 0)
    assert peaks.reserved == (reserved if row["layers"] == 16 else None)
    of_all = peftplan.estimate(**job | {"loss": "full"}).peaks
    assert of_all is not None
    assert of_all.by_phase["forward"] < 0.95 * row["by_phase"]["forward"]


@pytest.mark.parametrize("other", [{"gpus": 2}, {"method": "lora"}, {"attn_implementation": "eager"}], ids=str)
def test_masked_tokens_of_other_jobs_have_no_peak(other: dict[str, Any]) -> None:
    row = read(Path(__file__).with_name("axolotl_diffusion.jsonl"))[0]
    assert peftplan.estimate(**options(row) | other).peaks is None


SCANS = read(Path(__file__).with_name("axolotl_scan.jsonl"))


@pytest.mark.parametrize("row", SCANS, ids=lambda row: f"{row['values']['base_model']}-{row.get('axolotl', FIRST)}")
def test_falcon_h1_scans_as_its_transformers(row: dict[str, Any]) -> None:
    """axolotl 0.19 pins a transformers whose scan multiplies by broadcasting: for each pair of a chunk's tokens it holds as many
    numbers as a state has. bitsandbytes holds the packed head twice while the tables are cast, which `load` leaves out."""
    assert plan(row).unsupported == {}
    job, by_broadcasting = options(row), "axolotl" not in row
    peaks = peftplan.estimate(**job).peaks
    assert peaks is not None
    near, of_load = (3e-3, 0.07) if by_broadcasting else (4e-4, 2e-3)
    assert peaks.by_phase == {
        phase: pytest.approx(n, rel=of_load if phase == "load" else near) for phase, n in row["by_phase"].items()
    }
    assert peaks.allocated == pytest.approx(row["allocated"], rel=2e-3 if by_broadcasting else 1e-4)
    assert peaks.reserved == pytest.approx(row["reserved"], rel=2.2e-3 if by_broadcasting else 7e-3)
    size = job["model"]
    of_pairs = 2048 * size["mamba_chunk_size"] * size["mamba_n_heads"] * size["mamba_d_state"] * 4
    assert (2 * of_pairs < peaks.by_phase["backward"]) is by_broadcasting
    for other in ({"batch_size": 2}, {"kbit_prepare": False}, {"gpus": 2}):
        assert peftplan.estimate(**job | other).peaks is None


@pytest.mark.parametrize(
    "row", read(Path(__file__).with_name("axolotl_routers.jsonl")), ids=lambda row: row["values"]["base_model"]
)
def test_routers_in_fp32(row: dict[str, Any]) -> None:
    """axolotl 0.21.0, loaders/model.py:1462: modules that end in `.gate` are cast to fp32, and not back. LoRA on parameters is
    that of peft 0.21; 0.19 pins 0.20. DDP leaves them so; a job of two ranks reserved 1.3 % more than is said."""
    assert plan(row).unsupported == {}
    job = options(row)
    peaks = peftplan.estimate(**job).peaks
    assert peaks is not None
    assert peaks.by_phase == {phase: pytest.approx(n, rel=1e-5) for phase, n in row["by_phase"].items()}
    assert peaks.reserved == pytest.approx(row["reserved"], rel=1.3e-2 if "gpus" in row else 7e-4)
    adapts = plan(row).options["method"] == "lora" and "Qwen3" not in row["values"]["base_model"]  # which adapts no parameter
    if adapts and "gpus" not in row:
        others = ({"tool_version": "0.19"}, {"strategy": "ddp", "gpus": 2}, {"method": "qlora"}, {"trainer": "axolotl-dpo"})
        for other in others:
            assert peftplan.estimate(**job | other).peaks is None


def test_a_reference_is_read_in_fp32_beside_a_policy_in_16_bits() -> None:
    """GDPO of three layers of Llama 3.2 1B. The reference scores completions before a step, and a rehearsal counts this
    as `load` and `step`; `forward` here, of the reference, is 0.9 % too high."""
    (row,) = read(Path(__file__).with_name("axolotl_grpo.jsonl"))
    assert plan(row).unsupported == {}
    job = options(row)
    peaks = peftplan.estimate(**job).peaks
    assert peaks is not None
    assert peaks.allocated == peaks.by_phase["backward"] == pytest.approx(row["allocated"], rel=2e-5)
    assert peaks.reserved == row["reserved"]
    assert max(row["by_phase"]["forward"], row["by_phase"]["step"]) <= peaks.by_phase["forward"]
    assert peaks.by_phase["forward"] == pytest.approx(row["by_phase"]["step"], rel=9e-3)
    weights = 128_256 * 2048 + 3 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048 + 2 * 2048) + 2048
    without = peftplan.estimate(**job | {"beta": 0.0}).peaks
    assert without is not None
    assert peaks.allocated - without.allocated == pytest.approx(4 * weights, rel=1e-4)


MIXERS = read(Path(__file__).with_name("axolotl_mixers.jsonl"))


@pytest.mark.parametrize("row", MIXERS, ids=lambda row: row["values"]["base_model"])
def test_mixers_of_packed_rows_run_kernels(row: dict[str, Any]) -> None:
    """Six layers of Nemotron 3, whose Mamba 2 has a 4-bit projection behind the scan, which mamba-ssm's one function does not
    take. Loading is 64 MiB too high."""
    assert plan(row).unsupported == {}
    job = options(row)
    peaks = peftplan.estimate(**job).peaks
    assert peaks is not None
    near = {"load": 1.4e-2}
    assert peaks.by_phase == {phase: pytest.approx(n, rel=near.get(phase, 1e-4)) for phase, n in row["by_phase"].items()}
    assert peaks.reserved == pytest.approx(row["reserved"], rel=5e-3)
    others: list[dict[str, Any]] = [{"batch_size": 2}, {"gradient_checkpointing": False}, {"gpus": 2}, {"loss": "full"}]
    others += [{"use_dora": True}, {"modules_to_save": "lm_head"}]
    for other in (*others, {"use_reentrant": not job.get("use_reentrant", True)}):
        assert peftplan.estimate(**job | other).peaks is None
