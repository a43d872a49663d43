"""Recorded layers of Unsloth's own decoder: of Gemma 2, whose batches stay padded, of Qwen3 with rounded
weights, and of an encoder."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import load
from peftplan.job import compiled_layers
from tests.memory.engines import shallow

ROWS: list[dict[str, Any]] = load("compiled_layers.json", list)
QLORA: dict[str, Any] = {
    "method": "qlora", "r": 16, "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "trainer": "trl",
    "loss": "unsloth", "kernels": "unsloth-padded", "gradient_checkpointing": True, "offload_checkpoints": True,
    "use_reentrant": True, "kbit_prepare": False, "adapter_dtype": "fp32", "optim": "adamw_8bit", "use_cache": False,
}  # fmt: skip
REHEARSED = [
    ("gemma-2-2b", 2, (2, 2048, 2), (1_995_208_704, 2_139_326_464, 1_364_640_256), 2_472_542_208),
    ("gemma-2-2b", 26, (2, 2048, 2), (3_152_504_832, 3_296_622_592, 2_521_936_384), 3_600_809_984),
    ("gemma-2-9b", 2, (2, 2048, 2), (2_864_450_048, 3_568_654_848, 2_174_899_200), 3_992_977_408),
]
"""Model, layers; batch size, length and micro batches; peaks of forward, backward and step in the second step, and reserved bytes
of Unsloth's FastLanguageModel over layers of a model on an emulated A100: unsloth and unsloth_zoo 2026.10.9, transformers 5.17.0,
trl 1.15.0, bitsandbytes 0.50.2, torch 2.13.0. Records are of those of two layers, and of shorter rows; the other is the whole
model."""


@pytest.mark.parametrize(("model", "layers", "sizes", "by_phase", "reserved"), REHEARSED)
def test_scores_of_all_heads_are_made(
    model: str,
    layers: int,
    sizes: tuple[int, int, int],
    by_phase: tuple[int, ...],
    reserved: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention with a cap is plain products: a layer keeps the scores of each head, and both masks stay on the card."""
    rows = [{**row, "model": "gemma2"} for row in ROWS if row["model"] == model]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    batch_size, seq_len, micro_batches = sizes
    options = {**QLORA, "batch_size": batch_size, "seq_len": seq_len, "gradient_accumulation_steps": micro_batches}
    peaks = estimate(shallow(model, layers), **options).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0001)
    assert peaks.reserved == pytest.approx(reserved, rel=0.03)


WIDE = {"quant_skip_modules": ["lm_head", "model.layers.1.mlp"]}
OF_ORPO = {"trainer": "trl-orpo", "max_completion_length": 1024}
IN_BF16 = {"method": "lora", "kbit_prepare": None}
OF_LLASA = {"r": 128, "target_modules": "q_proj,v_proj"}
SHAPES = {"orpheus-3b-0.1-ft": "llama-3.2-3b", "llasa-3b": "llama-3.2-3b", "llasa-1b": "llama-3.2-1b"}
"""Model → the one whose layers it has, which was rehearsed with its own head."""
OF_SFT: list[tuple[str, str, int, tuple[int, int, int], dict[str, Any], tuple[int, ...]]] = [
    ("qwen2.5-14b", "qwen2", 3, (2, 2048, 2), {}, (4_350_550_016, 4_777_601_536, 3_701_481_472)),
    ("qwen2.5-14b", "qwen2", 3, (2, 1500, 2), {}, (4_192_252_928, 4_467_470_848, 3_678_983_168)),
    ("qwen3-14b", "qwen3", 4, (2, 2048, 2), {"r": 32, **WIDE}, (5_210_816_512, 5_740_055_552, 4_436_967_424)),
    ("qwen3-14b", "qwen3", 4, (2, 1500, 2), {"r": 32, **WIDE}, (5_028_951_040, 5_369_179_648, 4_414_469_120)),
    ("llama-3-8b", "llama", 3, (2, 2048, 2), OF_ORPO, (3_674_909_696, 4_683_007_488, 2_634_349_568)),
    ("llama-3.2-3b", "llama", 4, (2, 2048, 2), WIDE, (1_631_435_264, 1_873_841_664, 1_227_097_088)),
    ("llama-3.2-3b", "llama", 4, (2, 1500, 2), WIDE, (1_584_219_648, 1_687_339_008, 1_213_577_216)),
    ("orpheus-3b-0.1-ft", "llama", 3, (2, 2048, 2), {"r": 64, **IN_BF16}, (1_985_244_672, 2_228_830_720, 1_580_906_496)),
    ("llasa-3b", "llama", 3, (2, 1500, 2), {**OF_LLASA, **IN_BF16}, (1_872_945_664, 1_863_128_064, 1_502_303_232)),
    ("llasa-1b", "llama", 3, (2, 1500, 2), {**OF_LLASA, **IN_BF16}, (1_300_742_656, 1_270_770_176, 966_063_104)),
]
"""Model, its type and layers; batch size, length and micro batches; other options; peaks of phases in the second step of
Unsloth's SFTTrainer with a collator on an emulated A100, beside transformers 4.56.2 and trl 0.22.2; other releases as above."""


@pytest.mark.parametrize(("model", "model_type", "layers", "sizes", "options", "by_phase"), OF_SFT)
def test_padded_rows_of_a_decoder_run_its_record(
    model: str,
    model_type: str,
    layers: int,
    sizes: tuple[int, int, int],
    options: dict[str, Any],
    by_phase: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{**row, "model": model_type} for row in ROWS if row["model"] == model and not row.get("scheme")]
    for row in rows:
        row["in_16_bits"] = options.get("quant_skip_modules", row.get("in_16_bits"))
        row["others"] = [[[number], *events] for number, (_, *events) in enumerate(row.get("others", ()), 1)]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    of_job = dict(zip(("batch_size", "seq_len", "gradient_accumulation_steps"), sizes, strict=True))
    peaks = estimate(shallow(SHAPES.get(model, model), layers), **{**QLORA, **of_job, **options}).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0001)


DPO = {**QLORA, "trainer": "trl-dpo", "r": 64}
OF_DPO = [
    (6, (2, 1024, 4), 512, (2_600_599_040, 2_609_418_752, 1_616_644_096), None),
    (3, (1, 1536, 1), 256, (1_706_142_208, 1_828_033_024, 1_103_964_160), None),
    (32, (2, 1024, 4), 1, (9_433_597_440, 6_902_903_296, 5_910_128_640), 9_556_721_664),
]
"""Layers of Mistral 7B v0.1; pairs, length and micro batches; tokens of a prompt; peaks of phases in the second step, and
reserved bytes, of Unsloth's DPOTrainer on an emulated A100, beside transformers 4.56.2 and trl 0.22.2; other releases as above.
The record is of three layers and other rows; the last is the notebook's job. Fewer layers reserve most while kernels are timed,
for which up to 6 % more is counted."""


@pytest.mark.parametrize(("layers", "sizes", "prompt", "by_phase", "reserved"), OF_DPO)
def test_pairs_hold_hidden_states_of_all_layers(
    layers: int,
    sizes: tuple[int, int, int],
    prompt: int,
    by_phase: tuple[int, ...],
    reserved: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The policy returns them, and accelerate copies them in fp32; so does its base, whose layers have graphs of their own."""
    rows = [{**row, "model": "mistral"} for row in ROWS if row["model"] == "mistral-7b-v0.1"]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    pairs, seq_len, micro_batches = sizes
    options = {**DPO, "batch_size": pairs, "seq_len": seq_len, "gradient_accumulation_steps": micro_batches}
    peaks = estimate(shallow("mistral-7b-v0.1", layers), **options, max_completion_length=seq_len - prompt).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0002)
    if reserved is not None:
        assert peaks.reserved == pytest.approx(reserved, rel=0.003)


@pytest.mark.parametrize("changed", [{"r": 32}, {"kernels": None}, {"precompute_ref_log_probs": True}])
def test_dpo_without_a_record_has_no_peak(changed: dict[str, Any]) -> None:
    """Adapters of another rank; layers of the model's own; no reference in a step."""
    assert estimate("mistral-7b-v0.1", **{**DPO, **changed}).peaks is None


QAT = {
    **{name: value for name, value in QLORA.items() if name != "kbit_prepare"},
    "method": "lora",
    "kernels": "unsloth-qat-lora",
}
OF_QAT = [
    (2048, (7_897_348_096, 2_280_309_248, 1_583_470_592), 7_939_817_472),
    (1536, (7_886_833_664, 2_244_479_488, 1_583_446_016), None),
]
"""Length of one row, two micro batches; peaks of phases of three layers of Qwen3 4B Instruct 2507 in one
program, whose last steps had the shorter row, with torchao 0.18 and `qat_scheme="int4"` on LoRA; other releases as above."""


@pytest.mark.parametrize(("seq_len", "by_phase", "reserved"), OF_QAT)
def test_frozen_weights_are_rounded_in_fp32(
    seq_len: int, by_phase: tuple[int, ...], reserved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head, 151,936 x 2,560 numbers of 4 bytes, lies there four times before the loss: 6.2 GB. Of the second row buffers for
    inputs on the host are those of the first one, 5.2 MB larger."""
    rows = [{**row, "model": "qwen3"} for row in ROWS if row["model"] == "qwen3-4b-instruct-2507" and row["scheme"] == "int4"]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    peaks = estimate(
        shallow("qwen3-4b-instruct-2507", 3), **QAT, batch_size=1, seq_len=seq_len, gradient_accumulation_steps=2
    ).peaks
    assert peaks is not None
    buffers = 2 * (2048 - seq_len) * 2560 * 2
    estimated = [peaks.by_phase[phase] + buffers for phase in ("forward", "backward", "step")]
    assert estimated == pytest.approx(by_phase, rel=0.0001)
    if reserved is not None:
        assert peaks.reserved == pytest.approx(reserved, rel=0.003)


CLASSIFIER: dict[str, Any] = {
    "method": "full", "trainer": "transformers", "task_type": "SEQ_CLS", "num_labels": 6, "dtype": "bf16", "autocast": "none",
    "optim": "adamw_8bit", "gradient_checkpointing": True, "offload_checkpoints": True, "use_reentrant": True,
    "kernels": "unsloth-rows",
}  # fmt: skip
OF_MODERNBERT = [
    (512, (2_389_414_400, 3_493_140_992, 2_780_255_232), 3_579_838_464),
    (384, (2_270_760_448, 3_256_654_336, 2_763_412_480), 3_347_054_592),
]
"""Length of 32 rows; peaks of phases in the second step, and reserved bytes of Unsloth's FastModel with all of ModernBERT large
as a classifier, trained in full by Trainer; releases as above. The record is of these rows."""


@pytest.mark.parametrize(("seq_len", "by_phase", "reserved"), OF_MODERNBERT)
def test_an_encoder_has_layers_of_three_kinds(seq_len: int, by_phase: tuple[int, ...], reserved: int) -> None:
    """The first one, those of a window, and those of all tokens, which take turns: two and one."""
    peaks = estimate("modernbert-large", **CLASSIFIER, batch_size=32, seq_len=seq_len).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0001)
    assert peaks.reserved == pytest.approx(reserved, rel=0.013)


def test_its_notebooks_rows_as_unsloth_ran() -> None:
    """32 rows of 2,048 tokens, of which no record was made. Forward's peak, which is not that of the step, is of a mask that
    Unsloth copies before the layers (import_fixes.py:1937): 134.2 MB more than is counted."""
    peaks = estimate("modernbert-large", **CLASSIFIER, batch_size=32, seq_len=2048).peaks
    assert peaks is not None
    assert peaks.by_phase["forward"] + 32 * 2048**2 == pytest.approx(4_029_268_480, rel=0.0002)
    assert [peaks.by_phase[phase] for phase in ("backward", "step")] == pytest.approx((6_576_347_648, 2_982_368_256), rel=0.0002)
    assert peaks.reserved == pytest.approx(6_935_281_664, rel=0.022)


def test_before_ampere_layers_are_others() -> None:
    """There Unsloth takes fp16."""
    assert estimate("modernbert-large", **CLASSIFIER, batch_size=32, seq_len=512, gpu="t4").peaks is None
