"""The ecosystem's own objects in place of options: the same estimate, and what is set beside them wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from tests.planning.tiny import CONFIG

COMMON = {"output_dir": "unused", "report_to": [], "use_cpu": True}


def choices(estimate: peftplan.Estimate) -> dict[str, Any]:
    """What an estimate assumed, but for where the model was read from; peft keeps names as sets, so their order says nothing."""
    return {k: sorted(v) if isinstance(v, list) else v for k, v in estimate.assumptions.items() if k != "model"}


def same(one: peftplan.Estimate, other: peftplan.Estimate) -> bool:
    """Whether two estimates rest on the same lines and the same choices."""
    return one.lines() == other.lines() and choices(one) == choices(other)


def test_a_transformers_config_is_a_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    assert same(peftplan.estimate(config), peftplan.estimate(CONFIG))


def test_a_config_of_another_kind_is_a_model_too() -> None:
    transformers = pytest.importorskip("transformers")
    estimate = peftplan.estimate(transformers.BertConfig(num_labels=3), task_type="SEQ_CLS", target_modules="query")
    # r·(in + out) per layer, and the classifier that peft trains for this task: 768·3 + 3
    assert estimate.trainable_parameters == 12 * 8 * (768 + 768) + 2_307


PEFT_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # class of peft: (its arguments, ours)
    "LoraConfig": ({"r": 4, "target_modules": ["q_proj", "v_proj"]}, {"r": 4, "target_modules": "q_proj,v_proj"}),
    "IA3Config": (
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"method": "ia3", "target_modules": "k_proj,down_proj", "feedforward_modules": "down_proj"},
    ),
    "LoHaConfig": ({"r": 4, "target_modules": ["q_proj"]}, {"method": "loha", "r": 4, "target_modules": "q_proj"}),
    "LoKrConfig": ({"r": 4, "target_modules": ["q_proj"]}, {"method": "lokr", "r": 4, "target_modules": "q_proj"}),
    "VeraConfig": ({"r": 16, "target_modules": ["q_proj"]}, {"method": "vera", "r": 16, "target_modules": "q_proj"}),
    "OFTConfig": (
        {"oft_block_size": 16, "target_modules": ["q_proj"]},
        {"method": "oft", "oft_block_size": 16, "target_modules": "q_proj"},
    ),
    "AdaLoraConfig": (
        {"init_r": 6, "target_r": 4, "total_step": 10, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
        {"method": "adalora", "init_r": 6, "target_r": 4, "total_step": 10, "target_modules": "q_proj"},
    ),
    "PrefixTuningConfig": (
        {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"},
        {"method": "prefix-tuning", "num_virtual_tokens": 5},
    ),
    "LNTuningConfig": ({"target_modules": ["norm"]}, {"method": "ln-tuning", "target_modules": "norm"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_a_peft_config_is_a_method(name: str) -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = PEFT_CONFIGS[name]
    with_object = peftplan.estimate(CONFIG, peft_config=getattr(peft, name)(**theirs))
    assert same(with_object, peftplan.estimate(CONFIG, **ours))
    assert with_object.trainable_parameters > 0


def test_a_saved_adapter_is_a_method(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    expected = peftplan.estimate(CONFIG, method="dora", r=4, target_modules="q_proj")
    for path in (tmp_path, str(tmp_path), tmp_path / "adapter_config.json"):
        assert same(peftplan.estimate(CONFIG, peft_config=path), expected)
    raw = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert same(peftplan.estimate(CONFIG, peft_config=raw), expected)


def test_what_is_set_wins_over_a_peft_config() -> None:
    raw = {"peft_type": "LORA", "r": 64, "target_modules": ["q_proj"], "use_dora": True}
    estimate = peftplan.estimate(CONFIG, peft_config=raw, r=4, target_modules="v_proj")
    assert estimate.trainable_parameters == 2 * (4 * (64 + 32) + 32)  # and the magnitudes of DoRA stay
    assert estimate.method["name"] == "dora"
    with pytest.raises(peftplan.InputError, match="of type LORA"):
        peftplan.estimate(CONFIG, peft_config=raw, method="ia3")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"load_in_8bit": True}, {"quant": "int8"}),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["q_proj"]}, {"quant": "int8", "quant_skip_modules": "q_proj"}),
        ({"load_in_4bit": True}, {"quant": "fp4", "compute_dtype": "fp32"}),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"quant": "nf4", "compute_dtype": "fp32"}),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
            },
            {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"},
        ),
    ],
)
def test_a_bitsandbytes_config_is_a_storage(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    estimate = peftplan.estimate(CONFIG, quantization_config=transformers.BitsAndBytesConfig(**theirs))
    assert same(estimate, peftplan.estimate(CONFIG, **ours))


def test_what_is_set_wins_over_a_bitsandbytes_config() -> None:
    raw = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert peftplan.estimate(CONFIG, quantization_config=raw, double_quant=False).assumptions["double_quant"] is False
    assert same(peftplan.estimate(CONFIG, quantization_config=raw, quant="int8"), peftplan.estimate(CONFIG, quant="int8"))
    assert same(peftplan.estimate(CONFIG, quantization_config=raw, quant="none"), peftplan.estimate(CONFIG))
    # The object says what `qlora` leaves open, and what it presets.
    plain = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    assumptions = peftplan.estimate(CONFIG, method="qlora", quantization_config=plain).assumptions
    assert (assumptions["quant"], assumptions["double_quant"], assumptions["compute_dtype"]) == ("fp4", False, "fp32")


def test_training_arguments_are_a_setup() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        **COMMON, per_device_train_batch_size=3, gradient_accumulation_steps=5, optim="adafactor", gradient_checkpointing=True
    )
    estimate = peftplan.estimate(CONFIG, training_args=args)
    ours = {"batch_size": 3, "gradient_accumulation_steps": 5, "optim": "adafactor", "gradient_checkpointing": True}
    assert same(estimate, peftplan.estimate(CONFIG, autocast="none", **ours))
    assert estimate.assumptions["trainer"] == "transformers"


@pytest.mark.parametrize(("config", "strategy"), [({}, "fsdp2"), ({"version": 2}, "fsdp2"), ({"version": 1}, "fsdp1")])
def test_fsdp_without_a_version_is_that_of_transformers(config: dict[str, int], strategy: str) -> None:
    """transformers 5, training_args.py: `int(self.fsdp_config.get("version", 2))`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(**COMMON, fsdp="full_shard", fsdp_config=dict(config))
    document = peftplan.estimate(CONFIG, training_args=args, method="lora", gpus=4).to_dict()
    assert document["distributed"]["strategy"] == strategy


@pytest.mark.parametrize("word", ["shard_grad_op", "hybrid_shard"])
def test_fsdp_1_of_transformers_5_is_full_shard(word: str) -> None:
    """accelerate's own plugin: what transformers passes as reshard_after_forward is not the strategy."""
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(**COMMON, fsdp=word, fsdp_config={"version": 1, "sync_module_states": False})
    plugin = accelerate.FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    assert (plugin.sharding_strategy.name, plugin.reshard_after_forward.name) == ("FULL_SHARD", word.upper())

    whole = transformers.TrainingArguments(**COMMON, fsdp="full_shard", fsdp_config={"version": 1})
    by_word, usual = (peftplan.estimate(CONFIG, training_args=each, method="lora", gpus=4) for each in (args, whole))
    assert by_word.peaks is not None
    assert by_word.peaks == usual.peaks
    assert f"FSDP1 runs FULL_SHARD, not {word.upper()}" in by_word.assumptions["notes"][0]


def test_training_arguments_say_what_they_leave_off() -> None:
    # Their own defaults, unlike our preset: no checkpointing, no mixed precision, a batch of 8 on each device.
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assumptions = peftplan.estimate(CONFIG, training_args=transformers.TrainingArguments(**COMMON)).assumptions
    assert (assumptions["batch_size"], assumptions["gradient_checkpointing"], assumptions["autocast"]) == (8, False, "none")
    assert assumptions["optim"] == "adamw_torch_fused"


def test_optimizer_arguments_come_along() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(**COMMON, optim="galore_adamw", optim_args="rank=4", optim_target_modules=["attn"])
    ours = {"optim": "galore_adamw", "optim_args": "rank=4", "optim_target_modules": "attn", "method": "full"}
    estimate = peftplan.estimate(CONFIG, training_args=args, method="full")
    assert estimate.lines() == peftplan.estimate(CONFIG, **ours).lines()


def test_an_sft_config_is_trl() -> None:
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(**COMMON, max_length=512, per_device_train_batch_size=2, bf16=False)
    assumptions = peftplan.estimate(CONFIG, training_args=args, quant="nf4").assumptions
    shown = {
        name: assumptions[name]
        for name in ("trainer", "seq_len", "batch_size", "loss", "kbit_prepare", "adapter_dtype", "autocast")
    }
    assert shown == {
        "trainer": "trl",
        "seq_len": 512,
        "batch_size": 2,
        "loss": "trl-chunked",
        "kbit_prepare": False,
        "adapter_dtype": "bf16",
        "autocast": "none",
    }
    assert assumptions["gradient_checkpointing"] is True  # TRL's own default


@pytest.mark.parametrize(
    ("module", "name", "trainer"),
    [
        ("trl", "DistillationConfig", "trl-distillation"),
        ("trl.experimental.gkd", "GKDConfig", "trl-gkd"),
        ("trl.experimental.gold", "GOLDConfig", "trl-gold"),
    ],
)
def test_a_teacher_of_the_arguments(module: str, name: str, trainer: str) -> None:
    of_trl = pytest.importorskip(module)
    args = getattr(of_trl, name)(**COMMON, bf16=True, teacher_model_name_or_path="smollm2-360m")
    assumptions = peftplan.estimate("smollm2-135m", training_args=args, method="full", dtype="fp32").assumptions
    assert (assumptions["trainer"], assumptions["teacher_model"]) == (trainer, "smollm2-360m")


@pytest.mark.parametrize(
    ("module", "name", "argument", "value"),
    [
        ("gold", "GOLDConfig", "use_uld_loss", True),
        ("tpo", "TPOConfig", "tpo_alpha", 0.0),
    ],
)
def test_losses_that_keep_other_tensors_are_refused(module: str, name: str, argument: str, value: float) -> None:
    args = getattr(pytest.importorskip(f"trl.experimental.{module}"), name)(**COMMON, bf16=False, **{argument: value})
    with pytest.raises(peftplan.InputError, match=rf"training_args.{argument}: {value} is not valid; .* is not counted"):
        peftplan.estimate(CONFIG, training_args=args, teacher_model="smollm2-360m")


def test_defaults_for_vllm_are_no_warning_where_transformers_generates() -> None:
    config = pytest.importorskip("trl").GRPOConfig
    for use_vllm, mode in ((False, None), (True, "server")):
        args = config(**COMMON, bf16=False, use_vllm=use_vllm, vllm_mode="server", num_generations=2)
        result = peftplan.estimate("smollm2-135m", training_args=args, batch_size=2)
        assert (result.warnings, result.assumptions.get("vllm_mode")) == ((), mode)


def test_other_trainers_of_trl_are_refused() -> None:
    args = pytest.importorskip("trl.experimental.sdpo").SDPOConfig(**COMMON, bf16=False)
    with pytest.raises(peftplan.InputError, match=r"'SDPOConfig' is not valid; accepted: .* SFTConfig, DPOConfig"):
        peftplan.estimate(CONFIG, training_args=args)


@pytest.mark.parametrize(
    ("name", "fields", "options"),
    [
        ("DPO", {"precompute_ref_log_probs": True, "beta": 0.3}, {"precompute_ref_log_probs": True, "beta": 0.3}),
        ("DPO", {"loss_type": ["sigmoid", "sft"]}, {"loss_type": "sigmoid,sft"}),
        ("KTO", {"loss_type": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
        ("Reward", {}, {}),
    ],
)
def test_configs_of_preferences_and_rewards(name: str, fields: dict[str, Any], options: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl")
    args = getattr(trl, f"{name}Config")(**COMMON, max_length=512, per_device_train_batch_size=2, bf16=False, **fields)
    expected: dict[str, Any] = {"trainer": f"trl-{name.lower()}", "seq_len": 512, "batch_size": 2, "autocast": "none"}
    result = peftplan.estimate(CONFIG, training_args=args)
    assert result.lines() == peftplan.estimate(CONFIG, **expected, **options).lines()
    assert {option: result.assumptions[option] for option in {**expected, **options}} == {**expected, **options}


def test_what_is_set_wins_over_training_arguments() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(**COMMON, per_device_train_batch_size=3, optim="adafactor")
    estimate = peftplan.estimate(
        CONFIG, training_args=args, optim="sgd", trainer="plain", batch_size=1, gradient_accumulation_steps=None
    )
    shown = {name: estimate.assumptions[name] for name in ("optim", "trainer", "batch_size", "gradient_accumulation_steps")}
    # None sets nothing.
    assert shown == {"optim": "sgd", "trainer": "plain", "batch_size": 1, "gradient_accumulation_steps": 1}
    assert peftplan.estimate(CONFIG, training_args=args, optim=None).assumptions["optim"] == "adafactor"


@pytest.mark.parametrize(
    ("argument", "accepted"),
    [
        ("peft_config", "PeftConfig"),
        ("quantization_config", "BitsAndBytesConfig"),
        ("training_args", "TrainingArguments"),
        ("gpu", "names of cards"),
        ("model", "built-in name"),
    ],
)
def test_an_object_of_another_kind_is_refused(argument: str, accepted: str) -> None:
    with pytest.raises(peftplan.InputError, match=accepted):
        peftplan.estimate(**{"model": CONFIG, argument: 3.5})


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_kwargs_say_whether_it_is_reentrant(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    for kwargs, expected in (({"use_reentrant": True}, True), ({"use_reentrant": False}, False), (None, False)):
        args = transformers.TrainingArguments(**COMMON, **{name: True, f"{name}_kwargs": kwargs})
        assert peftplan.estimate(CONFIG, training_args=args).assumptions["use_reentrant"] is expected


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"every_n_layers": 2}, {"every_n_layers": 2}),
        ({"offload": True, "use_reentrant": True}, {"offload_checkpoints": True, "use_reentrant": True}),
        ({}, {}),
    ],
)
def test_checkpointing_kwargs_say_which_layers_and_where(kwargs: dict[str, Any], expected: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    for on in (True, False):
        args = transformers.TrainingArguments(**COMMON, activation_checkpointing=on, activation_checkpointing_kwargs=kwargs)
        assumptions = peftplan.estimate(CONFIG, training_args=args).assumptions
        names = {"every_n_layers", "offload_checkpoints"}
        assert {name: assumptions[name] for name in assumptions if name in names} == {
            k: v for k, v in expected.items() if on and k in names
        }
        assert assumptions["use_reentrant"] is kwargs.get("use_reentrant", False)


def bounded(args: object, key: str) -> tuple[str, str]:
    """The bound of an estimate whose arguments have a key that is not counted, and its warning."""
    estimate = peftplan.estimate(CONFIG, training_args=args)
    assert estimate.peaks is not None
    (warning,) = [text for text in estimate.warnings if text.startswith(f"training_args.{key}")]
    config = estimate.to_dict()["config"]
    assert config["unsupported"].keys() == {f"training_args.{key}"}
    with pytest.raises(peftplan.errors.RefusedError, match=key):
        peftplan.estimate(CONFIG, training_args=args, strict=True)
    return config["bound"], warning


def test_checkpointing_that_is_not_counted_makes_a_bound() -> None:
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(**COMMON, gradient_checkpointing_kwargs={"selective": True}, bf16=False)
    assert bounded(args, "gradient_checkpointing_kwargs.selective")[0] == "at_least"


def test_checkpointing_kwargs_are_checked_as_options() -> None:
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        **COMMON, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 0}
    )
    with pytest.raises(peftplan.InputError, match=r"training_args.gradient_checkpointing_kwargs.every_n_layers: 0 is"):
        peftplan.estimate(CONFIG, training_args=args)


def test_activations_that_trl_moves_to_the_host_make_a_bound() -> None:
    trl = pytest.importorskip("trl")
    bound, warning = bounded(trl.SFTConfig(**COMMON, activation_offloading=True, bf16=False), "activation_offloading")
    assert (bound, warning.rpartition("; ")[2]) == ("at_most", "the peak is at most the stated one")
    counted = {"kernels": ["trl-offload.activations"], "quant": "nf4", "trainer": "trl", "seq_len": 512, "batch_size": 8}
    args = trl.SFTConfig(**COMMON, activation_offloading=True, max_length=512, bf16=False)
    of_4_bits = peftplan.estimate(CONFIG, training_args=args, quant="nf4")
    assert of_4_bits.lines() == peftplan.estimate(CONFIG, autocast="none", **counted).lines()
    assert of_4_bits.to_dict().get("config") is None


def test_liger_means_its_loss_to_trainer_and_only_its_layers_to_sft_trainer() -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    by_trainer = transformers.TrainingArguments(**COMMON, use_liger_kernel=True)
    without_loss = transformers.TrainingArguments(
        **COMMON, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False}
    )
    by_trl = trl.SFTConfig(**COMMON, use_liger_kernel=True, bf16=False)
    losses = [peftplan.estimate(CONFIG, training_args=args).assumptions["loss"] for args in (by_trainer, without_loss, by_trl)]
    assert losses == ["liger", "full", "trl-chunked"]


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("label_smoothing_factor", 0.1, "at_least"),
        ("auto_find_batch_size", True, "at_most"),
        ("torch_empty_cache_steps", 4, "at_most"),
    ],
)
def test_training_arguments_that_are_not_counted_make_a_bound(field: str, value: object, bound: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert bounded(transformers.TrainingArguments(**COMMON, **{field: value}), field)[0] == bound


def test_arguments_of_which_nobody_knows_the_effect_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(peftplan.InputError, match=r"training_args.torch_compile: True is not valid; .* is not counted"):
        peftplan.estimate(CONFIG, training_args=transformers.TrainingArguments(**COMMON, torch_compile=True))


def test_the_cache_of_training_arguments_is_read() -> None:
    transformers = pytest.importorskip("transformers")
    for use_cache in (False, True):
        args = transformers.TrainingArguments(**COMMON, use_cache=use_cache)
        assert peftplan.estimate(CONFIG, training_args=args).assumptions["use_cache"] is use_cache


@pytest.mark.parametrize(
    ("task", "model", "trainable"),
    [
        # r·(in + out) of query and value per layer, and the classifier that peft trains: 768·2 + 2, for answers too
        ("SEQ_CLS", "bert-base-uncased", 12 * 2 * 8 * (768 + 768) + 1_538),
        ("QUESTION_ANS", "bert-base-uncased", 12 * 2 * 8 * (768 + 768) + 1_538),
        # a score of two classes without a bias: 2048·2; q 2048 → 2048, v 2048 → 512
        ("SEQ_CLS", "llama-3.2-1b", 16 * 8 * (2048 + 2048 + 2048 + 512) + 4_096),
    ],
)
def test_the_task_of_an_adapter_with_a_head_is_the_jobs(task: str, model: str, trainable: int, tmp_path: Path) -> None:
    """`LoraConfig(task_type="SEQ_CLS")` is for the class with that head, which config.json does not name; peft counts it so."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=task, r=8)
    config.save_pretrained(tmp_path)
    for source in (config, tmp_path):
        estimate = peftplan.estimate(model, peft_config=source)
        assert estimate.model["model_class"].endswith({"SEQ_CLS": "ForSequenceClassification"}.get(task, "ForQuestionAnswering"))
        assert estimate.trainable_parameters == trainable
    assert peftplan.estimate(model, peft_config=config, task_type="FEATURE_EXTRACTION").model["model_class"].endswith("Model")


def test_a_task_that_vision_models_borrow_leaves_their_class(tmp_path: Path) -> None:
    """People write CAUSAL_LM for Qwen2-VL, whose class is the one that its config names."""
    estimate = peftplan.estimate(
        "qwen2-vl-2b-instruct", peft_config={"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    )
    assert estimate.model["model_class"] == "Qwen2VLForConditionalGeneration"


def test_a_checkpoint_of_bitsandbytes_is_loaded_as_stored() -> None:
    """As transformers loads it: a config.json with its own `quantization_config`."""
    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, **four_bit}
    config = {**CONFIG, "quantization_config": stored}
    for method in ("lora", "qlora"):
        estimate, expected = peftplan.estimate(config, method=method), peftplan.estimate(CONFIG, method="qlora")
        assert estimate.lines() == expected.lines()
        assert "quantized checkpoint (bitsandbytes)" in str(estimate.assumptions["notes"])
    for other in ("none", "int8"):
        with pytest.raises(peftplan.errors.RefusedError, match=f"quant: {other} is not how this repository stores its weights"):
            peftplan.estimate(config, quant=other)
    with pytest.raises(peftplan.errors.RefusedError, match="stores weights as nf4, and transformers refuses"):
        peftplan.estimate(config, method="full")
    by_gptq = peftplan.estimate({**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 32}})
    assert "(gptq): taken from it" in str(by_gptq.assumptions["notes"])
    assert by_gptq.lines() == peftplan.estimate(CONFIG, quant="gptq", quant_bits=8, quant_group_size=32).lines()


def test_how_trl_loads_a_model() -> None:
    trl, torch = pytest.importorskip("trl"), pytest.importorskip("torch")
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager", "revision": "main"}
    args = trl.SFTConfig(**COMMON, model_init_kwargs=kwargs, max_length=512, bf16=False)
    expected = peftplan.estimate(CONFIG, training_args=trl.SFTConfig(**COMMON, max_length=512, bf16=False), dtype="fp32",
                                 attn_implementation="eager")  # fmt: skip
    assert same(peftplan.estimate(CONFIG, training_args=args), expected)
    named = trl.SFTConfig(**COMMON, model_init_kwargs={"torch_dtype": "float16", "device_map": "auto"}, bf16=False)
    assert peftplan.estimate(CONFIG, training_args=named).assumptions["dtype"] == "fp16"
    stored = trl.SFTConfig(**COMMON, model_init_kwargs={"quantization_config": {"load_in_4bit": True}}, bf16=False)
    with pytest.raises(
        peftplan.InputError, match=r"model_init_kwargs.quantization_config.load_in_4bit: .* name it as quantization_config"
    ):
        peftplan.estimate(CONFIG, training_args=stored)
    in_fp32 = "SFTTrainer loads a model passed by name in fp32"
    assert in_fp32 in str(peftplan.estimate(CONFIG, trainer="trl").assumptions["notes"])
    assert "notes" not in expected.assumptions


def test_a_batch_as_one_sequence() -> None:
    """A row of per_device_train_batch_size × max_length tokens without padding, as a script's `packing=True`."""
    config = pytest.importorskip("trl").SFTConfig
    with pytest.raises(peftplan.InputError, match=r"training_args.padding_free: .* is not counted"):
        peftplan.estimate(CONFIG, training_args=config(**COMMON, bf16=False, padding_free=True))
    packed = config(**COMMON, bf16=False, packing=True, max_length=64, per_device_train_batch_size=3)
    by_sdpa = peftplan.estimate(CONFIG, training_args=packed).assumptions
    assert (by_sdpa["trainer"], by_sdpa["batch_size"], by_sdpa["seq_len"]) == ("trl-packed", 1, 192)
    by_flash = peftplan.estimate(CONFIG, training_args=packed, attn_implementation="flash_attention_2").assumptions
    assert (by_flash["trainer"], by_flash["batch_size"], by_flash["seq_len"]) == ("trl", 1, 192)
    wrapped = config(**COMMON, bf16=False, packing=True, packing_strategy="wrapped")
    assert peftplan.estimate(CONFIG, training_args=wrapped).peaks is not None


@pytest.mark.parametrize(
    ("adapter", "what"),
    [({"peft_type": "LORA", "a_new_key": 3}, "LORA with a_new_key"), ({"peft_type": "SHIRA", "r": 8}, "peft_type SHIRA")],
)
def test_what_only_peft_reads_of_an_adapter_config_is_named(adapter: dict[str, Any], what: str) -> None:
    """peft itself counts it, and no peak is stated."""
    pytest.importorskip("peft")
    estimate = peftplan.estimate("llama-3.2-1b", peft_config={"target_modules": ["q_proj"], **adapter})
    assert estimate.peaks is None
    assert estimate.not_modelled[0].startswith(f"activations of {what} (")


def test_a_class_of_arguments_is_no_object() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(peftplan.InputError, match=r"training_args: <class .* accepted: a transformers TrainingArguments"):
        peftplan.estimate(CONFIG, training_args=transformers.TrainingArguments)


def arguments(package: str, name: str, **fields: Any) -> Any:
    """An object of arguments of transformers or trl."""
    return getattr(pytest.importorskip(package), name)(**COMMON, **fields)


@pytest.mark.parametrize(("model", "patched"), [("gpt2", False), ("llama-3.2-1b", True)])
def test_liger_beside_a_model_that_it_does_not_patch_replaces_nothing(model: str, patched: bool) -> None:
    pytest.importorskip("transformers")
    with_liger = peftplan.estimate(model, training_args=arguments("transformers", "TrainingArguments", use_liger_kernel=True))
    without = peftplan.estimate(model, training_args=arguments("transformers", "TrainingArguments"))
    assert (with_liger.peaks != without.peaks) is patched
    assert (with_liger.assumptions["loss"] == "liger") is patched


def test_dropout_need_not_be_disabled_where_nothing_drops() -> None:
    kept, disabled = (arguments("trl", "DPOConfig", disable_dropout=disabled) for disabled in (False, True))
    assert same(peftplan.estimate("llama-3.2-1b", training_args=kept), peftplan.estimate("llama-3.2-1b", training_args=disabled))
    for model, options in (("llama-3.2-1b", {"lora_dropout": 0.1}), ("gpt2", {})):  # GPT-2 itself drops a tenth
        with pytest.raises(peftplan.InputError, match=r"training_args\.disable_dropout: False"):
            peftplan.estimate(model, training_args=kept, **options)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim", "adamww", "training_args.optim: 'adamww'"),
        ("fsdp", "full_shrad", "training_args.fsdp: 'full_shrad'"),
        ("fsdp_config", {"reshard": 1}, "training_args.fsdp_config: 'fsdp_reshard'"),
    ],
)
def test_an_error_names_the_argument(field: str, value: object, message: str) -> None:
    args = arguments("transformers", "TrainingArguments")
    args.fsdp = field == "fsdp_config"
    setattr(args, field, value)
    with pytest.raises(peftplan.InputError) as caught:
        peftplan.estimate(CONFIG, training_args=args, gpus=2)
    assert str(caught.value).startswith(message)


def test_an_option_that_the_user_sets_keeps_its_name() -> None:
    with pytest.raises(peftplan.InputError, match=r"^optim: 'adamww'"):
        peftplan.estimate(CONFIG, optim="adamww", training_args=arguments("transformers", "TrainingArguments"))


@pytest.mark.parametrize("value", ["yes", "no"])
def test_a_switch_of_arguments_is_no_text(value: str) -> None:
    args = arguments("trl", "SFTConfig", packing=value)
    with pytest.raises(peftplan.InputError, match=f"training_args.packing: '{value}' is not valid; accepted: True or False"):
        peftplan.estimate(CONFIG, training_args=args)


@pytest.mark.parametrize("name", ["batch_size", "seq_len", "r", "gpus", "gradient_accumulation_steps"])
def test_a_switch_is_no_number(name: str) -> None:
    with pytest.raises(peftplan.InputError, match=f"^{name} must be a whole number"):
        peftplan.estimate(CONFIG, **{name: True})
    if name in ("batch_size", "seq_len", "r"):
        with pytest.raises(peftplan.InputError, match=f"^{name} must be a whole number"):
            peftplan.estimate(CONFIG).at(**{name: True})
