"""Habits of files that users publish, which files of the tools' own repositories do not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan import Script, estimate
from peftplan.errors import InputError
from peftplan.job.configs.read import read_config

SETTINGS = "model_name_or_path: Qwen/Qwen2.5-0.5B\nper_device_train_batch_size: 4\noutput_dir: out\nlearning_rate: 1.0e-4\n"
GRPO = "model: Qwen/Qwen3-4B\ntrain_type: lora\ntorch_dtype: bfloat16\nmax_length: 1024\nmax_completion_length: 512\n"


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_program_that_trains_elsewhere_has_no_launch(tmp_path: Path) -> None:
    launch = "cat > ranks.yaml << 'EOF'\ndistributed_type: MULTI_GPU\nnum_processes: 2\nEOF\n"
    run = written(tmp_path / "run.sh", launch + "accelerate launch --config_file ranks.yaml away.py --epochs 3\n")
    assert read_config(run).kind == "other"


@pytest.mark.parametrize(
    "lines",
    [
        'cd "$(dirname "$0")"\ntrl sft --config sft.yaml\n',
        'HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"\ntrl sft --config "${HERE}/sft.yaml"\n',
        'ROOT=$(dirname "$(readlink -f "$0")")\ntrl sft --config $ROOT/sft.yaml\n',
    ],
)
def test_a_script_names_files_from_its_own_folder(tmp_path: Path, lines: str) -> None:
    written(tmp_path / "sft.yaml", SETTINGS)
    assert read_config(written(tmp_path / "run.sh", lines)).options["batch_size"] == 4


def test_a_script_names_files_from_the_folder_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "configs" / "sft.yaml", SETTINGS)
    run = 'ROOT="$(cd "$(dirname "$0")/.." && pwd)"\ncd "$ROOT"\ntrl sft --config configs/sft.yaml\n'
    written(tmp_path / "scripts" / "run.sh", run)
    monkeypatch.chdir(tmp_path)
    assert read_config("scripts/run.sh").model == "Qwen/Qwen2.5-0.5B"


def test_words_behind_a_recipe_s_config_are_its_own(tmp_path: Path) -> None:
    model = "model:\n  _component_: torchtune.models.llama3_1.lora_llama3_1_8b\n  lora_rank: 8\n  lora_alpha: 16\n"
    model += "  lora_attn_modules: [q_proj]\n  apply_lora_to_mlp: false\n"
    written(tmp_path / "lora.yaml", f"{model}batch_size: 2\ndtype: bf16\n")
    run = "torchrun --nproc_per_node 1 recipes/lora_finetune_distributed.py --config lora.yaml batch_size=8\n"
    assert read_config(written(tmp_path / "run.sh", run)).options["batch_size"] == 8


@pytest.mark.parametrize("key", ["num_generations: 8", "reward_funcs: [accuracy]"])
def test_a_file_of_swift_rlhf_without_its_type(tmp_path: Path, key: str) -> None:
    plan = read_config(written(tmp_path / "grpo.yaml", f"{GRPO}{key}\n"))
    assert plan.options["trainer"] == "swift-grpo"
    assert plan.options["seq_len"] == 1024 + 512
    assert plan.assumed["trainer"] == f"GRPO, since the file sets {key.partition(':')[0]}"


def test_a_file_of_swift_rlhf_that_any_trainer_may_take(tmp_path: Path) -> None:
    plan = read_config(written(tmp_path / "pairs.yaml", f"{GRPO}beta: 0.1\n"))
    assert plan.unsupported["beta"].effect == "unknown"
    assert "beta" not in plan.without({"trainer": "swift-dpo"})


def test_the_only_name_of_a_list_is_all_linear(tmp_path: Path) -> None:
    adapter = "use_peft: true\nlora_target_modules:\n  - all-linear\n"
    assert read_config(written(tmp_path / "lora.yaml", SETTINGS + adapter)).options["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("packing", "rows"),
    [
        ("packing: false\n", 4),
        ("packing: true\n", 1),  # 4 x 1,024 tokens, packed as the batch of training is
        ("packing: true\npacking_strategy: wrapped\n", 4),
        ("packing: true\neval_packing: false\n", None),
    ],
)
def test_an_evaluation_is_packed_as_training_is(tmp_path: Path, packing: str, rows: int | None) -> None:
    evaluated = "attn_implementation: flash_attention_2\nmax_length: 1024\neval_strategy: steps\nper_device_eval_batch_size: 4\n"
    plan = read_config(written(tmp_path / "sft.yaml", SETTINGS + evaluated + packing))
    assert plan.options.get("eval_batch_size") == rows


def test_arguments_that_transformers_5_no_longer_has(tmp_path: Path) -> None:
    earlier = "logging_dir: logs\nfp16_opt_level: O1\nray_scope: last\nno_cuda: false\nadafactor: true\n"
    plan = read_config(written(tmp_path / "sft.yaml", SETTINGS + earlier))
    assert plan.unsupported.keys() == {"adafactor"}
    assert not plan.without({"optim": "adafactor"})


def test_a_file_that_only_chats_trains_nothing(tmp_path: Path) -> None:
    values = "model_name_or_path: Qwen/Qwen2.5-0.5B\nadapter_name_or_path: saves/lora\ntemplate: qwen\nfinetuning_type: lora\n"
    assert read_config(written(tmp_path / "chat.yaml", values)).kind == "other"


def test_axolotl_drops_keys_that_it_does_not_have(tmp_path: Path) -> None:
    """As `validate_config` of axolotl 0.19.0 does: the misspelt key leaves checkpointing off."""
    values = "base_model: Qwen/Qwen2.5-0.5B\nbase_model_config: Qwen/Qwen2.5-0.5B\nmicro_batch_size: 2\nsequence_len: 512\n"
    plan = read_config(written(tmp_path / "full.yml", f"{values}gradient_checkpoint: true\neval_table_max_new_tokens: 128\n"))
    assert not plan.unsupported
    assert not plan.options["gradient_checkpointing"]
    assert "did you mean gradient_checkpointing" in plan.ignored["gradient_checkpoint"].why
    assert plan.assumed["gradient_checkpoint"].startswith("no effect: axolotl leaves it out; did you mean gradient_checkpointing")


def test_a_quantized_model_without_adapters_does_not_train(tmp_path: Path) -> None:
    calls = "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B', load_in_8bit=True)\n"
    calls += "trainer = Trainer(model, args=TrainingArguments('out'))\n"
    plan = read_config(written(tmp_path / "tune.py", calls))
    assert "ValueError" in plan.unsupported["load.load_in_8bit"].why
    assert not plan.without({"method": "lora"})
    plan = read_config(written(tmp_path / "sft.yaml", f"{SETTINGS}load_in_4bit: true\n"))
    assert plan.refused.keys() == {"load_in_4bit"}
    assert plan.options["method"] == "lora"


def test_a_key_may_appear_twice_with_one_value(tmp_path: Path) -> None:
    twice = SETTINGS + "bf16: true\nbf16: true\n"
    assert read_config(written(tmp_path / "sft.yaml", twice)).options["autocast"] == "bf16"
    with pytest.raises(InputError, match=r"sft\.yaml:6: bf16 appears twice, with another value in line 5"):
        read_config(written(tmp_path / "sft.yaml", twice.replace("bf16: true\nbf16: true", "bf16: true\nbf16: false")))


def test_a_file_whose_name_alone_says_lora(tmp_path: Path) -> None:
    assert read_config(written(tmp_path / "qlora.yaml", SETTINGS)).unsupported["use_peft"].option == "method"
    assert not read_config(written(tmp_path / "qlora.yaml", f"{SETTINGS}use_peft: true\n")).unsupported
    assert not read_config(written(tmp_path / "sft.yaml", SETTINGS)).unsupported


def test_the_record_of_a_run_is_no_config(tmp_path: Path) -> None:
    record = "_wandb:\n  desc: null\nmodel_type:\n  value: llama\nlearning_rate:\n  value: 1.0e-4\n"
    record += "per_device_train_batch_size:\n  value: 4\n"
    plan = read_config(written(tmp_path / "config.yaml", record))
    assert (plan.kind, plan.unsupported) == ("other", {})


def test_a_class_that_a_decided_branch_names(tmp_path: Path) -> None:
    calls = "name = 'Qwen/Qwen2.5-0.5B'\nif 'Qwen' in name:\n    kind = AutoModelForCausalLM\nelse:\n    kind = AutoModel\n"
    calls += (
        "model = kind.from_pretrained(name, torch_dtype=torch.bfloat16)\ntrainer = SFTTrainer(model, args=SFTConfig('out'))\n"
    )
    assert read_config(written(tmp_path / "tune.py", calls)).model == "Qwen/Qwen2.5-0.5B"


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    calls = "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B', torch_dtype=torch.bfloat16)\n"
    calls += (
        "model, tokenizer = setup_chat_format(model, tokenizer)\nlora = LoraConfig(r=4)\nmodel = get_peft_model(model, lora)\n"
    )
    calls += "trainer = SFTTrainer(model, args=SFTConfig('out'), peft_config=lora)\n"
    plan = read_config(written(tmp_path / "tune.py", calls))
    assert plan.refused["trainer.peft_config"].instead == {"trainer.peft_config": None}
    assert plan.options["r"] == 4
    assert "vocabulary" in plan.assumed


CELL = '{"cell_type": "code", "source": ["%s"]}'
NOTEBOOK = f'{{"cells": [{CELL % "!pip install RELEASES"}, {CELL % "CALLS"}]}}'
LOADED = "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B')\\n"
TRAINED = LOADED + "args = TrainingArguments('out', bf16=True)\\ntrainer = Trainer(model, args=args)\\n"


def notebook(path: Path, releases: str, calls: str) -> Path:
    return written(path, NOTEBOOK.replace("RELEASES", releases).replace("CALLS", calls))


def test_the_releases_that_a_notebook_installs_run_it(tmp_path: Path) -> None:
    plan = read_config(notebook(tmp_path / "tune.ipynb", "transformers==4.41.2 bitsandbytes==0.43.1", TRAINED))
    assert plan.releases == {"transformers": "4.41.2", "bitsandbytes": "0.43.1"}
    assert plan.options["use_reentrant"]
    assert plan.options["optim"] == "adamw_torch"
    assert not plan.unsupported
    assert not read_config(notebook(tmp_path / "today.ipynb", "transformers", TRAINED)).releases


def test_weights_without_a_dtype_depend_on_the_release(tmp_path: Path) -> None:
    file = notebook(tmp_path / "tune.ipynb", "transformers==4.57.1", TRAINED)
    weights = {
        release: estimate(config=file, script=Script(transformers=release)).to_dict()["memory"]["by_category"]["weights"]
        for release in (None, "5.24")
    }
    assert weights[None] == pytest.approx(2 * weights["5.24"], rel=0.01)  # fp32 before transformers 5, else the checkpoint's bf16


def test_a_release_that_nothing_was_compared_with(tmp_path: Path) -> None:
    plan = read_config(notebook(tmp_path / "tune.ipynb", "transformers==4.25.1", TRAINED))
    assert "--transformers" in plan.unsupported["transformers"].why


def test_an_earlier_trl_is_not_counted_as_today_s(tmp_path: Path) -> None:
    calls = TRAINED.replace("Trainer(", "SFTTrainer(").replace("args=args", "args=args, max_seq_length=512")
    plan = read_config(notebook(tmp_path / "tune.ipynb", "trl==0.7.11", calls))
    assert plan.unsupported["trl"].effect == "unknown"
    assert not plan.without({"trainer": "trl"})
    assert "max_seq_length" in read_config(notebook(tmp_path / "today.ipynb", "trl", calls)).assumed["trl"]


def test_a_key_is_suggested_only_where_most_letters_agree(tmp_path: Path) -> None:
    file = written(tmp_path / "configs" / "sft.yaml", SETTINGS + "bf16: true\nraw_rollout: false\nmax_lenght: 512\n")
    plan = read_config(file)
    assert "did you mean" not in plan.unsupported["raw_rollout"].why
    assert "did you mean max_length" in plan.unsupported["max_lenght"].why


def test_words_of_ms_swift_2_name_those_of_today(tmp_path: Path) -> None:
    run = "swift sft --model_id_or_path Qwen/Qwen1.5-7B-Chat --sft_type lora --dtype bf16 --batch_size 2 --max_length 1024\n"
    plan = read_config(written(tmp_path / "sft.sh", run))
    assert {key: row.why.rpartition(" ")[2] for key, row in plan.unsupported.items()} == {
        "sft_type": "tuner_type",
        "dtype": "torch_dtype",
        "batch_size": "per_device_train_batch_size",
    }


@pytest.mark.parametrize(
    ("install", "runs"),
    [
        ("transformers==4.46.3 peft", "4.46.3"),
        ("'transformers<=4.46.3'", "4.46.3"),
        ("transformers~=4.44.0", "4.44"),
        ("'transformers[torch]>=4.40,<4.50'", "4.49"),
        ("transformers<5", "4.57"),
        ("transformers>=4.40", None),
        ("transformers==4.46.3\\n!pip install -U transformers", None),
        ("transformers==4.46.3\\n!pip install git+https://github.com/huggingface/transformers.git", None),
        ("-U peft # transformers==4.46.3", None),
    ],
)
def test_the_last_release_below_a_bound_runs_a_notebook(tmp_path: Path, install: str, runs: str | None) -> None:
    assert read_config(notebook(tmp_path / "tune.ipynb", install, TRAINED)).releases.get("transformers") == runs


@pytest.mark.parametrize(
    ("install", "is_earlier"), [("trl<0.9.0", True), ("trl~=0.8", True), ("trl<1", True), ("trl>=0.9", False)]
)
def test_a_trl_below_a_bound_is_not_counted_as_today_s(tmp_path: Path, install: str, is_earlier: bool) -> None:
    calls = TRAINED.replace("Trainer(", "SFTTrainer(")
    assert ("trl" in read_config(notebook(tmp_path / "tune.ipynb", install, calls)).unsupported) == is_earlier


def test_the_default_optimizer_before_transformers_4_32_is_not_known(tmp_path: Path) -> None:
    for release in ("4.30.2", "4.31.0"):
        plan = read_config(notebook(tmp_path / "tune.ipynb", f"transformers=={release}", TRAINED))
        assert "adamw_hf" in plan.unsupported["args.optim"].why
    assert read_config(notebook(tmp_path / "tune.ipynb", "transformers==4.32.0", TRAINED)).options["optim"] == "adamw_torch"


@pytest.mark.parametrize("key", ["do_causal_lm_eval", "do_bench_eval"])
def test_axolotl_evaluates_more_than_rows_of_its_own(tmp_path: Path, key: str) -> None:
    """CausalLMBenchEvalCallback generates text, BenchEvalCallback runs rows of a benchmark (utils/callbacks/__init__.py)."""
    values = "base_model: Qwen/Qwen2.5-0.5B\nmicro_batch_size: 2\nsequence_len: 512\nval_set_size: 0.1\n"
    assert read_config(written(tmp_path / "full.yml", f"{values}{key}: true\n")).unsupported[key].effect == "raises"
    assert not read_config(written(tmp_path / "off.yml", f"{values}{key}: false\n")).unsupported


def test_a_traced_evaluation_and_apex_are_not_counted(tmp_path: Path) -> None:
    keys = "jit_mode_eval: true\nhalf_precision_backend: apex\n"
    assert read_config(written(tmp_path / "sft.yaml", SETTINGS + keys)).unsupported.keys() == {
        "jit_mode_eval",
        "half_precision_backend",
    }
    off = "jit_mode_eval: false\nhalf_precision_backend: auto\n"
    assert not read_config(written(tmp_path / "sft.yaml", SETTINGS + off)).unsupported


def test_groups_of_lora_plus_under_zero2(tmp_path: Path) -> None:
    """Eight layers of SmolLM2 135M with rank 128 by LLaMA-Factory over two ranks, rehearsed: 2,283,798,528 bytes reserved without
    loraplus_lr_ratio, 1,302,331,392 with it, which was +72 %."""
    values = f"{SETTINGS}stage: sft\nfinetuning_type: lora\nlora_target: all\ndataset: mine\ntemplate: qwen\n"
    launch = "deepspeed: examples/deepspeed/ds_z2_config.json\n"
    assert read_config(written(tmp_path / "lora.yaml", values + launch)).options["method"] == "lora"
    grouped = f"{values}{launch}loraplus_lr_ratio: 16.0\n"
    assert read_config(written(tmp_path / "lora.yaml", grouped)).options["method"] == "lora+"


PROGRAM = """from trl import SFTConfig, SFTTrainer
args = SFTConfig(output_dir="out", per_device_train_batch_size=1, {more})
trainer = SFTTrainer(model="Qwen/Qwen2.5-0.5B", args=args)
{calls}
"""


@pytest.mark.parametrize(
    ("calls", "more", "rows"),
    [
        ("trainer.train()\nprint(trainer.evaluate())", "", 8),
        ("trainer.train()\ntrainer.evaluate()", "per_device_eval_batch_size=2", 2),
        ("trainer.train()\ntrainer.evaluate()", 'eval_strategy="no"', 8),
        ("trainer.train()", 'eval_strategy="no"', None),
        ("trainer.train()\nmetric.evaluate()", "", None),
        ("trainer.train()", "", None),
    ],
)
def test_a_program_that_evaluates_after_training_has_an_evaluation(
    tmp_path: Path, calls: str, more: str, rows: int | None
) -> None:
    plan = read_config(written(tmp_path / "sft.py", PROGRAM.format(calls=calls, more=more)))
    assert plan.options.get("eval_batch_size") == rows


def test_a_misspelled_argument_of_a_program_leads_to_the_right_one(tmp_path: Path) -> None:
    plan = read_config(written(tmp_path / "sft.py", PROGRAM.format(more="max_legnth=512", calls="trainer.train()")))
    assert plan.unsupported["args.max_legnth"].why.endswith("did you mean max_length or max_seq_length?")


@pytest.mark.parametrize(("deepspeed", "counted"), [("ds_z2_config.json", True), ("ds_z3_config.json", False)])
def test_groups_of_lora_plus_are_counted_under_zero2_alone(tmp_path: Path, deepspeed: str, counted: bool) -> None:
    text = SETTINGS + "stage: sft\ndo_train: true\nfinetuning_type: lora\nloraplus_lr_ratio: 16\n"
    plan = read_config(written(tmp_path / "lora.yaml", f"{text}deepspeed: examples/deepspeed/{deepspeed}\n"))
    assert ("loraplus_lr_ratio" not in plan.unsupported) is counted


@pytest.mark.parametrize("words", ["fp16=True, bf16=False", "bf16=False, fp16=True"])
def test_the_order_of_precisions_decides_nothing(tmp_path: Path, words: str) -> None:
    program = f"model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B')\nargs = TrainingArguments('out', {words})\n"
    program = "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n" + program
    plan = read_config(written(tmp_path / "train.py", program + "Trainer(model=model, args=args).train()\n"))
    assert plan.options["autocast"] == "fp16"


def test_noise_on_the_embeddings_of_a_script(tmp_path: Path) -> None:
    program = "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen2.5-0.5B')\nargs = {0}('out', neftune_noise_alpha=5)\n"
    for trainer, settings in (("Trainer", "TrainingArguments"), ("SFTTrainer", "SFTConfig")):
        text = program.format(settings) + f"{trainer}(model=model, args=args).train()\n"
        plan = read_config(written(tmp_path / "train.py", text))
        assert plan.options["noisy_embeddings"] is True
        assert not plan.unsupported


TRAINS = """from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype="bfloat16")
args = TrainingArguments(output_dir="out", per_device_train_batch_size=2, per_device_eval_batch_size=ROWS, PRECISION)
trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=others)
"""


@pytest.mark.parametrize(("rows", "bound"), [("2", set()), ("4", {"trainer.evaluate"})])
def test_an_evaluation_before_training_makes_a_lower_bound(tmp_path: Path, rows: str, bound: set[str]) -> None:
    program = TRAINS.replace("ROWS", rows).replace("PRECISION", "bf16=True")
    plan = read_config(written(tmp_path / "a.py", f"{program}trainer.evaluate()\ntrainer.train()\n"))
    assert plan.unsupported.keys() == bound
    both = read_config(written(tmp_path / "b.py", f"{program}trainer.evaluate()\ntrainer.train()\ntrainer.evaluate()\n"))
    assert both.options["eval_batch_size"] == int(rows)


@pytest.mark.parametrize(
    ("precision", "refused"), [("bf16=True, fp16=True", True), ("bf16=False, fp16=True", False), ("fp16=True", False)]
)
@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
def test_both_precisions_at_once_have_no_peak(tmp_path: Path, precision: str, trainer: str, *, refused: bool) -> None:
    """transformers 5.24.0, training_args.py:1785: ValueError: At most one of fp16 and bf16 can be True, but not both."""
    program = TRAINS.replace("ROWS", "2").replace("PRECISION", precision)
    if trainer == "SFTTrainer":
        program = "from trl import SFTConfig, SFTTrainer\n" + program.replace("TrainingArguments(", "SFTConfig(")
        program = program.replace("= Trainer(", "= SFTTrainer(")
    plan = read_config(written(tmp_path / "a.py", f"{program}trainer.train()\n"))
    assert ("args.fp16" in plan.unsupported) is refused
    assert plan.options["autocast"] == "fp16"
