"""Host memory and checkpoints: the files against those that Trainer writes, byte by byte."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.planning import host
from tests.cli.run import run

CONFIG = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256,
}  # fmt: skip


def trained(folder: Path, *, method: str, optim: str) -> Path:
    """The checkpoint that Trainer writes on the CPU after two steps."""
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    config = transformers.AutoConfig.for_model("llama", **CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, save_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True, optim=optim
    )
    tokens = torch.arange(8)
    transformers.Trainer(model, arguments, train_dataset=[{"input_ids": tokens, "labels": tokens}] * 4).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"])
def test_files_are_those_that_trainer_writes(method: str, optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # accelerate, once training ends: it scans what all other tests have left
    folder = trained(tmp_path, method=method, optim=optim)
    on_card = host.optimizer_file_bytes
    monkeypatch.setattr(host, "optimizer_file_bytes", lambda tensors, **how: on_card(tensors, **how, device="cpu"))
    options: dict[str, Any] = {"r": 4} if method == "lora" else {}
    facts = peftplan.estimate({"model_type": "llama", **CONFIG}, method=method, optim=optim, **options).host
    assert facts is not None
    files = facts.checkpoint
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert (files.model, files.optimizer, files.scheduler) == (
        sizes[files.model_name],
        sizes["optimizer.pt"],
        sizes["scheduler.pt"],
    )
    assert files.optimizer_exact


def test_a_dense_model_is_in_host_memory_first() -> None:
    """gpt2 has 124,439,808 parameters of 2 B; its buffers are none, and LoRA's 294,912 stay in fp32."""
    facts = peftplan.estimate("gpt2", r=8, target_modules="c_attn").host
    assert facts is not None
    assert facts.loading.bytes == 124_439_808 * 2 + 294_912 * 4
    assert facts.loading.largest_tensor == 50_257 * 768 * 2


def test_a_quantized_model_is_not() -> None:
    facts = peftplan.estimate("llama-2-7b", method="qlora").host
    assert facts is not None
    assert (facts.loading.bytes, facts.loading.largest_tensor) == (0, 32_000 * 4096 * 2)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_keeps_all_checkpoints(limit: int, tmp_path: Path) -> None:
    """As in transformers; ms-swift's scripts set -1."""
    assert peftplan.estimate("gpt2", save_total_limit=limit).host == peftplan.estimate("gpt2").host
    file = tmp_path / "sft.sh"
    file.write_text(f"swift sft --model Qwen/Qwen2.5-0.5B --save_total_limit {limit}\n")
    assert peftplan.read_config(file).options.get("save_total_limit") is None


def test_kept_checkpoints_and_one_more() -> None:
    facts = peftplan.estimate("gpt2", save_total_limit=3).host
    assert facts is not None
    assert (facts.disk_kept, facts.disk_peak) == (3 * facts.checkpoint.total, 4 * facts.checkpoint.total)
    assert peftplan.estimate("gpt2").host.disk_kept is None  # type: ignore[union-attr]


def test_paged_states_and_checkpointed_inputs_have_their_place() -> None:
    paged = peftplan.estimate("gpt2", method="full", optim="paged_adamw_32bit")
    assert paged.host.paged == paged.managed_bytes > 0  # type: ignore[union-attr]
    offloaded = peftplan.estimate("gpt2", offload_checkpoints=True, batch_size=2, seq_len=128)
    inputs = 12 * 2 * 128 * 768 * 2  # bf16 embeddings of each of 12 layers
    assert offloaded.host.offloaded >= inputs  # type: ignore[union-attr]


def test_a_merge_is_that_of_serving() -> None:
    (on_cpu,) = (merge for merge in peftplan.serving("gpt2", r=8).merges if merge.place == "cpu")
    assert peftplan.estimate("gpt2", r=8).host.merging == on_cpu.total  # type: ignore[union-attr]
    assert peftplan.estimate("gpt2", method="full").host.merging is None  # type: ignore[union-attr]


def test_the_answer_stays_short_and_v_says_it() -> None:
    line = ("estimate", "gpt2", "--save-total-limit", "2")
    assert "optimizer.pt" not in run(*line).out
    output = run(*line, "-v").out
    assert "checkpoint: optimizer.pt" in output
    assert "2 checkpoints, as kept" in output


def test_ranks_of_a_node_share_its_memory() -> None:
    """ZeRO-2, its optimizer on the host: 4 B masters, 8 B moments, 6 B gradients of each of 1,235,814,400 parameters, 2 nodes."""
    options: dict[str, Any] = {"method": "full", "gpus": 4, "nodes": 2, "strategy": "zero2", "offload_optimizer": "cpu"}
    facts = peftplan.estimate("llama-3.2-1b", **options).host
    assert facts is not None
    assert facts.offloaded_per_node == 4 * facts.offloaded == pytest.approx(18 * 1_235_814_400 / 2, rel=1e-3)
    assert facts.loading_per_node == 4 * facts.loading.bytes


@pytest.mark.parametrize(
    ("options", "ranks", "loads"),
    [
        ({"strategy": "tp", "target_modules": "q_proj"}, 4, 0),
        ({"strategy": "device-map"}, 1, 0),
        ({"strategy": "zero3"}, 4, 0),
        ({"strategy": "zero3", "zero3_init": False}, 4, 4),
        ({"strategy": "fsdp2", "cpu_ram_efficient_loading": True}, 4, 1),
        ({"strategy": "fsdp2"}, 4, 4),
    ],
)
def test_how_many_models_a_node_loads(options: dict[str, Any], ranks: int, loads: int) -> None:
    """Under tensor parallelism and `device_map` weights go to the cards one by one; `cpu_ram_efficient_loading` leaves them to
    the first rank (transformers, `is_local_dist_rank_0`)."""
    alone = peftplan.estimate("llama-3.2-1b", method="lora", target_modules=options.get("target_modules", "all-linear")).host
    facts = peftplan.estimate("llama-3.2-1b", method="lora", gpus=4, **options).host
    assert alone is not None
    assert facts is not None
    assert facts.ranks == ranks
    assert facts.loading_per_node == loads * alone.loading.bytes


def test_a_node_without_the_memory_does_not_run_the_job() -> None:
    """149.58 GiB: 20 B for each of 8,030,261,248 parameters."""
    options = ("llama-3.1-8b", "--method", "full", "--strategy", "zero3", "--offload-params", "cpu", "--offload-optimizer", "cpu")
    line = ("estimate", *options, "--gpu", "8xrtx-4090")
    assert run(*line, "--host-memory", "256GiB", "--require-fit").code == 0
    short = run(*line, "--host-memory", "128GiB", "--require-fit")
    assert short.code == 1
    assert "host memory: 8 ranks on a node keep 149.58 GiB there, and it has 128.00 GiB" in " ".join(short.out.split())
    assert "host memory" in run("estimate", *options, "--gpus", "8", "--host-memory", "1GB").out


@pytest.mark.parametrize("size", ["5xx", "0", "64", "-1GiB", "GiB", "1e3GiB", "9" * 30])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    refused = run("estimate", "gpt2", f"--host-memory={size}")
    assert refused.code == 2
    assert refused.err.startswith(f"peftplan: --host-memory: '{size}' is not valid; accepted: a size such as 512GiB")
