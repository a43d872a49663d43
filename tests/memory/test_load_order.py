"""How tensors reach the device: both engines allocate and free the same bytes in the same order while a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.analytic.compiled import last_step
from peftplan.planning.question import Question
from peftplan.units import round512
from tests.memory import engines
from tests.memory.engines import shallow

LLAMA = {**engines.LLAMA, "num_hidden_layers": 3}
ATTENTION = {"target_modules": "attention"}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a trainer moves a layer's buffers with the layer": (LLAMA, {"method": "boft", **ATTENTION}),
    "in a decoder's stack and an encoder's": (shallow("bart-base", 2), {"method": "boft", **ATTENTION}),
    "the first layer holds what all layers share": (LLAMA, {"method": "vera", **ATTENTION}),
    "a plain loop makes adapters last, each with its buffers": (LLAMA, {"method": "vera", "trainer": "plain", **ATTENTION}),
    "a trainer that loads by name reads the weights by name": (LLAMA, {"method": "vera", "trainer": "trl", **ATTENTION}),
    "on one device without asking for room": (LLAMA, {"method": "lora", "device_map": "cuda"}),
    "a quantized base behind a question for room": (LLAMA, {"method": "qlora", "trainer": "trl"}),
    "a quantized base has its buffers behind its weights": (LLAMA, {"method": "qlora"}),
    "DoRA's norms need a quantized weight as it was": (LLAMA, {"method": "qdora"}),
    "DoRA's norms on a base of 8 bits": (LLAMA, {"method": "dora", "quant": "int8"}),
    "DoRA's norms multiply fp16 as fp32": (LLAMA, {"method": "qdora", "dtype": "fp16", "compute_dtype": "fp16"}),
    "DoRA's norms on a dense base that is there": (LLAMA, {"method": "dora", "trainer": "plain"}),
    "DoRA's norms where a device map put the base": (LLAMA, {"method": "dora", "trainer": "trl"}),
    "DoRA's norms of Falcon's own class of linear layers": (
        {**shallow("falcon-7b", 1), "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 128},
        {"method": "dora", "trainer": "plain"},
    ),
    "Phi-3 is Mistral's checkpoint where Unsloth loads it": (
        {**shallow("phi-3-mini-4k-instruct", 1), "vocab_size": 32064},
        {"method": "lora", "loss": "unsloth"},
    ),
    "a saved module is copied behind the adapters": (LLAMA, {"method": "qlora", "modules_to_save": ["embed_tokens"]}),
}


class Moves:
    """A device that notes what is allocated (+) and freed (-)."""

    def __init__(self) -> None:
        self.noted: list[int] = []

    def allocate(self, nbytes: int) -> int:
        self.keep((nbytes,))
        return nbytes

    def keep(self, sizes: tuple[int, ...], /) -> None:
        self.noted += [round512(nbytes) for nbytes in sizes]

    def release(self, nbytes: int, /) -> None:
        self.noted.append(-round512(nbytes))

    def empty_cache(self) -> None:
        self.noted.append(0)


@pytest.mark.parametrize("job", JOBS)
def test_tensors_reach_the_device_in_the_traces_order(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    monkeypatch.setattr("peftplan.trace.engine.STEPS", 1)
    config, options = JOBS[job]
    options = {"batch_size": 1, "seq_len": 64, **options}
    question = estimate(config, **options).origin
    assert isinstance(question, Question)
    compiled, _ = last_step(question.inventory, "8.0")
    moves = Moves()
    compiled.load(moves)
    assert moves.noted == _traced(config, options)


def test_a_saved_copy_of_an_fp32_original_was_never_16_bits() -> None:
    """Kbit preparation has made the embedding fp32; peft copies it so, and what is cast after it are LoRA's matrices alone."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = torch.nn.Sequential()
    model.add_module("embed", torch.nn.Embedding(10, 16))
    model.add_module("linear", torch.nn.Linear(16, 16, dtype=torch.bfloat16))
    config = peft.LoraConfig(target_modules=["linear"], modules_to_save=["embed"])
    names = dict(peft.get_peft_model(model, config, autocast_adapter_dtype=False).named_parameters())
    dtypes = {name: p.dtype for name, p in names.items() if p.requires_grad}
    assert [name for name, dtype in dtypes.items() if dtype == torch.bfloat16] == [
        f"base_model.model.linear.lora_{half}.default.weight" for half in "AB"
    ]
    saving = {"method": "qlora", "modules_to_save": ["embed_tokens"], "batch_size": 1, "seq_len": 64}
    job = estimate({**LLAMA, "vocab_size": 50_000}, **saving)
    assert job.peaks is not None
    copy = 4 * 50_000 * LLAMA["hidden_size"]
    assert job.peaks.by_phase["load"] - job.static.bytes(("weights", "quant_state", "adapter_weights", "buffers")) < copy // 2


def _traced(config: dict[str, Any], options: dict[str, Any]) -> list[int]:
    peaks = estimate(config, engine="trace", record=True, **options).peaks
    assert peaks is not None
    noted, alive = [], {}
    for event in peaks.recording.events:
        if event.phase != "load" or event.category == "activations":  # the batch
            break
        if event.kind == "alloc":
            alive[event.id] = round512(event.nbytes)
        noted.append({"alloc": alive.get(event.id, 0), "free": -alive.get(event.id, 0), "empty_cache": 0}[event.kind])
    return noted


def test_a_packed_layer_in_a_head_is_not_cast() -> None:
    """RoBERTa's `lm_head.dense` has the name of what axolotl casts, and is in 4 bits: estimating raised KeyError."""
    peaks = estimate(shallow("roberta-base", 2), method="qlora", trainer="axolotl", seq_len=128).peaks
    assert peaks is not None
    (dense,) = (line for line in peaks.ledgers["load"].lines if line.name == "lm_head.dense.weight")
    assert dense.bytes() == 768 * 768 // 2
