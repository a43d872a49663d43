"""Host memory and checkpoints: the files against those that Trainer writes, byte by byte."""

from __future__ import annotations

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
