"""Settings of people's files that the kept ones do not have: dtypes of QLoRA in fp16, texts that look like placeholders."""

from __future__ import annotations

from pathlib import Path

import pytest

import peftplan
from peftplan.job.configs.plan import bound
from peftplan.job.configs.read import read_config, read_text, read_values
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, SWIFT, TORCHTUNE, TRL

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("values", "changed", "dtypes"),
    [
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True}, ("bf16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": False, "fp16": True}, ("fp16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": None, "fp16": True}, ("fp16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": "auto", "fp16": True}, ("fp16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": False}, ("fp32", "bf16")),
        (LLAMAFACTORY, {"quantization_bit": 4}, ("bf16", "bf16")),
        (LLAMAFACTORY, {"quantization_bit": 4, "bf16": False, "fp16": True}, ("fp16", "fp16")),
        (SWIFT, {"quant_bits": 4, "quant_method": "bnb"}, ("bf16", None)),
        (SWIFT, {"quant_bits": 4, "quant_method": "bnb", "torch_dtype": "float16"}, ("fp32", None)),
        (SWIFT, {"quant_bits": 4, "quant_method": "bnb", "bnb_4bit_compute_dtype": "float16"}, ("fp16", None)),
    ],
)
def test_the_dtype_in_which_four_bits_are_computed(
    values: dict[str, object], changed: dict[str, object], dtypes: tuple[str, str | None]
) -> None:
    read = read_values({**values, **changed}, file="a.yml").options
    assert (read["compute_dtype"], read.get("quant_storage")) == dtypes


@pytest.mark.parametrize(("bf16", "dtype"), [("auto", "fp16"), (None, "fp16"), (True, "bf16"), (False, "fp16")])
@pytest.mark.parametrize("fp16_first", [True, False])
def test_axolotl_trains_in_one_of_two_dtypes(bf16: object, dtype: str, fp16_first: bool) -> None:
    """axolotl 0.19.0, utils/config/__init__.py (`resolve_dtype`), whatever the order of the keys."""
    base = {key: value for key, value in AXOLOTL.items() if key not in ("bf16", "fp16")}
    values = {**base, "fp16": True, "bf16": bf16} if fp16_first else {**base, "bf16": bf16, "fp16": True}
    read = read_values(values, file="a.yml").options
    assert (read["autocast"], read["dtype"]) == (dtype, dtype)


@pytest.mark.parametrize("pattern", [["^lm_head.weight$"], ["<extra>"]])
def test_an_unsupported_key_says_why_whatever_its_text(pattern: list[str]) -> None:
    for key in ("unfrozen_parameters", "tokens"):
        assert "placeholder" not in read_values({**AXOLOTL, key: pattern}, file="a.yml").unsupported[key].why


@pytest.mark.parametrize(
    ("settings", "autocast"),
    [({}, "bf16"), ({"bf16": False}, "none"), ({"bf16": False, "fp16": True}, "fp16"), ({"fp16": True}, "fp16")],
)
def test_trl_without_mixed_precision(settings: dict[str, bool], autocast: str) -> None:
    """TRL computes in bf16 unless a file says no (trl 1.16, trainer/base_config.py:108)."""
    values = {key: value for key, value in TRL.items() if key not in ("bf16", "fp16")}
    assert read_values({**values, **settings}, file="a.yaml").options["autocast"] == autocast
    arguments = ", ".join(f"{key}={value}" for key, value in settings.items())
    program = f"model = AutoModelForCausalLM.from_pretrained('gpt2')\nSFTTrainer(model, args=SFTConfig({arguments}))\n"
    assert read_text(program, file="run.py").options["autocast"] == autocast


@pytest.mark.parametrize(
    ("settings", "checkpoints", "autocast"),
    [("", False, "none"), (", bf16=True, gradient_checkpointing=True", True, "bf16"), (", fp16=True", False, "fp16")],
)
def test_training_arguments_keep_their_own_defaults_in_sft_trainer(settings: str, checkpoints: bool, autocast: str) -> None:
    program = f"model = AutoModelForCausalLM.from_pretrained('gpt2')\nSFTTrainer(model, args=TrainingArguments('x'{settings}))\n"
    read = read_text(program, file="run.py").options
    assert (read["gradient_checkpointing"], read["autocast"]) == (checkpoints, autocast)


@pytest.mark.parametrize(("precision", "autocast"), [("bf16", "bf16"), ("fp16", "fp16"), ("no", "none")])
@pytest.mark.parametrize(
    "settings",
    [
        "Trainer(model, TrainingArguments('x'))",
        "SFTTrainer(model, TrainingArguments('x'))",
        "SFTTrainer(model, SFTConfig(bf16=False))",
    ],
)
def test_a_launch_file_decides_the_precision_of_a_program_without_one(
    tmp_path: Path, settings: str, precision: str, autocast: str
) -> None:
    """transformers 5.24, training_args.py:1614."""
    (program := tmp_path / "run.py").write_text(f"model = AutoModelForCausalLM.from_pretrained('gpt2')\n{settings}\n")
    (launch := tmp_path / "launch.yaml").write_text(
        f"distributed_type: MULTI_GPU\nmixed_precision: {precision}\nnum_processes: 2\nnum_machines: 1\n"
    )
    assert read_config([program, launch]).options["autocast"] == autocast


def test_a_named_launch_file_decides_the_precision_of_trl_without_one() -> None:
    values = {**TRL, "bf16": False, "accelerate_config": "zero2"}
    assert read_values(values, file="a.yaml").options["autocast"] == "bf16"


@pytest.mark.parametrize("arguments", ["TrainingArguments('x')", "SFTConfig(gradient_checkpointing=False)"])
@pytest.mark.parametrize(("argument", "checkpoints"), [("", True), (", use_gradient_checkpointing=False", False)])
def test_peft_checkpoints_a_quantized_base_whatever_the_trainer_says(arguments: str, argument: str, checkpoints: bool) -> None:
    """prepare_model_for_kbit_training enables checkpoints (peft 0.21.2, utils/other.py); no trainer disables them."""
    program = (
        "model = AutoModelForCausalLM.from_pretrained('gpt2', quantization_config=BitsAndBytesConfig(load_in_4bit=True))\n"
        f"model = prepare_model_for_kbit_training(model{argument})\n"
        f"SFTTrainer(model, {arguments}, peft_config=LoraConfig(r=8)).train()\n"
    )
    assert read_text(program, file="run.py").options["gradient_checkpointing"] is checkpoints


@pytest.mark.parametrize(
    ("old", "name"), [("flash_attention", "flash_attention_2"), ("sdp_attention", "sdpa"), ("eager_attention", "eager")]
)
@pytest.mark.parametrize("adapter", ["qlora", None])
@pytest.mark.parametrize("more", [{}, {"sample_packing": True}, {"activation_offloading": True}])
def test_axolotls_old_names_of_attention(old: str, name: str, adapter: str | None, more: dict[str, object]) -> None:
    """axolotl 0.19.0, utils/schemas/config.py:1577, puts the new name in their place before anything reads it."""
    base = {key: value for key, value in AXOLOTL.items() if key not in ("attn_implementation", "flash_attention")}
    base |= {"base_model": "meta-llama/Llama-3.2-1B", "adapter": adapter, **more}
    of_old = read_values({**base, old: True}, file="a.yml")
    of_new = read_values({**base, "attn_implementation": name}, file="a.yml")
    assert of_old.options == of_new.options
    assert of_old.options["attn_implementation"] == name
    assert {*of_old.unsupported} == {*of_new.unsupported}
    assert "attn_implementation" in of_old.read[old].option
    both = read_values({**base, old: True, "attn_implementation": name}, file="a.yml")
    assert " raises " in both.unsupported[old].why  # config.py:1569


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"attn_implementation": "flash_attention_4"}, "attn_implementation"),
        ({"attn_implementation": "kernels-community/other"}, "attn_implementation"),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin", "mine.Plugin"]}, "plugins"),
        ({"lora_target_linear": None}, "adapter"),  # peft raises ValueError
    ],
)
def test_axolotl_leaves_no_value_out(values: dict[str, object], key: str) -> None:
    """Values that no rule knows say so: their peak was that of a file without the key."""
    assert [*read_values({**AXOLOTL, **values}, file="a.yml").unsupported] == [key]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({**LLAMAFACTORY, "quantization_bit": 3}, "quantization_bit"),
        ({**SWIFT, "quant_method": "bnb", "quant_bits": 3}, "quant_bits"),
        ({**SWIFT, "quant_method": "bnb", "quant_bits": None}, "quant_method"),
    ],
)
def test_bitsandbytes_has_4_and_8_bits(values: dict[str, object], key: str) -> None:
    """LLaMA-Factory 0.9.5, model/model_utils/quantization.py:181; ms-swift 4.6.0, arguments/base_args/quant_args.py:50, :57."""
    assert " raises ValueError" in read_values(values, file="a.yaml").unsupported[key].why


@pytest.mark.parametrize("values", [AXOLOTL, LLAMAFACTORY, TRL])
def test_an_emptied_cache_lowers_what_is_reserved(values: dict[str, object]) -> None:
    """transformers 5.24, trainer.py:2094: between forward and backward of each such step, the first one too."""
    assert (
        read_values({**values, "torch_empty_cache_steps": 4}, file="a.yaml").unsupported["torch_empty_cache_steps"].effect
        == "lowers"
    )


def test_attention_of_kernels_repositories() -> None:
    """What saves as FlashAttention 2 does is counted as it, in files of each tool; the others have no peak, but a count."""
    for values, key in ((TRL, "attn_implementation"), (SWIFT, "attn_impl"), (AXOLOTL, "attn_implementation")):
        for name in ("flash_attention_3", "kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3"):
            assert read_values({**values, key: name}, file="a.yaml").options["attn_implementation"] == "flash_attention_2"
        assert [*read_values({**values, key: "flex_attention"}, file="a.yaml").unsupported] == [key]


def test_trl_without_a_longest_sequence() -> None:
    """`max_length: null` cuts nothing (trl 1.16, trainer/sft_config.py:143); it is not the default of 1024 tokens."""
    plan = read_values({**TRL, "max_length": None}, file="a.yaml")
    assert "seq_len" not in plan.options
    assert "max_length" in plan.read or "max_length" in plan.ignored


@pytest.mark.parametrize(
    ("strategy", "flash", "shape"),
    [("bfd-requeue", True, "one row"), ("bfd-requeue", False, None), ("zzz", True, None), ("wrapped", False, "rows")],
)
def test_trl_packs_by_a_strategy_that_it_has(strategy: str, flash: bool, shape: str | None) -> None:
    """`bfd-requeue` is the old name of `bfd_split` (trl 1.16, trainer/sft_config.py:336)."""
    attention = {"attn_implementation": "flash_attention_2"} if flash else {}
    plan = read_values({**TRL, "packing": True, "packing_strategy": strategy, "max_length": 512, **attention}, file="a.yaml")
    assert ("packing" in plan.unsupported) is (shape is None)
    assert shape != "one row" or plan.options["batch_size"] == 1


@pytest.mark.parametrize(("losses", "meant"), [(["hinge"], "hinge"), ("hinge", "hinge"), (["hinge", "sft"], "hinge,sft")])
def test_trl_with_losses_in_a_list(losses: object, meant: str) -> None:
    """trl 1.16, trainer/dpo_config.py:245 takes a list, and adds the losses of a row up."""
    plan = read_values({**TRL, "loss_type": losses}, file="a.yaml", kind="command", program="trl dpo")
    assert (plan.options["loss_type"], plan.unsupported) == (meant, {})


@pytest.mark.parametrize(
    ("base", "values", "effect"),
    [
        (TORCHTUNE, {"optimizer": {"_component_": "torch.optim.SGD", "momentum": 0.9}}, "raises"),
        (TORCHTUNE, {"optimizer": {"_component_": "torch.optim.AdamW", "amsgrad": True}}, "raises"),
        (TRL, {"disable_dropout": False}, "unknown"),  # trl 1.16, trainer/dpo_config.py:185: True by default
        (TRL, {"full_determinism": True}, "unknown"),
    ],
)
def test_settings_that_change_what_a_step_keeps(base: dict[str, object], values: dict[str, object], effect: str) -> None:
    """They were read as numbers of the optimizer, of a loss or of the data."""
    (refusal,) = read_values({**base, **values}, file="a.yaml").unsupported.values()
    assert refusal.effect == effect


@pytest.mark.parametrize(
    ("values", "key", "raised"),
    [
        ({"tokens": {"bos_token": "<s>"}}, "tokens.bos_token", "ValidationError"),
        ({"qat": {"weight_dtype": "nvfp4", "activation_dtype": "nvfp4", "group_size": 16}}, "qat.weight_dtype", "ValueError"),
        (
            {
                "base_model": "mistralai/Mixtral-8x7B-v0.1",
                "adapter": "qlora",
                "load_in_4bit": True,
                "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "MistralDecoderLayer"},
            },
            "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
            "TypeError",
        ),
    ],
)
def test_what_axolotl_raises_for(values: dict[str, object], key: str, raised: str) -> None:
    """Each was run with axolotl 0.19.0, torchao 0.17.0 and peft 0.20.0, on the emulated card or as its config is validated."""
    plan = read_values({**AXOLOTL, **values}, file="a.yml", tool="axolotl", tool_version="0.19.0")
    assert f" raises {raised}" in {**plan.unsupported, **plan.refused}[key].why


def test_axolotl_0_21_fake_quantizes_nvfp4_beside_activations() -> None:
    """Run with torchao 0.18.0, which it pins: `prepare_model_for_qat` raises for weights alone. A step was not run."""
    qat = {"weight_dtype": "nvfp4", "activation_dtype": "nvfp4", "group_size": 16}
    both, alone = (
        read_values({**AXOLOTL, "qat": of}, file="a.yml", tool="axolotl") for of in (qat, qat | {"activation_dtype": None})
    )
    assert (both.refused, both.unsupported["qat.weight_dtype"].effect) == ({}, "raises")
    assert "axolotl 0.21.0 raises ValueError" in alone.unsupported["qat.weight_dtype"].why


def test_coreweave_sends_weights_as_it_trains() -> None:
    """It was read as a logger's settings."""
    plan = read_values({**AXOLOTL, "coreweave": {"bucket": "b", "rollouts": True}}, file="a.yml", tool="axolotl")
    assert {plan.unsupported[key].effect for key in ("coreweave.bucket", "coreweave.rollouts")} == {"unknown"}


def test_axolotl_trains_for_mxfp4_where_torchao_has_no_nvfp4() -> None:
    """examples/llama-3/3b-qat-nvfp4.yaml, which runs with what 3b-qat-mxfp4.yaml beside it says."""
    of_liger = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True}
    values: dict[str, object] = {key: AXOLOTL[key] for key in AXOLOTL if key not in ("adapter", "load_in_4bit")} | of_liger
    qat = {"activation_dtype": "nvfp4", "weight_dtype": "nvfp4", "group_size": 16}
    plan = read_values(values | {"qat": qat}, file="a.yml", tool="axolotl", tool_version="0.19.0")
    changed = {"activation_dtype": "mxfp4", "weight_dtype": "mxfp4", "group_size": 32}
    assert plan.refused["qat.weight_dtype"].instead == {f"qat.{key}": value for key, value in changed.items()}
    in_mx = read_values(values | {"qat": changed}, file="a.yml", tool="axolotl", tool_version="0.19.0")
    assert (in_mx.unsupported, in_mx.refused, in_mx.options) == ({}, {}, plan.options)
    assert plan.options["kernels"] == ("torchao-mxfp4",)
    for other in ({"weight_dtype": "nvfp4"}, {**qat, "activation_dtype": "int8"}):  # another experiment
        refused = read_values(values | {"qat": other}, file="a.yml", tool="axolotl")
        assert (refused.refused, "qat.weight_dtype" in refused.unsupported) == ({}, True)


def test_layers_in_mxfp4_without_a_formula_leave_no_bound() -> None:
    """Liger's kernels, which save less, go with them, and without checkpoints MXFP4 keeps 4 bits of what others keep in 16."""
    of_liger = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True}
    values: dict[str, object] = {key: AXOLOTL[key] for key in AXOLOTL if key not in ("adapter", "load_in_4bit")} | of_liger
    values |= {"base_model": "mistralai/Mistral-7B-v0.1", "qat": {"activation_dtype": "mxfp4", "weight_dtype": "mxfp4"}}
    memory = peftplan.estimate(config=read_values(values, file="a.yml", tool="axolotl")).to_dict()["memory"]
    assert memory["peak_allocated"] is None


@pytest.mark.parametrize(
    ("model", "stays"),
    [("EleutherAI/gpt-j-6b", True), ("tiiuae/falcon-7b", True), ("facebook/opt-1.3b", None), ("microsoft/phi-1_5", False)],
)
def test_axolotl_casts_embeddings_back_that_it_knows_by_name(model: str, stays: bool | None) -> None:
    """GPT-J's `wte` stays in fp32, and Falcon's linear layers, which bitsandbytes does not quantize: two layers, rehearsed, hold
    50,400 × 4,096 × 2 and 414,138,368 × 2 bytes more in each phase. None: not rehearsed, a lower bound."""
    values = {"base_model": model, "attn_implementation": "sdpa", "lora_mlp_kernel": False}
    plan = read_values({**AXOLOTL, **values}, file="a.yml", tool="axolotl")
    assert {key: row.effect for key, row in plan.unsupported.items()} == ({"load_in_4bit": "raises"} if stays is None else {})
    assert stays is None or plan.options["kbit_prepare"] is stays


@pytest.mark.parametrize(
    ("values", "stays"),
    [
        ({}, True),
        ({"deepspeed": "deepspeed_configs/zero1.json"}, True),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, False),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, False),
        ({"quantize_moe_experts": True}, False),
        ({"load_in_4bit": False, "adapter": "lora"}, False),
    ],
)
def test_experts_that_are_not_quantized_stay_in_fp32(values: dict[str, object], stays: bool) -> None:
    """Mixtral of transformers 5: 90 GB of experts in 16 bits are 180 GB. ZeRO-2 was rehearsed and has a peak."""
    plan = read_values({**AXOLOTL, "base_model": "mistralai/Mixtral-8x7B-v0.1", **values}, file="a.yml", tool="axolotl")
    assert ("load_in_4bit" in plan.unsupported) is stays


@pytest.mark.parametrize(
    ("values", "key", "effect"),
    [
        ({"adapter": "lora"}, "load_in_4bit", "raises"),
        ({"adapter": "lora", "deepspeed": "deepspeed_configs/zero1.json"}, "load_in_4bit", "raises"),
        ({"adapter": "lora", "deepspeed": "deepspeed_configs/zero3_bf16.json"}, "load_in_4bit", None),
        ({"bnb_config_kwargs": {"llm_int8_skip_modules": ["up_proj"]}}, "bnb_config_kwargs.llm_int8_skip_modules", "raises"),
        (
            {"adapter": "lora", "load_in_8bit": True, "bnb_config_kwargs": {"llm_int8_skip_modules": ["up_proj"]}},
            "bnb_config_kwargs.llm_int8_skip_modules",
            "lowers",
        ),
    ],
)
def test_linear_layers_that_axolotl_does_not_quantize(values: dict[str, object], key: str, effect: str | None) -> None:
    """peft casts to fp32 what is not in 4 or 8 bits, and only qlora reads which modules to leave out."""
    row = read_values({**AXOLOTL, **values}, file="a.yml", tool="axolotl").unsupported.get(key)
    assert (row and row.effect) == effect


@pytest.mark.parametrize("quantizes_experts", [True, False])
def test_glm_4_7_flash_runs_with_qlora_in_place_of_int8(quantizes_experts: bool) -> None:
    """axolotl reads `bnb_config_kwargs` beside qlora alone, so that no key leaves kv_b_proj out of int8."""
    values = {"base_model": "zai-org/GLM-4.7-Flash", "adapter": "lora", "load_in_8bit": True, "load_in_4bit": False}
    plan = read_values(
        {**AXOLOTL, **values, "lora_qkv_kernel": False, "quantize_moe_experts": quantizes_experts}, file="a.yml", tool="axolotl"
    )
    assert plan.refused["load_in_8bit"].instead == {"adapter": "qlora", "load_in_8bit": False, "load_in_4bit": True}
    assert (plan.options["quant"], plan.options.get("quant_skip_modules")) == ("nf4", None)
    assert "load_in_8bit" not in plan.unsupported


def test_a_list_of_tokens_may_grow_the_vocabulary() -> None:
    plan = read_values({**AXOLOTL, "tokens": ["<|im_start|>"]}, file="a.yml", tool="axolotl")
    assert plan.unsupported["tokens"].effect == "raises"


@pytest.mark.parametrize(
    ("more", "known"),
    [({}, True), ({"lora_rank": 64}, False), ({"_component_": "torchtune.models.qwen2_5.lora_qwen2_5_7b"}, False)],
)
def test_torchtunes_teacher_has_no_adapter(more: dict[str, object], *, known: bool) -> None:
    """`load_state_dict` of torch 2.13: its weights are missing in a checkpoint of the model. The published file runs without the
    adapter; others of its arguments raise TypeError then."""
    teacher = {"_component_": "torchtune.models.qwen2_5.lora_qwen2_5_14b_instruct", "lora_attn_modules": ["q_proj"], **more}
    plan = read_values({**TORCHTUNE, "teacher_model": teacher}, file="a.yml")
    (row,) = (plan.refused if known else plan.unsupported).values()
    assert "raises RuntimeError" in row.why
    assert known is not bool(plan.unsupported)


@pytest.mark.parametrize(
    ("values", "optim", "decay"),
    [
        (AXOLOTL, "optimizer", "weight_decay"),
        (LLAMAFACTORY, "optim", "weight_decay"),
        (TRL, "optim", "weight_decay"),
        (SWIFT, "optim", "weight_decay"),
    ],
)
def test_decayed_weights_are_added_to_copies_of_the_gradients(values: dict[str, object], optim: str, decay: str) -> None:
    """torch 2.13.0, optim/sgd.py:429. A step of torchtune's LoRA of Qwen2-0.5B, r 128, rehearsed with SGD and a decay of 0.01:
    134,466,560 B above the formula, its 67,239,936 gradients in 16 bits."""
    decays = {"sgd": 0.01, "rmsprop": "1e-2", "adagrad": 1}
    bounds = {name: bound(read_values({**values, optim: name, decay: n}, file="a.yml").unsupported) for name, n in decays.items()}
    assert set(bounds.values()) == {"at_least"}
    for others in ({optim: "sgd", decay: 0.0}, {optim: "adamw_torch", decay: 0.01}):
        assert bound(read_values({**values, **others}, file="a.yml").unsupported) is None


def test_decay_of_torchtune_is_the_optimizers() -> None:
    sgd = {"_component_": "torch.optim.SGD", "lr": 0.02}
    decayed = {**sgd, "weight_decay": 0.01}
    each = [read_values({**TORCHTUNE, "optimizer": one}, file="a.yaml") for one in (sgd, decayed, {**decayed, "fused": True})]
    assert [bound(plan.unsupported) for plan in each] == [None, "at_least", None]  # _fused_sgd_ decays within its kernel


@pytest.mark.parametrize(
    ("values", "dft", "liger", "preferences"),
    [
        (SWIFT, "enable_dft_loss", "use_liger_kernel", {"rlhf_type": "dpo"}),
        (LLAMAFACTORY, "use_dft_loss", "enable_liger_kernel", {"stage": "dpo"}),
    ],
)
def test_dynamic_fine_tuning_is_of_supervised_trainers(
    values: dict[str, object], dft: str, liger: str, preferences: dict[str, object]
) -> None:
    """ms-swift 4.6.0, trainers/seq2seq_trainer.py:137, and LLaMA-Factory 0.9.5, train/sft/trainer.py:108: the loss is made of
    logits, whatever kernel is on. Trainers of preferences do not read the key."""
    plain, fused, preferred = (
        read_values({**values, dft: True, **more}, file="a.yml") for more in ({}, {liger: True}, preferences)
    )
    assert plain.options["loss"] == fused.options["loss"] == "per-token"
    assert (bound(plain.unsupported), bound(fused.unsupported), bound(preferred.unsupported)) == (None, None, None)
    assert "loss" not in preferred.options


@pytest.mark.parametrize(
    ("optim_args", "has_peak"), [("weight_decay=0.01", False), ("weight_decay=0", True), ("momentum=0.9", True)]
)
def test_decay_among_arguments_of_an_optimizer_has_no_formula(optim_args: str, has_peak: bool) -> None:
    estimate = peftplan.estimate("smollm2-135m", optim="sgd", optim_args=optim_args)
    assert (estimate.peaks is not None) is has_peak
    assert has_peak or "weight_decay of sgd" in estimate.not_modelled[0]


def test_axolotl_passes_the_size_of_buckets_on_but_to_preferences() -> None:
    """core/builders/causal.py:229 in axolotl 0.19.0; its rl.py has no such line."""
    plan = read_values(AXOLOTL | {"ddp_bucket_cap_mb": 100}, file="a.yaml", tool="axolotl")
    assert not plan.unsupported
    distributed = peftplan.estimate(config=plan, gpus=2).distributed
    assert distributed is not None
    assert distributed.strategy.bucket_cap_mb == 100
    plan = read_values(AXOLOTL | {"ddp_bucket_cap_mb": 100, "rl": "dpo"}, file="a.yaml", tool="axolotl")
    assert "ddp_bucket_cap_mb" in plan.unsupported
