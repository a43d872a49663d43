"""Reserved bytes of both engines: where the analytic events come in the trace's order, the allocator makes the same of them."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from tests.memory.engines import shallow

EAGER: dict[str, Any] = {"attn_implementation": "eager", "gradient_checkpointing": True}
PLAIN: dict[str, Any] = {"trainer": "plain"}
ATTENTION = {"target_modules": "attention"}
TOKENS: dict[str, Any] = {"task_type": "TOKEN_CLS", "num_labels": 9}
FULL: dict[str, Any] = {"method": "full", "batch_size": 4, "seq_len": 512, "gradient_checkpointing": False}
LATENT = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "q_lora_rank": 512,
}  # fmt: skip
GEMMA = {
    "hidden_size": 1920, "intermediate_size": 6976, "vocab_size": 12048, "num_attention_heads": 15, "num_key_value_heads": 5,
}  # fmt: skip
FOUR_BIT = {"method": "qlora", "quant": "fp4", "compute_dtype": "fp16", "target_modules": "peft-default"}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "workspaces are taken by the first products": (shallow("gpt2"), {"method": "lora", "batch_size": 4, **PLAIN}),
    "a quantized load goes by name, though no layer is quantized": (shallow("falcon-7b", 3), {"method": "lora", "quant": "int8"}),
    "logits before a soft cap go with their name, hidden states through copies of two kinds": (
        shallow("gemma-2-2b", 6),
        {**FULL, **PLAIN},
    ),
    "autocast casts what matmul then copies": (
        shallow("smollm2-135m", 30),
        {"method": "lora", "quant": "int8", "batch_size": 2, "attn_implementation": "eager"},
    ),
    "a clone's gradient is no view, a tile's product comes behind its casts": (
        shallow("phi-2", 3),
        {"method": "qlora", "trainer": "trl", "batch_size": 4, "seq_len": 700},
    ),
    "what is rotated lives until attention returns": (
        shallow("gpt-j-6b", 3),
        {**FULL, "batch_size": 8, "gradient_checkpointing": True},
    ),
    "buckets of distances, the order of states, what a checkpointed layer holds": (
        shallow("t5-small"),
        {**FULL, "batch_size": 8, "gradient_checkpointing": True},
    ),
    "a layer's input is what the layer before it made, in backward too": (
        shallow("bart-base", 6),
        {"method": "full", "batch_size": 4},
    ),
    "an embedding that is scaled is two tensors": (
        shallow("gemma-2-2b", 26),
        {"method": "qlora", "batch_size": 2, "seq_len": 384},
    ),
    "Gemma 3 norms queries behind all three projections, and adds one to a norm's weight behind the norm": (
        shallow("gemma-3-270m", 6),
        {**FULL, **PLAIN},
    ),
    "Phi norms queries behind all three projections": (
        {**shallow("phi-2", 3), "qk_layernorm": True},
        {"method": "lora", "batch_size": 2, "seq_len": 700, "attn_implementation": "eager"},
    ),
    "FlashAttention-2 pads values to the head of queries and crops its output": (
        {**shallow("deepseek-v3", 4), **LATENT},
        {"attn_implementation": "flash_attention_2", "logits_to_keep": 1, "batch_size": 2, "seq_len": 512, **PLAIN},
    ),
    "kept gradients stay where the first step makes them": (
        {**shallow("c4ai-command-r-v01", 3), "hidden_size": 640, "num_attention_heads": 5, "num_key_value_heads": 5},
        {**FULL, **PLAIN, "keep_gradients": True, "keep_outputs": False},
    ),
    "prefixes of layers that stand as copies go with them": (
        shallow("t5-small", 6),
        {"method": "prefix-tuning", "num_virtual_tokens": 64, "batch_size": 5, "seq_len": 300, "padding": True, **PLAIN},
    ),
    "StarCoder makes its mask before it looks up positions": (
        {**shallow("starcoder", 4), "n_embd": 1280, "n_head": 10, "n_inner": 2208},
        {"method": "lora", "batch_size": 8, "seq_len": 1000, "dtype": "fp32", "autocast": "none", "padding": True, **EAGER},
    ),
    "Phi-3 joins queries before it rotates keys, and a single head is copied for all": (
        {**shallow("phi-3-mini-4k-instruct", 3), "num_attention_heads": 32, "num_key_value_heads": 1},
        {"method": "full", "batch_size": 4, "seq_len": 500, **EAGER},
    ),
    "4-bit layers under autocast cast bias, weight and input; copies take their first input from the layer before": (
        shallow("xlm-roberta-base", 5),
        {"method": "qlora", "compute_dtype": "fp32", "double_quant": False, "batch_size": 6, "seq_len": 381, "every_n_layers": 3},
    ),
    "addmm's gradients and what a call holds": (shallow("pythia-160m"), FULL),
    "a trainer moves what is added to a module behind the module": (
        {
            **shallow("gemma-2b", 6),
            "hidden_size": 1920,
            "intermediate_size": 6976,
            "vocab_size": 12048,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
        },
        {"method": "lora", "r": 64, "batch_size": 6, "seq_len": 617, "optim": "rmsprop", "modules_to_save": ["lm_head"]},
    ),
    "T5's saved embeddings come before their stacks, and its table of distances with its layer": (
        {**shallow("flan-t5-base", 3), "tie_word_embeddings": True},
        {"method": "lora", "r": 4, "dtype": "bf16", "autocast": "none", "modules_to_save": ["embed_tokens"], "seq_len": 374},
    ),
    "MPT copies gradients of queries and values, and a 4-bit product drops its gradient before its result is cast": (
        {**shallow("mpt-7b", 3), "d_model": 2304, "n_heads": 18, "vocab_size": 13379},
        {
            "method": "qlora",
            "quant": "fp4",
            "compute_dtype": "fp16",
            "r": 16,
            "batch_size": 2,
            "seq_len": 1024,
            "target_modules": "peft-default",
            "gradient_accumulation_steps": 4,
        },
    ),
    "BLOOM's MLP holds what its GELU returns, whose backward goes an operation at a time": (
        shallow("bloom-560m", 4),
        {"method": "lora", "batch_size": 2, "seq_len": 512, "logits_to_keep": 1},
    ),
    "Falcon's eager scores are products of casts, which matmul then copies": (
        {**shallow("falcon-40b", 2), "hidden_size": 1792, "num_attention_heads": 28, "num_kv_heads": 14, "vocab_size": 24854},
        {"method": "lora", "trainer": "trl", "batch_size": 4, "seq_len": 512, "dtype": "fp32", "use_reentrant": True, **EAGER},
    ),
    "ModernBERT's arguments of masks hold the embeddings; OFT's rotated input goes behind its output's cast": (
        shallow("modernbert-base", 6),
        {"method": "oft", **ATTENTION, "dtype": "fp32", "gradient_checkpointing": False, "batch_size": 2, "optim": "adamw_torch"},
    ),
    "ModernBERT's window is a distance in int64": (
        shallow("modernbert-base", 6),
        {"method": "houlsby", **PLAIN, "dtype": "fp32", "attn_implementation": "eager", "batch_size": 2, **TOKENS},
    ),
    "VeRA's projections stand with the first layer": (
        shallow("mistral-7b-v0.1", 6),
        {
            "method": "vera",
            **ATTENTION,
            "trainer": "trl",
            "dtype": "fp32",
            "gradient_checkpointing": False,
            "padding": True,
            "seq_len": 448,
        },
    ),
    "T5's encoder has no cache, so matmul copies its keys": (
        shallow("mt0-small", 6),
        {
            "method": "fourierft",
            **ATTENTION,
            **PLAIN,
            "dtype": "fp16",
            "attn_implementation": "eager",
            "batch_size": 4,
            "seq_len": 384,
        },
    ),
    "LoRA's dropped input is an argument of its module, Whisper's convolutions end with their activations": (
        shallow("whisper-tiny", 4),
        {
            "method": "qlora",
            "double_quant": False,
            "lora_dropout": 0.1,
            "batch_size": 4,
            "seq_len": 384,
            "optim": "adamw_8bit",
            **EAGER,
        },
    ),
    "BART's layers have one name for the weights of both attentions": (
        shallow("bart-base", 6),
        {
            "method": "full",
            "gradient_checkpointing": False,
            "attn_implementation": "eager",
            "seq_len": 448,
            "optim": "adamw_torch",
        },
    ),
    "the third of four micro batches reserves more than the second": (
        {
            **shallow("phi-3-mini-4k-instruct", 3),
            "hidden_size": 1728,
            "intermediate_size": 4096,
            "num_attention_heads": 18,
            "num_key_value_heads": 3,
            "vocab_size": 33000,
        },
        {
            "method": "lora",
            "r": 256,
            "modules_to_save": ["lm_head"],
            "autocast": "none",
            "gradient_checkpointing": False,
            "attn_implementation": "flash_attention_2",
            "loss": "trl-chunked",
            "gradient_accumulation_steps": 4,
            "batch_size": 5,
            "seq_len": 1024,
        },
    ),
    "Phi-3 holds the projection that it slices, and makes all slices before their views": (
        shallow("phi-3-mini-128k-instruct", 6),
        {"method": "full", "dtype": "fp32", "autocast": "bf16", "batch_size": 2, "optim": "adamw_8bit", **PLAIN},
    ),
    "repeated keys and values live beside what autocast casts them to": (
        shallow("starcoder2-3b", 6),
        {
            "method": "pfeiffer",
            "dtype": "fp32",
            "autocast": "bf16",
            "seq_len": 448,
            "padding": True,
            "gradient_accumulation_steps": 4,
        },
    ),
    "autocast's copies are gone when the math kernel's result is copied": (
        shallow("falcon-7b", 6),
        {
            "method": "qdora",
            "target_modules": "attention",
            "gradient_checkpointing": True,
            "padding": True,
            "batch_size": 4,
            "seq_len": 384,
            "autocast": "bf16",
            "optim": "adamw_torch_fused",
            **PLAIN,
        },
    ),
    "a norm whose weight multiplies in fp32 holds what it normed": (
        shallow("olmo-2-0425-1b", 6),
        {
            "method": "qlora",
            "trainer": "trl",
            "dtype": "fp16",
            "autocast": "none",
            "lora_dropout": 0.1,
            "batch_size": 3,
            "seq_len": 250,
            "optim": "adamw_8bit",
            "use_reentrant": True,
        },
    ),
    "layers of two kinds take turns as they stand, their copies too": (
        shallow("c4ai-command-r7b-12-2024", 6),
        {
            "method": "qdora",
            **ATTENTION,
            **PLAIN,
            "autocast": "bf16",
            "gradient_checkpointing": True,
            "padding": True,
            "batch_size": 1,
            "seq_len": 448,
            "optim": "adamw_8bit",
        },
    ),
    "ModernBERT makes one mask of each kind": (
        shallow("modernbert-base", 6),
        {
            "method": "boft",
            **ATTENTION,
            "autocast": "bf16",
            **EAGER,
            "padding": True,
            "batch_size": 4,
            "seq_len": 384,
            "optim": "adamw_torch_fused",
            **TOKENS,
        },
    ),
    "AdaLoRA's model adds no loss where peft has no class for the task": (
        shallow("vit-base-patch16-224-in21k", 6),
        {
            "method": "adalora",
            **ATTENTION,
            **PLAIN,
            "dtype": "fp16",
            "autocast": "none",
            "gradient_checkpointing": True,
            "padding": True,
            "batch_size": 3,
            "optim": "adamw_8bit",
            "task_type": "IMAGE_CLS",
            "num_labels": 10,
        },
    ),
    "ViT's patches go when the class token stands before them": (
        {**shallow("vit-base-patch16-224-in21k", 5), "hidden_size": 896, "intermediate_size": 3104, "num_attention_heads": 14},
        {
            "method": "qlora",
            "r": 4,
            "dtype": "fp32",
            "autocast": "none",
            "gradient_checkpointing": True,
            "gpu": "t4",
            "task_type": "IMAGE_CLS",
            "num_labels": 10,
            "batch_size": 8,
        },
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("job", JOBS)
def test_reserved_is_the_traces_to_the_byte(job: str) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    config, options = JOBS[job]
    analytic, traced = (
        peftplan.estimate(config, engine=engine, **{"seq_len": 256, **options}).peaks for engine in ("analytic", "trace")
    )
    assert analytic is not None
    assert traced is not None
    assert analytic.reserved == traced.reserved


def test_a_step_that_allocates_nothing_counts_the_tails_of_blocks() -> None:
    """bitsandbytes writes its states in place, so that the step's peak is what it begins with."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    config = shallow("modernbert-base", 3)
    options = {"method": "full", "optim": "adamw_8bit", "trainer": "plain", "gradient_accumulation_steps": 2, "batch_size": 1}
    analytic, traced = (
        peftplan.estimate(config, engine=engine, keep_outputs=False, gradient_checkpointing=True, seq_len=1024, **options).peaks
        for engine in ("analytic", "trace")
    )
    assert analytic is not None
    assert traced is not None
    assert analytic.by_phase["step"] > analytic.requested["step"]  # type: ignore[attr-defined]
    assert analytic.by_phase["step"] == pytest.approx(traced.by_phase["step"], rel=0.002)
