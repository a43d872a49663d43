"""The order of a run: tensors of 2 MiB and more are allocated and freed at the same places in the events of both engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

import peftplan
from peftplan.allocator.program import _Run
from peftplan.analytic.instant import InstantPeaks
from peftplan.job.script import Script
from peftplan.units import MIB, round512
from tests.memory.engines import shallow
from tools.analytic_grid import MADE_UP

FROZEN = Script(freezes_ranknum=True)
"""As peft was before 0.20: else the gradient of `ranknum` is summed behind a cast."""

PLAIN: dict[str, Any] = {"trainer": "plain"}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
KEPT: dict[str, Any] = {"gradient_checkpointing": False}
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}
ONE_TOKEN: dict[str, Any] = {"method": "full", **PLAIN, **CHECKPOINTED, "logits_to_keep": 1, "batch_size": 7, "seq_len": 512}
PICTURES: dict[str, Any] = {"task_type": "IMAGE_CLS", "num_labels": 10, "target_modules": "attention"}
REENTRANT: dict[str, Any] = {"gradient_checkpointing": True, "use_reentrant": True}
T5: dict[str, Any] = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 1024, "d_ff": 1024, "d_kv": 128,
    "num_heads": 8, "num_layers": 3, "num_decoder_layers": 3, "vocab_size": 3000, "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "d_model": 1280, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024, "vocab_size": 3000, "max_position_embeddings": 1024,
}  # fmt: skip
MLA: dict[str, Any] = {
    **shallow("deepseek-v3", 3), "first_k_dense_replace": 1, "hidden_size": 1024, "intermediate_size": 2048,
    "moe_intermediate_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 16,
    "vocab_size": 4000,
}  # fmt: skip
UNTIED: dict[str, Any] = {**T5, "tie_word_embeddings": False}
ROWS: dict[str, Any] = {"batch_size": 1, "seq_len": 520}
"""No multiple of 16: the gradient of a mask is a slice of longer rows."""
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AdaLoRA's layers on a quantized base hold the product that they scale until it is divided": (
        {**MLA, "num_hidden_layers": 2},
        {
            "method": "adalora",
            "quant": "nf4",
            "autocast": "none",
            **EAGER,
            "target_modules": "attention",
            "batch_size": 4,
        },
    ),
    "AdaLoRA's layers on int8 hold it too": (
        {**shallow("qwen2.5-0.5b", 3), "vocab_size": 4000},
        {"method": "adalora", "quant": "int8", **PLAIN, **KEPT, "batch_size": 4, "seq_len": 512},
    ),
    "AdaLoRA's layers on a base of 16 bits let go of the product once it is scaled": (
        {**shallow("qwen2.5-0.5b", 3), "vocab_size": 4000},
        {"method": "adalora", **PLAIN, **KEPT, "batch_size": 4, "seq_len": 512},
    ),
    "GraniteMoe multiplies its embeddings behind its masks": (
        {**MADE_UP["granitemoe"], "num_hidden_layers": 2, "hidden_size": 2048, "num_attention_heads": 16, "vocab_size": 4000},
        {"method": "lora", **EAGER, **CHECKPOINTED, "target_modules": "attention", "batch_size": 2, "seq_len": 1024},
    ),
    "the gradient of a mask with the batch's dims is a view: the first sum of it is a new tensor": (
        {**T5, "vocab_size": 3000},
        {"method": "lora", "dtype": "fp16", "autocast": "fp16", **CHECKPOINTED, "batch_size": 1, "seq_len": 512},
    ),
    "what a bottleneck adapter reads lives until its activation is done": (
        {**shallow("mistral-7b-v0.1", 2), "vocab_size": 4000},
        {"method": "houlsby", **PLAIN, **CHECKPOINTED, "batch_size": 8, "seq_len": 1024},
    ),
    "Cohere 2 makes both masks, whatever layers it has": (
        {**shallow("c4ai-command-r7b-12-2024", 3), "vocab_size": 4000, "sliding_window": 300},
        {"method": "lora", **PLAIN, **CHECKPOINTED, "padding": True, "batch_size": 2, "seq_len": 1500},
    ),
    "a table with trained rows lives until its rows are scaled": (
        {**BART, "vocab_size": 9000},
        {"method": "lora", **PLAIN, **KEPT, "trainable_token_indices": [1, 2], "batch_size": 2},
    ),
    "LoRA on an embedding scales what it adds as the embedding scales its rows": (
        {**shallow("gemma-3-270m", 2), "vocab_size": 9000},
        {"method": "lora", "target_modules": ["embed_tokens", "q_proj"], **CHECKPOINTED, "batch_size": 4},
    ),
    "GPT-J's scores live until the softmax of them is cast": (
        shallow("gpt-j-6b", 3),
        {"method": "ia3", "trainer": "trl", "dtype": "fp16", "autocast": "none", **EAGER, "padding": True, "batch_size": 3},
    ),
    "the math kernel's causal mask is made of booleans; a norm of heads gets no gradient that is summed": (
        shallow("qwen3-0.6b", 3),
        {"method": "pfeiffer", "dtype": "fp16", "autocast": "fp16", **KEPT, "gpu": "t4", "batch_size": 1, "seq_len": 1377},
    ),
    "the math kernel takes heads that a rotation copied as they are; int8's gradient is a view": (
        shallow("stablelm-2-1_6b", 3),
        {"method": "qlora", "quant": "int8", "gpu": "t4", "kbit_prepare": False, "batch_size": 2, "seq_len": 500},
    ),
    "the math kernel holds queries beside the copies that it multiplies": (
        {**shallow("qwen3-0.6b", 2), "num_attention_heads": 17, "num_key_value_heads": 1},
        {"method": "lora", **PLAIN, "gpu": "t4", **KEPT, "batch_size": 4},
    ),
    "autocast's cast of one head for all lies head by head; Gemma 3 makes both masks, whatever layers it has": (
        shallow("gemma-3-270m", 3),
        {"method": "full", "trainer": "trl", "dtype": "fp32", "autocast": "bf16", **EAGER, "batch_size": 4, "seq_len": 384},
    ),
    "the gradients of keys and values are copied behind the slices of a prefix": (
        shallow("phi-1-5", 3),
        {
            "method": "prefix-tuning",
            "num_virtual_tokens": 30,
            "dtype": "fp32",
            "autocast": "bf16",
            **EAGER,
            **KEPT,
            "batch_size": 4,
        },
    ),
    "a call of GPT-NeoX's MLP holds the norm's output while the adapter in its hook runs": (
        shallow("pythia-70m", 3),
        {"method": "houlsby", "quant": "nf4", **EAGER, **KEPT, "batch_size": 4, "seq_len": 512},
    ),
    "autocast keeps its cast of a leaf that a 4-bit product takes; FourierFT's spectrum lives as long as its call": (
        {**shallow("olmo-2-0425-1b", 2), "vocab_size": 4000},
        {
            "method": "fourierft",
            "target_modules": ["up_proj"],
            "trainer": "trl",
            "dtype": "fp32",
            "autocast": "fp16",
            "adapter_dtype": "fp32",
            "quant": "nf4",
            **CHECKPOINTED,
            "batch_size": 2,
            "seq_len": 600,
        },
    ),
    "OLMo views heads once all three projections are there": (
        shallow("olmo-1b", 3),
        {"method": "full", **PLAIN, **EAGER, **KEPT, "batch_size": 2},
    ),
    "OLMo-2 norms queries and keys at once, and views heads once values are projected": (
        {**shallow("olmo-2-0425-1b", 2), "vocab_size": 4000, "num_key_value_heads": 4},
        {"method": "full", **PLAIN, **CHECKPOINTED, "batch_size": 2, "seq_len": 1100},
    ),
    "the gradients of ModernBERT's queries, keys and values are stacked; an adapter's hook holds what its module took": (
        shallow("modernbert-base", 6),
        {"method": "houlsby", **PLAIN, "dtype": "fp32", **EAGER, "batch_size": 4, "task_type": "TOKEN_CLS", "num_labels": 9},
    ),
    "the gradients of GPT-NeoX's three are slices of one": (
        shallow("pythia-70m", 3),
        {"method": "lora", **PLAIN, "dtype": "fp32", **EAGER, **CHECKPOINTED, "batch_size": 4},
    ),
    "LoKr's cast of its input lives until the product is there": (
        shallow("modernbert-base", 6),
        {
            "method": "lokr",
            "target_modules": "attention",
            **PLAIN,
            "dtype": "fp32",
            "autocast": "bf16",
            **EAGER,
            **KEPT,
            "batch_size": 3,
            "seq_len": 250,
            "task_type": "TOKEN_CLS",
            "num_labels": 9,
        },
    ),
    "one token of each sequence is a view of rows; the shared expert's gate gets rows": (
        {**shallow("qwen1.5-moe-a2.7b", 2), "num_experts": 8, "vocab_size": 20000},
        ONE_TOKEN,
    ),
    "autocast keeps its cast of the zeros of cross-attention; slices are not added to in place": (
        T5,
        {**ROWS, "quant": "nf4", "method": "lora"},
    ),
    "positions that come back from the host lie in order": (
        T5,
        {
            **ROWS,
            **REENTRANT,
            "offload_checkpoints": True,
            "padding": True,
            "dtype": "fp32",
            "autocast": "fp16",
            "method": "lora",
        },
    ),
    "a gradient lies as its leaf; trained rows reach an untied head; copies tell two gradients apart": (
        {**UNTIED, "num_layers": 6, "num_decoder_layers": 6},
        {**REENTRANT, "quant": "int8", "method": "lora", "trainable_token_indices": [1, 2], "batch_size": 2},
    ),
    "rows of a mask are padded, sliced and expanded in steps; some layers are checkpointed": (
        T5,
        {
            "method": "full",
            **PLAIN,
            "dtype": "fp32",
            "padding": True,
            **CHECKPOINTED,
            "every_n_layers": 2,
            "batch_size": 1,
            "seq_len": 523,
        },
    ),
    "BART makes its mask before its positions; one sequence's gradient of keys needs no copy; a base is emptied once whole": (
        BART,
        {"method": "qlora", **PLAIN, "dtype": "fp32", "autocast": "fp16", **EAGER, **KEPT, "batch_size": 1, "seq_len": 1000},
    ),
    "a gradient of keys is copied where rows of several sequences become one matrix": (
        BART,
        {"method": "lora", **PLAIN, "dtype": "fp32", "autocast": "fp16", **EAGER, **KEPT, "batch_size": 2, "seq_len": 1000},
    ),
    "int8 makes rows of a gradient of keys, whatever the batch": (
        BART,
        {"method": "lora", "quant": "int8", **PLAIN, **EAGER, **CHECKPOINTED, "batch_size": 1, "seq_len": 1000},
    ),
    "BART's gradients behind a prefix are copied after the slices": (
        BART,
        {"method": "prefix-tuning", "num_virtual_tokens": 30, **PLAIN, **EAGER, **KEPT, "batch_size": 2, "seq_len": 900},
    ),
    "T5's gradients behind a prefix are copied after the slices": (
        T5,
        {"method": "prefix-tuning", "num_virtual_tokens": 30, **PLAIN, **KEPT, "batch_size": 4},
    ),
    "OPT views keys and values once both are there": (
        shallow("opt-125m", 2),
        {"method": "full", **PLAIN, **KEPT, "batch_size": 4, "seq_len": 512},
    ),
    "DoRA's products keep the order of a gradient's elements": (
        shallow("opt-125m", 2),
        {"method": "dora", **PLAIN, **EAGER, **KEPT, "batch_size": 4, "seq_len": 512},
    ),
    "Whisper copies its heads itself": (
        {
            **shallow("whisper-tiny", 2),
            "d_model": 768,
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 12),
            "vocab_size": 51865,
        },
        {"method": "lora", **PLAIN, **EAGER, **KEPT, "batch_size": 1, "seq_len": 448},
    ),
    "DoRA's two gradients of a projection are not summed in place: the first is a view of heads": (
        {**shallow("gpt-j-6b", 2), "n_embd": 1024, "n_head": 8, "vocab_size": 4000},
        {"method": "qdora", "target_modules": "all-linear", "use_cache": False, "batch_size": 1, "seq_len": 1100},
    ),
    "DeBERTa's gradients of keys and positions need no copies, and those of one sample's positions no sum": (
        {**shallow("deberta-v3-base", 2), "hidden_size": 1536, "num_attention_heads": 24, "vocab_size": 4000},
        {"method": "lokr", "dtype": "fp32", **REENTRANT, "task_type": "TOKEN_CLS", "num_labels": 9, "batch_size": 1},
    ),
    "DeBERTa's table of positions is sliced whole, which is an alias: its gradient is no copy": (
        {**shallow("deberta-v3-base", 2), "hidden_size": 1536, "num_attention_heads": 24, "vocab_size": 4000},
        {"method": "full", **KEPT, "task_type": "SEQ_CLS", "num_labels": 3, "batch_size": 1, "seq_len": 256},
    ),
    "DeBERTa's buckets of far positions are made of the logarithms of their distances": (
        {**shallow("deberta-v3-base", 2), "vocab_size": 4000},
        {"method": "full", **CHECKPOINTED, "task_type": "TOKEN_CLS", "num_labels": 9, "batch_size": 1, "seq_len": 600},
    ),
    "the result of a 4-bit base is cloned behind its product with IA3's vector": (
        {**shallow("qwen3-0.6b", 2), "vocab_size": 4000},
        {"method": "ia3", "target_modules": "all-linear", "quant": "nf4", **PLAIN, **KEPT, "batch_size": 2, "seq_len": 600},
    ),
    "each of four micro batches is run where gradients take segments of their own": (
        {**shallow("qwen3-0.6b", 2), "vocab_size": 8000},
        {"method": "full", **PLAIN, **CHECKPOINTED, "gradient_accumulation_steps": 4, "batch_size": 2, "seq_len": 300},
    ),
    "a leaf before virtual tokens copies its slice of a gradient, before all that waits": (
        {**shallow("qwen3-0.6b", 2), "vocab_size": 4000},
        {
            "method": "prompt-tuning",
            "num_virtual_tokens": 20,
            "dtype": "bf16",
            "autocast": "none",
            **CHECKPOINTED,
            "batch_size": 3,
        },
    ),
    "Whisper's clamp of fp16 gives a gradient that lies as the convolutions left their result": (
        shallow("whisper-tiny", 2),
        {"method": "full", "dtype": "fp16", "autocast": "none", **EAGER, **KEPT, "batch_size": 3, "seq_len": 300},
    ),
    "two places take turns for the chunks of Unsloth's loss; peft adds AdaLoRA's loss to it": (
        {**shallow("qwen3-0.6b", 2), "vocab_size": 256000},
        {
            "method": "adalora",
            "script": Script(freezes_ranknum=True),
            "loss": "unsloth",
            **CHECKPOINTED,
            "batch_size": 1,
            "seq_len": 2048,
        },
    ),
    "a router's update is made before its input is copied to fp32, and added behind": (
        MLA,
        {"method": "lora", "target_modules": ["gate"], "r": 1024, **PLAIN, **CHECKPOINTED, "batch_size": 1, "seq_len": 1100},
    ),
    "gpt-oss's single head of keys is copied by `matmul`; both bounds of a clamp live until its gradient is there": (
        {
            **shallow("gpt-oss-20b", 2),
            "hidden_size": 640,
            "intermediate_size": 640,
            "num_attention_heads": 10,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "vocab_size": 4000,
            "pad_token_id": None,
        },
        {"method": "boft", "trainer": "trl", "target_modules": ["q_proj", "v_proj"], "batch_size": 4, "seq_len": 512},
    ),
    "flash-attn's backward copies no output, however it lies": (
        shallow("phi-3-mini-4k-instruct", 3),
        {
            "method": "lora",
            "dtype": "bf16",
            "autocast": "none",
            "attn_implementation": "flash_attention_2",
            **KEPT,
            "batch_size": 3,
        },
    ),
    "flash-attn's backward holds its output until it returns": (
        {
            "model_type": "gpt_bigcode",
            "architectures": ["GPTBigCodeForCausalLM"],
            "multi_query": True,
            "n_embd": 1024,
            "n_head": 8,
            "n_inner": 4096,
            "n_layer": 2,
            "n_positions": 2048,
            "vocab_size": 4000,
        },
        {
            "method": "dora",
            "target_modules": "all-linear",
            "dtype": "fp16",
            "autocast": "fp16",
            **CHECKPOINTED,
            "attn_implementation": "flash_attention_2",
            "batch_size": 4,
            "seq_len": 512,
        },
    ),
    "values padded for flash-attn are gone when the layer copies what it returned": (
        MLA,
        {"method": "lora", "attn_implementation": "flash_attention_2", **CHECKPOINTED, "batch_size": 4, "seq_len": 512},
    ),
    "a gradient of the experts' input waits behind a view for the factors of their adapters": (
        MLA,
        {"method": "lora", "target_modules": "all-linear", "r": 32, **KEPT, "batch_size": 2, "seq_len": 640},
    ),
    "TRL's cast of what trains does not reach VeRA's shared matrices, which autocast casts in each layer": (
        {**shallow("qwen3-0.6b", 2), "vocab_size": 4000},
        {
            "method": "vera",
            "trainer": "trl",
            "quant": "nf4",
            "kbit_prepare": False,
            "target_modules": "mlp",
            "r": 512,
            **KEPT,
            "batch_size": 2,
        },
    ),
    "the second layer of BLOOM frees the weights that the first, which has no gradient, handed out": (
        {**shallow("bloom-560m", 4), "vocab_size": 4000},
        {"method": "lora", "target_modules": ["dense_4h_to_h"], **PLAIN, **KEPT, "batch_size": 2, "seq_len": 500},
    ),
    "BOFT's blocks lie on a diagonal of their own dtype": (
        {**shallow("qwen3-0.6b", 2), "vocab_size": 4000},
        {
            "method": "boft",
            "trainer": "trl",
            "quant": "nf4",
            "kbit_prepare": False,
            "autocast": "none",
            **KEPT,
            "batch_size": 1,
            "seq_len": 500,
        },
    ),
    "rotation copies StableLM's queries and keys, and nothing its values": (
        {**shallow("stablelm-2-1_6b", 2), "vocab_size": 4000},
        {"method": "lora", "use_cache": False, **EAGER, **KEPT, "batch_size": 2, "seq_len": 512},
    ),
    "Phi-3's values are slices of one projection, and copied all the same": (
        {**shallow("phi-3-mini-4k", 2), "vocab_size": 33000},
        {"method": "lora", "use_cache": False, **EAGER, **KEPT, "batch_size": 2, "seq_len": 512},
    ),
    "a copied layer of SmolLM3 stands before the first layer without rotation, where it runs": (
        {**shallow("smollm3-3b", 6), "hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 4000, "pad_token_id": None},
        {"method": "lora", **PLAIN, **CHECKPOINTED, "every_n_layers": 2, "batch_size": 4},
    ),
    "a router's adapted weight is made behind the copy of its input": (
        MLA,
        {"method": "lora", "target_modules": ["gate", "q_a_proj"], **EAGER, **KEPT, "batch_size": 7, "seq_len": 512},
    ),
    "a loop frees a batch of pictures, then fetches the next": (
        shallow("vit-base-patch16-224", 2),
        {"method": "lora", **PLAIN, **PICTURES, "batch_size": 8, "gradient_accumulation_steps": 2},
    ),
    "Trainer fetches the pictures of all micro batches, and then those of the step before go": (
        shallow("vit-base-patch16-224", 2),
        {"method": "lora", **KEPT, **PICTURES, "batch_size": 8, "gradient_accumulation_steps": 3},
    ),
    "so it does with sound": (
        shallow("whisper-tiny", 2),
        {"method": "lora", **KEPT, "batch_size": 2, "seq_len": 64, "gradient_accumulation_steps": 2},
    ),
    "states of fp16 are clamped": (UNTIED, {"method": "lora", **PLAIN, "dtype": "fp16", **CHECKPOINTED, "batch_size": 4}),
}
Change = tuple[str, int, int]
"""What happens, the bytes of the block, and which block it is."""


class _Log:
    """Stands for the allocator: writes down what is asked of it."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def allocate(self, nbytes: int, stream: int = 0) -> tuple[int, int]:
        block = nbytes, len(self.changes)
        self.changes.append(("alloc", *block))
        return block

    def release(self, block: tuple[int, int]) -> None:
        self.changes.append(("free", *block))

    def begin_phase(self, phase: str) -> None:
        """Phases are not compared."""

    def empty_cache(self) -> None:
        self.changes.append(("empty_cache", 0, 0))


def analytic_changes(config: dict[str, Any], options: dict[str, Any]) -> list[Change]:
    peaks = peftplan.estimate(config, **options).peaks
    assert isinstance(peaks, InstantPeaks)
    run = _Run(*peaks.run().program(), log := _Log())  # type: ignore[arg-type]
    run.events(0, len(run.program))
    return log.changes


def traced_changes(config: dict[str, Any], options: dict[str, Any]) -> list[Change]:
    peaks = peftplan.estimate(config, engine="trace", record=True, **options).peaks
    assert peaks is not None
    nbytes: dict[int, int] = {}
    changes = []
    for event in peaks.recording.events:  # type: ignore[union-attr]
        if event.kind == "alloc":
            nbytes[event.id] = event.nbytes
        changes.append((event.kind, 0 if event.kind == "empty_cache" else nbytes.get(event.id, 0), event.id))
    return changes


def large(changes: Iterable[Change]) -> list[tuple[str, int]]:
    """Those of large tensors; what is freed between two allocations in order of size, since the allocator does not care."""
    kept: list[tuple[str, int]] = []
    freed: list[tuple[str, int]] = []
    for what, nbytes, _ in changes:
        if what == "free":
            freed += [(what, round512(nbytes))] * (nbytes >= 2 * MIB)
        elif nbytes >= 2 * MIB or what == "empty_cache":
            kept += [*sorted(freed), (what, round512(nbytes))]
            freed.clear()
    return kept + sorted(freed)


def freed_blocks(changes: Iterable[Change]) -> list[list[int]]:
    """Before each large allocation, which of the earlier ones are freed."""
    numbers: dict[int, int] = {}
    freed: list[list[int]] = [[]]
    for what, nbytes, block in changes:
        if what == "free" and block in numbers:
            freed[-1] = sorted([*freed[-1], numbers.pop(block)])
        elif what == "alloc" and nbytes >= 2 * MIB:
            numbers[block] = len(freed)
            freed.append([])
    return freed


@pytest.mark.one_in(2)
@pytest.mark.parametrize("job", JOBS)
def test_large_tensors_come_and_go_in_the_traces_order(job: str) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    config, options = JOBS[job]
    options = {"seq_len": 384, **options}
    assert large(analytic_changes(config, options)) == large(traced_changes(config, options))


SAME_BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "BOFT's permutation comes from the host once its blocks lie on a diagonal": (
        {**shallow("qwen3-0.6b", 2), "vocab_size": 4000},
        {"method": "boft", "trainer": "trl", "quant": "nf4", "kbit_prepare": False, **KEPT, "batch_size": 1},
    ),
    "a layer that is not checkpointed lets go of its input, the checkpoint before it keeps its own": (
        {**JOBS["flash-attn's backward holds its output until it returns"][0], "n_layer": 5},
        {"method": "dora", "dtype": "fp16", "autocast": "fp16", **CHECKPOINTED, "every_n_layers": 2, "batch_size": 4},
    ),
    "a checkpoint on the host lets go of its input, the layer behind it keeps its own": (
        {**shallow("phi-1-5", 9), "vocab_size": 4000},
        {"method": "lora", **PLAIN, **CHECKPOINTED, "every_n_layers": 3, "offload_checkpoints": True, "batch_size": 2},
    ),
    "BERT's MLP lets go of its activation, then the layer of its attention; LoKr of its product, then the base's": (
        {**shallow("roberta-base", 2), "hidden_size": 1152, "num_attention_heads": 18, "intermediate_size": 1152},
        {"method": "lokr", **PLAIN, **EAGER, **KEPT, "task_type": "SEQ_CLS", "num_labels": 3, "batch_size": 3},
    ),
}


@pytest.mark.parametrize("job", SAME_BLOCKS)
def test_of_equal_tensors_the_same_ones_go(job: str) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    config, options = SAME_BLOCKS[job]
    options = {"seq_len": 384, **options}
    assert freed_blocks(analytic_changes(config, options)) == freed_blocks(traced_changes(config, options))
