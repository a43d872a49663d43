"""How files launch a job: the words of accelerate and DeepSpeed become the options of several GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, RefusedError
from peftplan.job.configs.read import read_beside, read_config, read_text, read_values
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, SWIFT, TRL

ZERO3 = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "bf16": {"enabled": "auto"}}


def options(values: dict[str, object], **more: str) -> dict[str, object]:
    return dict(read_values(values, file="a.yml", **more).options)


def test_a_launch_file_behind_a_training_file(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(json.dumps(LLAMAFACTORY))
    (tmp_path / "z3.json").write_text(json.dumps(ZERO3))
    plan = peftplan.read_config([tmp_path / "a.yml", tmp_path / "z3.json"])
    assert (plan.options["strategy"], plan.options["gpus"]) == ("zero3", 8)
    assert plan.assumed["gpus"] == "the launcher decides; 8 are assumed"
    stated = peftplan.estimate(config=plan, gpus=4).to_dict()["config"]
    assert stated is not None
    assert "gpus" not in stated["assumed"]


def test_a_launch_file_outside_the_tree_of_its_config_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree: the config's folder and the working directory, links resolved; a second `--config` may lie anywhere."""
    (tmp_path / "z3.json").write_text(json.dumps(ZERO3))
    (folder := tmp_path / "repository" / "examples").mkdir(parents=True)
    (folder.parent / "z3.json").write_text(json.dumps(ZERO3))
    (folder / "link.json").symlink_to(tmp_path / "z3.json")
    (config := folder / "a.yml").write_text("")
    monkeypatch.chdir(folder)
    for outside in ("../../z3.json", "../z3.json", str(tmp_path / "z3.json"), "link.json", "/etc/passwd", "z3\0.json"):
        config.write_text(json.dumps({**LLAMAFACTORY, "deepspeed": outside}))
        plan = peftplan.read_config(config)
        assert plan.unsupported["deepspeed"].why.endswith("so not opened; add it with another --config"), outside
        assert "strategy" not in plan.options
    assert peftplan.read_config([config, tmp_path / "z3.json"]).options["strategy"] == "zero3"
    monkeypatch.chdir(folder.parent)  # a repository's root, from which its examples are run
    for inside in ("z3.json", "examples/../z3.json", str(folder.parent / "z3.json")):
        config.write_text(json.dumps({**LLAMAFACTORY, "deepspeed": inside}))
        assert peftplan.read_config(config).options["strategy"] == "zero3", inside
    monkeypatch.chdir("/")  # every file lies beneath the root, which makes it no tree
    config.write_text(json.dumps({**LLAMAFACTORY, "deepspeed": str(tmp_path / "z3.json")}))
    assert "strategy" not in peftplan.read_config(config).options


def test_accelerates_file_names_no_file_outside_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "z3.json").write_text(json.dumps(ZERO3))
    (folder := tmp_path / "mine").mkdir()
    monkeypatch.chdir(folder)
    launch = {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"deepspeed_config_file": "../z3.json"}}
    (folder / "launch.json").write_text(json.dumps(launch))
    (folder / "a.yml").write_text(json.dumps(LLAMAFACTORY))
    refused = peftplan.read_config([folder / "a.yml", folder / "launch.json"]).unsupported["accelerate: accelerate"].why
    assert refused.startswith("deepspeed_config_file: ../z3.json: outside the config's folder")
    monkeypatch.chdir(tmp_path)
    launch["deepspeed_config"] = {"deepspeed_config_file": "z3.json"}
    (folder / "launch.json").write_text(json.dumps(launch))
    assert peftplan.read_config([folder / "a.yml", folder / "launch.json"]).options["strategy"] == "zero3"


def test_an_empty_key_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "a.yml").write_text(json.dumps({**LLAMAFACTORY, "": 3}))
    assert list(peftplan.read_config(path).unsupported) == ["an empty key"]


def test_a_module_is_not_both_target_and_saved() -> None:
    values = {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}
    with pytest.raises(peftplan.InputError, match="target_modules: 'q_proj' is not valid; modules_to_save names it too"):
        peftplan.estimate("llama-3.1-8b", **values)  # type: ignore[arg-type]


def test_names_that_a_tool_ships() -> None:
    assert options({**SWIFT, "deepspeed": "zero2"}, NPROC_PER_NODE="4")["strategy"] == "zero2"
    assert options({**SWIFT, "deepspeed": "zero2"}, NPROC_PER_NODE="4")["gpus"] == 4
    assert options({**TRL, "accelerate_config": "zero3"})["strategy"] == "zero3"
    assert options({**AXOLOTL, "deepspeed": "deepspeed_configs/zero3_bf16.json"})["strategy"] == "zero3"


@pytest.mark.parametrize(
    ("values", "key", "path", "sets"),
    [
        (AXOLOTL, "deepspeed", "deepspeed_configs/zero1.json", {"strategy": "zero1"}),
        (AXOLOTL, "deepspeed", "deepspeed_configs/zero2.json", {"strategy": "zero2", "offload_optimizer": "cpu"}),
        (
            AXOLOTL,
            "deepspeed",
            "./deepspeed_configs/zero3_bf16_cpuoffload_all.json",
            {"strategy": "zero3", "offload_params": "cpu"},
        ),
        (LLAMAFACTORY, "deepspeed", "examples/deepspeed/ds_z2_config.json", {"strategy": "zero2"}),
        (LLAMAFACTORY, "deepspeed", "ds_z2_offload_config.json", {"strategy": "zero2", "offload_optimizer": "cpu"}),
        (TRL, "accelerate_config", "examples/accelerate_configs/deepspeed_zero1.yaml", {"strategy": "zero1", "gpus": 8}),
        (TRL, "accelerate_config", "recipes/accelerate_configs/ddp.yaml", {"gpus": 8}),
        (TRL, "accelerate_config", "tests/distributed/data/accelerate_configs/ddp.yaml", {"gpus": 2}),
        (TRL, "accelerate_config", "recipes/accelerate_configs/fsdp.yaml", {"strategy": "fsdp1", "gpus": 8}),
    ],
)
def test_launch_files_of_the_tools_repositories(values: dict[str, object], key: str, path: str, sets: dict[str, object]) -> None:
    assert options({**values, key: path}).items() >= sets.items()


def test_fsdp_of_axolotl() -> None:
    config = {"offload_params": False, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "reshard_after_forward": True}
    read = options({**AXOLOTL, "fsdp_version": 2, "fsdp_config": config})
    assert (read["strategy"], read["gpus"], read["reshard_after_forward"]) == ("fsdp2", 8, True)


@pytest.mark.parametrize("key", ["tensor_parallel_size", "context_parallel_size"])
def test_what_divides_a_job_otherwise_cannot_be_said(key: str) -> None:
    assert key in read_values({**AXOLOTL, key: 2}, file="a.yml").unsupported
    assert key not in read_values({**AXOLOTL, key: 1}, file="a.yml").unsupported


def test_a_file_that_is_not_at_hand_cannot_be_said() -> None:
    assert "deepspeed" in read_values({**AXOLOTL, "deepspeed": "my/own.json"}, file="a.yml").unsupported


def test_one_process_is_one_gpu() -> None:
    assert options({**AXOLOTL})["gpus" if "gpus" in options({**AXOLOTL}) else "method"] == "qlora"


@pytest.mark.parametrize("number", [-1, 10**9])
def test_a_number_of_processes_that_no_run_has_cannot_be_said(number: int) -> None:
    plan = read_values({**AXOLOTL}, file="a.yml", tool="axolotl", NPROC_PER_NODE=number)
    assert plan.unsupported["gpus"].why == "accepted: 1 to 131,072"


def test_digits_of_other_alphabets_are_no_number() -> None:
    """`"²".isdigit()` holds, and `int("²")` raises."""
    assert "gpus" not in read_values({**AXOLOTL}, file="a.yml", tool="axolotl", NPROC_PER_NODE="²").options


@pytest.mark.parametrize(
    ("launcher", "gpus", "nodes"),
    [
        ("torchrun --nproc_per_node 8", 8, None),
        ("torchrun --nnodes=2 --nproc-per-node 4", 4, 2),
        ("deepspeed --num_nodes 2 --num_gpus 8", 8, 2),  # deepspeed/launcher/runner.py: GPUs of each node
        ("accelerate launch --num_machines 2 --num_processes 16", 8, 2),  # accelerate/commands/launch.py: processes in all
        ("accelerate launch --num_processes 4", 4, None),
    ],
)
def test_what_a_launcher_says_before_its_script(tmp_path: Path, launcher: str, gpus: int, nodes: int | None) -> None:
    """The last option stands before the script, which was read as a second value; `num_processes` counted for each node."""
    path = tmp_path / "train.sh"
    path.write_text(f"{launcher} sft.py --model_name_or_path Qwen/Qwen2.5-7B --use_peft true\n")
    plan = peftplan.read_config(path)
    assert (plan.tool, plan.options["gpus"], plan.options.get("nodes")) == ("trl", gpus, nodes)
    assert plan.unsupported == {}


def test_fsdp_of_training_arguments() -> None:
    """transformers 5.24, `_process_fsdp_args`: version 2 unless the config says 1; words of `fsdp` are fields of the config."""
    trl = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "per_device_train_batch_size": 1}
    assert options({**trl, "fsdp": "full_shard auto_wrap offload"})["strategy"] == "fsdp2"
    assert options({**trl, "fsdp": "full_shard auto_wrap offload"})["offload_params"] == "cpu"
    assert options({**trl, "fsdp": "shard_grad_op auto_wrap"})["reshard_after_forward"] is False
    assert options({**trl, "fsdp": True, "fsdp_config": {"version": 1}})["strategy"] == "fsdp1"
    assert options({**trl, "fsdp": True, "fsdp_config": {"cpu_offload": True}})["offload_params"] == "cpu"


def test_ms_swift_names_a_file_of_fsdp() -> None:
    """ms-swift 4.6, arguments/sft_args.py (`_init_fsdp`): its own name, or the path of a JSON file."""
    swift = {"model": "Qwen/Qwen3-8B", "tuner_type": "lora", "per_device_train_batch_size": 1, "fsdp": "other/fsdp2.json"}
    unsupported = read_values(swift, file="train.sh", tool="swift").unsupported["fsdp"]
    assert unsupported.why == "the launch file is not among the files; add it with another --config"
    named = {name: read_values({**swift, "fsdp": name}, file="train.sh", tool="swift") for name in ("fsdp2", "zero1")}
    assert named["fsdp2"].options["strategy"] == "fsdp2"
    assert "fsdp_config" in named["zero1"].unsupported  # a name of DeepSpeed's files


def test_the_release_of_transformers_decides_what_words_mean_under_fsdp_1() -> None:
    """`_process_fsdp_args`: before 5.4 a word is accelerate's `sharding_strategy`, since then its `reshard_after_forward`."""
    fsdp = {"fsdp": "shard_grad_op", "fsdp_config": {"version": 1}}
    plan = read_values({"model_name_or_path": "gpt2", "per_device_train_batch_size": 1, **fsdp}, file="a.yml", tool="trl")
    reshards = {
        release: peftplan.estimate(config=plan, script=peftplan.Script(transformers=release)).assumptions["reshard_after_forward"]
        for release in (None, "5.4", "5.3", "4.55")
    }
    assert reshards == {None: True, "5.4": True, "5.3": False, "4.55": False}


def test_what_releases_of_transformers_leave_to_fsdp_1_and_2() -> None:
    """`_process_fsdp_args`: FSDP1 by default before 5.10; before 5.4 FSDP2 keeps gathered weights, whatever `fsdp` says."""
    trl = {"model_name_or_path": "gpt2", "per_device_train_batch_size": 1, "fsdp": "full_shard"}
    plan = read_values({**trl, "fsdp_config": {"version": 2}}, file="a.yml", tool="trl")
    reshards = {
        release: peftplan.estimate(config=plan, script=peftplan.Script(transformers=release)).assumptions["reshard_after_forward"]
        for release in (None, "5.4", "5.3")
    }
    assert reshards == {None: True, "5.4": True, "5.3": False}
    unstated = read_values(trl, file="a.yml", tool="trl")
    for config, release in ((unstated, "5.9"), (plan, "4.57")):
        with pytest.raises(InputError, match=f"transformers {release} runs FSDP1 there; accepted: 1"):
            peftplan.estimate(config=config, script=peftplan.Script(transformers=release))
    assert peftplan.estimate(config=unstated, script=peftplan.Script(transformers="5.10")).distributed is not None


@pytest.mark.parametrize(("word", "stated"), [("full_shard", False), ("shard_grad_op", True)])
def test_fsdp_config_wins_over_words(word: str, stated: bool) -> None:
    """`_apply_legacy_fsdp_to_config`: `fsdp_config.setdefault("reshard_after_forward", …)`."""
    trl = {"model_name_or_path": "gpt2", "per_device_train_batch_size": 1, "fsdp": word}
    config = {"reshard_after_forward": stated, "sharding_strategy": word}
    assert options({**trl, "fsdp_config": config})["reshard_after_forward"] is stated


def test_fsdp_1_takes_no_switch_for_a_strategy() -> None:
    """accelerate, utils/dataclasses.py: `ShardingStrategy[self.reshard_after_forward.upper()]` raises KeyError: 'TRUE'."""
    config = {"version": 1, "reshard_after_forward": True}
    trl = {"model_name_or_path": "gpt2", "per_device_train_batch_size": 1, "fsdp": "full_shard", "fsdp_config": config}
    plan = read_values(trl, file="a.yml", tool="trl")
    with pytest.raises(InputError, match="fsdp_config: reshard_after_forward: 'True' is not valid; with FSDP1 accelerate"):
        peftplan.estimate(config=plan)
    unread = peftplan.estimate(config=plan, script=peftplan.Script(transformers="4.57"))
    assert unread.assumptions["strategy"] == "fsdp1"
    axolotl = read_values({**AXOLOTL, "fsdp": ["full_shard"], "fsdp_config": {"fsdp_reshard_after_forward": True}}, file="a.yml")
    with pytest.raises(InputError, match="with FSDP1 accelerate"):  # its `validate_config` makes that version 1
        peftplan.estimate(config=axolotl)


def test_fsdp_config_as_the_name_of_a_file(tmp_path: Path) -> None:
    """transformers' `TrainingArguments` take "either a dict or the location of a json file"."""
    trl = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "per_device_train_batch_size": 1, "fsdp": True}
    file = tmp_path / "fsdp.json"
    file.write_text('{"version": 1, "cpu_offload": true}')
    read = options({**trl, "fsdp_config": str(file)})
    assert (read["strategy"], read["offload_params"]) == ("fsdp1", "cpu")
    missing = read_values({**trl, "fsdp_config": "missing.json"}, file="a.yml").unsupported["fsdp_config"]
    assert missing.why == "fsdp_config: cannot read 'missing.json': No such file or directory"


def test_fsdp_of_swift_by_name_and_as_json() -> None:
    """ms-swift 4.6.0, `SftArguments._init_fsdp`: a name of its own files, or the JSON of one."""
    swift = {"model": "Qwen/Qwen2.5-7B", "tuner_type": "lora"}
    for fsdp in ("fsdp2", '{"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}'):
        plan = read_values({**swift, "fsdp": fsdp}, file="a.sh", kind="command", program="swift sft")
        assert (plan.options["strategy"], plan.unsupported) == ("fsdp2", {})
    inline = '{"zero_optimization": {"stage": 2}}'
    plan = read_values({**swift, "deepspeed": inline}, file="a.sh", kind="command", program="swift sft")
    assert (plan.options["strategy"], plan.unsupported) == ("zero2", {})


def test_processes_of_a_file_win_over_those_of_the_launch_file_that_it_names() -> None:
    """`trl sft --num_processes 4 --accelerate_config zero3`: accelerate launch takes the argument, not the file's 8."""
    trl = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "per_device_train_batch_size": 1, "accelerate_config": "zero3"}
    assert options(trl)["gpus"] == 8
    assert options({**trl, "num_processes": 4})["gpus"] == 4
    assert options({**trl, "num_processes": 4, "num_machines": 2})["gpus"] == 2  # it counts those of all machines


def test_processes_of_the_command_in_the_comments() -> None:
    """torchtune's recipes say in their header how they are launched; its recipes for several GPUs run FSDP2."""
    command = "# tune run --nnodes 1 --nproc_per_node 2 lora_finetune_distributed --config a.yml\n"
    recipe = "model:\n  _component_: torchtune.models.llama3_1.lora_llama3_1_8b\n  lora_attn_modules: [q_proj]\n"
    plan = read_text(command + recipe + "checkpointer:\n  checkpoint_dir: /tmp/Llama-3.1-8B\n", file="a.yml")
    assert (plan.options["gpus"], plan.options["strategy"]) == (2, "fsdp2")
    assert plan.assumed["gpus"] == "as the command in its comments launches it"
    axolotl = "base_model: gpt2\nadapter: lora\nfsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true\n"
    assert (
        read_text("# accelerate launch --num_processes 4 -m axolotl.cli.train a.yml\n" + axolotl, file="a.yml").options["gpus"]
        == 4
    )
    assert read_text(axolotl, file="a.yml").options["gpus"] == 8


def test_a_launch_file_wins_over_processes_that_were_assumed(tmp_path: Path) -> None:
    training, launch = tmp_path / "a.yml", tmp_path / "accelerate.yaml"
    training.write_text("base_model: gpt2\nadapter: lora\nfsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true\n")
    launch.write_text("distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 4\n")
    assert read_config([training, launch]).options["gpus"] == 4


def test_two_launch_files(tmp_path: Path) -> None:
    """The first one's strategy was read alone: over ranks of DDP, ZeRO-3 of a second file was dropped."""
    training, ranks, sharded, shards = (tmp_path / name for name in ("a.yml", "ranks.yaml", "z3.json", "fsdp.yaml"))
    training.write_text("base_model: gpt2\nadapter: lora\n")
    ranks.write_text("distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 4\n")
    shards.write_text("distributed_type: FSDP\nnum_machines: 1\nnum_processes: 4\nfsdp_config: {fsdp_version: 2}\n")
    sharded.write_text(json.dumps(ZERO3))
    for files, strategy in (([ranks, sharded], "zero3"), ([sharded, ranks], "zero3"), ([ranks, shards], "fsdp2")):
        read = read_config([training, *files]).options
        assert (read["strategy"], read["gpus"]) == (strategy, 4)
    with pytest.raises(RefusedError, match=r"fsdp\.yaml names fsdp2, .*z3\.json zero3; accepted: one strategy"):
        read_config([training, shards, sharded])


def test_example_scripts_of_transformers(tmp_path: Path) -> None:
    """run_glue.py trains a sequence classifier by Trainer, with three labels for MNLI; it was read as TRL's SFTTrainer."""
    path = tmp_path / "train.sh"
    glue = "torchrun --nproc_per_node 4 examples/pytorch/text-classification/run_glue.py"
    path.write_text(f"{glue} --model_name_or_path distilbert-base-uncased --task_name mnli --per_device_train_batch_size 64\n")
    plan = peftplan.read_config(path)
    assert (plan.tool, plan.unsupported, plan.options["gpus"]) == ("transformers-examples", {}, 4)
    classified = peftplan.estimate(config=plan)
    classifier = (768 * 768 + 768) + (3 * 768 + 3)  # pre_classifier and classifier of DistilBertForSequenceClassification
    assert classified.trainable_parameters == 66_362_880 + classifier  # DistilBertModel, and 66,955,779 by transformers on meta
    assert (plan.options["batch_size"], plan.options["seq_len"], classified.assumptions["dtype"]) == (64, 128, "fp32")
    path.write_text("python examples/pytorch/language-modeling/run_clm.py --model_name_or_path gpt2 --fp16 --block_size 512\n")
    plan = peftplan.read_config(path)
    assert (plan.tool, plan.options["seq_len"], plan.options["autocast"]) == ("transformers-examples", 512, "fp16")


def test_a_shipped_file_is_known_by_its_folder_too() -> None:
    """ms-swift ships two files of this name: `swift/config/fsdp2.json` and one for accelerate beside an example."""
    read = options({**SWIFT, "config_file": "examples/train/multi-gpu/fsdp2_lora/fsdp2.json"})
    assert (read["strategy"], read["gpus"], read["cpu_ram_efficient_loading"]) == ("fsdp2", 2, True)
    elsewhere = read_values({**SWIFT, "deepspeed": "mine/zero2.json"}, file="a.sh")
    assert elsewhere.unsupported["deepspeed"].why.startswith("the launch file is not among the files")


def test_checkpointing_that_a_launch_file_asks_for_counts() -> None:
    """accelerate wraps the layers itself, without reentry, whatever TrainingArguments say (accelerator.py:1697)."""
    values = {**SWIFT, "gradient_checkpointing": False, "config_file": "examples/train/multi-gpu/fsdp2_lora/fsdp2.json"}
    assert (options(values)["gradient_checkpointing"], options(values)["use_reentrant"]) == (True, False)


def test_checkpointing_of_a_second_file_counts(tmp_path: Path) -> None:
    """The same, as transformers 5.24 asks for it: Trainer raises where both say so (trainer.py:879)."""
    training, launch = tmp_path / "trl.yaml", tmp_path / "accelerate.yaml"
    training.write_text("model_name_or_path: Qwen/Qwen2.5-3B\ndataset_name: a/b\ngradient_checkpointing: false\n")
    for asks in (True, False):
        fsdp = f"{{fsdp_version: 2, fsdp_activation_checkpointing: {str(asks).lower()}}}"
        launch.write_text(f"distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp}\n")
        assert read_config([training, launch]).options["gradient_checkpointing"] is asks


def test_stage_0_of_deepspeed_is_a_strategy() -> None:
    """Without ZeRO its engine keeps fp32 copies of 16-bit weights (deepspeed, runtime/fp16/unfused_optimizer.py)."""
    read = read_values({**SWIFT, "deepspeed": "zero0"}, file="a.sh", NPROC_PER_NODE="4")
    assert (read.options["strategy"], "deepspeed" in read.unsupported) == ("zero0", False)


def test_a_sum_of_three_numbers_in_a_script() -> None:
    script = "export N=2\nswift sft --model Qwen/Qwen2.5-7B --gradient_accumulation_steps $(expr 32 / 4 / $N)"
    assert read_text(script, file="a.sh").options["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("several", [{"gpus": 8}, {"gpu": "8xh100-80gb"}, {"gpus": 8, "strategy": "zero3"}])
def test_several_gpus_for_a_file_of_one(several: dict[str, Any], tmp_path: Path) -> None:
    """LLaMA-Factory puts the model on its GPU where it runs alone, and each rank loads none on a device map."""
    file = tmp_path / "lora.yaml"
    config = "model_name_or_path: meta-llama/Llama-3.2-1B\nstage: sft\nfinetuning_type: lora\ntemplate: llama3\n"
    file.write_text(config, encoding="utf-8")
    jobs = [peftplan.estimate(config=file, **options).origin.inventory.job for options in (several, {"gpus": 1})]  # type: ignore[union-attr]
    assert [job.setup.device_map for job in jobs] == ["none", "cuda"]


@pytest.mark.parametrize(
    "launch", [ZERO3, {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 8}]
)
def test_a_launch_file_beside_a_file_of_one_process(launch: dict[str, Any], tmp_path: Path) -> None:
    """The device map that LLaMA-Factory has in one process is none of a launched one's."""
    (tmp_path / "lora.yaml").write_text(json.dumps(LLAMAFACTORY), encoding="utf-8")
    (tmp_path / "launch.json").write_text(json.dumps(launch), encoding="utf-8")
    alone, launched = (
        peftplan.read_config([tmp_path / name for name in names]).options
        for names in (["lora.yaml"], ["lora.yaml", "launch.json"])
    )
    assert (alone["device_map"], launched.get("device_map")) == ("cuda", None)
    assert peftplan.estimate(config=[tmp_path / "lora.yaml", tmp_path / "launch.json"]).peaks is not None


@pytest.mark.parametrize(
    ("strategy", "kept", "left_out"),
    [
        ("zero2", {"overlap_comm", "reduce_bucket_size"}, {"sub_group_size", "offload_params"}),
        ("fsdp2", {"offload_params"}, {"overlap_comm", "sub_group_size", "reduce_bucket_size"}),
        ("ddp", set[str](), {"overlap_comm", "sub_group_size", "offload_params", "reduce_bucket_size"}),
    ],
)
def test_another_strategy_on_the_command_line_wins_over_the_file(strategy: str, kept: set[str], left_out: set[str]) -> None:
    """Parameters of the file that the user's strategy does not have go with the file's."""
    zero3 = {"stage": 3, "overlap_comm": True, "sub_group_size": 1000000, "reduce_bucket_size": 1000000}
    plan = read_values(
        LLAMAFACTORY | {"deepspeed": {"zero_optimization": {**zero3, "offload_param": {"device": "cpu"}}}}, file="a.yaml"
    )
    assert plan.unsupported == {}
    assert plan.options["strategy"] == "zero3"
    distributed = peftplan.estimate(config=plan, gpus=4, strategy=strategy).distributed
    assert distributed is not None
    stated = {name for name in kept | left_out if name in distributed.strategy.model_fields_set}
    assert (distributed.strategy.strategy, stated) == (strategy, kept)


FSDP2 = {"fsdp_version": 2, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


@pytest.mark.parametrize(
    ("sizes", "world", "shards"),
    [
        ({"dp_shard_size": 2}, 2, 2),
        ({"dp_shard_size": 2, "dp_replicate_size": 4}, 8, 2),
        ({"dp_replicate_size": 2}, 8, 4),
        ({"dp_shard_size": "2"}, 2, 2),
        ({"dp_replicate_size": 3}, 6, 2),
        ({"dp_replicate_size": 16}, 32, 2),
    ],
)
def test_axolotls_groups_share_a_model(sizes: dict[str, object], world: int, shards: int) -> None:
    """What axolotl's `_get_parallel_config_kwargs` returns for these worlds; the sizes were left out, and 8 ranks shared it."""
    plan = read_values({**AXOLOTL, **FSDP2, **sizes}, file="a.yml")
    assert plan.options["dp_shard_size"] == shards
    assert plan.options.get("gpus", 8) == world


@pytest.mark.parametrize(
    "wrong",
    [
        {"dp_shard_size": 2, "fsdp_version": 1},
        {"dp_shard_size": "two"},
        {"dp_replicate_size": 3, "use_ray": True, "ray_num_workers": 8},
        {"dp_replicate_size": 8, "use_ray": True, "ray_num_workers": 8},  # nothing to share: accelerate raises
    ],
)
def test_groups_that_axolotl_refuses(wrong: dict[str, object]) -> None:
    assert set(wrong) & set(read_values({**AXOLOTL, **FSDP2, **wrong}, file="a.yml").unsupported)


@pytest.mark.parametrize(("gpus", "shards"), [(4, 2), (8, 4), (2, None), (3, None)])
def test_groups_fill_the_gpus_of_the_user(tmp_path: Path, gpus: int, shards: int | None) -> None:
    """`_get_parallel_config_kwargs` divides the processes that run, not those that were assumed."""
    file = tmp_path / "a.yml"
    file.write_text(json.dumps({**AXOLOTL, **FSDP2, "dp_replicate_size": 2}), encoding="utf-8")
    plan = read_beside(file, {"gpus": gpus})
    assert (plan.options.get("dp_shard_size"), "dp_replicate_size" in plan.unsupported) == (shards, shards is None)
