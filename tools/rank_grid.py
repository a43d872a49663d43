"""The jobs that tools/rank_jobs.py rehearses: strategies, methods, ranks, and what else is set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
"""Llama-3.2-1B cut to three layers, with a head of its own."""
CLASSES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
}
SMALL = {"hidden_size": 1000, "intermediate_size": 2730, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 100}
"""Sizes that no number of ranks divides."""
METHODS = ("full", "lora")
MASTERS = {"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "bfloat16"}
"""A policy that reduces gradients in fp32."""
CUT = {
    "gemma-2-2b": 2,
    "gpt2": 12,
    "mixtral-8x7b-v0.1": 2,
    "opt-1.3b": 3,
    "phi-2": 3,
    "gemma-3-1b-pt": 7,
    "qwen3-30b-a3b": 2,
    "bloom-1b1": 3,
    "pythia-1b": 3,
    "falcon-7b": 2,
    "stablelm-2-1-6b": 3,
    "deepseek-v2-lite": 3,
    "olmo-2-0425-1b": 3,
    "gpt-oss-20b": 2,
    "gpt-j-6b": 2,
    "c4ai-command-r7b-12-2024": 4,
    "phi-3-mini-4k-instruct": 3,
    "mpt-7b": 2,
    "starcoder2-3b": 3,
    "qwen1.5-moe-a2.7b": 2,
    "glm-4-9b-0414": 2,
    "seed-oss-36b-instruct": 2,
    "exaone-4.0-1.2b": 4,
    "afm-4.5b": 3,
    "ernie-4.5-0.3b-pt": 3,
    "hunyuan-0.5b-instruct": 3,
    "glm-4.7-flash": 3,
}
"""Built-in models of other kinds than Llama, and how many of their layers run."""
COLWISE = ["q_proj", "v_proj", "k_proj", "gate_proj", "up_proj"]
"""The targets of LoRA that tensor parallelism divides by their outputs."""
DIVIDED = {
    "qwen2.5-7b": 2,
    "gemma-2-2b": 2,
    "phi-2": 3,
    "pythia-1b": 3,
    "olmo-2-0425-1b": 3,
    "gpt-j-6b": 2,
    "c4ai-command-r7b-12-2024": 4,
    "phi-3-mini-4k-instruct": 3,
    "starcoder2-3b": 3,
    "glm-4-9b-0414": 2,
    "granite-3.1-2b-base": 3,
    "olmo-1b": 3,
    "smollm3-3b": 4,
    "aya-23-8b": 2,
}
"""Models of other kinds that have a plan of tensor parallelism, and how many of their layers run."""
TEXT_PARTS = {"qwen2.5-vl-3b-instruct": 4, "qwen3-vl-2b-instruct": 4, "gemma-3-4b-it": 7}
"""Vision-language models whose text part runs, and how many of its layers."""
IN_TEXT = ".*language_model.*_proj"
OF_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
JobName = tuple[str, str, int, dict[str, Any]]
"""Strategy, method, ranks, and what else is set."""


def jobs() -> Iterator[dict[str, Any]]:
    """Every job of the grid: its options here, what the program is told, and its world."""
    odd = {**SMALL, "vocab_size": 50001}
    variants: tuple[dict[str, Any], ...] = (
        {"accumulation": 3},
        {"config": {"tie_word_embeddings": True}},
        {"config": odd},
        {"checkpointing": False},
        {"optim": "adamw_torch"},
        {"fsdp": {"reshard_after_forward": False}},
        {"batch_size": 2, "seq_len": 1024},
        {"fsdp": {"cpu_ram_efficient_loading": True}},
        {},
    )
    for model_type, method in product(("qwen3", "qwen2", "mistral"), ("lora", "full")):
        yield job("fsdp2", method, 4, config={"model_type": model_type, **CLASSES[model_type]})
    for more, method in product(({}, {"accumulation": 2}, {"checkpointing": False}), ("full", "lora")):
        yield job("ddp", method, 4, **more)
    for options in ({"gradient_as_bucket_view": True}, {"static_graph": True}, {"bucket_cap_mb": 100}):
        yield job("ddp", "full", 4, ddp=options)
    yield job("ddp", "qlora", 4)
    yield job("ddp", "lora", 8, accumulation=3, ddp={"gradient_as_bucket_view": True})
    for model in ("gemma-3-1b-pt", "gpt2"):
        yield job("ddp", "full", 4, model=model, layers=CUT[model], seq_len=256)
    yield job("fsdp2", "qlora", 4)
    yield job("fsdp2", "qlora", 4, quant_storage="uint8")
    for more in ({}, {"fsdp": {"offload_params": "cpu"}}, {"model": "qwen2.5-7b", "layers": 2, "batch_size": 2}):
        yield job("fsdp2", "qlora", 4, device_map="cpu", **more)
    for more, method in product(variants, ("full", "lora")):
        yield job("fsdp2", method, 8, **more)
    for world, method in product((2, 4, 64), ("full", "lora", "qlora")):
        yield job("fsdp2", method, world)
    for world, method in product((2, 4, 8), ("lora", "qlora", "full")):
        yield job("fsdp2", method, world, model="llama-3.1-8b", layers=32, seq_len=2048)
    yield from older_jobs()
    yield from zero_jobs()
    for strategy, method, world, more in (*sharded_jobs(), *device_map_jobs(), *tensor_parallel_jobs(), *text_part_jobs()):
        yield job(strategy, method, world, **more)


def older_jobs() -> Iterator[dict[str, Any]]:
    """Jobs of releases of accelerate that make units of layers alone, and one that drops each loaded tensor before the next.
    The newest of the former casts nothing to fp32, the others all weights, once their shards are made."""
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"config": {"tie_word_embeddings": True}},
        {"accumulation": 3},
        {"fsdp": {"cpu_ram_efficient_loading": True}},
        {"fsdp": {"reshard_after_forward": False}},
    )
    for more, method in product(variants, ("full", "lora")):
        yield job("fsdp2", method, 4, accelerate="1.12", **more)
    for release, method in product(("1.13", "1.8"), ("full", "lora")):
        yield job("fsdp2", method, 4, accelerate=release)
    yield job("fsdp2", "lora", 8, accelerate="1.15", fsdp={"cpu_ram_efficient_loading": True})


def zero_jobs() -> Iterator[dict[str, Any]]:
    """Jobs of DeepSpeed. `zero`: fields of `zero_optimization` beside the stage."""
    odd, deep = {**SMALL, "vocab_size": 50001}, {"num_hidden_layers": 16, "tie_word_embeddings": True}
    offloaded = {"offload_optimizer": {"device": "cpu"}}
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"zero": {"overlap_comm": True}},
        {"accumulation": 3},
        {"checkpointing": False, "zero": {"overlap_comm": True}},
        {"zero": {"reduce_bucket_size": 20_000_000, "overlap_comm": True}},
        {"zero": offloaded},
        {"config": odd, "zero": {"overlap_comm": True}},
        {"config": deep},
    )
    for more, method in product(variants, ("lora", "full")):
        yield job("zero2", method, 4, **more)
    for world, method in product((2, 3, 16, 64), ("full", "lora")):
        yield job("zero2", method, world)
    yield job("zero2", "qlora", 4)
    yield job("zero2", "full", 8, zero=offloaded | {"overlap_comm": True}, accumulation=2)
    yield job("zero2", "full", 8, optim="adamw_torch", batch_size=2, seq_len=1024)
    yield job("zero2", "lora", 8, config={"model_type": "qwen3", **CLASSES["qwen3"]})
    yield job("zero2", "full", 4, zero={"reduce_bucket_size": "auto"})
    yield job("zero2", "full", 4, zero={"round_robin_gradients": True, "overlap_comm": True})
    yield job("zero2", "full", 4, zero={"reduce_scatter": False})
    for more, method in product(({}, {"accumulation": 3}, {"zero": {"overlap_comm": True}, "accumulation": 2}), ("full", "lora")):
        yield job("zero1", method, 4, **more)
    yield job("zero1", "full", 64)
    for strategy, zero in (("zero1", None), ("zero2", None), ("zero1", {"overlap_comm": True})):  # a head larger than the bucket
        yield job(strategy, "full", 4, model="qwen2.5-7b", layers=2, zero=zero)
    yield job("zero1", "full", 4, model="qwen2.5-7b", layers=6)
    yield job("zero1", "full", 4, loss="liger", kernels="liger", model="qwen2.5-7b", layers=2)
    for method in ("lora", "full", "qlora"):
        yield published("llama-3.2-1b", method, trainer="trl", seq_len=1024)
    for model, method in product(FAMILIES, ("lora", "full")):
        yield published(model, method, trainer="transformers", seq_len=256)
    yield from zero3_jobs()
    yield from ulysses_jobs()
    yield from classifying_jobs()
    yield from stage_0_jobs()
    yield from reentrant_jobs()


OLDER = "5.22"
"""The last transformers whose checkpoints cover the hooks around a layer too."""


def reentrant_jobs() -> Iterator[dict[str, Any]]:
    """Jobs whose checkpoints are reentrant: as transformers makes them, and as it did before 5.23; TRL's, which asks for them."""
    few = {"stage3_max_live_parameters": 300_000_000, "stage3_max_reuse_distance": 100_000_000}
    cpu = {"device": "cpu"}
    deep = {"num_hidden_layers": 16, "tie_word_embeddings": True}
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("lora", {"zero": AUTO}),
        ("lora", {"zero": AUTO | few}),
        ("full", {"zero": AUTO | few}),
        ("full", {"zero": AUTO}),
        ("qlora", {"zero": AUTO}),
        ("lora", {"batch_size": 4, "seq_len": 1024, "config": deep, "zero": AUTO | few}),
        ("lora", {"accumulation": 3, "zero": AUTO | few}),
        ("lora", {"zero": AUTO | {"offload_param": cpu, "offload_optimizer": cpu}}),
        ("qlora", {"model": "qwen2.5-7b", "layers": 2, "batch_size": 2, "seq_len": 1024, "zero": AUTO}),
        ("lora", {"model": "mixtral-8x7b-v0.1", "layers": 2, "seq_len": 256, "target_modules": OF_ATTENTION, "zero": AUTO}),
        ("lora", {"model": "gemma-2-2b", "layers": 2, "seq_len": 256, "zero": AUTO}),
        ("lora", {"model": "gpt2", "layers": 12, "seq_len": 256, "zero": AUTO}),
    )
    for method, more in variants:
        yield job("zero3", method, 8, use_reentrant=True, **more)
    for method, zero in (("lora", AUTO), ("lora", AUTO | few), ("full", AUTO | few), ("qlora", AUTO | few)):
        yield job("zero3", method, 8, transformers=OLDER, use_reentrant=True, zero=zero)
    yield job("zero2", "lora", 8, use_reentrant=True, zero={"overlap_comm": True})
    yield job("zero1", "full", 8, use_reentrant=True)
    yield job("ddp", "lora", 4, use_reentrant=True)
    for method in METHODS:
        yield job("fsdp2", method, 8, use_reentrant=True)
    for method in ("lora", "qlora"):
        row = published("smollm2-135m", method, strategy="zero3", trainer="trl", seq_len=1024, use_reentrant=False)
        yield {**row, "name": f"{row['name']} use_reentrant=False"}


def stage_0_jobs() -> Iterator[dict[str, Any]]:
    """Jobs of DeepSpeed's engine without ZeRO: every rank holds all of it."""
    for more, method in product(({}, {"accumulation": 3}), METHODS):
        yield job("zero0", method, 4, **more)
    yield variant("distilbert-base-uncased", "full", "zero0", **CLASSIFYING, dtype="fp32", autocast="none")
    yield variant("gpt2", "full", "zero0", **WIDE, gradient_checkpointing=False, batch_size=1, seq_len=1024)
    yield job("zero0", "full", 4, autocast="fp16", checkpointing=False)


CLASSIFYING = {"task_type": "SEQ_CLS", "seq_len": 128, "batch_size": 1, "gradient_checkpointing": False}
"""One sentence to classify, as in the examples of transformers and DeepSpeed that fine-tune encoders."""
WIDE = {"dtype": "fp32", "autocast": "fp16"}


def classifying_jobs() -> Iterator[dict[str, Any]]:
    """Jobs of encoders under DeepSpeed, and models that are made in fp32 and trained in fp16."""
    for strategy in ("zero1", "zero2", "zero3"):
        yield variant("distilbert-base-uncased", "full", strategy, **CLASSIFYING, **WIDE)
    for strategy in ("zero1", "zero2"):  # under ZeRO-3 DeepSpeed asserts that all that trains has one dtype
        yield variant("distilbert-base-uncased", "lora", strategy, **CLASSIFYING, **WIDE, target_modules="q_lin,v_lin")
    for model, strategy in product(("bert-base-uncased", "roberta-base"), ("zero2", "zero3")):
        yield variant(model, "full", strategy, **CLASSIFYING)
    yield variant("roberta-base", "lora", "zero2", **CLASSIFYING, target_modules="query,value")
    convolving = CLASSIFYING | {"seq_len": 256}
    for strategy in ("zero0", "zero1", "zero2", "zero3"):
        yield variant("deberta-v2-xxlarge", "full", strategy, **convolving, **WIDE)
    yield variant("deberta-v2-xxlarge", "full", "zero2", **convolving | {"gradient_checkpointing": True, "batch_size": 2})
    for method, strategy in (("full", "zero2"), ("full", "zero3"), ("lora", "zero1")):
        targets = {"target_modules": "query_proj,value_proj"} if method == "lora" else {}
        yield variant("deberta-v3-small", method, strategy, **CLASSIFYING, **targets)
    for strategy in ("zero1", "zero2", "zero3"):
        yield variant("gpt2", "full", strategy, **WIDE, gradient_checkpointing=False, batch_size=1, seq_len=1024)


def variant(model: str, method: str, strategy: str, **settings: Any) -> dict[str, Any]:
    """A job of a built-in model with other settings, which its name says."""
    row = published(model, method, strategy=strategy, trainer="transformers", **settings)
    return {**row, "name": " ".join([row["name"], *(f"{k}={v}" for k, v in settings.items())])}


AUTO = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
"""Fields that transformers fills in from the hidden size."""


def zero3_jobs() -> Iterator[dict[str, Any]]:
    """Jobs of DeepSpeed whose ranks hold shards of the weights."""
    odd, deep = {**SMALL, "vocab_size": 50001}, {"num_hidden_layers": 16, "tie_word_embeddings": True}
    few = {"stage3_max_live_parameters": 300_000_000, "stage3_max_reuse_distance": 100_000_000}
    cpu = {"device": "cpu"}
    variants: tuple[dict[str, Any], ...] = (
        {"zero": AUTO},
        {},
        {"zero": AUTO, "checkpointing": False},
        {"zero": AUTO | few},
        {"zero": AUTO, "accumulation": 3},
        {"zero": AUTO, "config": deep},
        {"zero": AUTO, "config": odd},
        {"zero": AUTO | {"offload_optimizer": cpu}},
        {"zero": AUTO | {"offload_param": cpu, "offload_optimizer": cpu}},
        {"zero": {"overlap_comm": False, "sub_group_size": 50_000_000}},
    )
    for more, method in product(variants, ("full", "lora")):
        yield job("zero3", method, 4, **more)
    for world, method in product((2, 3, 8, 64), ("full", "lora")):
        yield job("zero3", method, world, zero=AUTO)
    yield job("zero3", "qlora", 4, zero=AUTO)
    yield job("zero3", "lora", 4, zero=AUTO, config={"model_type": "qwen3", **CLASSES["qwen3"]}, checkpointing=False)
    for model, method in product(("gpt2", "opt-125m", "qwen2.5-0.5b", "qwen3-0.6b"), ("lora", "full")):
        yield published(model, method, strategy="zero3", trainer="transformers", seq_len=256)
    for model, method in product(("llama-3.2-1b", "pythia-160m", "qwen2.5-0.5b"), ("lora", "full")):
        yield published(model, method, strategy="zero3", trainer="trl", seq_len=1024)
    for model in ("smollm2-135m", "llama-3.2-1b"):
        yield published(model, "qlora", strategy="zero3", trainer="trl", seq_len=1024)
    for model, method in product(OTHER_ZERO3, METHODS):
        yield job("zero3", method, 4, model=model, layers=CUT[model], seq_len=256, zero=AUTO)
    for model, method in product(("mixtral-8x7b-v0.1", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b"), METHODS):
        targets = {"target_modules": OF_ATTENTION} if method == "lora" else {}
        yield job("zero3", method, 4, model=model, layers=2, seq_len=256, **targets, zero=AUTO)
    yield job("zero3", "lora", 4, model="mixtral-8x7b-v0.1", layers=2, seq_len=256, zero=AUTO)  # its stacks and routers too
    no_prefetch = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    of_zero3 = {"gpt-oss-20b": AUTO | no_prefetch, "deepseek-v2-lite": AUTO}
    for model, strategy, method in product(of_zero3, ("zero2", "zero3"), METHODS):
        targets = {"target_modules": OF_ATTENTION} if method == "lora" else {}
        zero = of_zero3[model] if strategy == "zero3" else None
        yield job(strategy, method, 4, model=model, layers=CUT[model], seq_len=256, **targets, zero=zero)
    yield job("zero2", "lora", 4, model="mixtral-8x7b-v0.1", layers=2, seq_len=256)
    yield job("zero1", "full", 4, model="deepseek-v2-lite", layers=2, seq_len=256)
    for method in METHODS:
        targets = {"target_modules": OF_ATTENTION} if method == "lora" else {}
        yield job("zero3", method, 8, model="deepseek-v2-lite", layers=2, seq_len=512, checkpointing=False, **targets, zero=AUTO)
    for strategy, method in product(("zero3", "zero2"), METHODS):
        yield job(strategy, method, 4, autocast="fp16", zero=AUTO if strategy == "zero3" else None)
    for method in METHODS:
        yield job("zero1", method, 4, autocast="fp16")
        yield job("zero3", method, 4, loss="liger", zero=AUTO)
        yield job("zero2", method, 4, loss="liger")
    yield job("zero3", "full", 4, loss="liger", zero=AUTO, config={"tie_word_embeddings": True}, seq_len=1024)
    yield job("zero1", "full", 4, loss="liger", kernels="liger")
    yield job("zero3", "full", 4, loss="liger", kernels="liger", zero=AUTO)
    yield job("zero3", "full", 4, zero=AUTO, model="qwen2.5-7b", layers=2)
    for strategy, method in product(("zero3", "zero2"), METHODS):
        zero = AUTO if strategy == "zero3" else None
        yield job(strategy, method, 4, loss="liger", kernels="liger", zero=zero, model="qwen2.5-7b", layers=2)
    yield job("zero3", "lora", 4, loss="liger", kernels="liger", zero=AUTO, config={"model_type": "qwen3", **CLASSES["qwen3"]})
    yield job("ddp", "lora", 4, loss="liger", kernels="liger", model="qwen2.5-7b", layers=2)
    for method in METHODS:
        yield job("ddp", method, 4, loss="liger", kernels="liger", model="smollm3-3b", layers=4)
    yield job("ddp", "full", 4, model="smollm3-3b", layers=4)
    for strategy, method in (("fsdp2", "full"), ("fsdp1", "full"), ("fsdp1", "lora")):  # torch refuses LoRA's under FSDP2
        yield job(strategy, method, 4, loss="liger")
    for strategy, method in (("fsdp2", "full"), ("fsdp1", "lora")):
        yield job(strategy, method, 4, loss="liger", kernels="liger")
    yield job("fsdp2", "full", 4, loss="liger", config={"tie_word_embeddings": True}, seq_len=1024)
    yield job("fsdp2", "lora", 4, kernels="liger")
    for more in ({"accumulation": 2}, {"checkpointing": False}, {"accumulation": 2, "checkpointing": False}):
        yield job("fsdp2", "full", 2, loss="liger", **more)
    for strategy, method in (("zero3", "lora"), ("zero2", "full")):
        zero = AUTO if strategy == "zero3" else None
        for model in MORE_UNDER_ZERO:
            yield job(strategy, method, 4, model=model, layers=(CUT | DIVIDED)[model], seq_len=256, zero=zero)


OTHER_ZERO3 = ("gemma-3-1b-pt", "pythia-1b", "bloom-1b1")
"""Built-in models whose few layers ran under ZeRO-3 too."""


MORE_UNDER_ZERO = (
    *("phi-3-mini-4k-instruct", "gemma-2-2b", "smollm3-3b", "granite-3.1-2b-base", "olmo-2-0425-1b", "glm-4-9b-0414"),
    *("stablelm-2-1-6b", "falcon-7b", "phi-2", "starcoder2-3b", "olmo-1b", "gpt-j-6b", "c4ai-command-r7b-12-2024", "aya-23-8b"),
    *("seed-oss-36b-instruct", "exaone-4.0-1.2b", "afm-4.5b", "ernie-4.5-0.3b-pt", "hunyuan-0.5b-instruct"),
)
"""Built-in models of still other kinds, whose few layers ran with LoRA under ZeRO-3 and fully trained under ZeRO-2."""
FAMILIES = ("gemma-3-270m", "pythia-160m", "gpt2", "opt-125m", "bloom-560m", "qwen2.5-0.5b", "qwen3-0.6b")
"""Built-in models of other kinds than Llama, and of full depth."""


ULYSSES: tuple[JobName, ...] = (
    ("zero2", "lora", 4, {"parallel": {"sp_size": 4}, "seq_len": 4096}),
    ("zero3", "lora", 8, {"zero": AUTO, "parallel": {"sp_size": 8}, "seq_len": 8192, "model": "llama-3.1-8b", "layers": 2}),
    (
        *("zero3", "full", 8),
        {
            "zero": AUTO,
            "parallel": {"sp_size": 4, "dp_replicate_size": 2},
            "seq_len": 4096,
            "model": "qwen2.5-7b",
            "layers": 2,
        },
    ),
    ("zero2", "full", 2, {"parallel": {"sp_size": 2}, "seq_len": 2048}),
    ("zero3", "lora", 4, {"zero": AUTO, "parallel": {"sp_size": 4}, "seq_len": 4096, "model": "qwen3-0.6b", "layers": 4}),
    ("zero3", "lora", 2, {"zero": AUTO, "parallel": {"sp_size": 2}, "seq_len": 4096, "model": "qwen2.5-0.5b", "layers": 4}),
    ("zero3", "lora", 16, {"zero": AUTO, "parallel": {"sp_size": 16}, "seq_len": 8192, "checkpointing": False}),
    ("zero1", "full", 4, {"parallel": {"sp_size": 2, "dp_replicate_size": 2}, "seq_len": 2048}),
    ("zero3", "full", 2, {"parallel": {"sp_size": 2}, "seq_len": 2048, "accumulation": 2}),
    ("zero3", "full", 2, {"zero": AUTO, "parallel": {"sp_size": 2}, "seq_len": 2048, "communication": "bf16"}),
    ("zero3", "full", 2, {"zero": AUTO, "parallel": {"sp_size": 2}, "seq_len": 2048, "batch_size": 2}),
    ("zero3", "lora", 2, {"zero": AUTO, "parallel": {"sp_size": 2}, "seq_len": 2048, "batch_size": 2, "checkpointing": False}),
    ("zero2", "lora", 4, {"parallel": {"sp_size": 4}, "seq_len": 2048, "batch_size": 3}),
    ("zero3", "lora", 8, {"zero": AUTO, "parallel": {"sp_size": 8}, "seq_len": 4096, "batch_size": 2}),
)


def ulysses_jobs() -> Iterator[dict[str, Any]]:
    """Jobs whose ranks share each row of tokens by DeepSpeed's Ulysses."""
    for method in METHODS:
        yield job("zero3", method, 2, zero=AUTO, parallel={"sp_size": 2}, seq_len=2048)
        yield job("zero3", method, 4, zero=AUTO, parallel={"sp_size": 4}, seq_len=4096, checkpointing=False)
    for strategy, world in (("zero2", 4), ("zero3", 8)):
        zero = {"zero": AUTO} if strategy == "zero3" else {}
        yield job(strategy, "qlora", world, **zero, parallel={"sp_size": world}, seq_len=4096, model="llama-3.2-1b", layers=2)
    yield job("zero3", "qlora", 2, zero=AUTO, parallel={"sp_size": 2}, seq_len=4096, model="qwen2.5-0.5b", layers=2)
    for strategy, method, world, more in ULYSSES:
        yield job(strategy, method, world, **more)


def published(model: str, method: str, *, strategy: str = "zero2", **settings: Any) -> dict[str, Any]:
    """A job of a built-in model under ZeRO on 4 ranks, which tools/rehearsed_program.py runs with DeepSpeed's config."""
    settings = {"method": method, "r": 16, "batch_size": 2, **settings}
    name = " ".join([strategy, method, "4", model, f"trainer={settings['trainer']}"])
    return {"name": name, "strategy": strategy, "world": 4, "model": model, "program": settings, "fsdp": {}}


def job(
    strategy: str,
    method: str,
    world: int,
    *,
    fsdp: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    transformers: str | None = None,
    accelerate: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """One job by its name: what decides it. `transformers`, `accelerate`: older releases that run it."""
    communication = settings.get("communication")
    circumstances = {**settings, **({"fsdp": fsdp} if fsdp else {}), **({"zero": zero} if zero else {})}
    name = " ".join([strategy, method, str(world), *(f"{k}={json.dumps(v)}" for k, v in circumstances.items())])
    releases = {"transformers": transformers, "accelerate": accelerate}
    release = {package: version for package, version in releases.items() if version is not None}
    name = " ".join([name, *(f"{package} {version}" for package, version in release.items())])
    program = {"method": method, **settings}
    if strategy in ("fsdp1", "fsdp2"):
        config = {"version": int(strategy[-1]), **(fsdp or {})}
        arguments: dict[str, Any] = {"fsdp": "full_shard"}
        if strategy == "fsdp1":
            config.pop("dp_shard_size", None)  # torch shards within a node
        if config.pop("offload_params", None):
            config["cpu_offload"] = True
        if config.pop("sync_each_batch", None):
            arguments["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        if (prefetch := config.pop("backward_prefetch", None)) is not None:
            config["backward_prefetch"] = f"backward_{prefetch}"
        program["arguments"] = {**arguments, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **config}}
    if strategy == "tp":
        program["tp"] = world
    if strategy == "device-map":
        program["device_map"] = "balanced"
    if strategy == "ddp":
        # Trainer looks for unused parameters of a PeftModel, with a map in pinned memory, which no rehearsal has
        program["arguments"] = {"ddp_find_unused_parameters": False}
    if strategy.startswith("zero"):
        program["arguments"] = {"deepspeed": deepspeed(int(strategy[-1]), zero or {}, settings.get("autocast", "bf16"))}
        if communication is not None:
            program["arguments"]["deepspeed"]["seq_parallel_communication_data_type"] = communication
    return {"name": name, "strategy": strategy, "world": world, "program": program, "fsdp": fsdp or {}, **release}


def deepspeed(stage: int, zero: dict[str, Any], autocast: str = "bf16") -> dict[str, Any]:
    """A config of DeepSpeed with what transformers fills in left to it."""
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(automatic, "auto"),
        autocast: {"enabled": True},
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
    }


def sharded_jobs() -> Iterator[JobName]:
    """Jobs of FSDP1, and of FSDP2's other parameters and models."""
    yield from fsdp2_jobs()
    yield from fsdp1_jobs()


def fsdp2_jobs() -> Iterator[JobName]:
    """Parameters of FSDP2, then models."""
    variants: tuple[dict[str, Any], ...] = (
        {"fsdp": {"offload_params": "cpu"}},
        {"autocast": "fp16"},
        {"parallel": {"dp_replicate_size": 2, "dp_shard_size": 4}},
        {"fsdp": {"sync_each_batch": True}, "accumulation": 3},
        {"policy": MASTERS},
    )
    for more, method in product(variants, METHODS):
        yield "fsdp2", method, 8, more
    for model, layers in CUT.items():
        yield "fsdp2", "lora", 4, {"model": model, "layers": layers, "seq_len": 256}


def fsdp1_jobs() -> Iterator[JobName]:
    """Parameters of FSDP1, and numbers of ranks."""
    ahead = {"backward_prefetch": "pre"}
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"fsdp": ahead},
        {"checkpointing": False},
        {"accumulation": 3},
        {"config": {**SMALL, "vocab_size": 50001}},
        {"config": {"tie_word_embeddings": True}, "fsdp": ahead},
        {"optim": "adamw_torch"},
        {"config": {"tie_word_embeddings": True}},
        {"fsdp": {"offload_params": "cpu"}},
        {"autocast": "fp16", "optim": "adamw_torch"},
        {"fsdp": {"use_orig_params": False}},
        {"fsdp": {"forward_prefetch": True, **ahead}},
    )
    for more, method in product(variants, METHODS):
        yield "fsdp1", method, 4, more
    for more, method in product(
        (
            {"fsdp": {"forward_prefetch": True}},
            {"fsdp": {"forward_prefetch": True, **ahead}, "accumulation": 3},
            {"fsdp": {"forward_prefetch": True, **ahead}, "config": {"num_hidden_layers": 8, "vocab_size": 8000}},
            {"fsdp": {"forward_prefetch": True, "offload_params": "cpu"}},
            {"fsdp": {"offload_params": "cpu"}, "accumulation": 3},
            {"fsdp": {"offload_params": "cpu", **ahead}, "checkpointing": False},
        ),
        METHODS,
    ):
        yield "fsdp1", method, 4, more
    yield "fsdp1", "qlora", 4, {"fsdp": {"offload_params": "cpu"}}
    for world, method in product((2, 64), METHODS):
        yield "fsdp1", method, world, {"fsdp": ahead}
    for method in METHODS:
        yield "fsdp1", method, 4, {"use_reentrant": True}
    for method in ("lora", "qlora"):
        yield "fsdp1", method, 4, {"use_reentrant": True, "accumulation": 3, "fsdp": {"use_orig_params": False}}
    flat_on_host: dict[str, Any] = {"use_orig_params": False, "offload_params": "cpu", "cpu_ram_efficient_loading": True}
    yield "fsdp1", "qlora", 4, {"use_reentrant": True, "accumulation": 3, "batch_size": 2, "fsdp": flat_on_host}
    yield "fsdp1", "qlora", 4, {}
    yield "fsdp1", "lora", 4, {"autocast": "none"}
    for ahead_or_not in ({}, ahead):
        yield "fsdp1", "full", 4, {"autocast": "none", "fsdp": ahead_or_not}
    yield "fsdp1", "full", 4, {"autocast": "none", "optim": "adamw_torch"}
    yield "fsdp1", "full", 4, {"autocast": "none", "config": {"tie_word_embeddings": True}}
    for method in METHODS:
        yield "fsdp1", method, 8, {"fsdp": {"dp_shard_size": 4}}


def device_map_jobs() -> Iterator[JobName]:
    """Jobs of one process over several GPUs, with a head of its own and with a tied one."""
    for (model, layers), method in product((("llama-3.1-8b", 4), ("llama-3.2-3b", 12), ("qwen3-8b", 4)), ("lora", "full")):
        yield "device-map", method, 2, {"model": model, "layers": layers}
    for method in ("lora", "full"):
        yield "device-map", method, 4, {"model": "mistral-7b-v0.3", "layers": 8}
        yield "device-map", method, 2, {"model": "mistral-7b-v0.3", "layers": 4, "checkpointing": False}
    yield "device-map", "lora", 2, {"model": "qwen2.5-7b", "layers": 4, "batch_size": 2, "accumulation": 2}
    yield "device-map", "lora", 4, {"model": "llama-3.1-8b", "layers": 6, "seq_len": 1024}
    packed: tuple[tuple[int, dict[str, Any]], ...] = (
        (2, {"model": "llama-3.1-8b", "layers": 6}),
        (3, {"model": "mistral-7b-v0.3", "layers": 12}),
        (2, {"model": "qwen3-8b", "layers": 4, "checkpointing": False}),
        (2, {"model": "qwen2.5-7b", "layers": 6, "batch_size": 2, "accumulation": 2}),
        (2, {"model": "qwen3-8b", "layers": 6, "kbit": True}),
        (2, {"model": "llama-3.1-8b", "layers": 16}),
        (3, {"model": "mistral-7b-v0.3", "layers": 24}),
        (2, {"model": "qwen2.5-7b", "layers": 16, "checkpointing": False}),
        (2, {"model": "qwen3-8b", "layers": 20, "kbit": True, "batch_size": 2}),
    )
    for devices, more in packed:
        yield "device-map", "qlora", devices, more


def text_part_jobs() -> Iterator[JobName]:
    """LoRA on the text part of vision-language models, whose batches have no images."""
    for strategy, model in product(("zero2", "zero3", "ddp"), TEXT_PARTS):
        zero = {"zero": AUTO} if strategy == "zero3" else {}
        yield (
            strategy,
            "lora",
            4,
            {"model": model, "layers": TEXT_PARTS[model], "target_modules": IN_TEXT, "seq_len": 256, **zero},
        )


def tensor_parallel_jobs() -> Iterator[JobName]:
    """Jobs under transformers' own tensor parallelism. Of LoRA those whose adapters peft makes as wide as they must be."""
    dividing: tuple[tuple[str, int], ...] = (("llama-3.1-8b", 2), ("llama-3.2-1b", 3), ("qwen3-8b", 2), ("mistral-7b-v0.3", 2))
    for (model, layers), world in product(dividing, (2, 4, 8)):
        yield "tp", "full", world, {"model": model, "layers": layers}
        yield "tp", "lora", world, {"model": model, "layers": layers, "target_modules": COLWISE[: 2 if world == 4 else 5]}
    for (model, layers), method in product(dividing, METHODS):
        wide = {} if method == "full" else {"target_modules": COLWISE, "r": 64}
        yield "tp", method, 2, {"model": model, "layers": layers, "checkpointing": False, **wide}
    model = {"model": "llama-3.2-1b", "layers": 3}
    for more in ({"accumulation": 3}, {"optim": "adamw_torch"}, {"batch_size": 2, "seq_len": 1024}):
        yield "tp", "full", 4, {**model, **more}
        yield "tp", "lora", 4, {**model, **more, "target_modules": COLWISE}
    for name, layers in DIVIDED.items():
        yield "tp", "full", 2, {"model": name, "layers": layers, "seq_len": 256}


def cut(name: str, layers: int | str) -> dict[str, Any]:
    """A built-in model's config with its first layers alone, or with those that a pattern names by a letter each."""
    from peftplan.arch.catalogue import find

    entry = find(name)
    assert entry is not None
    config = dict(entry.facts()["config"])
    if (pattern := config.get("hybrid_override_pattern")) is not None:
        pattern = layers if isinstance(layers, str) else pattern[:layers]
        return config | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    assert isinstance(layers, int)
    if isinstance(text := config.get("text_config"), dict):  # the tower stays as it is
        return config | {"text_config": shortened(text, layers)}
    return shortened(config, layers)


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of a decoder with its first layers alone, all of them where it has fewer."""
    fields = ("n_layer", "n_layers", "num_hidden_layers", "num_layers")
    field = next((field for field in fields if field in config), "num_hidden_layers")
    whole = config.get(field, layers)
    config = config | {field: min(layers, whole)}
    if borrowing := config.get("num_kv_shared_layers"):
        config["num_kv_shared_layers"] = borrowing * config[field] // whole
    return config | {name: value[:layers] for name, value in config.items() if isinstance(value, list) and len(value) == whole}
