"""Round trips: what `export` writes says the same job when it is read back, for every tool and for jobs drawn from a seed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.datafiles import load
from peftplan.errors import InputError, PeftplanError, RefusedError
from peftplan.job.configs.read import read_text, read_values
from peftplan.job.configs.sayable import fields_of
from peftplan.job.launch import accelerate, deepspeed
from peftplan.job.script import Script
from peftplan.planning.export import TOOLS, export
from peftplan.results.estimate import Estimate
from tests.job.configs.drawn import PLANS, Trip, trips
from tools.check_exports import SUFFIX, shapes, values_of

TRAINERS = tuple(tool for tool in TOOLS if tool not in ("accelerate", "deepspeed"))
TWICE = 4
"""Jobs of a tool that are exported again from what was read."""
CHECKED: Mapping[str, Any] = load("configs/checked.json", dict)


def numbers(estimate: Estimate) -> dict[str, object]:
    """All counts and bytes of an estimate: each line of the ledger at each phase, what is reserved, and what the host holds."""
    peaks = estimate.peaks
    return {
        "counts": (estimate.trainable_parameters, estimate.total_parameters),
        "standing": sorted((line.name, line.place, line.bytes()) for line in estimate.static),
        "phases": peaks
        and {phase: sorted((line.name, line.bytes()) for line in ledger) for phase, ledger in peaks.ledgers.items()},
        "reserved": peaks and peaks.reserved,
        "host": estimate.host,
        "cards": [(verdict.gpu, verdict.verdict, verdict.needed_bytes) for verdict in estimate.gpus],
    }


def fields(estimate: Estimate) -> dict[str, object]:
    return fields_of(estimate.origin.inventory.job)  # type: ignore[union-attr]


def script(estimate: Estimate) -> Script:
    return estimate.origin.inventory.job.request.script  # type: ignore[union-attr]


@pytest.mark.parametrize("tool", TRAINERS)
def test_round_trip(tool: str, pytestconfig: pytest.Config) -> None:
    """Of the drawn jobs half run, all with `--full-matrix`."""
    plans = PLANS if pytestconfig.option.full_matrix else PLANS // 2
    exports = [trip for trip in trips(tool, plans=plans) if isinstance(trip, Trip)]
    assert len(exports) == plans
    for number, (model, options, estimate, exported) in enumerate(exports):
        where = f"{tool}: {model} {options}"
        check_schema(tool, exported.text)
        plan = read_text(exported.text, file=f"a.{SUFFIX.get(tool, 'yml')}")
        assert not plan.unsupported, where
        again = peftplan.estimate(config=plan)
        # the file says every option as it was, except those that it lists
        before, after = fields(estimate), fields(again)
        differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        by_targets = (
            {"target_modules", "exclude_modules"} if before.get("target_modules") == after.get("target_modules") else set()
        )
        assert differing - by_targets - {"adapter_dtype"} == exported.changed.keys() - {"adapter_dtype"}, where
        assert not exported.changed.keys() & options.keys(), where
        # and the same bytes: those of the job, or of what the tool makes of it
        read_back = numbers(again)
        assert read_back == numbers(exported.estimate), where
        if not exported.changed and script(exported.estimate) == script(estimate):  # the tool may run older libraries
            assert read_back == numbers(estimate), where
        if number >= TWICE:
            continue
        # what was read back can be said whole, and is said the same way
        twice = export(exported.estimate, to=tool)  # type: ignore[arg-type]
        assert not twice.changed, where
        assert _read(tool, twice.text) == _read(tool, exported.text), where


def _read(tool: str, text: str) -> dict[str, object]:
    """The values of a config without scaling, which is not read."""
    return {key: value for key, value in values_of(tool, text).items() if not key.endswith("lora_alpha")}


@pytest.mark.parametrize("tool", ["accelerate", "deepspeed"])
def test_round_trip_of_launch_files(tool: str) -> None:
    exports = [trip for trip in trips(tool) if isinstance(trip, Trip)]
    assert len(exports) == PLANS
    for model, options, estimate, exported in exports:
        check_schema(tool, exported.text)
        values = values_of(tool, exported.text)
        read = accelerate.options if tool == "accelerate" else deepspeed.options
        options_read = read(_nested(values))
        own = ("strategy", "gpus", "nodes", "offload_params", "offload_optimizer", "reshard_after_forward", "autocast")
        rest = {name: value for name, value in options.items() if name not in own}
        ranks = {name: options[name] for name in ("gpus", "nodes") if tool == "deepspeed" and name in options}
        again = peftplan.estimate(model, **rest, **ranks, **options_read)
        assert numbers(again) == numbers(estimate), (model, options)
        assert fields(again) == fields(estimate), (model, options)


def _nested(values: Mapping[str, Any]) -> dict[str, object]:
    from peftplan.job.configs.texts import nested

    return nested(values)


def check_schema(tool: str, text: str) -> None:
    """Keys, types and words of a config are among those that the tool itself accepted (`tools/check_exports.py`)."""
    kept = CHECKED[tool]
    assert kept["accepted"] == kept["plans"] == PLANS
    for key, shape in shapes(values_of(tool, text)):
        assert shape in kept["keys"].get(key, ()), f"{tool} was not asked about {key}: {shape}"


@pytest.mark.parametrize(
    ("tool", "model", "options", "line"),
    [
        (
            "axolotl",
            "llama-3.1-8b",
            {"method": "ia3"},
            "method: a config of axolotl 0.21.0 has no setting for 'ia3'; accepted: lora, qlora, full",
        ),
        (
            "axolotl",
            "llama-3.1-8b",
            {"trainer": "trl"},
            "trainer: a config of axolotl 0.21.0 has no setting for 'trl'; accepted: axolotl",
        ),
        ("axolotl", "qwen3-8b", {"method": "full"}, "attn_implementation: axolotl runs it otherwise than counted here"),
        (
            "ms-swift",
            "llama-3.1-8b",
            {"method": "lora-fa"},
            "method: a config of ms-swift 4.6.0 has no setting for 'lora-fa'",
        ),
        (
            "trl",
            "llama-3.1-8b",
            {"layers_to_transform": [0, 1]},
            "layers_to_transform: a config of trl 1.16.0 has no setting for (0, 1)",
        ),
        (
            "trl",
            "llama-3.1-8b",
            {"loss": "full"},
            "loss: a config of trl 1.16.0 has no setting for 'full'; accepted: trl-chunked",
        ),
        ("trl", "bert-base-uncased", {}, "task_type: trl trains CAUSAL_LM; bert-base-uncased has the head of MASKED_LM"),
        ("torchtune", "smollm2-135m", {}, "model: torchtune has no builder for smollm2-135m; accepted: codellama-7b"),
        (
            "torchtune",
            "llama-3.1-8b",
            {"optim": "adafactor"},
            "optim: a config of torchtune 0.6.1 has no setting for 'adafactor'",
        ),
        (
            "llamafactory",
            "llama-3.1-8b",
            {"method": "full", "dtype": "bf16", "autocast": "bf16"},
            "autocast: a config of llamafactory",
        ),
        (
            "torchtune",
            "llama-3.1-8b",
            {"method": "qlora"},
            "quant: a config of torchtune 0.6.1 has no setting for 'nf4 of bitsandbytes'; accepted: nf4 of torchao",
        ),
        ("deepspeed", "llama-3.1-8b", {}, "strategy: DeepSpeed's file says a stage of ZeRO, not one GPU"),
        (
            "accelerate",
            "llama-3.1-8b",
            {"gpus": 2, "strategy": "zero2", "overlap_comm": True},
            "overlap_comm: a file of accelerate",
        ),
    ],
)
def test_refused_by_the_name_of_the_option(tool: Any, model: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(PeftplanError, match=re.escape(line)):
        export(peftplan.estimate(model, **options), to=tool)


@pytest.mark.parametrize("options", [{"method": "lisa"}, {"method": "partial", "trainable": "self_attn"}], ids=str)
def test_no_method_is_accepted_that_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PeftplanError, match=f"no setting for '{options['method']}'; accepted: lora, qlora, full, lora\\+$"):
        export(peftplan.estimate("llama-3.1-8b", trainer="axolotl", **options), to="axolotl")


def test_a_model_without_default_targets() -> None:
    """peft knows no targets for Command R: a script without target_modules fails on the way to one that has them."""
    text = export(peftplan.estimate("c4ai-command-r7b-12-2024", method="qlora"), to="trl-script").text
    assert 'target_modules="all-linear"' in text


def test_torchtune_shards_where_nobody_said_how() -> None:
    exported = export(peftplan.estimate("llama-3.1-8b", gpus=4), to="torchtune")
    assert exported.changed["strategy"] == ("ddp", "fsdp2")
    assert "strategy fsdp2 (instead of ddp)" in "".join(exported.notes())
    with pytest.raises(PeftplanError, match="has no setting for 'ddp'; accepted: fsdp2"):
        export(peftplan.estimate("llama-3.1-8b", gpus=4, strategy="ddp"), to="torchtune")


def test_model_without_a_repository() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config |= {"vocab_size": 128, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    with pytest.raises(PeftplanError, match="model: the repository of llama is not known"):
        export(peftplan.estimate({**config, "tie_word_embeddings": False, "num_key_value_heads": 4}), to="trl")


@pytest.mark.parametrize(
    ("model", "repository"),
    [
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),  # the checkpoint that was named, not its base
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_repository(model: str, repository: str) -> None:
    assert f"model_name_or_path: {repository}\n" in export(peftplan.estimate(model), to="trl").text


def test_a_plan_of_fit() -> None:
    result = peftplan.fit("qwen2.5-0.5b", gpu="t4", method="lora", seq_len=1024, methods="lora", device_map="cuda")
    plan = result.plans[0]
    exported = export(plan, to="llamafactory")
    assert f"per_device_train_batch_size: {plan.batch_size}\n" in exported.text
    assert exported.estimate is not None
    assert exported.estimate.peaks is not None
    assert exported.estimate.peaks.allocated == plan.peak_allocated
    assert exported.estimate.gpus[0].verdict == plan.verdict


def test_header_says_what_is_estimated_and_how_to_run_it() -> None:
    exported = export(peftplan.estimate("llama-3.1-8b", method="qlora", r=16, gpu="rtx-4090"), to="axolotl", file="qlora.yml")
    header = [line for line in exported.text.splitlines() if line.startswith("# ")]
    assert header[0].startswith(f"# llama-3.1-8b, qlora r=16: written by peftplan {peftplan.__version__} for axolotl 0.21.0")
    assert any("peak" in line and "reserved" in line for line in header)
    assert "# rtx-4090: fits; it needs" in "\n".join(header)
    assert "# run: axolotl train qlora.yml" in header
    assert "# check: peftplan estimate --config qlora.yml --gpu rtx-4090" in header
    assert "learning_rate: 0.0002  # placeholder" in exported.text


def test_switches_that_no_option_says_are_off() -> None:
    """axolotl turns its LoRA kernels on by itself, and they save fewer tensors than peft's code."""
    text = export(peftplan.estimate("llama-3.1-8b", r=16), to="axolotl").text
    assert "lora_mlp_kernel: false\n" in text
    text = export(peftplan.estimate("llama-3.1-8b", r=16, kernels="axolotl,liger", trainer="axolotl"), to="axolotl").text
    assert "liger_rope: true\n" in text
    assert "lora_mlp_kernel" not in text


def test_layers_that_axolotl_leaves_in_16_bits() -> None:
    """axolotl 0.19 hands `bnb_config_kwargs` to `BitsAndBytesConfig` (loaders/model.py:823), and peft casts to fp32 what that
    leaves out, but for what axolotl casts back."""
    estimate = peftplan.estimate("llama-3.1-8b", method="qlora", quant_skip_modules=["lm_head"])
    text = export(estimate, to="axolotl").text
    assert "bnb_config_kwargs:\n  llm_int8_skip_modules: [lm_head]\n" in text
    assert read_text(text, file="a.yml").options["quant_skip_modules"] == ("lm_head",)
    skipped = ["lm_head", "model.layers.1.mlp.down_proj"]
    with pytest.raises(RefusedError, match="quant_skip_modules"):
        export(peftplan.estimate("llama-3.1-8b", method="qlora", quant_skip_modules=skipped), to="axolotl")


def test_options_that_move_no_byte() -> None:
    exported = export(peftplan.estimate("llama-3.1-8b", r=16, lora_alpha=32, use_rslora=True), to="llamafactory")
    assert "lora_alpha: 32\n" in exported.text
    assert "use_rslora: true\n" in exported.text
    assert exported.left_out == ()
    assert export(peftplan.estimate("llama-3.1-8b", use_rslora=True), to="trl").left_out == ("use_rslora",)


def test_what_a_file_leaves_to_transformers_is_no_option() -> None:
    """`fsdp` without a version: what is unstated waits for the release (`launch.accelerate.of_release`)."""
    trl = {"model_name_or_path": "meta-llama/Llama-3.1-8B", "per_device_train_batch_size": 1, "fsdp": "full_shard"}
    config = read_values(trl, file="a.yml", tool="trl")
    assert export(peftplan.estimate(config=config, gpus=4), to="trl").left_out == ()


def test_number_of_gpus_is_in_the_command_that_runs_it() -> None:
    text = export(peftplan.estimate("llama-3.1-8b", gpus=4, nodes=2), to="axolotl").text
    assert "# run: axolotl train axolotl.yml -- --num_processes 8 --num_machines 2" in text
    assert read_text(text, file="a.yml").options["gpus"] == 4
    assert read_text(text, file="a.yml").options["nodes"] == 2


def test_from_the_file_of_another_tool(tmp_path: Path) -> None:
    """A key that no option says is named in the comments; it does not vanish."""
    file = tmp_path / "axolotl.yml"
    file.write_text(
        "base_model: meta-llama/Llama-3.1-8B\nadapter: lora\nlora_r: 8\nlora_target_linear: true\nsequence_len: 1024\n"
        "micro_batch_size: 2\nneftune_noise_alpha: 5\n"
    )
    text = export(peftplan.estimate(config=file), to="trl").text
    assert "not carried over from" in text
    assert "neftune_noise_alpha" in text
    assert "per_device_train_batch_size: 2\n" in text


def test_a_file_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    exported = export(peftplan.estimate("llama-3.1-8b"), to="trl")
    exported.write(file)
    assert file.read_text() == str(exported)
    with pytest.raises(InputError, match="the file exists; accepted: another name, or force"):
        exported.write(file)
    exported.write(file, force=True)


def test_the_optimizer_that_accelerate_makes_is_not_written() -> None:
    """transformers has no `deepspeed_cpu_adam`: it steps in place of what the file names."""
    job: dict[str, Any] = {"method": "lora", "strategy": "zero3", "gpus": 8, "offload_optimizer": "cpu"}
    assert "\noptim: adamw_torch\n" in export(peftplan.estimate("llama-3.1-8b", **job), to="llamafactory").text


READ_BACK = {"axolotl": (".yml", ".yaml", ".txt", "", ".x"), "trl-script": (".py",), "ms-swift": (".sh", ".txt", "", ".x")}


@pytest.mark.parametrize("ending", [".yml", ".yaml", ".json", ".sh", ".py", ".ipynb", ".txt", "", ".x"])
@pytest.mark.parametrize("tool", READ_BACK)
def test_every_ending_is_read_back_or_refused(tmp_path: Path, tool: Any, ending: str) -> None:
    """`trl-script -o x.trl-script` was written, and read as YAML: peftplan goes by the ending."""
    file = tmp_path / f"x{ending}"
    job = peftplan.estimate("llama-3.2-1b", r=4)
    if ending not in READ_BACK[tool]:
        with pytest.raises(InputError, match=r"accepted: a name that ends in \."):
            export(job, to=tool, file=file)
        return
    file.write_text(export(job, to=tool, file=file).text, encoding="utf-8")
    assert peftplan.read_config(file).options["r"] == 4


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory", "ms-swift"])
def test_words_of_ours_are_written_as_names(tool: Any) -> None:
    """`peft-default` was written as it is, a module's name to these tools."""
    text = export(peftplan.estimate("llama-3.2-1b", target_modules="peft-default"), to=tool).text
    assert "q_proj" in text
    assert "peft-default" not in text


@pytest.mark.parametrize("tool", ["trl", "trl-script"])
def test_an_evaluation_reads_back(tool: Any, tmp_path: Path) -> None:
    """With more rows than a training step has, which a file's keys alone would not let us count."""
    job = peftplan.estimate("llama-3.2-1b", trainer="trl", eval_batch_size=16)
    file = tmp_path / f"a.{'yml' if tool == 'trl' else 'py'}"
    file.write_text(export(job, to=tool, file=file).text, encoding="utf-8")
    again = peftplan.estimate(config=file)
    assert again.peaks is not None
    assert job.peaks is not None
    assert again.peaks.by_phase == job.peaks.by_phase
    assert "evaluate" in again.peaks.by_phase


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize(
    ("tool", "ending", "data"),
    [
        ("axolotl", "yml", "val_set_size: 0.05"),
        ("llamafactory", "yaml", "val_size: 0.1"),
        ("ms-swift", "sh", "--split_dataset_ratio 0.05"),
    ],
)
def test_an_evaluation_of_other_tools_reads_back(tool: Any, ending: str, data: str, rows: int, tmp_path: Path) -> None:
    """It was refused."""
    job = peftplan.estimate("llama-3.2-1b", batch_size=4, seq_len=512, eval_batch_size=rows)
    file = tmp_path / f"a.{ending}"
    written = export(job, to=tool, file=file)
    file.write_text(written.text, encoding="utf-8")
    again = peftplan.estimate(config=file)
    assert data in written.text
    assert again.assumptions["eval_batch_size"] == rows
    assert again.bound is None
    assert (again.peaks and again.peaks.by_phase) == (
        written.estimate and written.estimate.peaks and written.estimate.peaks.by_phase
    )
