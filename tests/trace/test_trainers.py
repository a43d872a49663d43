"""SFTTrainer's step: TRL's own class on a tiny model on the CPU, storage by storage, against the step program."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
import transformers

from peftplan.errors import RefusedError
from peftplan.job.resolving import resolved
from peftplan.job.setup import parse_setup
from peftplan.planning.estimate import estimate
from peftplan.trace.cuda import chunked, losses
from peftplan.trace.model import cast_by_trl
from peftplan.trace.steps import Run, take_steps
from tests.memory.engines import shallow
from tests.trace.engine_case import llama, lora, traced
from tests.trace.storages import Storages

ROWS, LENGTH, VOCAB = 2, 40, 40_000
TOKENS = ROWS * (LENGTH - 1)


class Launched:
    """A Triton kernel that does nothing: `kernel[grid](...)`."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def tiny_model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB
    )
    base = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def batch() -> dict[str, Any]:
    ids = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def storages_of_trl(model: Any, tmp_path: Any) -> Storages:
    """SFTTrainer's `compute_loss` and backward, with kernels that do nothing in place of Triton's and of products into fp32."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.kernels import chunked_logprob

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "a": 1})), pad_token="<pad>", eos_token="<pad>"
    )
    args = trl.SFTConfig(
        output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to=[], gradient_checkpointing=False, max_length=LENGTH
    )
    data = Dataset.from_list([{"input_ids": [1] * LENGTH}] * ROWS)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    prepared = trainer.accelerator.prepare_model(trainer.model)
    nothing = Launched()
    with (
        patch.object(chunked_logprob, "_use_triton", lambda device: True),
        patch("trl.trainer.utils._use_triton", lambda device: True),
        patch.object(chunked_logprob, "_forward_kernel", nothing),
        patch.object(chunked_logprob, "_backward_kernel", nothing),
        patch.object(chunked_logprob, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), create=True),
        patch.object(chunked_logprob, "_addmm_fp32", lambda acc, a, b: None),
        Storages() as seen,
    ):
        trainer.compute_loss(prepared, batch()).backward()
    return seen


def storages_of_ours(model: Any) -> Storages:
    """The step program's loss and backward on the same model, with real tensors."""
    setup = resolved(parse_setup({"trainer": "trl"}), quantized=False, supports_sdpa=True, use_cache=True)
    losses.install(model.get_base_model(), loss="trl-chunked", prompt=0, capability=(8, 0))
    watcher = MagicMock()
    watcher.began = []
    with (
        patch.object(chunked, "accumulate", lambda into, a, b: None),
        patch("torch.nn.utils.clip_grad_norm_"),
        Storages() as seen,
    ):
        take_steps(Run(model, batch(), MagicMock(spec=["step", "after_step", "zero_grad"]), watcher, setup, steps=1))
    return seen


def test_sft_trainer_makes_these_storages(tmp_path: Any) -> None:
    """Every storage of TRL's is one of ours, and as much is alive at most.

    Ours shows what indexing by a mask takes inside one kernel on CUDA: int64 indices, two per token, of hidden states, labels,
    and of the gradients of hidden states and of what was scattered (4 × 16 n); prefix sums of three masks (3 × 8 n). Theirs has a
    copy of the hidden states' gradient, which `index_backward` makes only under a dispatch mode (torch 2.13 FunctionsManual.cpp).
    """
    model = tiny_model()
    theirs, ours = storages_of_trl(deepcopy(model), tmp_path), storages_of_ours(model)
    copy_under_a_mode = TOKENS * 64 * 2
    assert Counter(theirs.sizes) - Counter(ours.sizes) == Counter([copy_under_a_mode])
    assert Counter(ours.sizes) - Counter(theirs.sizes) == Counter([16 * TOKENS] * 4 + [8 * TOKENS] * 3)
    assert TOKENS * 32768 * 2 in ours.sizes  # the tile: 78 tokens of 4096, 32,768 columns whatever the vocabulary
    assert abs(theirs.peak - ours.peak) <= copy_under_a_mode


def test_padded_targets_of_whisper_are_no_packed_sequences() -> None:
    """Without a mask transformers looks whether positions have gaps, which padding does not make: no mask is made."""
    traced = [
        estimate(shallow("whisper-tiny", 2), engine="trace", seq_len=448, batch_size=8, padding=padding).peaks
        for padding in (False, True)
    ]
    assert traced[0] is not None
    assert traced[1] is not None
    assert traced[0].by_phase == traced[1].by_phase


def test_a_mask_of_ones_is_in_every_batch_of_trl() -> None:
    trace = traced(llama(1), lora(["q_proj"]), trainer="trl", seq_len=64)
    assert any(m.storage.shape == (1, 64) and m.storage.dtype == "int64" for m in trace.log)
    kernels = {m.storage.shape for m in trace.log if m.storage.module.endswith("self_attn") and m.storage.dtype == "int64"}
    assert kernels == {(2,), ()}  # flash's random state: transformers drops a mask of ones, so that grouped queries stay grouped


@pytest.mark.parametrize("loss", ["full", "liger"])
def test_losses_that_trl_cannot_compute_are_refused(loss: str) -> None:
    with pytest.raises(RefusedError, match=f"cannot compute the {loss} loss; accepted: trl-chunked, unsloth"):
        traced(llama(1), lora(["q_proj"]), trainer="trl", loss=loss, seq_len=8)


def test_trl_leaves_only_magnitudes_in_fp32_on_a_quantized_base() -> None:
    """SFTTrainer casts what trains to bf16, `lora_magnitude_vector` excepted; copies of whole modules too."""
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in llama(1).items() if k != "architectures"}))
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, config)
    cast_by_trl(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"
    }
    assert dtypes["base_model.model.lm_head.modules_to_save.default.weight"] == torch.bfloat16


def test_fp16_training_holds_a_scale_and_a_counter() -> None:
    """Four scalars of 512 bytes: scale and counter last, the mark of infinity and the inverse come with each step."""
    trace = traced(llama(1), lora(["q_proj"]), trainer="transformers", dtype="fp16", autocast="fp16", seq_len=64)
    without = traced(llama(1), lora(["q_proj"]), trainer="transformers", dtype="fp16", autocast="bf16", seq_len=64)
    lasting = [m.storage for m in trace.log if m.kind == "alloc" and m.storage.op == "aten.full.default" and not m.storage.module]
    assert {(s.dtype, s.nbytes) for s in lasting} == {("fp32", 4), ("int32", 4)}
    more = trace.peak_by_phase["step"] - without.peak_by_phase["step"]
    assert 0 < more <= 4 * 512


def test_gradients_of_16_bits_cannot_be_unscaled() -> None:
    """torch: "Attempting to unscale FP16 gradients.". Of bf16 gradients its kernel is "not implemented for 'BFloat16'": so ended
    rehearsals with `fp16=True` of full fine-tuning by Trainer and of QLoRA by SFTTrainer, whose adapters are bf16."""
    for dtype in ("fp16", "bf16"):
        with pytest.raises(RefusedError, match=f"cannot unscale {dtype} gradients"):
            traced(llama(1), None, trainer="transformers", dtype=dtype, autocast="fp16", seq_len=64)
        with pytest.raises(RefusedError, match=f"cannot unscale {dtype} gradients"):
            estimate(llama(1), method="full", trainer="transformers", dtype=dtype, autocast="fp16", seq_len=64)
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    weight.grad = torch.zeros_like(weight)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.unscale_(torch.optim.SGD([weight]))
