"""Every kind of model is traced: counts against peft's own, categories against peaks, batches against what each class reads."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import peft
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import peftplan
from peftplan.errors import InputError, PeftplanError, RefusedError
from peftplan.job.resolving import resolved
from peftplan.job.setup import Setup, parse_setup
from peftplan.storage import parse_quant
from peftplan.trace import engine
from peftplan.trace.cuda.experts import experts_on
from peftplan.trace.engine import Traced, trace
from peftplan.trace.inputs import inputs
from peftplan.trace.reasons import reason
from tests.arch.meta import build
from tests.trace.family_configs import BART, FAMILIES, GQA, LOCAL_EXPERTS, PLAIN, VIT, Family

B, S = 2, 24
NF4 = {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"}


def model(family: Family) -> Any:
    """transformers' own model, on meta."""
    return build(family.config, family.model_class)


def setup_of(family: Family, *, quantized: bool = False, **options: Any) -> Setup:
    """The setup that `estimate` would resolve."""
    sdpa = bool(getattr(transformers, family.model_class)._supports_sdpa)
    fields = {"batch_size": B, "seq_len": S, "gradient_checkpointing": family.checkpointing, **options}
    return resolved(parse_setup(fields), quantized=quantized, supports_sdpa=sdpa, use_cache=False)


def traced(family: Family, kind: str, *, skip: tuple[str, ...] | None = None, **options: Any) -> Traced:
    """The trace of one way to train a family."""
    adapter = None if kind == "full" else {"peft_type": "LORA", "r": 4, "target_modules": family.targets}
    quant = parse_quant("nf4", double_quant=True, compute_dtype="bf16", skip_modules=skip or None) if kind == "qlora" else None
    return trace(
        {**family.config, "architectures": [family.model_class]},
        task_type=family.task,
        peft_config=adapter,
        quant=quant,
        setup=setup_of(family, quantized=quant is not None, **options),
        device=(8, 0),
    )


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")
SAME_LAYERS = (int, float, str, type(None))
"""Types of the values of a config that says nothing about single layers."""


def of_one_layer(family: Family) -> Family:
    """The family with one layer instead of two, where its layers are all the same."""
    config = family.config
    if "first_k_dense_replace" in config or not all(isinstance(value, SAME_LAYERS) for value in config.values()):
        return family
    return family._replace(config={**config, **{name: 1 for name in LAYERS if config.get(name) == 2}})


def counts(family: Family, kind: str) -> tuple[int, int]:
    """(trainable, all) as the real model, adapted by peft itself, counts them."""
    real = model(family)
    if kind == "full":
        total = sum(p.numel() for p in real.parameters())
        return total, total  # what the class freezes, Marian's and Whisper's positions, trains once a checkpoint is loaded
    task = family.task if family.task in {t.value for t in peft.TaskType} else None
    with torch.device("meta"):
        adapted = peft.get_peft_model(real, peft.LoraConfig(task_type=task, r=4, target_modules=family.targets))
    numbers: tuple[int, int] = adapted.get_nb_trainable_parameters()
    return numbers


KINDS = ("full", "lora", "qlora")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_traced_counts_and_sums(name: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each type by one kind of method in turn; `--full-matrix`: by all three."""
    kinds = KINDS if pytestconfig.option.full_matrix else KINDS[[*FAMILIES].index(name) % len(KINDS) :][:1]
    for kind in kinds:
        with monkeypatch.context() as patch:
            check_counts_and_sums(name, kind, patch)


def check_counts_and_sums(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA with two layers and two steps, the others with one: what repeats is the same in all three."""
    if kind != "lora":
        monkeypatch.setattr(engine, "STEPS", 1)
    family = FAMILIES[name] if kind == "lora" else of_one_layer(FAMILIES[name])
    result = traced(family, kind, skip=family.qlora_skip)
    assert (result.num_trainable, result.num_total) == counts(family, kind)
    for phase, peak in result.peak_by_phase.items():
        assert sum(result.by_category(phase).values()) == peak
    assert result.by_category("backward")["activations"] > 0
    assert result.unknown_ops == {}


def test_more_than_forty_model_types() -> None:
    assert len({family.config["model_type"] for family in FAMILIES.values()}) > 40


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("roberta", "quant_skip_modules"),  # the head that peft trains is the last module, and quantized: bitsandbytes' own error
        ("mamba", "packed 4-bit weight"),  # `dt_proj.weight @ …` in transformers' mixer
    ],
)
def test_what_qlora_cannot_train_is_refused_with_a_way_out(name: str, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        traced(FAMILIES[name], "qlora")


def test_a_packed_weight_that_the_model_clamps_has_a_way_out() -> None:
    """Gemma 3n's `prediction_coefs.weight.data.clamp_` (modeling_gemma3n.py): torch clamps no bytes by floats."""
    packed = torch.ones(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="can't be cast"):
        packed.clamp_(-1.0, 1.0)
    error = RuntimeError("Attempting to cast from torch.float32 to out tensor with dtype torch.uint8, but this can't be cast")
    assert "quant_skip_modules" in reason(error)


BATCHES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, int | str]]] = {
    "gpt2": ({"input_ids": (2, 24), "labels": (2, 24)}, {}),
    "roberta": ({"input_ids": (2, 24), "labels": (2,)}, {}),
    "xlm-roberta": ({"input_ids": (2, 24), "start_positions": (2,), "end_positions": (2,)}, {}),
    "bart": ({"input_ids": (2, 24), "labels": (2, 24)}, {"decoder_seq_len": 24}),
    "bart-classifier": ({"input_ids": (2, 24), "labels": (2,)}, {}),
    # Whisper's second convolution halves the frames: 20 positions are 40 of them
    "whisper": ({"input_features": (2, 16, 40), "labels": (2, 24)}, {"mel_frames": 40, "decoder_seq_len": 24}),
    # 20 s of 16 kHz; 999 frames; SpecAugment: int(0.05 · 999 / 10) = 4 spans of 10 frames
    "wav2vec2": (
        {"input_values": (2, 320_000), "labels": (2, 24)},
        {"audio_seconds": 20, "sampling_rate": 16_000, "masked_frames": 40, "label_tokens": 24},
    ),
    "ast": ({"input_values": (2, 40, 16), "labels": (2,)}, {"mel_frames": 40}),
    "vit": ({"pixel_values": (2, 3, 32, 32), "labels": (2,)}, {"images_per_sample": 1, "image_size": "32x32"}),
    "videomae": ({"pixel_values": (2, 4, 3, 32, 32), "labels": (2,)}, {"frames_per_sample": 4, "image_size": "32x32"}),
    "clip": ({"input_ids": (2, 24), "pixel_values": (2, 3, 32, 32)}, {"images_per_sample": 1, "image_size": "32x32"}),
    # (32 / 8)² patches, the class token left out
    "llava": (
        {"input_ids": (2, 24), "labels": (2, 24), "pixel_values": (2, 3, 32, 32)},
        {"images_per_sample": 1, "image_size": "32x32", "image_tokens": 16},
    ),
    "qwen2_vl": ({"input_ids": (2, 24), "labels": (2, 24)}, {"images_per_sample": 0}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_batch(name: str) -> None:
    family = FAMILIES[name]
    step_inputs = inputs(model(family), setup_of(family))
    shapes, facts = BATCHES[name]
    assert {key: tuple(value.shape) for key, value in step_inputs.batch.items() if torch.is_tensor(value)} == shapes
    assert step_inputs.facts == facts


def test_a_mask_comes_with_padding() -> None:
    for name in ("llama", "bert", "bart"):
        step_inputs = inputs(model(FAMILIES[name]), setup_of(FAMILIES[name], padding=True))
        assert step_inputs.batch["attention_mask"].shape == (B, S)


@pytest.mark.parametrize(
    ("labels", "problem", "shape", "dtype"),
    [
        (3, None, (B,), torch.int64),
        (1, None, (B,), torch.float32),
        (3, "regression", (B, 3), torch.float32),
        (3, "multi_label_classification", (B, 3), torch.float32),
    ],
)
def test_labels_of_a_classifier(labels: int, problem: str | None, shape: tuple[int, ...], dtype: Any) -> None:
    config = {"model_type": "bert", **PLAIN, "num_labels": labels, "problem_type": problem}
    family = Family(config, "BertForSequenceClassification", "SEQ_CLS")
    tensor = inputs(model(family), setup_of(family)).batch["labels"]
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bert-base-uncased", {"seq_len": 513}, "seq_len: 513 .* up to 512"),
        ("roberta-base", {"seq_len": 513}, "seq_len: 513 .* up to 512"),  # 514 rows, the first two are the padding's
        ("gpt2", {"seq_len": 2048}, "seq_len: 2048 .* up to 1024"),
        ("opt-350m", {"seq_len": 2049}, "seq_len: 2049 .* up to 2048"),
        ("whisper-tiny", {"seq_len": 449}, "seq_len: 449 .* up to 448"),
    ],
)
def test_lengths_past_the_positions_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        peftplan.estimate(name, method="full", engine="trace", **options)


def test_a_decoder_with_fewer_positions_takes_what_it_holds() -> None:
    config = {"model_type": "led", **BART, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 16}
    family = Family(config, "LEDForConditionalGeneration", "SEQ_2_SEQ_LM")
    step_inputs = inputs(model(family), setup_of(family))
    assert (step_inputs.batch["labels"].shape, step_inputs.facts) == ((B, 16), {"decoder_seq_len": 16})


def test_what_has_no_loss_or_no_start_is_refused() -> None:
    bare = Family({"model_type": "bert", **PLAIN}, "BertModel", "FEATURE_EXTRACTION")
    with pytest.raises(RefusedError, match="BertModel has no loss"):
        inputs(model(bare), setup_of(bare))
    config = {**FAMILIES["t5"].config, "decoder_start_token_id": None}
    with pytest.raises(InputError, match="decoder_start_token_id"):
        inputs(model(FAMILIES["t5"]._replace(config=config)), setup_of(FAMILIES["t5"]))
    picture = FAMILIES["llava"]
    with pytest.raises(InputError, match=r"seq_len: 16 .* more than 16"):
        inputs(model(picture), setup_of(picture, seq_len=16))
    with pytest.raises(RefusedError, match="gradient_checkpointing: AlbertFor"):
        traced(FAMILIES["albert"], "full", gradient_checkpointing=True)


@pytest.mark.parametrize(("name", "rows"), [("bart", 48), ("t5", 48), ("bert", 48), ("whisper", 48), ("llava", 48), ("vit", 0)])
def test_logits_are_tokens_of_the_decoder_by_vocabulary(name: str, rows: int) -> None:
    result = traced(FAMILIES[name], "lora")
    logits = {m.storage.shape for m in result.log if m.storage.category == "logits"}
    assert {shape[-1] for shape in logits} == ({200} if rows else set())
    # a causal loss shifts: without the last token of each of the two samples
    assert {int(torch.Size(shape).numel()) // 200 for shape in logits} <= {rows, rows - B}


SHAPES = {"2d x 3d": ((6, 16), (2, 16, 32)), "2d x 2d": ((16, 8), (8, 32)), "3d x 3d": ((2, 8, 16), (2, 16, 32))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", SHAPES)
def test_a_grouped_product_has_the_real_kernels_shape(layout: str, dtype: Any) -> None:
    def product() -> Any:
        a, b = (torch.ones(shape, dtype=dtype) for shape in SHAPES[layout])
        offsets = None if layout == "3d x 3d" else torch.tensor([2, 8 if layout == "2d x 2d" else 6], dtype=torch.int32)
        return torch.nn.functional.grouped_mm(a, b, offs=offsets)

    real = product()
    with experts_on((8, 0)), FakeTensorMode():
        fake = product()
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_rows_that_no_grouped_product_takes_are_refused_as_the_kernel_does() -> None:
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    a, b = torch.ones(6, 10, dtype=torch.bfloat16), torch.ones(2, 10, 32, dtype=torch.bfloat16)  # rows of 20 bytes
    with pytest.raises(RuntimeError, match="16 bytes"):
        torch.nn.functional.grouped_mm(a, b, offs=offsets)
    with experts_on((8, 0)), FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="16 bytes"):
        torch.nn.functional.grouped_mm(a, b, offs=offsets)


def test_experts_in_fp32_and_on_old_cards() -> None:
    family = FAMILIES["mixtral"]
    result = traced(family, "qlora")
    experts = [m.storage for m in result.log if (m.storage.name or "").endswith("experts.down_proj")]
    assert {(s.dtype, s.shape) for s in experts} == {("bf16", (4, 64, 96)), ("fp32", (4, 64, 96))}  # loaded, then cast for kbit
    assert any("_grouped_mm" in m.storage.op for m in result.log)
    config = {"model_type": "mixtral", **GQA, **LOCAL_EXPERTS, "architectures": ["MixtralForCausalLM"]}
    old = trace(config, peft_config=None, setup=setup_of(family), device=(7, 5))
    assert any("grouped_mm_fallback" in m.storage.op for m in old.log)


def test_the_kernels_that_were_not_there_are_named() -> None:
    estimate = peftplan.estimate(FAMILIES["mamba"].config, engine="trace", seq_len=8, target_modules=["in_proj"])
    assert "mamba_ssm" in estimate.assumptions["kernels"]
    shown = peftplan.estimate(FAMILIES["bart"].config, engine="trace", seq_len=8, target_modules=["q_proj"])
    assert shown.assumptions["decoder_seq_len"] == 8
    assert "kernels" not in shown.assumptions


DEEP: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt2": ({"n_layer": 8}, ["transformer.h"]),
    "distilbert": ({"n_layers": 8}, ["distilbert.transformer.layer"]),
    "clip": (
        {"text_config": {**PLAIN, "num_hidden_layers": 8}, "vision_config": {**VIT, "num_hidden_layers": 9}},
        ["vision_model.encoder.layers", "text_model.encoder.layers"],
    ),
}
"""Changes that make a model deep, and the stacks that then repeat, the deepest first."""


@pytest.mark.parametrize("name", DEEP)
def test_deep_stacks_are_the_full_trace(name: str) -> None:
    changes, stacks = DEEP[name]
    family = FAMILIES[name]._replace(config={**FAMILIES[name].config, **changes})
    config = {**family.config, "architectures": [family.model_class]}
    assert [s.name for s in engine.repeating_stacks(config, task_type=family.task)] == stacks
    short = traced(family, "lora")
    with patch.object(engine, "repeating_stacks", lambda config, **_: ()):
        full = traced(family, "lora")
    assert (short.depths, full.depths) == ((3, 4), ())
    assert short.peak_by_phase == full.peak_by_phase
    assert short.by_category() == full.by_category()
    assert (short.num_trainable, short.num_total) == (full.num_trainable, full.num_total) == counts(family, "lora")
    assert short.replayed.peaks == full.replayed.peaks


def test_no_traceback_for_a_model_without_known_input() -> None:
    config = {"model_type": "timesformer", **VIT, "num_frames": 2}
    family = Family(config, "TimesformerModel", None)
    with pytest.raises(PeftplanError, match="no loss"):
        inputs(model(family), setup_of(family))
