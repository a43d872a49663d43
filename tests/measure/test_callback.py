"""`MemoryCallback` inside a real Trainer and a real SFTTrainer on the CPU, with the double in CUDA's place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.measure.tiny import TINY

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peftplan.accuracy.jsonl import read
from peftplan.integrations import MemoryCallback
from peftplan.job.script import Script
from peftplan.planning.estimate import estimate
from tests.measure.double import Double

# r × (in + out) of q (64+64), k and v (64+32 each), o (64+64), in 2 layers, r 4
SCALARS = 4 * 512
NUM_LORA = 2 * 4 * (128 + 96 + 96 + 128)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")


@pytest.fixture
def double() -> Iterator[Double]:
    with Double() as device:
        yield device


def model() -> Any:
    fields = {key: value for key, value in TINY.items() if key not in ("model_type", "architectures")}
    return LlamaForCausalLM(LlamaConfig(**fields))


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


def samples(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": (ids := torch.arange(length) % 512), "labels": ids} for length in lengths]


def arguments(folder: Path, **fields: Any) -> dict[str, Any]:
    common = {"per_device_train_batch_size": 1, "max_steps": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return {"output_dir": str(folder), **common, "save_strategy": "no", "logging_strategy": "no", "bf16": False, **fields}


def trained(folder: Path, callback: Any, *, lengths: list[int], **fields: Any) -> None:
    """A real training of one sequence per step."""
    wrapped = get_peft_model(model(), lora())
    training_args = TrainingArguments(**arguments(folder, **fields))
    training_args.train_sampling_strategy = "sequential"
    Trainer(model=wrapped, args=training_args, train_dataset=samples(lengths), callbacks=[callback]).train()


def test_a_trainer_prints_measured_beside_estimated_and_leaves_a_record(tmp_path: Path, double: Double) -> None:
    messages: list[str] = []
    output = tmp_path / "runs.jsonl"
    trained(tmp_path, MemoryCallback(device=double, tell=messages.append, output=output), lengths=[16] * 4)
    assert all(line.startswith("peftplan: ") for line in messages)
    assert "peftplan: after 2 steps, the largest of 1 × 16 tokens" in messages
    (title,) = [line for line in messages if " · ok" in line]
    assert "lora" in title
    assert any(f"trainable {NUM_LORA:,} of" in line and "as estimated" in line for line in messages)
    (record,) = read(output)
    options = record.run.options
    assert (options["batch_size"], options["seq_len"], options["dtype"], options["adapter_dtype"]) == (1, 16, "fp32", "fp32")
    assert (options["trainer"], options["autocast"], options["gradient_checkpointing"]) == ("transformers", "none", False)
    assert record.counts.trainable == NUM_LORA
    assert set(record.peaks.by_phase) == {"load", "forward", "backward", "step"}


def test_phases_follow_the_trainer_through_accumulation(tmp_path: Path, double: Double) -> None:
    output = tmp_path / "runs.jsonl"
    trained(
        tmp_path, MemoryCallback(device=double, tell=lambda line: None, output=output), lengths=[8] * 8,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    (record,) = read(output)
    assert [(figure["step"], figure["phase"]) for figure in record.steps] == [
        (0, "load"),
        *((step, phase) for step in (1, 2) for phase in ("forward", "backward", "forward", "backward", "step", "between")),
    ][:-1]
    assert record.run.options["gradient_accumulation_steps"] == 2


def test_gradients_and_states_are_what_a_step_leaves_alive(tmp_path: Path, double: Double) -> None:
    """AdamW in the first step makes two fp32 states per trained parameter and a step counter; gradients go with zero_grad.

    16 parameters (A and B of 4 modules in 2 layers): counters 16 × 512 B; the trainer keeps a few scalars too, such as its loss.
    """
    output = tmp_path / "runs.jsonl"
    trained(tmp_path, MemoryCallback(device=double, tell=lambda line: None, output=output), lengths=[16] * 4)
    (record,) = read(output)
    after = {(figure["step"], figure["phase"]): figure["allocated_after"] for figure in record.steps}
    gradients = after[2, "backward"] - after[1, "step"]
    states = after[1, "step"] - after[0, "load"]
    assert 0 <= gradients - 4 * NUM_LORA <= SCALARS
    assert 0 <= states - 8 * NUM_LORA - 16 * 512 <= SCALARS


def test_it_warns_before_the_batch_that_will_not_fit(tmp_path: Path, double: Double) -> None:
    """The third sequence is eight times as long; the driver has less left than the trace says it needs."""
    messages: list[str] = []
    callback = MemoryCallback(device=double, tell=messages.append, engine="trace", after=1)
    begun = callback._begin
    at_warning: list[int] = []

    def begin(phase: str) -> None:
        at_warning.append(sum("is likely to run out of memory" in line for line in messages))
        begun(phase)

    callback._begin = begin  # type: ignore[method-assign]
    # what the trace says of 64 tokens fits, of 512 tokens it does not
    small, large = (callback_estimate(length) for length in (64, 512))
    double.free_bytes = lambda: (small + large) // 2 - double.counter.reserved  # type: ignore[method-assign]
    trained(tmp_path, callback, lengths=[64, 64, 512, 64])
    (warning,) = [line for line in messages if "is likely to run out of memory" in line]
    assert "a batch of 1 × 512 tokens" in warning
    # phases begun in the two steps before, four each (forward, backward, step, between), see no warning; all later ones see it
    assert at_warning == [0] * 8 + [1] * 8


def callback_estimate(length: int) -> int:
    import peftplan

    expected = peftplan.estimate(
        LlamaConfig(**{k: v for k, v in TINY.items() if k not in ("model_type",)}), peft_config=lora(), engine="trace",
        dtype="fp32", autocast="none", gradient_checkpointing=False, seq_len=length,
    )  # fmt: skip
    assert expected.peaks is not None
    return expected.peaks.allocated


def test_without_cuda_it_says_so_and_prints_the_estimate(tmp_path: Path) -> None:
    messages: list[str] = []
    trained(tmp_path, MemoryCallback(tell=messages.append), lengths=[16] * 4)
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert any("needs a CUDA GPU" in line for line in messages)
    assert any("estimated for 1 × 16 tokens" in line for line in messages)


def test_the_estimate_is_of_the_torch_that_runs_and_of_what_the_program_does(tmp_path: Path, double: Double) -> None:
    scripts: list[Script] = []
    output = tmp_path / "runs.jsonl"

    def noting(*args: Any, **kwargs: Any) -> Any:
        scripts.append(kwargs["script"])
        return estimate(*args, **kwargs)

    with patch("peftplan.measure.callback.estimate", noting):
        for options in ({}, {"script": Script(empties_cache=True)}):
            trained(tmp_path, MemoryCallback(device=double, tell=lambda line: None, output=output, **options), lengths=[8] * 4)
    assert [(script.empties_cache, script.torch) for script in scripts] == [(False, torch.__version__), (True, torch.__version__)]
    assert [record.run.script for record in read(output)] == [Script(), Script(empties_cache=True)]


def test_the_model_is_left_without_hooks(tmp_path: Path, double: Double) -> None:
    wrapped = get_peft_model(model(), lora())
    callback = MemoryCallback(device=double, tell=lambda line: None)
    training_args = TrainingArguments(**arguments(tmp_path, max_steps=2))
    Trainer(model=wrapped, args=training_args, train_dataset=samples([8] * 4), callbacks=[callback]).train()
    assert not wrapped._forward_hooks
    assert not wrapped._forward_pre_hooks


def test_full_fine_tuning_is_recognised(tmp_path: Path, double: Double) -> None:
    output = tmp_path / "runs.jsonl"
    callback = MemoryCallback(device=double, tell=lambda line: None, output=output)
    whole = model()
    training_args = TrainingArguments(**arguments(tmp_path, max_steps=2))
    Trainer(model=whole, args=training_args, train_dataset=samples([8] * 4), callbacks=[callback]).train()
    (record,) = read(output)
    assert record.run.method_name == "full"
    assert record.counts.trainable == record.counts.total == whole.num_parameters()


def test_in_sft_trainer(tmp_path: Path, double: Double) -> None:
    """TRL's trainer: its chunked loss, its checkpointing by default, tokens as its data set has them."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    messages: list[str] = []
    output = tmp_path / "runs.jsonl"
    sft_config = trl.SFTConfig(**arguments(tmp_path, max_steps=3, max_length=24))
    data = datasets.Dataset.from_dict({"input_ids": [list(range(24))] * 6})
    tokenizer = _tokenizer()
    trainer = trl.SFTTrainer(
        model=model(), args=sft_config, train_dataset=data, processing_class=tokenizer, peft_config=lora(),
        callbacks=[MemoryCallback(device=double, tell=messages.append, output=output)],
    )  # fmt: skip
    trainer.train()
    (record,) = read(output)
    assert (record.run.options["trainer"], record.run.options["loss"]) == ("trl", "trl-chunked")
    assert record.run.options["gradient_checkpointing"] is True
    assert record.run.options["seq_len"] == 24
    assert record.counts.trainable == NUM_LORA
    assert any("after 2 steps" in line for line in messages)


def _tokenizer() -> Any:
    """512 words, no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(511)} | {"<pad>": 511}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="w0")


def test_the_name_is_lazy_and_wrong_names_are_errors() -> None:
    import peftplan.integrations

    with pytest.raises(AttributeError, match="no attribute 'Memory'"):
        peftplan.integrations.Memory  # noqa: B018
