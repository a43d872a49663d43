"""Which of Unsloth's jobs run layers that torch compiles, of models with a record of their own."""

from __future__ import annotations

import copy
import json

import pytest

import peftplan
from peftplan.job.configs.read import read_text
from peftplan.job.sources import load_config

GEMMA2 = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/gemma-2-2b", max_seq_length=1024)
model = FastLanguageModel.get_peft_model(model, r=16)
SFTTrainer(model=model, max_seq_length=1024, packing=False, args=SFTConfig(per_device_train_batch_size=2, max_steps=60)).train()
"""


def test_batches_of_gemma_2_stay_padded() -> None:
    """trainer.py:198 (`PADDING_FREE_BLOCKLIST`)."""
    plan = read_text(GEMMA2, file="a.py")
    assert not plan.unsupported
    assert plan.options["kernels"] == "unsloth-padded"
    assert "FlashAttention" in plan.assumed["kernels"]
    assert plan.assumed["padding"].startswith("none")
    result = peftplan.estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (20_766_720, None)
    assert result.peaks is not None


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("packing=False", "packing=True"),
        ("packing=False", "data_collator=DataCollatorForSeq2Seq(tokenizer)"),
        ("model, max_seq_length=1024", "model, max_seq_length=512"),
        ("max_steps=60", "max_length=512"),
        ("r=16", "r=8"),
        ("from unsloth", "import os; os.environ['UNSLOTH_BLOCK_COMPILE_LEGACY'] = '0'\nfrom unsloth"),
    ],
)
def test_other_batches_of_gemma_2_have_no_record(written: str, instead: str) -> None:
    """Masks are as wide as the model's longest row, whatever the trainer's is."""
    result = peftplan.estimate(config=read_text(GEMMA2.replace(written, instead), file="a.py"))
    assert result.peaks is None or result.bound is not None


EMBEDDING = """
from unsloth import FastSentenceTransformer
model = FastSentenceTransformer.from_pretrained(model_name="unsloth/Qwen3-Embedding-4B", max_seq_length=512, load_in_4bit=False)
model = FastSentenceTransformer.get_peft_model(model, r=32, use_gradient_checkpointing="unsloth", task_type="FEATURE_EXTRACTION",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
loss = losses.MultipleNegativesRankingLoss(model)
SentenceTransformerTrainer(model=model, loss=loss, args=SentenceTransformerTrainingArguments(
    max_steps=60, per_device_train_batch_size=8, bf16=is_bf16_supported(), fp16=not is_bf16_supported())).train()
"""


def test_inputs_of_a_decoder_of_embeddings_stay_on_the_card() -> None:
    plan = read_text(EMBEDDING, file="a.py")
    assert not plan.unsupported
    assert (plan.options["gradient_checkpointing"], plan.options["offload_checkpoints"]) == (True, False)
    result = peftplan.estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (66_060_288, None)
    assert result.peaks is not None


@pytest.mark.parametrize(
    ("written", "instead"), [('"unsloth", task', "True, task"), ("load_in_4bit=False", "load_in_4bit=True"), ("r=32", "r=16")]
)
def test_other_embeddings_have_no_record(written: str, instead: str) -> None:
    result = peftplan.estimate(config=read_text(EMBEDDING.replace(written, instead), file="a.py"))
    assert result.peaks is None or result.bound is not None


QAT = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen3-4B-Instruct-2507", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, qat_scheme="int4")
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=1, max_steps=30)).train()
"""


def test_qat_of_lora_rounds_the_base() -> None:
    """14.86 GB: the weights in 16 bits, 8.0 GB, and the head in fp32 four times."""
    plan = read_text(QAT, file="a.py")
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (33_030_144, None)
    assert result.peaks is not None
    assert result.peaks.allocated > 8_044_936_192 + 4 * 4 * 151_936 * 2560


@pytest.mark.parametrize(
    ("written", "instead"),
    [('"int4"', '"int8-int4"'), ("load_in_4bit=False", "load_in_4bit=True"), ("r=16", "r=8"), ("max_steps=30", "packing=True")],
)
def test_other_qat_of_lora_has_no_record(written: str, instead: str) -> None:
    result = peftplan.estimate(config=read_text(QAT.replace(written, instead), file="a.py"))
    assert result.peaks is None or result.bound is not None


CLASSIFIER = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained(model_name="unsloth/ModernBERT-large", max_seq_length=512, num_labels=6,
    auto_model=AutoModelForSequenceClassification, full_finetuning=True, load_in_4bit=False)
model = FastModel.get_peft_model(model, r=16, use_gradient_checkpointing="unsloth", task_type="SEQ_CLS")
trainer = Trainer(model=model, processing_class=tokenizer, compute_metrics=compute_metrics, args=TrainingArguments(
    per_device_train_batch_size=32, bf16=True, optim="adamw_8bit"))
trainer.train()
"""


def test_a_classifier_trains_in_full_whatever_its_adapter() -> None:
    """models/vision.py: get_peft_model has no effect on full fine-tuning; 395,837,446 parameters in a rehearsal."""
    plan = read_text(CLASSIFIER, file="a.py")
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (395_837_446, None)
    assert result.peaks is not None


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("full_finetuning=True", "full_finetuning=False"),
        ("ModernBERT-large", "ModernBERT-base"),
        ('="unsloth", task', "=False, task"),
        ("compute_metrics=compute_metrics", "data_collator=collator"),
    ],
)
def test_other_classifiers_have_no_record(written: str, instead: str) -> None:
    plan = read_text(CLASSIFIER.replace(written, instead), file="a.py")
    result = peftplan.estimate(config=plan) if plan.options["trainer"] == "transformers" else None
    assert result is None or result.peaks is None or result.bound is not None


MIXTURE = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Qwen3-30B-A3B-Instruct-2507", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=32, use_gradient_checkpointing=True, target_modules=["q_proj", "k_proj",
    "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"])
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=50)).train()
"""


def test_a_mixture_by_its_own_class_has_a_record() -> None:
    """1,285,029,888 trainable parameters, as the notebook's output says."""
    plan = read_text(MIXTURE, file="a.py")
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (1_285_029_888, None)
    assert result.peaks is not None


@pytest.mark.parametrize(
    ("written", "instead"),
    [("load_in_4bit=False", "load_in_4bit=True"), ("r=32", "r=16"), ("max_steps=50", "packing=True")],
)
def test_other_jobs_of_the_mixture_have_no_record(written: str, instead: str) -> None:
    result = peftplan.estimate(config=read_text(MIXTURE.replace(written, instead), file="a.py"))
    assert result.peaks is None or result.bound is not None


@pytest.mark.parametrize(("installed", "recorded"), [("5.3.0", True), ("4.56.2", False)])
def test_experts_of_transformers_4_have_no_record(installed: str, recorded: bool) -> None:
    """They are linear layers, each with an adapter of its own."""
    cells = [{"cell_type": "code", "source": [f"!pip install transformers=={installed}\n{MIXTURE}"]}]
    result = peftplan.estimate(config=read_text(json.dumps({"cells": cells}), file="a.ipynb"))
    assert (result.peaks is not None and result.bound is None) is recorded


GEMMA_4 = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained(model_name="unsloth/gemma-4-26B-A4B-it", max_seq_length=8192, load_in_4bit=True)
model = FastModel.get_peft_model(model, finetune_vision_layers=False, r=8)
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=1, max_steps=60)).train()
"""
OF_EXPERTS = 30 * 128 * 3 * 704 * 2816
"""Layers, experts, the three matrices of each: 22,837,985,280 of the model's 25.8 billion parameters."""


def test_stacks_of_experts_in_4_bits() -> None:
    """Half a byte a number in place of two: unsloth_zoo, moe_utils_bnb4bit.py:533 (`replace_expert_params_with_bnb_params`)."""
    plan = read_text(GEMMA_4, file="a.py")
    in_16_bits = read_text(GEMMA_4.replace("load_in_4bit=True", "load_in_4bit=False"), file="a.py")
    assert "quant_experts" not in in_16_bits.options
    both = (peftplan.estimate(config=plan, quant_experts=experts) for experts in (False, True))
    left_alone, stored = (estimate.to_dict()["memory"]["by_category"]["weights"] for estimate in both)
    assert left_alone - stored == OF_EXPERTS * 3 // 2
    assert stored == peftplan.estimate(config=plan).to_dict()["memory"]["by_category"]["weights"]


def test_four_layers_have_the_counts_that_unsloth_printed() -> None:
    """Two of sliding and two of full attention, and two layers of the tower: a rehearsal of unsloth 2026.10.9 beside
    transformers 5.17.0, in which the router's scores stayed in 16 bits."""
    plan = read_text(GEMMA_4, file="a.py")
    config = copy.deepcopy(load_config(str(plan.model)))
    config["text_config"] |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config["vision_config"]["num_hidden_layers"] = 2
    result = peftplan.estimate(config, **plan.options)
    assert (result.trainable_parameters, result.total_parameters) == (32_983_040, 4_124_497_440)
    lines = {line["name"]: line["bytes"] for line in result.to_dict()["memory"]["lines"]}
    assert lines["model.language_model.layers.*.router.proj.weight"] == 4 * 128 * 2816 * 2
    assert lines["model.embed_vision.embedding_projection.weight"] == 1152 * 2816 * 2


IN_4_BITS = """
from unsloth import FastVisionModel
model, tokenizer = FastVisionModel.from_pretrained("unsloth/MODEL", load_in_4bit=True)
model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False, r=16, target_modules=["q_proj", "v_proj"])
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=1, max_steps=60)).train()
"""


@pytest.mark.parametrize(
    ("model", "beside"),
    [
        ("gemma-3-27b-it", 411_070_464),
        ("gemma-3n-E4B-it", 688_676_864),
        ("gemma-4-E4B-it", 462_094_336),
        ("gemma-4-31B-it", 552_019_968),
        ("Llama-3.2-11B-Vision-Instruct", 31_457_280),
        ("Qwen2-VL-7B-Instruct", 673_710_080),
    ],
)
def test_what_stands_beside_the_text_part_stays_in_16_bits(model: str, beside: int) -> None:
    """`beside`: numbers in the weights of the model's linear layers, as transformers 5.17.0 builds it, that are not converted by
    `_unsloth_should_convert_module` with `SKIP_QUANTIZATION_MODULES` of unsloth_zoo 2026.10.9, but for the head. Two bytes each
    in place of half a byte."""
    plan = read_text(IN_4_BITS.replace("MODEL", model), file="a.py")
    both = (peftplan.estimate(config=plan, quant_skip_modules=names) for names in (plan.options["quant_skip_modules"], "lm_head"))
    kept, converted = (estimate.to_dict()["memory"]["by_category"]["weights"] for estimate in both)
    assert kept - converted == beside * 3 // 2


OF_AUDIO = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained(model_name="unsloth/gemma-4-12b-it", load_in_4bit=False)
model = FastModel.get_peft_model(model, finetune_vision_layers=False, finetune_language_layers=True,
    finetune_attention_modules=True, finetune_mlp_modules=True, finetune_audio_layers=True, r=8)
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=8, max_steps=60)).train()
"""


def test_the_embedder_of_audio_is_adapted() -> None:
    """`get_peft_regex` of unsloth_zoo 2026.10.9 on four layers of transformers 5.17.0: 26 layers of the language model, which
    printed 2,740,224, and embed_audio, r x (640 + 3,840) more."""
    plan = read_text(OF_AUDIO, file="a.py")
    assert not plan.unsupported
    config = copy.deepcopy(load_config(str(plan.model)))
    config["text_config"] |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    assert peftplan.estimate(config, **plan.options).trainable_parameters == 2_740_224 + 8 * (640 + 3_840)


OF_QWEN_3_5 = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen3.5-35B-A3B", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
    "up_proj", "down_proj", "gate_up_proj"], use_gradient_checkpointing=True)
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=1, max_steps=50)).train()
"""


def test_experts_of_qwen_3_5_are_adapted() -> None:
    """unsloth 2026.10.9 beside transformers 5.2.0 on an emulated card: two layers, the second of which attends. A layer's 256
    experts have 8 x (2,048 + 1,024 + 512 + 2,048) numbers each, the shared one an adapter of its own beside them."""
    plan = read_text(OF_QWEN_3_5, file="a.py")
    config = copy.deepcopy(load_config(str(plan.model)))
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    result = peftplan.estimate(config, **plan.options)
    assert result.trainable_parameters == 23_363_584
    assert not any("gate_up_proj" in warning for warning in result.warnings)


OUTE = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained(model_name="unsloth/Llama-OuteTTS-1.0-1B", max_seq_length=2048, load_in_4bit=False)
model = FastModel.get_peft_model(model, r=128, target_modules=["q_proj", "v_proj"], use_gradient_checkpointing="unsloth")
SFTTrainer(model=model, max_seq_length=2048, args=SFTConfig(per_device_train_batch_size=2, max_steps=60)).train()
"""


def test_llama_of_speech_has_a_loss_by_function() -> None:
    """A chunk of 1,024 of 4,096 tokens, its gradient beside it, and a mask of all pairs of tokens."""
    result = peftplan.estimate(config=read_text(OUTE, file="a.py"))
    assert (result.trainable_parameters, result.bound) == (13_631_488, None)
    assert result.peaks is not None
    lines = {line.name.rpartition("model ")[2]: line.bytes() for line in result.peaks.ledgers["forward"].lines}
    assert lines["logits, in chunks"] == lines["gradient of logits"] == 1024 * 134_400 * 2
    assert lines["mask"] == 4096**2


def test_nobody_knows_what_layers_without_a_record_do() -> None:
    """Models of Unsloth's FastModel may have the loss by function, of which a chunk takes more."""
    result = peftplan.estimate(config=read_text(OUTE.replace("r=128", "r=64"), file="a.py"))
    assert result.config is not None
    assert (result.peaks, result.config["bound"]) == (None, "unknown")


TARGETS = OF_QWEN_3_5[OF_QWEN_3_5.index("target_modules=") : OF_QWEN_3_5.index("use_gradient")]
"""What the program above names."""


def test_experts_of_qwen_3_5_are_adapted_where_nothing_is_named() -> None:
    """unsloth 2026.10.9 beside transformers 5.2.0 on an emulated card: two layers and two of the tower, r 4. `FastModel` adapts
    the gate of the shared expert too; `FastLanguageModel` takes the seven projections."""
    text = OF_QWEN_3_5.replace(TARGETS, "").replace("r=8", "r=4")
    plan = read_text(text.replace("FastLanguageModel", "FastModel"), file="a.py")
    config = copy.deepcopy(load_config(str(plan.model)))
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config["vision_config"]["depth"] = 2
    assert peftplan.estimate(config, **plan.options).trainable_parameters == 11_947_528
    seven = read_text(text, file="a.py")
    assert peftplan.estimate(config, **seven.options).trainable_parameters == 23_363_584 / 2


@pytest.mark.parametrize("model", ["unsloth/Qwen3-VL-30B-A3B-Instruct", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen1.5-MoE-A2.7B"])
def test_experts_that_were_not_counted_leave_no_peak(model: str) -> None:
    named = read_text(OF_QWEN_3_5.replace("unsloth/Qwen3.5-35B-A3B", model), file="a.py")
    attending = read_text(
        OF_QWEN_3_5.replace("unsloth/Qwen3.5-35B-A3B", model).replace(TARGETS, 'target_modules=["q_proj"], '), file="a.py"
    )
    assert named.unsupported.keys() == {"experts"}
    assert peftplan.estimate(config=named).peaks is None
    assert not attending.unsupported


@pytest.mark.parametrize(
    ("call", "switch", "adapted"),
    [
        ("FastLanguageModel", "", 184_811_520),
        ("FastLanguageModel", "finetune_vision_layers=True, ", 202_899_456),
        ("FastModel", "", 202_899_456),
        ("FastModel", "finetune_vision_layers=False, ", 184_811_520),
    ],
)
def test_names_are_of_the_language_model_where_towers_are_switched_off(call: str, switch: str, adapted: int) -> None:
    """The notebook of Magistral printed 184,811,520; `FastLanguageModel` switches the tower off itself (models/llama.py:4604)."""
    text = OF_QWEN_3_5.replace("unsloth/Qwen3.5-35B-A3B", "unsloth/Magistral-Small-2509").replace('"gate_up_proj"', "")
    plan = read_text(text.replace("r=8, ", f"r=32, {switch}").replace("FastLanguageModel", call), file="a.py")
    assert peftplan.estimate(config=plan).trainable_parameters == adapted
