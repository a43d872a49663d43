"""What programs do to weights between loading and training: casts of parts, other heads, frozen references, lists."""

from __future__ import annotations

import pytest

import peftplan
from peftplan.job.configs.read import read_text
from tests.job.configs.files import AXOLOTL, read

MODEL = 'model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.bfloat16)\n'
TRAINS = "Trainer(model=model, args=TrainingArguments('o', bf16=True), train_dataset=data).train()\n"


@pytest.mark.parametrize(
    "changes",
    [
        "model.lm_head.float()",
        "model.model.embed_tokens.to(torch.float32)",
        "model.lm_head = CastOutputToFloat(model.lm_head)",
        "for p in model.parameters():\n    p.data = p.data.to(torch.float32)",
        "for name, module in model.named_modules():\n    if 'norm' in name:\n        module.to(torch.float32)",
        "model.model.layers = model.model.layers[:12]",
        "del model.model.layers[12:]",
        "model = torch.compile(model)",
        "model.compile()",
        "apply_liger_kernel_to_qwen2()",
        "def upcast(model):\n    for p in model.parameters():\n        p.data = p.data.float()\nupcast(model)",
    ],
)
def test_a_cast_of_a_part_is_not_silent(changes: str) -> None:
    plan = read_text(f"{MODEL}{changes}\n{TRAINS}", file="run.py")
    assert plan.unsupported.keys() == {"parts.call"}
    assert peftplan.estimate(config=plan).peaks is None
    assert peftplan.estimate(config=plan, dtype="fp32").peaks is not None
    assert not read_text(f"{MODEL}{TRAINS}{changes}\n", file="run.py").unsupported or "def " in changes  # after training


@pytest.mark.parametrize(
    "kept",
    [
        "model.config.use_cache = False",
        "model.generation_config = GenerationConfig(temperature=None)",
        "logits = outputs.logits.float()",
        "batch = {k: v.to(torch.float32) for k, v in batch.items()}",
        "model.to('cuda')",
        "tokenizer.pad_token = str(tokenizer.eos_token)",
    ],
)
def test_what_casts_no_part(kept: str) -> None:
    assert read_text(f"{MODEL}{kept}\n{TRAINS}", file="run.py").unsupported == {}


def test_an_inverted_switch_freezes() -> None:
    flips = "for p in model.parameters():\n    p.requires_grad ^= True\n"
    assert read_text(MODEL + flips + TRAINS, file="run.py").unsupported.keys() == {"weights.call"}


REFERENCE = MODEL + MODEL.replace("model", "ref_model", 1)
PREFERS = "DPOTrainer(model=model, ref_model=ref_model, args=DPOConfig('o'), train_dataset=data).train()\n"


@pytest.mark.parametrize(
    "freezes",
    [
        "ref_model.requires_grad_(False)",
        "for p in ref_model.parameters():\n    p.requires_grad = False",
        "for name, p in list(ref_model.named_parameters()):\n    p.requires_grad_(False)",
    ],
)
def test_a_frozen_reference_trains_no_less(freezes: str) -> None:
    plan = read_text(f"{REFERENCE}{freezes}\n{PREFERS}", file="run.py")
    assert (plan.options["trainer"], plan.options["method"], plan.unsupported) == ("trl-dpo", "full", {})
    itself = read_text(f"{REFERENCE}{freezes.replace('ref_model', 'model')}\n{PREFERS}", file="run.py")
    assert itself.unsupported.keys() == {"weights.call"}


@pytest.mark.parametrize(
    ("fills", "targets"),
    [
        ("names = ['q_proj']\nother = names\nother += ['v_proj']", ("q_proj", "v_proj")),
        ("names = ['q_proj']\nadd = lambda name: names.append(name)\nadd('v_proj')", None),
        ("def add(name):\n    names.append(name)\nnames = ['q_proj']\nadd('v_proj')", None),
        ("names = ['q_proj']\ndef add(name):\n    names.append(name)\nadd('v_proj')", None),
    ],
)
def test_lists_that_grow_under_another_name(fills: str, targets: tuple[str, ...] | None) -> None:
    adapts = "model = get_peft_model(model, LoraConfig(r=8, target_modules=names))\n"
    plan = read_text(f"{fills}\n{MODEL}{adapts}{TRAINS}", file="run.py")
    assert plan.options.get("target_modules") == targets
    assert plan.unsupported.keys() == (set() if targets else {"lora.target_modules"})


def test_a_program_of_trainer_leaves_the_length_to_the_data() -> None:
    """TRL's SFTTrainer cuts texts at 1,024 tokens, transformers' Trainer nowhere; RoBERTa has 512 positions."""
    program = (
        "model = AutoModelForSequenceClassification.from_pretrained('roberta-base')\nTrainer(model, TrainingArguments('o'))\n"
    )
    plan = read_text(program, file="run.py")
    assert "seq_len" not in plan.options
    assert "the data decide" in plan.assumed["seq_len"]
    assert peftplan.estimate(config=plan).assumptions["seq_len"] == 512
    cut = read_text(f"tokenizer(text, truncation=True, max_length=128)\n{program}", file="run.py")
    assert (cut.options["seq_len"], "seq_len" in cut.assumed) == (128, False)


def test_axolotl_s_precisions() -> None:
    """Trainer's `bf16` is `bf16 or bfloat16` (core/builders/base.py:276); `bf16: auto` is one (utils/config/__init__.py:166)."""
    rows = {
        (False, "bfloat16"): ("bf16", "bf16"),
        ("auto", "bfloat16"): ("bf16", "bf16"),
        ("full", "bfloat16"): ("bf16", "none"),
        (False, "float16"): ("fp16", "none"),
        ("auto", "float16"): ("bf16", "bf16"),
    }
    for (bf16, word), expected in rows.items():
        options = read({**AXOLOTL, "bf16": bf16, word: True}).options
        assert (options["dtype"], options["autocast"]) == expected, (bf16, word)
    unsaid = read({**{key: value for key, value in AXOLOTL.items() if key != "bf16"}, "float16": True}).options
    assert (unsaid["dtype"], unsaid["autocast"]) == ("bf16", "bf16")


def test_unsloth_in_fp16() -> None:
    """Its mixed precision follows the model's dtype (models/rl.py:2676), and so do NF4's products (models/llama.py:4019)."""
    loads = "model, tokenizer = FastLanguageModel.from_pretrained('unsloth/Qwen2.5-0.5B', dtype=torch.float16{})\n"
    adapts = "model = FastLanguageModel.get_peft_model(model, r=16)\nSFTTrainer(model=model, args=SFTConfig('o')).train()\n"
    options = read_text(loads.format("") + adapts, file="run.py").options
    assert (options["dtype"], options["autocast"], options["compute_dtype"]) == ("fp16", "fp16", "fp16")
    options = read_text(loads.format(", load_in_4bit=False") + adapts, file="run.py").options
    assert (options["dtype"], options["autocast"], options.get("compute_dtype")) == ("fp16", "fp16", None)


@pytest.mark.parametrize(
    ("loads", "task"),
    [
        ("BertForSequenceClassification.from_pretrained('bert-base-uncased')", "SEQ_CLS"),
        ("transformers.BertForTokenClassification.from_pretrained('bert-base-uncased')", "TOKEN_CLS"),
        ("LlamaForCausalLM.from_pretrained('huggyllama/llama-7b', torch_dtype=torch.float16)", None),
        ("GPT2LMHeadModel.from_pretrained('gpt2')", None),
        ("T5ForConditionalGeneration.from_pretrained('t5-small')", "SEQ_2_SEQ_LM"),
    ],
)
def test_a_model_s_own_class(loads: str, task: str | None) -> None:
    plan = read_text(f"model = {loads}\n{TRAINS}", file="run.py")
    assert (plan.tool, plan.unsupported, plan.options.get("task_type")) == ("transformers-script", {}, task)
    assert peftplan.estimate(config=plan).peaks is not None
    assert ("labels" in plan.assumed) is (task == "SEQ_2_SEQ_LM")


@pytest.mark.parametrize(
    "name", ["AutoLigerKernelForCausalLM", "AutoPeftModelForCausalLM", "ORTModelForCausalLM", "TFBertForCausalLM"]
)
def test_a_class_of_another_package_is_not_read(name: str) -> None:
    assert read_text(f"model = {name}.from_pretrained('gpt2')\n{TRAINS}", file="run.py").unsupported.keys() == {"trainer.model"}


def test_halves_of_a_model_s_own_class() -> None:
    halved = read_text(f"model = LlamaForCausalLM.from_pretrained('llama-7b').half()\n{TRAINS}", file="run.py")
    assert halved.options["dtype"] == "fp16"


def test_preparing_under_peft_s_old_name() -> None:
    """peft before 0.10: it upcasts norms and checkpoints layers; it was not read."""
    loads = "model = AutoModelForCausalLM.from_pretrained('huggyllama/llama-7b', load_in_8bit=True, torch_dtype=torch.float16)\n"
    adapts = "model = get_peft_model(model, LoraConfig(r=8))\n"
    plan = read_text(f"{loads}model = prepare_model_for_int8_training(model)\n{adapts}{TRAINS}", file="run.py")
    assert (plan.options["kbit_prepare"], plan.options["gradient_checkpointing"], plan.unsupported) == (True, True, {})


def test_rows_that_a_program_adds_are_said() -> None:
    plan = read_text(f"{MODEL}model.resize_token_embeddings(len(tokenizer))\n{TRAINS}", file="run.py")
    assert "are not counted" in plan.assumed["vocabulary"]


def test_accelerate_s_mixed_precision_on_the_command_line() -> None:
    command = "accelerate launch --mixed_precision {} trl/scripts/sft.py --model_name_or_path gpt2 --bf16 {}\n"
    for word, bf16, autocast in (("fp16", "false", "fp16"), ("bf16", "true", "bf16"), ("no", "false", "none")):
        plan = read_text(command.format(word, bf16), file="a.sh")
        assert (plan.unsupported, plan.options["autocast"]) == ({}, autocast)
    assert read_text(command.format("fp8", "true"), file="a.sh").unsupported.keys() == {"mixed_precision"}


@pytest.mark.parametrize(
    ("methods", "unsupported"),
    [
        ("def log(self, logs): print(logs)", set()),
        ("def compute_loss(self, model, inputs): return model(**inputs).loss", {"trainer.overrides"}),
        ("compute_loss = own_loss", {"trainer.overrides"}),
        ("pass", set()),
    ],
)
def test_a_trainer_of_the_program(methods: str, unsupported: set[str]) -> None:
    """A class derived from Trainer; the file was none of a known tool."""
    own = f"class Base(Trainer):\n    {methods}\nclass Mine(Base):\n    def evaluate(self): pass\n"
    plan = read_text(own + MODEL + TRAINS.replace("Trainer(", "Mine(", 1), file="run.py")
    assert (plan.tool, plan.options["trainer"]) == ("transformers-script", "transformers")
    assert plan.unsupported.keys() == unsupported
    assert (peftplan.estimate(config=plan).peaks is None) is bool(unsupported)


TRAINER = "trainer = Trainer(model=model, args=TrainingArguments('o', bf16=True), train_dataset=data)\n"


@pytest.mark.parametrize(
    "changes",
    [
        "trainer.compute_loss = own_loss",
        "trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)",
        "trainer.model = torch.compile(trainer.model)",
        "Trainer.compute_loss = own_loss",
    ],
)
def test_what_a_program_puts_in_the_place_of_a_trainer_s_own(changes: str) -> None:
    """Before the training; afterwards it changes nothing that ran."""
    plan = read_text(f"{MODEL}{TRAINER}{changes}\ntrainer.train()\n", file="run.py")
    assert plan.unsupported.keys() == {"trainer.overrides"}
    assert read_text(f"{MODEL}{TRAINER}trainer.train()\n{changes}\n", file="run.py").unsupported == {}


@pytest.mark.parametrize(("method", "unsupported"), [("compute_loss", {"trainer.overrides"}), ("log", set())])
def test_a_method_that_a_trainer_inherits_from_another_class(method: str, unsupported: set[str]) -> None:
    own = f"class Mixin:\n    def {method}(self, *args): pass\nclass Mine(Mixin, Trainer):\n    pass\n"
    plan = read_text(own + MODEL + TRAINS.replace("Trainer(", "Mine(", 1), file="run.py")
    assert plan.unsupported.keys() == unsupported


def test_a_model_that_is_compiled_as_it_is_loaded() -> None:
    compiled = MODEL.replace("= ", "= torch.compile(", 1).replace(")\n", "))\n")
    assert read_text(compiled + TRAINS, file="run.py").unsupported.keys() == {"parts.call"}


FINDS = """
def find_all_linear_names(model):
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            parts = name.split(".")
            names.add(parts[0] if len(parts) == 1 else parts[-1])
    if "lm_head" in names:
        names.remove("lm_head")
    return list(names)
"""


def test_a_function_that_lists_all_quantized_layers() -> None:
    """As in QLoRA's own script. One that skips further names is not read."""
    adapts = "model = get_peft_model(model, LoraConfig(r=8, target_modules=find_all_linear_names(model)))\n"
    assert read_text(FINDS + MODEL + adapts + TRAINS, file="run.py").options["target_modules"] == "all-linear"
    skips = FINDS.replace("        if isinstance", "        if 'vision' in name:\n            continue\n        if isinstance")
    assert read_text(skips + MODEL + adapts + TRAINS, file="run.py").unsupported.keys() == {"lora.target_modules"}


def test_trl_s_auto_on_4_bits_is_an_error_of_trl() -> None:
    values = {"model_name_or_path": "gpt2", "dtype": "auto", "use_peft": True, "load_in_4bit": True}
    assert "raises AttributeError" in read(values).unsupported["dtype"].why
    assert read({**values, "dtype": "bfloat16"}).unsupported == {}
