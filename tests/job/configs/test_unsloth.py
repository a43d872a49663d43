"""What calls of Unsloth mean: which names are loaded as what, what is trained, what is compiled, and what waits on the host."""

from __future__ import annotations

import json
from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError
from peftplan.job.configs.plan import bound
from peftplan.job.configs.read import read_text, read_values
from peftplan.job.kernels import named_kernels


def test_unsloths_calls() -> None:
    calls = [
        {"call": "FastLanguageModel.from_pretrained", "args": [], "kwargs": {"model_name": "unsloth/Meta-Llama-3.1-8B"}},
        {"call": "FastLanguageModel.get_peft_model", "args": ["<model>"], "kwargs": {"r": 32, "lora_dropout": 0}},
        {"call": "SFTConfig", "args": [], "kwargs": {"per_device_train_batch_size": 2, "optim": "adamw_8bit"}},
    ]
    plan = read_values({"calls": calls}, kind="calls", file="run.yml")
    assert plan.model == "llama-3.1-8b"
    assert plan.options["target_modules"] == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    wanted = {
        "method": "qlora",
        "quant": "nf4",
        "r": 32,
        "batch_size": 2,
        "seq_len": 2048,
        "optim": "adamw_8bit",
        "loss": "unsloth",
    }
    assert {name: plan.options[name] for name in wanted} == wanted
    assert (plan.options["gradient_checkpointing"], plan.options["offload_checkpoints"]) == (True, True)


UNSLOTH = """
import os
{settings}
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B", max_seq_length=2048, use_exact_model_name=True)
model = FastLanguageModel.get_peft_model(model, r=16)
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=2{arguments})).train()
"""
COMPILED, LONG = {"UNSLOTH_BLOCK_COMPILE"}, {"UNSLOTH_PADDING_CHOICE"}
PADDED = 'os.environ.setdefault("UNSLOTH_DISABLE_AUTO_PADDING_FREE", "1")'


@pytest.mark.parametrize(
    ("settings", "arguments", "unsupported", "padding_free"),
    [
        ("", ", max_steps=60, gradient_accumulation_steps=4", set(), True),
        ("", ", max_steps=1249, gradient_accumulation_steps=4", set(), True),
        ("", ", max_steps=1250, gradient_accumulation_steps=4", LONG, True),
        ('os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"', ", max_steps=5000", set(), True),
        ('os.environ["UNSLOTH_DISABLE_AUTO_PADDING_FREE"] = "0"', ", max_steps=60", set(), True),
        (PADDED, ", max_steps=60", COMPILED, False),
        ('os.environ["UNSLOTH_PADDING_CHOICE"] = "padded"', ", max_steps=60", COMPILED, False),
        ('os.environ["UNSLOTH_PADDING_CHOICE"] = "padding_free"', ", max_steps=5000", set(), True),
        ("", ", max_steps=60, padding_free=False", COMPILED, False),
        ("", ", max_steps=60), data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer", COMPILED, False),
        (f'{PADDED}; os.environ["UNSLOTH_COMPILE_DISABLE"] = "1"', ", max_steps=60", set(), False),
    ],
)  # fmt: skip
def test_unsloth_compiles_layers_of_padded_batches(
    settings: str, arguments: str, unsupported: set[str], padding_free: bool
) -> None:
    """unsloth 2026.10.9: a layer that gets lengths of documents runs as it is (models/_block_compile.py:929)."""
    plan = read_text(UNSLOTH.format(settings=settings, arguments=arguments), file="train.py")
    assert set(plan.unsupported) == unsupported
    assert ("unsloth.padding_free" in named_kernels(plan.options["kernels"])) is padding_free
    assert (peftplan.estimate(config=plan).peaks is None) == bool(unsupported)  # in which direction it changes is not known
    assert not peftplan.estimate(config=plan, kernels="unsloth").config["unsupported"]  # the user says how it runs


@pytest.mark.parametrize(
    ("settings", "arguments", "assumed"),
    [
        ("", ", padding_free=False", True),
        ("%env UNSLOTH_BLOCK_COMPILE=0", ", padding_free=False", False),
        ("%env UNSLOTH_BLOCK_COMPILE_LEGACY=1", ", padding_free=False", False),
        ("", "", False),
    ],
)
def test_a_notebook_is_assumed_to_have_a_torch_before_layers_compile(settings: str, arguments: str, assumed: bool) -> None:
    """unsloth 2026.10.9, models/llama.py:3431; where nothing is left to torch's release, nothing is assumed."""
    program = UNSLOTH.format(settings="", arguments=f"{arguments}, max_steps=60")
    plan = read_text(
        json.dumps({"cells": [{"cell_type": "code", "source": [cell]} for cell in (settings, program)]}), file="a.ipynb"
    )
    assert ("2.11" in plan.assumed.get("torch", "")) is assumed
    assert set(plan.unsupported) == (COMPILED if "LEGACY" in settings else set())


def test_unsloth_trains_embeddings_that_are_named_as_targets_in_full() -> None:
    """models/llama.py:4884; 603,979,776 trainable parameters, as the notebook of Mistral's text completion prints them."""
    modules = '"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"'
    source = UNSLOTH.format(settings="", arguments=", max_steps=60").replace("r=16", f"r=128, target_modules=[{modules}]")
    plan = read_text(source.replace("Llama-3.2-1B", "mistral-7b-v0.3"), file="a.py")
    assert not plan.unsupported
    assert plan.options["modules_to_save"] == ("embed_tokens", "lm_head")
    assert "modules_to_save" in plan.read["lora.target_modules"].option
    assert peftplan.estimate(config=plan).trainable_parameters == 603_979_776


def test_arguments_without_a_name_are_those_of_the_signature() -> None:
    """unsloth 2026.10.9, models/loader.py:1241 (`from_pretrained`), models/llama.py:4569 (`get_peft_model`)."""
    source = """
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/llama-3-8b-bnb-4bit", 4096, None, False)
model = FastLanguageModel.get_peft_model(model, 32, ["q_proj", "v_proj"], 64, 0.1)
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=2, max_steps=60)).train()
"""
    plan = read_text(source, file="a.py")
    assert not plan.unsupported
    stated = {name: plan.options[name] for name in ("method", "seq_len", "r", "target_modules", "lora_dropout")}
    assert stated == {"method": "lora", "seq_len": 4096, "r": 32, "target_modules": ("q_proj", "v_proj"), "lora_dropout": 0.1}
    further = read_text(source.replace("None, False", "None, False, True"), file="a.py")
    assert set(further.unsupported) == {"load.4"}  # `token` in some classes, `load_in_8bit` in others


@pytest.mark.parametrize(
    ("call", "key"),
    [
        ('from_pretrained("unsloth/llama-3-8b", *found)', "load.*"),
        ("from_pretrained(*found)", "load.*"),
        ('from_pretrained("unsloth/llama-3-8b", 4096, max_seq_length=2048)', "load.1"),
    ],
)
def test_arguments_that_are_spread_or_twice_are_not_read(call: str, key: str) -> None:
    source = UNSLOTH.format(settings="", arguments=", max_steps=60")
    start = source.index("from_pretrained(")
    plan = read_text(source[:start] + call + source[source.index(")", start) + 1 :], file="a.py")
    assert key in plan.unsupported


def test_unsloth_takes_its_names_in_any_case() -> None:
    """unsloth 2026.10.9, models/loader_utils.py: the mapper's names are looked up in lower case."""
    plan = read_text(UNSLOTH.format(settings="", arguments=", max_steps=60").replace("Llama-3.2-1B", "Phi-4"), file="a.py")
    assert plan.model == "phi-4"


GRPO = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Llama-3.2-1B", max_seq_length=1024, fast_inference=True, gpu_memory_utilization=0.6,
    use_exact_model_name=True
)
model = FastLanguageModel.get_peft_model(model, r=32)
args = GRPOConfig(per_device_train_batch_size={batch}, gradient_accumulation_steps={accumulation}, num_generations=6,
    max_prompt_length=256, max_completion_length=768, max_steps=50, optim="paged_adamw_8bit")
GRPOTrainer(model=model, args=args).train()
"""


@pytest.mark.parametrize(("batch", "accumulation", "rows"), [(1, 1, 6), (12, 1, 12), (2, 3, 2), (4, 1, 6), (1, 6, 1)])
def test_unsloth_s_grpo_of_a_notebook(batch: int, accumulation: int, rows: int) -> None:
    """A batch that is no multiple of num_generations becomes one of them (models/rl.py:3598); vLLM shares the weights."""
    source = GRPO.format(batch=batch, accumulation=accumulation)
    plan = read_text(json.dumps({"cells": [{"cell_type": "code", "source": [source]}]}), file="grpo.ipynb")
    assert not plan.unsupported
    assert (plan.options["batch_size"], plan.options["vllm_gpu_memory_utilization"]) == (rows, 0.6)
    assert "0.22.2" in plan.assumed["trl"]
    result = peftplan.estimate(config=plan, gpu="a100-80gb")
    assert result.peaks is not None
    assert ("unsloth.padding_free" in result.assumptions["kernels"]) is (rows > 1)
    assert result.bound is None
    (card,) = result.gpus
    weights = result.static.bytes(("weights", "quant_state"))
    assert card.vllm_bytes == int(0.6 * card.usable_bytes) - weights
    assert read_text(source, file="grpo.py").unsupported  # a script says nothing of its trl


@pytest.mark.parametrize(("in_4bit", "method"), [("", "qlora"), (", load_in_4bit=False", "lora")])
def test_unsloth_takes_a_name_of_4_bits_for_that_of_16_where_the_file_says_so(in_4bit: str, method: str) -> None:
    """models/loader_utils.py:1194 (`INT_TO_FLOAT_MAPPER`)."""
    source = UNSLOTH.format(settings="", arguments=", max_steps=60").replace('1B", ', f'1B-unsloth-bnb-4bit"{in_4bit}, ')
    plan = read_text(source, file="a.py")
    assert plan.options["method"] == method
    assert ("quantization_config.llm_int8_skip_modules" in plan.unsupported) is (method == "qlora")


@pytest.mark.parametrize(
    ("name", "exact", "taken"),
    [("unsloth/Llama-3.2-1B", False, True), ("unsloth/Llama-3.2-1B", True, False), ("unsloth/mistral-7b", False, False)],
)
def test_unsloth_takes_plain_names_for_repositories_that_leave_layers_in_16_bits(name: str, exact: bool, taken: bool) -> None:
    """models/mapper.py: `FLOAT_TO_INT_MAPPER` of Llama 3.2 names -unsloth-bnb-4bit, of Mistral -bnb-4bit."""
    source = UNSLOTH.format(settings="", arguments=", max_steps=60").replace("unsloth/Llama-3.2-1B", name)
    plan = read_text(source.replace("use_exact_model_name=True", f"use_exact_model_name={exact}"), file="a.py")
    assert ("quantization_config.llm_int8_skip_modules" in plan.unsupported) is taken


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("SFTConfig(max_steps=60)", ("adamw_8bit", 4, 2)),
        ('SFTConfig(optim="adamw_torch", per_device_train_batch_size=1, gradient_accumulation_steps=8)', ("adamw_torch", 1, 8)),
        ("UnslothTrainingArguments(max_steps=60)", ("adamw_8bit", 4, 2)),
        ("DPOConfig(max_steps=60)", ("adamw_8bit", 4, 2)),
        ("KTOConfig(max_steps=60, per_device_train_batch_size=1)", ("adamw_8bit", 1, 2)),
        ("TrainingArguments(max_steps=60)", ("adamw_torch_fused", 8, 1)),
    ],
)
def test_unsloth_has_defaults_of_its_own_for_trl_s_configs(arguments: str, meant: tuple[str, int, int]) -> None:
    """models/rl.py:3312; transformers' TrainingArguments keep theirs. Rehearsed: without an optimizer, states have 8 bits."""
    trainer = arguments.partition("Config")[0] if "Config" in arguments else "SFT"
    source = UNSLOTH.replace("SFTConfig(per_device_train_batch_size=2{arguments})", arguments).replace("SFTT", f"{trainer}T")
    plan = read_text(source.format(settings=""), file="a.py")
    assert tuple(plan.options[name] for name in ("optim", "batch_size", "gradient_accumulation_steps")) == meant
    assert ("gradient_accumulation_steps" in plan.defaults) is ("=8" not in arguments)


@pytest.mark.parametrize(("arguments", "rows"), [("", 4), ("gradient_accumulation_steps=1,", 8), ("num_generations=6,", 6)])
def test_unsloth_s_defaults_decide_the_rows_of_grpo(arguments: str, rows: int) -> None:
    """4 rows in 2 micro batches are one group of 8 (models/rl.py:3598); else a micro batch is a group."""
    options = "per_device_train_batch_size={batch}, gradient_accumulation_steps={accumulation}, num_generations=6,"
    first, rest = GRPO.split(options)
    cell = {"cell_type": "code", "source": [first + arguments + rest]}
    assert read_text(json.dumps({"cells": [cell]}), file="grpo.ipynb").options["batch_size"] == rows


@pytest.mark.parametrize("trainer", ["SFT", "GRPO"])
def test_unsloth_loads_the_model_itself(trainer: str) -> None:
    """In 16 bits (models/llama.py:3601), whatever TRL would load: its note about fp32 is not said."""
    source = UNSLOTH.format(settings="", arguments=", max_steps=60") if trainer == "SFT" else GRPO.format(batch=1, accumulation=1)
    plan = read_text(source, file="a.py")
    result = peftplan.estimate(config=plan)
    assert plan.options["dtype"] == result.assumptions["dtype"] == "bf16"
    assert not any("fp32" in note for note in result.assumptions.get("notes", ()))


@pytest.mark.parametrize(("longest", "hosted"), [(456, False), (512, True)])
def test_unsloth_keeps_inputs_of_short_rows_on_the_card(longest: int, hosted: bool) -> None:
    """models/_utils.py:506, whatever `use_gradient_checkpointing="unsloth"` says."""
    source = GRPO.format(batch=1, accumulation=1).replace("max_seq_length=1024", f"max_seq_length={longest}")
    plan = read_text(json.dumps({"cells": [{"cell_type": "code", "source": [source]}]}), file="grpo.ipynb")
    assert plan.options["offload_checkpoints"] is hosted


@pytest.mark.parametrize(("loaded", "hosted"), [("True", False), ("False", False), ('"unsloth"', True)])
def test_get_peft_model_turns_checkpoints_on_again(loaded: str, hosted: bool) -> None:
    """Its default is "unsloth" (models/vision.py:4924); the loader alone patches what moves inputs (_utils.py:510)."""
    source = UNSLOTH.format(settings="", arguments="").replace("max_seq", f"use_gradient_checkpointing={loaded}, max_seq")
    options = read_text(source, file="a.py").options
    assert (options["gradient_checkpointing"], options["offload_checkpoints"]) == (True, hosted)


def test_of_sft_before_grpo_the_second_is_counted() -> None:
    """It holds all completions of a prompt. A length that only the program knows leaves prompt and completion all of a row."""
    before = """
args = SFTConfig(per_device_train_batch_size=1, gradient_accumulation_steps=1, num_train_epochs=2)
SFTTrainer(model=model, args=args).train()
longest = maximum_length + 1
"""
    source = GRPO.format(batch=1, accumulation=1).replace("args = GRPO", f"{before}args = GRPO").replace("=256", "=longest")
    source = source.replace("max_completion_length=768", "max_completion_length=1024 - longest")
    plan = read_text(json.dumps({"cells": [{"cell_type": "code", "source": [source]}]}), file="grpo.ipynb")
    assert not plan.unsupported
    assert (plan.options["trainer"], plan.options["batch_size"], plan.options["seq_len"]) == ("trl-grpo", 6, 1024)
    assert "max_completion_length" not in plan.options
    assert plan.assumed["seq_len"] == "every prompt and completion fill max_seq_length together"
    assert "besides" in plan.ignored["later.SFTConfig#1"].why


def test_the_embedding_of_packed_completions_on_the_host_makes_an_upper_bound() -> None:
    source = GRPO.format(batch=1, accumulation=1).replace("fast_inference=True", "fast_inference=True, offload_embedding=True")
    plan = read_text(json.dumps({"cells": [{"cell_type": "code", "source": [source]}]}), file="grpo.ipynb")
    assert [row.effect for row in plan.unsupported.values()] == ["lowers"]
    result = peftplan.estimate(config=plan, gpu="a100-80gb")
    assert result.bound == "at_most"
    assert result.gpus[0].verdict == "fits"


def test_unsloth_loads_phi_with_its_projections_apart() -> None:
    """The seven projections of Phi-3 medium: 65,536,000 trainable parameters, as its notebook prints them."""
    plan = read_text(
        UNSLOTH.format(settings="", arguments=", max_steps=60").replace("Llama-3.2-1B", "Phi-3-medium-4k-instruct"), file="a.py"
    )
    assert not plan.unsupported
    result = peftplan.estimate(config=plan)
    assert (result.model["name"], result.trainable_parameters) == ("phi-3-medium-4k-instruct", 65_536_000)
    assert result.peaks is not None
    in_fp16 = UNSLOTH.format(settings="", arguments="").replace('Llama-3.2-1B"', 'Phi-3-medium-4k-instruct", dtype=torch.float16')
    half = peftplan.estimate(config=read_text(in_fp16, file="a.py"))
    assert (half.peaks is not None, half.trainable_parameters) == (True, 65_536_000)
    fused = peftplan.estimate("phi-3-medium-4k-instruct", method="lora", r=16, target_modules=["qkv_proj", "gate_up_proj"])
    assert fused.trainable_parameters != result.trainable_parameters


def test_a_run_whose_length_the_data_decide_is_assumed_to_be_short() -> None:
    plan = read_text(UNSLOTH.format(settings="", arguments=", num_train_epochs=3"), file="train.py")
    assert not plan.unsupported
    assert "5,000" in plan.assumed["padding"]


@pytest.mark.parametrize(("where", "exact"), [("", True), (", data_collator=mine", False)])
def test_packed_rows_become_one_row(where: str, exact: bool) -> None:
    """Rehearsed with two documents of 512 and 1,536 tokens in each row (unsloth 2026.10.9, trl 1.15, torch 2.13, RTX 4090): the
    peak is 3,051,857,920 bytes, while loading; 3,049,502,208 in backward without packing, at as many tokens."""
    arguments = "per_device_train_batch_size=2, max_length=2048, max_steps=3, packing=True"
    source = f"""
model, tokenizer = FastLanguageModel.from_pretrained("meta-llama/Llama-3.2-1B", 2048, None, False)
model = FastLanguageModel.get_peft_model(model, 16)
SFTTrainer(model=model{where}, args=SFTConfig({arguments})).train()
"""
    plan = read_text(source, file="train.py")
    assert (not plan.unsupported) is exact
    result = peftplan.estimate(config=plan)
    assert not exact or (result.peaks is not None and result.peaks.allocated == pytest.approx(3_051_857_920, rel=0.001))


def test_a_notebook_sets_variables_by_a_magic() -> None:
    program = UNSLOTH.format(settings="", arguments=", padding_free=False")
    cells = ["%env UNSLOTH_BLOCK_COMPILE=0\n%env WANDB_PROJECT=mine", program]
    notebook = json.dumps({"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]})
    plan = read_text(notebook, file="train.ipynb")
    assert not plan.unsupported
    assert plan.read["environment.UNSLOTH_BLOCK_COMPILE"].value == "0"


FAST_MODEL = """
{settings}
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained("unsloth/gemma-3-270m-it", max_seq_length=2048, load_in_4bit=False)
model = FastModel.get_peft_model(
    model, r=128, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=4, gradient_accumulation_steps=1{arguments})).train()
"""


PADDING = "UNSLOTH_DISABLE_AUTO_PADDING_FREE"


@pytest.mark.parametrize(
    ("settings", "arguments", "unsupported"),
    [
        ("", ", max_steps=100", set()),
        ("", "", set()),
        ("", ", max_steps=1250", LONG),
        ("", ", max_steps=100), data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer", set()),
        ("import os\n" + PADDED, ", max_steps=100", {"kernels"}),
        ('import os\nos.environ["UNSLOTH_BLOCK_COMPILE"] = "0"', ", max_steps=100", {"kernels", PADDING}),
    ],
)
def test_torch_compiles_the_layers_of_fastmodel(settings: str, arguments: str, unsupported: set[str]) -> None:
    """models/_block_compile.py: each layer is one region, of a row without padding where nothing else is said."""
    plan = read_text(FAST_MODEL.format(settings=settings, arguments=arguments), file="a.py")
    assert set(plan.unsupported) == unsupported
    if "kernels" not in unsupported:
        package = "unsloth-rows" if "data_collator" in arguments else "unsloth-compiled"
        assert named_kernels(plan.options["kernels"]) == (f"{package}.layers", f"{package}.checkpoint")


def test_functiongemma_is_compiled() -> None:
    """models/loader.py:1861 hands Gemma 3 to FastModel too: nb/FunctionGemma_(270M).ipynb, with rank 128."""
    modules = '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'
    source = UNSLOTH.format(settings="", arguments=", max_steps=500").replace("Llama-3.2-1B", "functiongemma-270m-it")
    source = source.replace("max_seq_length=2048,", "max_seq_length=2048, load_in_4bit=False,")
    plan = read_text(source.replace("r=16", f"r=128, target_modules={modules}"), file="a.py")
    assert not plan.unsupported
    assert named_kernels(plan.options["kernels"]) == ("unsloth-compiled.layers", "unsloth-compiled.checkpoint")
    result = peftplan.estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (30_375_936, None)
    assert result.peaks is not None


def test_granite_4_is_compiled_and_adapted_in_attention_alone() -> None:
    """models/loader.py:1861 hands it to FastModel, whose filters know no name of its MLP: 5,963,776 trainable parameters in a
    rehearsal of the same call; Unsloth 2025.10.11 printed 13,303,808."""
    source = UNSLOTH.format(settings="", arguments=", max_steps=60").replace("Llama-3.2-1B", "granite-4.0-350m-unsloth-bnb-4bit")
    modules = '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"]'
    source = source.replace("max_seq_length=2048,", "max_seq_length=2048, load_in_4bit=False,")
    plan = read_text(source.replace("r=16", f"r=32, target_modules={modules}"), file="a.py")
    assert not plan.unsupported
    assert named_kernels(plan.options["kernels"]) == ("unsloth-compiled.layers", "unsloth-compiled.checkpoint")
    assert "2025" in plan.assumed["target_modules"]
    result = peftplan.estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (5_963_776, None)
    assert result.peaks is not None


FULL_QAT = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/gemma-3-270m-it", max_seq_length=2048, load_in_4bit=False,
    full_finetuning=True, qat_scheme="int4")
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=8, gradient_accumulation_steps=4{arguments})).train()
"""


@pytest.mark.parametrize(
    ("arguments", "unsupported"),
    [
        (', max_steps=60, optim="adamw_torch"', set()),
        (", max_steps=400", LONG),
        (", max_steps=60, padding_free=False", {"load.qat_scheme", "kernels"}),
    ],
)
def test_fake_quantized_weights_are_compiled_with_their_layers(arguments: str, unsupported: set[str]) -> None:
    """models/_utils.py:9127; 268,098,176 trainable parameters, as nb/Gemma3_(270M)_Phone_Deployment.ipynb prints them."""
    plan = read_text(FULL_QAT.format(arguments=arguments), file="a.py")
    assert set(plan.unsupported) == unsupported
    if not unsupported:
        assert named_kernels(plan.options["kernels"]) == ("unsloth-qat-int4.layers", "unsloth-qat-int4.checkpoint")
        result = peftplan.estimate(config=plan)
        assert (result.trainable_parameters, result.bound) == (268_098_176, None)
        assert result.peaks is not None


def test_qat_for_phones_unties_the_head() -> None:
    """models/_utils.py:8143; 751,632,384 parameters, as nb/Qwen3_(0_6B)-Phone_Deployment.ipynb prints them."""
    source = FULL_QAT.format(arguments=", max_steps=60").replace("gemma-3-270m-it", "Qwen3-0.6B").replace('"int4"', '"int8-int4"')
    result = peftplan.estimate(config=read_text(source, file="a.py"))
    assert (result.trainable_parameters, result.total_parameters, result.bound) == (751_632_384, 751_632_384, None)
    assert result.peaks is not None


@pytest.mark.parametrize(("r", "trained"), [(8, 92_454_912), (4, 46_227_456)])
def test_unsloth_adapts_the_experts_of_gpt_oss(r: int, trained: int) -> None:
    """models/_utils.py:11189: 11,556,864 parameters per rank in 1,632 linear layers, as `get_moe_target_modules` of 2026.10.9
    finds them in its classes on the meta device; Unsloth 2025 printed 3,981,312 with rank 8, those of attention."""
    source = UNSLOTH.format(settings="", arguments="").replace("unsloth/Llama-3.2-1B", "unsloth/gpt-oss-20b")
    modules = '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'
    plan = read_text(source.replace("r=16", f"r={r}, target_modules={modules}"), file="a.py")
    assert plan.options["target_parameters"] == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert "2025" in plan.assumed["target_parameters"]
    assert plan.options["kernels"] == ()
    assert "experts" in plan.unsupported["kernels"].why  # layers of its own, which torch does not compile (_block_compile.py:140)
    assert peftplan.estimate(config=plan).trainable_parameters == trained


@pytest.mark.parametrize(
    ("argument", "dtypes"), [("", ("bf16", "none")), (", float32_mixed_precision=True", ("fp32", "bf16"))], ids=["unsaid", "fp32"]
)
def test_full_fine_tuning_is_in_bf16_where_nothing_is_said(argument: str, dtypes: tuple[str, str]) -> None:
    """models/vision.py:5436; Qwen3 0.6B rehearsed has 1,192 MB of weights, 2 B each, before its head is untied."""
    source = (
        f'from unsloth import FastModel\nm, t = FastModel.from_pretrained("unsloth/Qwen3-0.6B", full_finetuning=True{argument})\n'
    )
    plan = read_text(f"{source}SFTTrainer(model=m, args=SFTConfig(max_steps=60)).train()\n", file="a.py")
    assert plan.options["method"] == "full"
    assert (plan.options["dtype"], plan.options["autocast"]) == dtypes


@pytest.mark.parametrize(
    ("model", "arguments", "supported", "trained"),
    [
        ("gemma-4-E2B-it", "finetune_vision_layers=False", True, 24_158_208),
        ("gemma-4-E4B-it", "finetune_vision_layers=False", True, 34_881_536),
        ("gemma-3n-E4B-it", "finetune_vision_layers=False", True, 37_191_680),
        ("gemma-3n-E4B-it", "finetune_vision_layers=False, finetune_audio_layers=True", True, 47_611_904),
        ("gemma-3n-E4B-it", 'target_modules="all-linear"', True, 47_677_440),
        ("gemma-4-E2B-it", 'target_modules="all-linear"', True, 35_745_792),
        ("gemma-4-E4B-it", 'target_modules="all-linear"', True, 46_501_888),
        ("gemma-4-E2B-it", "", False, None),
    ],
)
def test_unsloth_adapts_these_layers_of_gemma(model: str, arguments: str, supported: bool, trained: int | None) -> None:
    """Parameters of rank 16 on the linear layers that `get_peft_regex` of unsloth_zoo 2026.10.9 matches in transformers' model on
    the meta device: 205, 258 and 215 layers of language models, 349, 350, 454 and 507 with towers and embedders.
    """
    source = UNSLOTH.format(settings="", arguments="").replace("FastLanguageModel", "FastModel").replace("Llama-3.2-1B", model)
    plan = read_text(source.replace("r=16", f"r=16, {arguments}"), file="a.py")
    assert ("targets" not in plan.unsupported) is supported
    if trained is not None:
        counted = peftplan.estimate(str(plan.model), method="lora", r=16, target_modules=plan.options["target_modules"])
        assert counted.trainable_parameters == trained


SENTENCES = """
from unsloth import FastSentenceTransformer
model = FastSentenceTransformer.from_pretrained(model_name="unsloth/all-MiniLM-L6-v2", max_seq_length=512, full_finetuning=False)
model = FastSentenceTransformer.get_peft_model(model, r=64, target_modules=["value", "key", "dense", "query"], lora_alpha=128,
    lora_dropout=0, use_gradient_checkpointing=False, task_type="FEATURE_EXTRACTION")
loss = losses.MultipleNegativesRankingLoss(model)
trainer = SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss, args=SentenceTransformerTrainingArguments(
    num_train_epochs=2, per_device_train_batch_size=256, bf16=is_bf16_supported(), fp16=not is_bf16_supported()))
trainer.train()
"""


def test_sentence_transformers_are_in_16_bits() -> None:
    """nb/All_MiniLM_L6_v2.ipynb; `load_in_4bit=False`, `use_gradient_checkpointing=False` (models/sentence_transformer.py)."""
    plan = read_text(SENTENCES, file="a.py")
    assert not plan.unsupported
    assert {"method": "lora", "trainer": "unsloth-sentence-transformers", "autocast": "bf16"}.items() <= plan.options.items()
    assert "quant" not in plan.options
    assert set(plan.assumed) == {"columns", "loss", "model"}


@pytest.mark.parametrize(
    ("written", "instead", "key"),
    [
        ("MultipleNegativesRankingLoss(model)", "CoSENTLoss(model)", "trainer.loss"),
        ("num_train_epochs=2", "max_steps=100", "args.max_steps"),
        ("num_train_epochs=2", "gradient_checkpointing=True", "args.gradient_checkpointing"),
        ("use_gradient_checkpointing=False", "use_gradient_checkpointing=True", "lora.use_gradient_checkpointing"),
        ("full_finetuning=False", "load_in_4bit=True", "load.load_in_4bit"),
        ("full_finetuning=False", "full_finetuning=True", "load.full_finetuning"),
        ("all-MiniLM-L6-v2", "Qwen3-Embedding-4B", "kernels"),
    ],
)
def test_other_sentence_transformers_are_not_exact(written: str, instead: str, key: str) -> None:
    assert key in read_text(SENTENCES.replace(written, instead), file="a.py").unsupported


def test_a_tied_head_and_its_embedding_train_as_one_table() -> None:
    """unsloth 2026.10.9, models/_utils.py:11619. Rank 16 of Llama 3.2 1B has 11,272,192 parameters."""
    text = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
    "up_proj", "down_proj", "embed_tokens", "lm_head"])
trainer = SFTTrainer(model=model, args=SFTConfig(max_steps=60))
trainer.train()
"""
    assert peftplan.estimate(config=read_text(text, file="a.py")).trainable_parameters == 11_272_192 + 128_256 * 2_048


def test_experts_beside_linear_layers_of_the_same_names() -> None:
    """nb/GLM_Flash_A100(80GB).ipynb; unsloth 2026.10.9, models/_utils.py:11189 and import_fixes.py:9476."""
    text = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/GLM-4.7-Flash", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
    "up_proj", "down_proj", "out_proj"])
trainer = SFTTrainer(model=model, args=SFTConfig(max_steps=60))
trainer.train()
"""
    plan = read_text(text, file="a.py")
    assert plan.options["target_parameters"] == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert plan.options["kernels"] == "unsloth-compiled"
    assert not plan.unsupported
    assert peftplan.estimate(config=plan).bound is None


@pytest.mark.parametrize(
    ("modules", "trained"),
    [
        ('"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"', 1_285_029_888),
        (None, 1_285_029_888),
        ('"q_proj", "k_proj", "v_proj", "o_proj"', 26_738_688),
    ],
)
def test_stacked_experts_have_one_adapter_of_the_rank_that_is_asked(modules: str | None, trained: int) -> None:
    """nb/Qwen3_MoE.ipynb printed the first count, of 31,817,152,512 parameters; a rehearsal of three layers has 80,314,368. Seven
    projections are the default (models/llama.py:3061)."""
    named = "" if modules is None else f"target_modules=[{modules}], "
    text = f"""
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen3-30B-A3B-Instruct-2507", load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=32, {named}use_gradient_checkpointing=True)
trainer = SFTTrainer(model=model, args=SFTConfig(max_steps=50))
trainer.train()
"""
    assert peftplan.estimate(config=read_text(text, file="a.py")).trainable_parameters == trained


@pytest.mark.parametrize(
    ("modules", "separate"),
    [
        (', target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]', 64 * 27 * 98_304),
        ("", 0),
    ],
)
@pytest.mark.parametrize("release", ["4.56.2", "5.3.0"])
def test_experts_of_ernie_have_an_adapter_each_beside_transformers_4(modules: str, separate: int, release: str) -> None:
    """nb/ERNIE_4_5_21B_A3B_PT-Conversational.ipynb printed 177,545,216 of 22,002,983,104 beside transformers 4.56.2, with 64 x 27
    experts of 98,304 parameters each: three linear layers between 2,560 and 1,536; a rehearsal of three layers has 13,602,816.
    The expression that is the default names none of them: 1,286,144 of four layers. Stacked, gate and up share one: four layers
    that unsloth 2026.10.9 loaded in 4 bits beside transformers 5.17.0 have 16,228,352, which these sums give too."""
    text = f"""
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained("unsloth/ERNIE-4.5-21B-A3B-PT", max_seq_length=2048, load_in_4bit=True)
model = FastModel.get_peft_model(model, r=8{modules})
trainer = SFTTrainer(model=model, args=SFTConfig(max_steps=60))
trainer.train()
"""
    cells = [{"cell_type": "code", "source": [source]} for source in (f"!pip install transformers=={release}", text)]
    stacked = 64 * 27 * 8 * ((2560 + 2 * 1536) + (1536 + 2560))
    result = peftplan.estimate(config=read_text(json.dumps({"cells": cells}), file="a.ipynb"))
    beside = 177_545_216 - 64 * 27 * 98_304
    assert result.trainable_parameters == beside + (separate if release.startswith("4") else stacked)
    assert result.config is not None
    assert ("unsloth-experts" in str(result.config["options"].get("kernels"))) is release.startswith("4")
    assert result.total_parameters - result.trainable_parameters == 22_002_983_104 - 177_545_216


def test_experts_have_an_adapter_each_without_another_kernel() -> None:
    """`--kernels unsloth-experts` alone counts as the notebook does, and is refused where there are no such experts."""
    options: dict[str, Any] = {"method": "qlora", "trainer": "trl", "kernels": "unsloth-experts"}
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    result = peftplan.estimate("ernie-4.5-21b-a3b-pt", target_modules=modules, r=8, **options)
    assert (result.trainable_parameters, result.total_parameters) == (177_545_216, 22_002_983_104)
    assert result.peaks is None
    for model in ("qwen3-30b-a3b", "llama-3.2-1b"):
        with pytest.raises(InputError, match="'unsloth-experts' is not valid; accepted: only for model type ernie4_5_moe, not"):
            peftplan.estimate(model, **options)


@pytest.mark.parametrize(
    ("written", "beta"), [("", None), ('loss_type="dr_grpo"', None), ('loss_type="bnpo"', 0.001), ("beta=0.04", 0.04)]
)
def test_a_reference_of_grpo_is_the_policy_without_its_adapter(written: str, beta: float | None) -> None:
    """unsloth 2026.10.9, models/rl.py:3538: without `beta`, the loss decides whether a reference scores the completions."""
    text = f"""
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B", max_seq_length=1024, fast_inference=True)
model = FastLanguageModel.get_peft_model(model, r=32, use_gradient_checkpointing="unsloth")
args = GRPOConfig(num_generations=6, max_prompt_length=256, max_completion_length=768, {written})
trainer = GRPOTrainer(model=model, reward_funcs=[correct], args=args, train_dataset=dataset)
"""
    plan = read_text(json.dumps({"cells": [{"cell_type": "code", "source": [text]}]}), file="a.ipynb")
    assert plan.options.get("beta") == beta
    assert peftplan.estimate(config=plan).peaks is not None


def test_dft_has_another_loss() -> None:
    text = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16)
trainer = SFTTrainer(model=model, args=SFTConfig(max_steps=60, loss_type="dft"))
"""
    assert set(read_text(text, file="a.py").unsupported) == {"args.loss_type"}
    assert not read_text(text.replace("dft", "nll"), file="a.py").unsupported


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("!uv pip install transformers==4.56.2", True),
        ("%pip install transformers==4.56.2", True),
        ("!pip install --no-deps \\\n    transformers==4.56.2", True),
        ("!pip install sentence-transformers==4.1.0", False),
    ],
)
def test_lines_that_install_a_release(line: str, read: bool) -> None:
    text = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained("unsloth/ERNIE-4.5-21B-A3B-PT")
model = FastModel.get_peft_model(model, target_modules=["down_proj"])
"""
    cells = [{"cell_type": "code", "source": [source]} for source in (line, text)]
    assert ("kernels" in read_text(json.dumps({"cells": cells}), file="a.ipynb").options) is read


@pytest.mark.parametrize(("decay", "kind"), [("", "at_least"), (", weight_decay=0.0", None)])
def test_unsloth_decays_weights_by_default(decay: str, kind: str | None) -> None:
    """models/rl.py:3316: by 0.001, where TRL's configs do not."""
    text = f"""
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B-Instruct")
model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj"])
trainer = SFTTrainer(model=model, args=SFTConfig(optim="sgd"{decay}))
trainer.train()
"""
    assert bound(read_text(text, file="a.py").unsupported) == kind


def test_trained_biases_leave_unsloth_s_layers_apart() -> None:
    """models/llama.py:5335: it fuses layers with their adapters where bias is none."""
    model = "model = FastLanguageModel.get_peft_model(model, r=16"
    program = UNSLOTH.format(settings="", arguments=", max_steps=60").replace(model, f'{model}, bias="all"')
    assert read_text(program, file="a.py").unsupported["lora.bias"].effect == "raises"
