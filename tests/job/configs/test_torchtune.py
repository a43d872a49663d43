"""What files of torchtune mean."""

from __future__ import annotations

import pytest

import peftplan
from peftplan.job.configs.read import read_text
from peftplan.job.kernels import named_kernels
from tests.job.configs.files import TORCHTUNE, read


def test_an_optimizer_of_a_package_is_not_supported() -> None:
    """Its states are not known; the rest of the file is read, and the parameters are counted."""
    plan = read({**TORCHTUNE, "optimizer": {"_component_": "dion.Muon"}})
    assert plan.unsupported["optimizer._component_"].option == "optim"
    assert peftplan.estimate(config=plan).trainable_parameters > 0


@pytest.mark.parametrize(
    ("group", "component", "kernels", "unsupported"),
    [
        (256, "Int8DynActInt4WeightQATQuantizer", ("torchao.fake_quant",), set()),
        (128, "Int8DynActInt4WeightQATQuantizer", ("torchao.fake_quant",), {"quantizer.groupsize"}),
        (256, "Int4WeightOnlyQATQuantizer", None, {"quantizer._component_"}),
    ],
)
def test_quantizers_of_torchtune(group: int, component: str, kernels: tuple[str, ...] | None, unsupported: set[str]) -> None:
    quantizer = {"_component_": f"torchtune.training.quantization.{component}", "groupsize": group}
    plan = read({**TORCHTUNE, "quantizer": quantizer})
    assert plan.unsupported.keys() == unsupported
    assert (named_kernels(plan.options.get("kernels")) or None) == kernels


SIZES = {"vocab_size": 32000, "num_layers": 22, "num_heads": 32, "num_kv_heads": 4, "embed_dim": 2048, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("sizes", "known"),
    [({}, True), ({"intermediate_dim": 5632}, True), ({"embed_dim": 4096}, False), ({"num_layers": 11}, False)],
)
def test_a_builder_whose_sizes_are_those_of_its_checkpoint(sizes: dict[str, int], known: bool) -> None:
    """TinyLlama's: 8/3 x 2,048 is rounded up to a multiple of 256 (models/llama2/_model_utils.py, `scale_hidden_dim_for_mlp`)."""
    model = {"_component_": "torchtune.models.llama2.llama2", "max_seq_len": 2048, **SIZES, **sizes}
    plan = read({**TORCHTUNE, "model": model, "checkpointer": {"checkpoint_dir": "models/TinyLlama_v1.1"}})
    assert bool(plan.unsupported) is not known
    assert plan.model == "tinyllama/tinyllama-v1.1"


def test_torchtune_reads_pairs_for_a_loss_of_preferences() -> None:
    """Others of its losses of pairs, and full fine-tuning with a second model, have no peak."""
    pairs = {**TORCHTUNE, "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}
    plan = read(pairs)
    assert (plan.options["trainer"], plan.options["loss"], plan.unsupported) == ("torchtune-dpo", "full", {})
    other = read({**TORCHTUNE, "loss": {"_component_": "torchtune.rlhf.loss.RSOLoss"}})
    assert other.unsupported["loss._component_"].effect == "unknown"


def test_torchtune_reads_a_teacher() -> None:
    """A divergence in eight chunks of logits, with the cross entropy in as many; another divergence has no peak."""
    losses = {"loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}}
    chunks = {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}
    of_teacher = {
        "teacher_model": {"_component_": "torchtune.models.qwen2.qwen2_1_5b"},
        "teacher_checkpointer": {"checkpoint_dir": "/data/Qwen2-1.5B-Instruct"},
    }
    adapted = {"_component_": "torchtune.models.qwen2_5.lora_qwen2_5_14b_instruct", "lora_attn_modules": ["q_proj"]}
    plan = read({**TORCHTUNE, **losses, **of_teacher, "teacher_model": adapted, "kd_loss": chunks})
    assert (plan.unsupported, [*plan.refused]) == ({}, ["teacher_model._component_"])
    student = {**TORCHTUNE, "checkpointer": {**TORCHTUNE["checkpointer"], "checkpoint_dir": "/tmp/Qwen2.5-7B-Instruct"}}
    student |= {"model": {**TORCHTUNE["model"], "_component_": "torchtune.models.qwen2_5.lora_qwen2_5_7b"}}  # no such builder
    plan = read({**student, **losses, **of_teacher, "teacher_model": adapted, "kd_loss": chunks})
    assert (plan.unsupported, {*plan.refused}) == ({}, {"model._component_", "teacher_model._component_"})
    plan = read({**TORCHTUNE, **losses, **of_teacher, "kd_loss": chunks})
    assert (plan.options["trainer"], plan.options["loss"], plan.unsupported) == ("torchtune-kd", "torchtune-kl", {})
    assert "release 0.6.1 frees" in plan.assumed["recipe"]
    assert plan.options["teacher_model"] == "Qwen2-1.5B-Instruct"
    other = read({**TORCHTUNE, **losses, **of_teacher, "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLLoss"}})
    assert other.unsupported["kd_loss._component_"].effect == "unknown"


def test_torchtune_over_the_processes_of_its_header() -> None:
    values = {
        "model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"},
        "checkpointer": {"checkpoint_dir": "/tmp/Llama-3.2-1B-Instruct/"},
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
        "optimizer_in_bwd": True,
    }
    plan = read(values, nproc_per_node=4)
    assert (plan.options["strategy"], plan.options["gpus"]) == ("fsdp2", 4)
    assert plan.options["optimizer_in_backward"] is True
    ends = {**values, "custom_sharded_layers": ["tok_embeddings", "output"], "fsdp_cpu_offload": True}
    assert read(ends, nproc_per_node=4).options["custom_sharded_layers"] == ("tok_embeddings", "output")
    assert "offload_params" not in read(ends).options


@pytest.mark.parametrize("more", [{"quantize_base": True}, {"_component_": "torchtune.models.llama3_1.qlora_llama3_1_8b"}])
def test_adapters_of_quantized_weights_are_not_fake_quantized(more: dict[str, object]) -> None:
    """torchtune, modules/peft/lora.py:283 (`QATLoRALinear.from_lora_linear`)."""
    quantizer = {"_component_": "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer", "groupsize": 32}
    values = {**TORCHTUNE, "model": {**TORCHTUNE["model"], **more}, "quantizer": quantizer}
    assert any(" raises ValueError" in row.why for row in read(values, tool="torchtune").unsupported.values())


def test_a_reference_of_full_dpo_is_a_copy() -> None:
    checkpoint = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": "checkpoints",
        "model_type": "LLAMA3",
    }
    values = {**TORCHTUNE, "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}, "ref_checkpointer": checkpoint}
    full = read({**values, "model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}})
    adapted = read({**values, "model": {"_component_": "torchtune.models.llama3_1.lora_llama3_1_8b"}})
    assert (full.options["trainer"], full.options["method"]) == ("torchtune-dpo", "full")
    assert not [key for key in full.unsupported if key.startswith("ref_checkpointer")]
    assert "ref_checkpointer._component_" in adapted.unsupported


FULL = """# To launch on 4 devices: tune run --nproc_per_node 4 full_finetune_distributed --config llama3/8B_full
model: {_component_: torchtune.models.llama3.llama3_8b}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /tmp/Meta-Llama-3-8B}
"""


@pytest.mark.parametrize(
    ("ac", "expected"),
    [
        ("{ac_mode: selective, ac_option: 2}", (True, 2)),
        ("{ac_mode: full}", (True, None)),
        ("{ac_mode: selective, ac_option: 2, enable_activation_checkpointing: true}", (False, None)),
    ],
)
def test_torchtune_checkpoints_every_second_layer(ac: str, expected: tuple[bool, int | None]) -> None:
    """recipes/full_finetune_distributed.py:659, :667: both kinds at once are none."""
    plan = read_text(FULL + ac.strip("{}").replace(", ", "\n"), file="run.yaml")
    assert not {"ac_mode", "ac_option"} & plan.unsupported.keys()
    assert (plan.options["gradient_checkpointing"], plan.options.get("every_n_layers")) == expected


def test_few_recipes_of_torchtune_choose_layers_for_checkpoints() -> None:
    """Those of adapters, and of one GPU, read `enable_activation_checkpointing` alone; `ac_option` is a number."""
    selective = "ac_mode: selective\nac_option: 2\nenable_activation_checkpointing: true"
    adapted = read_text(FULL.replace("llama3_8b", "lora_llama3_8b") + selective, file="run.yaml")
    assert "ac_mode" not in adapted.unsupported
    assert (adapted.options["gradient_checkpointing"], adapted.options.get("every_n_layers")) == (True, None)
    alone = FULL.replace("--nproc_per_node 4 full_finetune_distributed", "full_finetune_single_device") + selective
    without_number = FULL + "ac_mode: selective"
    assert all("ac_mode" in read_text(text, file="run.yaml").unsupported for text in (alone, without_number))


def test_torchtune_divides_by_the_steps_between_logs() -> None:
    """recipes/full_finetune_distributed.py:1077, of `dev/8B_full_experimental.yaml`, rehearsed: TypeError behind a step."""
    plan = read({**TORCHTUNE, "log_every_n_steps": None})
    assert "TypeError" in plan.refused["log_every_n_steps"].why
    assert plan.refused["log_every_n_steps"].instead == {"log_every_n_steps": 1}
    assert (plan.unsupported, read({**TORCHTUNE, "log_every_n_steps": 1}).options) == ({}, plan.options)


def test_recipes_clip_gradients_where_they_are_told_to() -> None:
    clipping = {**TORCHTUNE, "clip_grad_norm": 1.0}
    whole = {**clipping, "model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}}
    assert read(clipping).options["clip_gradients"] is True
    assert "clip_gradients" not in read({**TORCHTUNE, "clip_grad_norm": None}).options
    assert not read(whole).unsupported
    assert "RuntimeError" in read({**whole, "optimizer_in_bwd": True}).refused["clip_grad_norm"].why


@pytest.mark.parametrize(
    ("more", "key"),
    [({"num_output_chunks": 4}, "loss.num_output_chunks"), ({"mask_ignored_tokens": False}, "loss.mask_ignored_tokens")],
)
def test_other_chunks_of_a_linear_loss_have_no_peak(more: dict[str, object], key: str) -> None:
    """torchtune, modules/loss/cross_entropy_loss.py: with one chunk all logits are there at once."""
    linear = {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss", "num_output_chunks": 8}
    before = read({**TORCHTUNE, "loss": linear}).unsupported
    assert read({**TORCHTUNE, "loss": {**linear, **more}}).unsupported.keys() - before == {key}


@pytest.mark.parametrize("names", [[], ["q_proj", "o_proj"]])
def test_modules_that_torchtune_does_not_adapt_have_no_count(names: list[str]) -> None:
    """torchtune, modules/peft/_utils.py:16, and models/llama3/_component_builders.py:354 for none."""
    model = {**TORCHTUNE["model"], "lora_attn_modules": names}
    assert "model.lora_attn_modules" in read({**TORCHTUNE, "model": model}).unsupported
