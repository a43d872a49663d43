"""The static ledger, end to end: every tensor of a real run after one step, against the lines of `peftplan.estimate`."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "datasets"):
    pytest.importorskip(package)

import peftplan  # noqa: E402
from peftplan.errors import RefusedError  # noqa: E402
from peftplan.units import round512  # noqa: E402
from tests.whole_model import Case, Tensors, adapter_config, alive, load, on_device, planned, prepare  # noqa: E402

VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 5}
ADALORA: dict[str, Any] = {"target_r": 4, "init_r": 6, "total_step": 10}
VERA: dict[str, Any] = {"r": 32, "target_modules": ["q_proj", "v_proj"]}
BOTH_ENDS: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
EMBEDDING: dict[str, Any] = {"modules_to_save": ["embed_tokens"]}
TOKENS: dict[str, Any] = {"trainable_token_indices": [1, 2, 3]}
TOKENS_TWICE: dict[str, Any] = {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}}
CLASSES: dict[str, Any] = {"task_type": "SEQ_CLS"}
SKIPPED: dict[str, Any] = {"quant_skip_modules": ("classifier",), **CLASSES}
PLAIN: dict[str, Any] = {"trainer": "plain", "optim": "adamw_torch"}
TRL: dict[str, Any] = {"trainer": "trl"}
TWO: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}

CASES = [
    # dtypes, adapters, trainers
    Case("llama", "lora"),
    Case("llama", "lora", dtype="fp16"),
    Case("llama", "lora", dtype="fp32", **PLAIN),
    Case("llama", "lora", adapter_dtype="bf16"),
    Case("llama", "lora", "nf4", double_quant=True),
    Case("llama", "lora", "nf4", **PLAIN),
    Case("llama", "lora", "nf4", double_quant=True, **TRL),
    Case("llama", "lora", "nf4", dtype="fp16", **TRL),
    Case("llama", "lora", "int8"),
    Case("llama", "lora", "int8", **TRL),
    Case("llama", "lora", "nf4", quant_skip_modules=("layers.1.mlp",)),
    Case("llama", "full"),
    # every model
    Case("llama-tied", "full", **TRL),
    Case("gpt2", "full"),
    Case("t5", "full"),
    Case("t5", "full", dtype="fp16"),
    Case("bert", "full", **CLASSES),
    Case("mixtral", "full"),
    Case("gemma", "full"),
    Case("opt", "full"),
    Case("deepseek_v3", "full"),
    Case("deepseek_v3", "full", dtype="fp16"),
    Case("bart", "full"),
    Case("whisper", "full"),
    Case("gpt2", "lora", "nf4"),
    Case("gpt2", "lora", "nf4", double_quant=True, **TRL),
    Case("t5", "lora", "nf4", dtype="fp16"),
    Case("t5", "lora", "nf4", dtype="fp16", kbit_prepare=False),
    Case("t5", "lora", "int8", kbit_prepare=False),
    Case("bert", "lora", **CLASSES),
    Case("bert", "lora", "nf4", **SKIPPED),
    Case("bert", "lora", "nf4", dtype="fp16", double_quant=True, **SKIPPED),
    Case("mixtral", "lora"),
    Case("mixtral", "lora", "nf4"),
    Case("mixtral", "lora", "nf4", **TRL),
    Case("mixtral", "lora", "nf4", options=TWO),
    Case("mixtral", "lora", "int8", kbit_prepare=False),
    Case("gemma", "lora", "nf4", double_quant=True),
    Case("gemma", "lora", "nf4", **TRL),
    Case("gemma", "dora", "int8"),
    Case("opt", "lora", "nf4"),
    Case("opt", "lora", "nf4", kbit_prepare=False),
    Case("opt", "lora", "int8", **TRL),
    Case("opt", "lora", "nf4", options={"bias": "lora_only"}),
    Case("opt", "lora", "nf4", options={"bias": "all"}, **TRL),
    Case("deepseek_v3", "lora", "nf4"),
    Case("deepseek_v3", "lora", "nf4", **TRL),
    Case("deepseek_v3", "lora", "int8", kbit_prepare=False),
    Case("bart", "lora", "nf4"),
    Case("bart", "lora", "nf4", dtype="fp16", kbit_prepare=False),
    Case("whisper", "lora", "nf4"),
    Case("whisper", "lora", options=TWO),
    # every method
    Case("llama", "dora"),
    Case("llama", "dora", adapter_dtype="bf16"),
    Case("llama", "dora", "nf4"),
    Case("llama", "dora", "nf4", **TRL),
    Case("llama", "ia3"),
    Case("llama", "ia3", "fp4"),
    Case("llama", "ia3", "nf4", **TRL),
    Case("llama", "prefix-tuning", options=VIRTUAL),
    Case("llama", "prefix-tuning", "nf4", options=VIRTUAL),
    Case("llama", "prefix-tuning", "nf4", options=VIRTUAL, **TRL),
    Case("llama", "prompt-tuning", options=VIRTUAL),
    Case("llama", "prompt-tuning", "int8", "adamw_8bit", options=VIRTUAL),
    Case("llama", "p-tuning", options=VIRTUAL),
    Case("bert", "prompt-tuning", options=VIRTUAL, **CLASSES),
    Case("llama", "vera", options=VERA),
    Case("llama", "vera", "nf4", options=VERA),
    Case("llama", "vera", "nf4", options=VERA, **TRL),
    Case("llama", "adalora", options=ADALORA, dtype="fp32", **PLAIN),
    Case("llama", "adalora", "int8", options=ADALORA),
    Case("llama", "ln-tuning", dtype="fp16"),
    Case("llama", "ln-tuning", "nf4"),
    Case("llama", "ln-tuning", "nf4", **TRL),
    Case("gpt2", "ln-tuning"),
    Case("llama", "boft"),
    Case("llama", "fourierft", "nf4", **TRL),
    Case("llama", "lokr"),
    Case("llama", "loha", "int8"),
    Case("gpt2", "bitfit"),
    Case("opt", "bitfit"),
    Case("bert", "bitfit", **CLASSES),
    Case("bart", "bitfit"),
    # saved modules and tokens
    Case("llama", "lora", options=BOTH_ENDS),
    Case("llama", "lora", "nf4", "adamw_8bit", options=BOTH_ENDS),
    Case("llama", "lora", "nf4", options=BOTH_ENDS, **TRL),
    Case("llama", "lora", "nf4", dtype="fp16", options=BOTH_ENDS, **TRL),
    Case("llama-tied", "lora", options=BOTH_ENDS),
    Case("llama-tied", "lora", options=EMBEDDING),
    Case("llama-tied", "lora", "nf4", "adamw_8bit", options=EMBEDDING, **TRL),
    Case("llama-tied", "lora", options={"modules_to_save": ["lm_head"]}),
    Case("llama", "lora", options={"modules_to_save": ["norm"]}),
    Case("llama", "lora", options=TOKENS),
    Case("llama", "lora", adapter_dtype="bf16", options=TOKENS),
    Case("llama-tied", "lora", "nf4", options=TOKENS),
    Case("llama", "lora", "nf4", options=TOKENS_TWICE),
    # optimizers
    *(
        Case("llama-wide", method, quant, optim, options=options)
        for method, quant, options in (("full", "none", {}), ("lora", "nf4", {"r": 16}))
        for optim in ("adamw_torch", "adafactor", "sgd", "lion_8bit", "adamw_8bit", "lion_32bit", "rmsprop", "adagrad")
    ),
    *(Case("llama-wide", "full", optim=optim, trainer="plain") for optim in ("adamw_torch", "sgd", "adamw_8bit", "lion_8bit")),
    Case("llama-tied", "lora", "nf4", "adamw_8bit", "plain", options={"r": 64, **EMBEDDING}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where each tiny model is saved once. What the suite had before is set aside: each case collects what the last one left."""
    gc.collect()
    gc.freeze()
    yield tmp_path_factory.mktemp("models")
    gc.unfreeze()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_on_the_ledger(case: Case, folder: Path) -> None:
    ledger = planned(case)
    ours, theirs = on_device(ledger), alive(case, folder)
    assert difference(ours, theirs) == {}
    assert {category: total for category, total in ledger.by_category().items() if total} == rounded(theirs)


def difference(ours: Tensors, theirs: Tensors) -> dict[tuple[str, str, int], int]:
    """Tensors that ours has (positive) or lacks (negative)."""
    return {key: ours[key] - theirs[key] for key in sorted(ours | theirs) if ours[key] != theirs[key]}


def rounded(tensors: Tensors) -> dict[str, int]:
    """Bytes of each category as the allocator rounds them."""
    totals: Counter[str] = Counter()
    for (category, _, nbytes), copies in tensors.items():
        totals[category] += copies * round512(nbytes)
    return dict(totals)


def test_adalora_counters_train_on_a_16_bit_base(folder: Path) -> None:
    """peft 0.21 wraps the frozen `ranknum` anew when it casts it to fp32, and so it trains: left out of our count, as its older
    releases (and its published counts) have it. One per q_proj and v_proj of 3 layers: 6 gradients, 2 × 6 moments, 6 steps."""
    case = Case("llama", "adalora", options=ADALORA)
    assert difference(on_device(planned(case)), alive(case, folder)) == {
        ("gradients", "fp32", 4): -6, ("optimizer_states", "fp32", 4): -18,
    }  # fmt: skip


def test_biases_of_int8_layers_follow_their_input(folder: Path) -> None:
    """They are cast to the dtype of the input: that of a norm is fp32, as prepared; of c_proj (2 in each of 2 layers) bf16."""
    case = Case("gpt2", "lora", "int8")
    assert difference(on_device(planned(case)), alive(case, folder)) == {
        ("weights", "bf16", 2 * 64): -4, ("weights", "fp32", 4 * 64): 4,
    }  # fmt: skip


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_copy_of_a_quantized_head_cannot_train(quant: str, folder: Path) -> None:
    case = Case("bert", "lora", quant, **CLASSES)
    with pytest.raises(RefusedError, match="classifier is stored as"):
        planned(case)
    model = load(case, folder)
    with pytest.raises(RuntimeError, match="floating point dtype can require gradients"):
        prepare(case, model, folder)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_lycoris_on_a_4_bit_base_is_refused(method: str, folder: Path) -> None:
    case = Case("llama", method, "nf4")
    with pytest.raises(RefusedError, match="4-bit"):
        planned(case)
    with pytest.raises(RuntimeError, match="shape"):
        alive(case, folder)


def test_no_map_of_double_quantization_where_nothing_is_quantized() -> None:
    """Falcon's linear layers are a subclass, which bitsandbytes leaves."""
    assert peftplan.estimate("falcon-7b", method="qlora").static.by_category()["quant_state"] == 0


def test_the_witness_has_an_adapter() -> None:
    assert adapter_config(Case("llama", "full"), None) is None
    assert adapter_config(Case("llama", "dora"), None).use_dora
