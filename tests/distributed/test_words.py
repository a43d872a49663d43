"""Several GPUs in the words of accelerate, FSDP and DeepSpeed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.cli import main
from peftplan.errors import InputError, PeftplanError
from peftplan.job.job import Job
from peftplan.job.launch.accelerate import passed_options
from peftplan.job.prepare import prepare
from peftplan.planning.advising import advice

FSDP2 = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
mixed_precision: bf16
num_machines: 2
num_processes: 8
rdzv_backend: static
"""
ZERO3 = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_param_persistence_threshold": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 4,
}


def estimated(**options: Any) -> dict[str, Any]:
    return peftplan.estimate("gpt2", method="full", **options).to_dict()


def test_one_gpu_says_nothing_of_several() -> None:
    alone, counted, typed = estimated(gpu="t4"), estimated(gpu="1xt4"), estimated(gpu="t4", gpus=1)
    assert "distributed" not in alone
    assert not {"gathered_weights", "communication"} & alone["memory"]["by_category"].keys()
    assert alone == counted == typed


def test_the_card_says_how_many_there_are() -> None:
    """4 × 2 sequences of 3 micro batches on 16 GPUs."""
    result = estimated(gpu="8xh100-80gb", nodes=2, strategy="fsdp2", batch_size=2, gradient_accumulation_steps=3)
    block = result["distributed"]
    assert (block["strategy"], block["world_size"], block["gpus_per_node"], block["nodes"]) == ("fsdp2", 16, 8, 2)
    assert (block["batch_size_per_rank"], block["global_batch_size"]) == (2, 2 * 3 * 16)
    assert [card["name"] for card in result["gpus"]] == ["h100-80gb"]
    assert block["ranks"][0]["persistent"] == result["memory"]["persistent"]


def test_without_a_strategy_it_is_ddp() -> None:
    assert estimated(gpus=2)["distributed"]["strategy"] == "ddp"


def test_accelerate_config(tmp_path: Path) -> None:
    file = tmp_path / "fsdp2.yaml"
    file.write_text(FSDP2, encoding="utf-8")
    job = prepare("gpt2", method="full", accelerate_config=str(file))
    assert job.distributed is not None
    assert (job.distributed.strategy, job.distributed.gpus, job.distributed.nodes) == ("fsdp2", 4, 2)
    assert job.distributed.reshard_after_forward is True
    assert job.distributed.wrap_policy == "transformer"
    assert job.distributed.offload_params == "none"
    assert job.setup.autocast == "bf16"


@pytest.mark.parametrize(("field", "runs"), [("reshard_after_forward", True), ("sharding_strategy", False)])
def test_the_strategy_of_fsdp_1_in_accelerate_s_file(field: str, runs: bool) -> None:
    """accelerate, commands/launch.py: `--fsdp_sharding_strategy` is FULL_SHARD by default, and it wins in the plugin."""
    fsdp = {"fsdp_version": 1, f"fsdp_{field}": "SHARD_GRAD_OP"}
    config = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": fsdp}
    job = prepare("gpt2", method="full", accelerate_config=config)
    assert job.distributed is not None
    assert job.distributed.reshard_after_forward is runs
    assert any("FULL_SHARD" in note for note in job.architecture.notes) is runs


@pytest.mark.parametrize("passed", [False, True])
def test_the_strategy_of_fsdp_2_is_a_switch(passed: bool) -> None:
    """accelerate, utils/dataclasses.py: under FSDP2 it reads no `sharding_strategy`, and `reshard_after_forward` must be a bool.
    transformers, training_args.py, `_process_fsdp_args`: `str_to_bool` of the same field raises ValueError."""

    def job(**fields: object) -> Job:
        if passed:
            return prepare("gpt2", method="full", gpus=4, **passed_options(fields))
        fsdp = {"fsdp_version": 2, **{f"fsdp_{name}": value for name, value in fields.items()}}
        config = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": fsdp}
        return prepare("gpt2", method="full", accelerate_config=config)

    with pytest.raises(InputError, match="reshard_after_forward: 'SHARD_GRAD_OP' is not valid; accepted: true, false"):
        job(reshard_after_forward="SHARD_GRAD_OP")
    ignored = job(sharding_strategy="SHARD_GRAD_OP")
    assert ignored.distributed is not None
    assert ignored.distributed.reshard_after_forward is not False
    assert any("does not read sharding_strategy SHARD_GRAD_OP" in note for note in ignored.architecture.notes)
    assert not any("sharding_strategy" in note for note in job(sharding_strategy="FULL_SHARD").architecture.notes)


@pytest.mark.parametrize(("fields", "reshards"), [({"gpus": 4}, True), ({"gpus": 8, "dp_shard_size": 4}, True), ({"gpus": 8}, 4)])
def test_a_size_of_all_shards_is_a_switch(fields: dict[str, Any], reshards: object) -> None:
    """torch, _fully_shard/_fsdp_init.py, `_get_post_forward_mesh_info`: the number of ranks that share the weights means true."""
    job = prepare("gpt2", method="full", strategy="fsdp2", reshard_after_forward=4, **fields)
    assert job.distributed is not None
    assert job.distributed.reshard_after_forward is reshards


def test_a_one_in_a_file_of_accelerate_is_true() -> None:
    """accelerate, utils/dataclasses.py: `str_to_bool`, as transformers does with `fsdp_config`."""
    fsdp = {"fsdp_version": 2, "fsdp_reshard_after_forward": 1}
    in_file = prepare(
        "gpt2", method="full", accelerate_config={"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": fsdp}
    )
    passed = prepare("gpt2", method="full", gpus=4, **passed_options({"reshard_after_forward": 1}))
    for job in (in_file, passed):
        assert job.distributed is not None
        assert job.distributed.reshard_after_forward is True


def test_deepspeed_config(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(ZERO3), encoding="utf-8")
    job = prepare("gpt2", method="full", deepspeed=str(file), gpus=4)
    assert job.distributed is not None
    stated = job.distributed.model_dump(exclude_none=True)
    assert stated == {
        "strategy": "zero3",
        "gpus": 4,
        "nodes": 1,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 10**9,
        "stage3_param_persistence_threshold": "auto",
        "offload_optimizer": "cpu",
    }
    assert job.setup.gradient_accumulation_steps == 4


@pytest.mark.parametrize("zero", [{"zero_optimization": {"stage": 0, "overlap_comm": True}}, {}])
def test_stage_0_is_deepspeed_without_zero(zero: dict[str, Any]) -> None:
    """Also where the file says no stage (DeepSpeed, runtime/zero/config.py: `stage`); fields of other stages are not read."""
    job = prepare("gpt2", method="full", deepspeed={**zero, "fp16": {"enabled": True}}, gpus=4)
    assert job.distributed is not None
    assert job.distributed.model_dump(exclude_none=True) == {"strategy": "zero0", "gpus": 4, "nodes": 1}
    assert job.setup.autocast == "fp16"


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"gpu": "8xt4", "gpus": 4}, "gpus: the card says how many there are (8x…); accepted: one of the two"),
    ({"gpu": ["2xl4", "8xt4"]}, "gpu: one estimate is for one number of GPUs (got 2x, 8x); run one estimate for each"),
    ({"strategy": "fsdp2"}, "strategy: fsdp2 divides a job over several GPUs; add --gpus 2, for example, or --gpu 2xCARD"),
    ({"strategy": "zero4", "gpus": 2}, "strategy: 'zero4' is not valid; did you mean zero"),
    ({"overlap_comm": True}, "overlap_comm: it takes effect on several GPUs only; add --gpus 2"),
    (
        {"gpus": 2, "reshard_after_forward": False},
        "reshard_after_forward: DDP has no such parameter; accepted: with --strategy fsdp2 or fsdp1",
    ),
    # torch, _fully_shard/_fsdp_init.py: "reshard_after_forward=1 (int) means resharding parameters to world size 1"
    *(
        (
            {"gpus": 4, "strategy": "fsdp2", "reshard_after_forward": number},
            f"reshard_after_forward: {number!r} is not valid; torch",
        )
        for number in (0, 1, "1")
    ),
    ({"gpus": 8, "strategy": "fsdp2", "dp_shard_size": 3}, "dp_shard_size: 3 is not valid; accepted: a divisor of the 8 GPUs"),
    ({"gpus": 0}, "gpus must be at least 1 (got 0)"),
    (
        {"gpus": 2, "strategy": "zero2", "clip_gradients": True},
        "clip_gradients: DeepSpeed clips by itself, as `gradient_clipping`",
    ),
    ({"gpus": 2, "strategy": "tp"}, "strategy: tp divides a model by its tp_plan, and GPT2LMHeadModel has none in transformers"),
    ({"gpus": 2, "deepspeed": {"zero_optimization": {"stage": 4}}}, "deepspeed: stage: 4 is not valid; accepted: 0, 1, 2, 3"),
    (
        {"gpus": 2, "deepspeed": {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}},
        "deepspeed: offload_optimizer: 'cpu' is not valid; not counted at stage 0",
    ),
    ({"gpus": 2, "deepspeed": {"zero_optimization": {"stage": 2, "overlap_com": True}}}, "did you mean overlap_comm"),
    ({"gpus": 2, "deepspeed": {"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}}, "tensor_parallel"),
    (
        {"gpus": 2, "deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}},
        "offload_optimizer: ratio: 0.3 is not valid; no other value than 1.0 is counted",
    ),
    (
        {"gpus": 2, "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin": True}}}},
        "deepspeed: zero_optimization: offload_optimizer: 'pin' is not valid",
    ),
    (
        {"gpus": 2, "deepspeed": {"bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True}}},
        "deepspeed: bf16: bf16_master_weights_and_grads: True is not valid; no other value than false is counted",
    ),
    (
        {"gpus": 2, "deepspeed": {"bf16": {"enabled": True}, "fp16": {"enabled": True}}},
        "bf16 and fp16 are both enabled, which DeepSpeed refuses",
    ),
    (
        {"accelerate_config": {"distributed_type": "FSDP", "num_processes": 2}, "deepspeed": ZERO3},
        "deepspeed: strategy is fsdp1 in accelerate_config and zero3 here",
    ),
    ({"gpus": 2, "deepspeed": ZERO3, "strategy": "zero2"}, "strategy: 'zero2' is not valid; deepspeed says zero3"),
    ({"accelerate_config": {"distributed_type": "TPU"}}, "accelerate_config: distributed_type: 'TPU' is not valid"),
    ({"accelerate_config": {"distributed_type": "FSDP", "num_proceses": 2}}, "did you mean num_processes"),
    (
        {"accelerate_config": {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_shard": 1}}},
        "accelerate_config: fsdp_config: 'fsdp_shard' is not valid",
    ),
    (
        {"accelerate_config": {"distributed_type": "MULTI_GPU", "num_processes": 3, "num_machines": 2}},
        "num_processes: 3 is not valid; accepted: a multiple of the 2 machines",
    ),
)


def test_a_field_that_only_pipelines_read_is_left_out() -> None:
    block = {"enabled": "auto", "immediate_grad_update": True}
    same = [
        peftplan.estimate("gpt2", gpus=2, deepspeed={"zero_optimization": {"stage": 2}, "bf16": bf16}).peaks
        for bf16 in (block, {"enabled": "auto"})
    ]
    assert same[0] == same[1] is not None


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[line[:30] for _, line in REFUSED])
def test_bad_input_is_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(PeftplanError) as error:
        estimated(**options)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_flat_parameters_of_integers_are_refused() -> None:
    with pytest.raises(PeftplanError, match="FSDP1 cannot flatten integer dtype tensors"):
        peftplan.estimate("llama-2-7b", method="qlora", gpus=2, strategy="fsdp1")
    peftplan.estimate("llama-2-7b", method="qlora", gpus=2, strategy="fsdp1", quant_storage="bf16")


BROKEN = (
    ("a: [1", "not a YAML file: line 1"),
    ("num_processes: 2\nnum_processes: 4\n", "num_processes appears twice"),
    (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(f"b{n}: [{', '.join(['*a'] * 10)}]" for n in range(200)),
        "at most 10,000",
    ),
    ("- 1\n- 2\n", "accepted: a file of fields with values"),
    ("distributed_type: FSDP\nfsdp_config: 7\n", "fsdp_config: 7 is not valid; accepted: fields and values"),
    ("distributed_type: FSDP\nfsdp_config: {1: 2}\n", "accepted: fields and values"),
    ("distributed_type: MULTI_GPU\nnum_processes: .inf\n", "num_processes: inf is not valid; accepted: a whole number"),
    ("distributed_type: MULTI_GPU\nnum_processes: .nan\n", "num_processes: nan is not valid; accepted: a whole number"),
    ("distributed_type: MULTI_GPU\nnum_machines: 0\n", "num_machines: 0 is not valid; accepted: at least 1"),
    ("distributed_type: MULTI_GPU\nnum_processes: 0\n", "num_processes: 0 is not valid; accepted: at least 1"),
    ("distributed_type: !!python/object/apply:os.system ['true']\n", "not a YAML file"),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', "stage appears twice"),
    ('{"zero_optimization": ', "not a JSON file"),
)


@pytest.mark.parametrize(("text", "line"), BROKEN, ids=[line for _, line in BROKEN])
def test_a_broken_launch_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "launch"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PeftplanError, match=line.replace("(", r"\(")):
        estimated(accelerate_config=file)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_fsdp_offloads_to_the_host_alone(strategy: str) -> None:
    """`CPUOffloadPolicy` and `CPUOffload` know no other place (torch, distributed/fsdp)."""
    with pytest.raises(PeftplanError, match=r"offload_params: 'nvme' is not valid; .* accepted: none or cpu"):
        peftplan.estimate("llama-3.2-1b", gpus=2, strategy=strategy, offload_params="nvme")


def test_an_offload_without_a_device_is_refused() -> None:
    """DeepSpeed takes a block (runtime/zero/config.py); a text was read as no offload."""
    zero = {"zero_optimization": {"stage": 3, "offload_param": "cpu"}}
    with pytest.raises(PeftplanError, match=r"deepspeed: offload_param: 'cpu' is not valid; accepted: fields and values"):
        estimated(deepspeed=zero, gpus=4)


@pytest.mark.parametrize("number", ["0", "00", "131073", "1000000000", "9" * 5000])
def test_a_number_of_cards_that_no_run_has(number: str) -> None:
    with pytest.raises(PeftplanError, match=r"gpu: '\d.* is not valid; accepted: 1 to 131,072 of a card"):
        estimated(gpu=f"{number}xl4")


@pytest.mark.parametrize("command", [("serve", "gpt2"), ("estimate", "gpt2")])
def test_a_card_that_is_counted_where_one_is_meant(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--gpu", "2x2xl4" if command[0] == "estimate" else "2xl4"])
    assert ended.value.code == 2
    assert "--gpu: '2xl4' is not valid; it counts GPUs where one is meant" in capsys.readouterr().err


def test_a_release_that_is_none() -> None:
    with pytest.raises(PeftplanError, match=r"accelerate: 'x' is not valid; accepted: a release, such as 1\.16"):
        estimated(gpus=2, accelerate="x")


def test_several_numbers_of_gpus_are_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "gpt2", "--gpu", "2xl4,8xt4", "--strategy", "zero2", "--format", "json"])
    assert not ended.value.code
    results = json.loads(capsys.readouterr().out)
    assert [(result["distributed"]["world_size"], result["gpus"][0]["name"]) for result in results] == [(2, "l4"), (8, "t4")]


TRAPS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"method": "qlora", "strategy": "fsdp2"}, "quant_storage: FSDP2 shards packed weights only if they are stored as floats"),
    (
        {"method": "lora", "strategy": "fsdp2", "r": 4},
        "gpus: 8 ranks share tensors of 4 rows, of which each rank still holds one",
    ),
    ({"method": "lora", "strategy": "fsdp2", "wrap_policy": "none"}, "wrap_policy: none may make no layer a unit"),
    (
        {"method": "lora", "strategy": "fsdp1", "optim": "paged_adamw_32bit"},
        "optim: of paged optimizers only paged_adamw_8bit with LoRA was rehearsed under FSDP1",
    ),
)


@pytest.mark.parametrize(("options", "line"), TRAPS, ids=[line[:20] for _, line in TRAPS])
def test_what_costs_memory_without_an_error_is_a_warning(options: dict[str, Any], line: str) -> None:
    warnings = peftplan.estimate("llama-3.2-1b", gpus=8, **options).warnings
    assert [warning for warning in warnings if warning.startswith(line)]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bitsandbytes_optimizers_fail_under_fsdp2(method: str) -> None:
    """Rehearsed with torch 2.13 and bitsandbytes 0.50.2: "Operator bitsandbytes.optimizer_update_32bit.default does not have a
    sharding strategy registered" of full fine-tuning, and "got mixed torch.Tensor and DTensor" of LoRA."""
    with pytest.raises(PeftplanError, match="adamw_8bit fails in the first step of FSDP2"):
        peftplan.estimate("llama-3.2-1b", method=method, gpus=8, strategy="fsdp2", optim="adamw_8bit")


def test_no_warning_without_a_trap() -> None:
    assert not peftplan.estimate("llama-3.2-1b", method="lora", r=16, gpus=8, strategy="fsdp2").warnings


def test_the_json_has_the_shape_that_the_schema_says() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from peftplan.report.schema import json_schema

    document = json.loads(json.dumps(estimated(gpu="8xh100-80gb", strategy="zero3")))
    validator = jsonschema.Draft202012Validator(json_schema("estimate", closed=True))
    assert [*validator.iter_errors(document)] == []
    document = peftplan.estimate("llama-3.2-1b", method="lora", gpu="8xh100-80gb", strategy="fsdp2").to_dict()
    assert [*validator.iter_errors(json.loads(json.dumps(document)))] == []


def test_more_ranks_are_advised() -> None:
    """Full tuning of 70B needs 16 B per parameter: 1,104 GB over 8 cards of 80 GB is too much, over 16 or more it fits."""
    result = peftplan.estimate("llama-2-70b", method="full", gpu="8xh100-80gb", strategy="fsdp2")
    assert [verdict.verdict for verdict in result.gpus] == ["does_not_fit"]
    advised = advice(result)["h100-80gb"]
    assert [(change.options, change.verdict) for change in advised.changes if "nodes" in change.options] == [
        ({"nodes": 2}, "tight")
    ]
