"""Choices over several GPUs that run, and waste memory or leave it to routing: a warning for each."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peftplan.arch.modules import Architecture
from peftplan.distributed.strategy import Distributed
from peftplan.job.exchanges import IN_TURN
from peftplan.job.setup import Setup
from peftplan.job.shared_bases import packs_integers
from peftplan.methods.adaptation import Adaptation
from peftplan.storage import QuantConfig

STEM = re.compile(r"(.+?)(?:For[A-Z]|LMHead|Model$)")
"""What the names of a model's modules begin with, such as `Llama` of `LlamaForCausalLM`. A capital follows: `Gemma2DecoderLayer`
is no layer of Gemma, nor `Qwen2MoeDecoderLayer` one of Qwen 2."""
FURTHER = "Moe|VL|Next|H1?|Mamba(?=Block)|X|Lite"
"""What may follow in the names of another model's modules: `Qwen3NextDecoderLayer` is no layer of Qwen 3."""
NAMELESS = ("TransformerBlock", "ConvLayer")
"""Layers whose names do not begin so: DistilBERT's, and what DeBERTa has before its layers."""


def traps(
    distributed: Distributed, setup: Setup, architecture: Architecture, quant: QuantConfig | None, adaptation: Adaptation
) -> Iterator[str]:
    """A warning for each choice that wastes memory without an error, or that routing decides."""
    called = distributed.facts.called
    if (ranks := distributed.ep_size or 1) > 1:
        mlp = next((block.mlp for block in architecture.blocks if block.mlp.variant == "moe"), None)
        of_rank, most_of_rank, of_worst = "", "", ""
        if mlp is not None:  # whose layers are known
            tokens, own = setup.batch_size * setup.seq_len, mlp.num_experts // ranks
            of_rank = f", {tokens * mlp.num_experts_per_tok:,} rows a layer on each rank"
            most = f", {ranks * tokens * min(mlp.num_experts_per_tok, own):,} rows"
            most_of_rank, of_worst = f"{most} where all send one rank every token", f"{most} a layer"
        if distributed.routing == "worst":
            yield f"routing: experts are counted on the rank to which all others send every token{of_worst}"
        elif IN_TURN not in (setup.kernels or ()):  # there all ranks get as many
            yield (
                f"ep_size: experts are counted with equal shares of the tokens{of_rank}; uneven routing takes more on some "
                f"ranks{most_of_rank}"
            )
    if distributed.strategy == "fsdp2" and packs_integers(quant):
        yield "quant_storage: FSDP2 shards packed weights only if they are stored as floats (bf16); each rank holds all"
    if distributed.strategy in ("fsdp1", "fsdp2") and distributed.wrap_policy in ("none", "size"):
        yield f"wrap_policy: {distributed.wrap_policy} may make no layer a unit; {called} then gathers the whole model at once"
    if distributed.strategy in ("fsdp1", "fsdp2") and distributed.min_num_params and distributed.wrap_policy != "size":
        yield "min_num_params: accelerate reads it with wrap_policy size alone (utils/dataclasses.py, `set_auto_wrap_policy`)"
    if distributed.strategy in ("fsdp1", "fsdp2") and (strange := _of_other_models(distributed, architecture)):
        yield (
            f"transformer_cls_names_to_wrap: no module of {architecture.model_class} is called {', '.join(strange)}; "
            "accelerate's FSDP plugin then raises ValueError: Could not find the transformer layer class"
        )
    rows = min((tensor.shape[0] for tensor in adaptation.added if tensor.trainable and len(tensor.shape) > 1), default=None)
    if distributed.strategy == "fsdp2" and rows is not None and rows < distributed.shards:
        yield f"gpus: {distributed.shards} ranks share tensors of {rows} rows, of which each rank still holds one"
    if distributed.strategy == "fsdp1" and str(setup.optim).startswith("paged_"):
        yield f"optim: of paged optimizers only paged_adamw_8bit with LoRA was rehearsed under {called}; states count as sharded"
    own = any(t.group or (".lora_A." in t.name and not t.trainable) for t in adaptation.added)
    if own and distributed.strategy.startswith("zero") and setup.by.prepares_model:
        freezes_a = any(".lora_A." in t.name and not t.trainable for t in adaptation.added)
        yield (
            "method: under DeepSpeed Trainer drops an optimizer that is passed to it (transformers, integrations/deepspeed.py:"
            "658); override create_optimizer, as LLaMA-Factory does"
            + (". LoRA-FA's then steps over flat partitions as AdamW does" if freezes_a else "")
        )


def wide_experts(setup: Setup, architecture: Architecture, quant: QuantConfig | None) -> Iterator[str]:
    """A warning for stacks of experts beside a quantized base, which axolotl leaves in fp32 (peft's
    `prepare_model_for_kbit_training`, which it calls; two layers of OLMoE with QLoRA, rehearsed with 0.21.0)."""
    has_stacks = any(module.kind == "Experts" for module in architecture.modules)
    if has_stacks and quant is not None and not quant.experts and not setup.kbit_prepare:
        yield "quant: axolotl leaves stacks of experts in fp32, which are counted in 16 bits; the bytes are a lower bound"


def _of_other_models(distributed: Distributed, architecture: Architecture) -> list[str]:
    """Classes to wrap whose names are those of another model's modules, such as `LlamaDecoderLayer` where the model is Qwen 2."""
    stem = STEM.match(architecture.model_class)
    if stem is None or architecture.has_towers:  # whose parts have names of their own
        return []
    own = re.compile(rf"{re.escape(stem[1])}(?!(?:{FURTHER})[A-Z])[A-Z]\w*")
    layers = (name for name in distributed.transformer_cls_names_to_wrap or () if name.endswith(("Layer", "Block")))
    return [name for name in layers if name not in NAMELESS and not own.fullmatch(name)]
