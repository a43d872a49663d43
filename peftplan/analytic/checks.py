"""Which jobs have a formula, and what the others lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import peftplan.methods as methods
from peftplan.analytic.families import check_family
from peftplan.analytic.mixers import check_delta_rule, check_mixer
from peftplan.analytic.of_tools import unlike_rehearsed
from peftplan.analytic.running import SHOWN_PICTURES
from peftplan.arch.text_part import is_in_text_part
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import NeedsTraceError, NoEngineError, NoRankFormulaError
from peftplan.job import loss_sizes
from peftplan.job.automodel import builds
from peftplan.job.beside_towers import knows_tower
from peftplan.job.compiled_layers import recorded
from peftplan.job.kernel_facts import Lora
from peftplan.job.kernels import IN_INT4, IN_MXFP4, KERNELS, OF_TORCHTUNE, kernels_of, without_formula
from peftplan.job.requirements import rows_apart
from peftplan.job.trainers import DEFAULT
from peftplan.job.virtual_tokens import check_virtual_tokens
from peftplan.memory.methods import ADAPTERS
from peftplan.memory.models import FORWARDS, OF_TEXT_PARTS
from peftplan.methods.adaptation import NeedsPeftError
from peftplan.optim import parse_optim_args
from peftplan.storage import is_skipped, without_peak
from peftplan.storage.config import FOUR_BIT
from peftplan.units import GIB
from peftplan.versions import LATENT_CACHED

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

COPYING = ("sgd", "rmsprop", "adagrad")
"""Optimizers of torch that add decayed weights to copies of the gradients (torch, optim/sgd.py:429)."""
SHARED = {
    "liger": ("ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"),
    "axolotl": ("ddp", "zero1", "zero2"),
    "torchao-float8": ("fsdp2",),
    "swift-offload": ("fsdp2",),
    "fla": ("fsdp2", "zero2", "zero3"),
    **dict.fromkeys(("te", "te-norm", "torch-norm"), ("fsdp2",)),
    "mamba-ssm": ("fsdp2", "zero2"),
    **dict.fromkeys(("deepep", "hybridep", "uccl", "te-linear", "te-experts"), ("fsdp2",)),
}
"""Package → the strategies under which its kernels were rehearsed."""
SHARED_TEXT_PARTS = ("ddp", "zero1", "zero2", "zero3")
"""Strategies under which text parts of vision-language models were rehearsed (tests/distributed/rank_jobs.jsonl)."""
TRAINERS_OF_TEXT_PARTS = {
    "trl-dpo": "",
    "trl-grpo": "qwen2_5_vl",
    "swift-dpo": "",
    "swift-grpo": "",
    "swift-grpo-reloading": "qwen2_5_vl",
}
"""Trainers of preferences that were rehearsed on them (tests/rehearse/preferences.jsonl) → how their model types begin."""
TEXT_ALONE = ("plain", "transformers", "trl", "trl-dpo")
"""Trainers that give a model no image of their own where a sample has none: weights outside the text part get no gradient, but
for AdaLoRA's, whose loss reads each of its matrices."""
WRITING_ALONE = ("llama", "qwen2", "qwen3")
"""Model types whose completions of one prompt each were rehearsed, or that differ from these by norms of heads alone."""
PACKED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose packed rows were rehearsed, or have the same masks."""
WITH_EAGER = ("axolotl.", "torchao-float8.")
"""Packages whose kernels were rehearsed beside eager attention."""
LATENT = "kv_b_proj"
"""What expands the latent keys and values of DeepSeek and GLM."""
PROJECTOR = ".multi_modal_projector"
"""A part of a model that gets no gradient where samples have no images."""
UNSLOTH_LORA = frozenset({"unsloth.lora_mlp", "unsloth.lora_qkv", "unsloth.lora_o"})
FEWEST_OFFLOADED = 3
"""ms-swift offloads nothing of a model with fewer units (callbacks/activation_cpu_offload.py, `enable_activation_offloading`)."""
FEWEST_PACKED = 2
"""Unsloth's GRPO packs so many completions or more into one row (`_pack_active`)."""


def check(job: Job) -> None:
    """Raise NeedsTraceError or NoEngineError if a part of the job has no formula."""
    if job.distributed is not None:
        from peftplan.analytic import rehearsed

        if (why := rehearsed.without_formula(job)) is not None:
            raise NoRankFormulaError(f"a step with {job.distributed.called}{why}")
    elif job.setup.by.weighs_tokens or job.setup.by.anchors:
        raise NoEngineError(f"a step of {job.setup.by.called} on one GPU (no formula yet)")
    if job.adaptation.rests and job.distributed is not None:
        raise NoRankFormulaError(f"layers that take turns under {job.distributed.called}")
    if (why := unlike_rehearsed(job)) is not None:
        raise NoEngineError(f"{why} (no formula yet)")
    known = job.setup.by.scoring in (None, "rows") or job.setup.by.generates or job.setup.by.beside_copy
    shared = job.distributed is not None and job.distributed.strategy == "fsdp2"  # where `under_fsdp2` says so
    if job.reference == "copy" and not known and not shared:
        raise NoEngineError(f"a second model under {job.setup.by.called} (no formula yet)")
    if job.setup.by.leaves_temperature and not _writes_alone(job):
        raise NoEngineError(
            f"a step of {job.setup.by.called} but of Llama, Qwen 2 and 3 in full under sdpa in bf16 (no formula yet)"
        )
    if (apart := rows_apart(job.setup)) is not None:
        raise NoEngineError(apart)
    if job.setup.by.packs and not _packs_as_rehearsed(job):
        raise NoEngineError(f"a step of {job.setup.by.called} with this model, method, attention or strategy (no formula yet)")
    if job.setup.by.reads_features and (job.method_name != "lora" or job.quant is not None):
        raise NoEngineError(f"a step of {job.setup.by.called} but of LoRA on a base in 16 bits (no formula yet)")
    if job.setup.by.block and not _writes_as_rehearsed(job):
        raise NoEngineError(f"a step of {job.setup.by.called} with these options or this model type (no formula yet)")
    by_kernel = job.setup.by.scoring == "kernel" and not job.setup.of_hidden_pairs
    if job.quant is not None and (by_kernel or job.setup.by.teaches or job.setup.by.rewards):
        raise NoEngineError(f"a quantized base under {job.setup.by.called} (no formula yet)")
    merges = job.setup.merges_for_vllm and bool(job.method and job.method.peft_type)
    beside_tower = job.architecture.has_towers and not (job.setup.by.reloads_weights or _merges_beside_tower(job))
    if merges and ((job.quant is not None and not _merges_into(job)) or beside_tower):
        raise NoEngineError(f"an adapter that {job.setup.by.called} merges for vLLM, of this base (no formula yet)")
    if job.quant is not None and (why := without_peak(job.quant)) is not None and not _reads_8_bits(job):
        raise NoEngineError(why)
    if job.setup.noisy_embeddings and any(block.stack != "decoder" for block in job.architecture.blocks):
        raise NoEngineError("noise on the embeddings of an encoder (no formula yet)")
    if job.setup.optim in COPYING and float(parse_optim_args(job.setup.optim_args).get("weight_decay", "0")):
        raise NoEngineError(f"weight_decay of {job.setup.optim}, added to copies of the gradients (no formula yet)")
    if (refused := refused_product(job)) is not None:
        raise NoEngineError(refused)
    if job.quant is not None and job.quant.experts:
        _check_stacks(job)
    if job.setup.by.own_fsdp2:
        _check_parameters(job)
    model_type = job.architecture.model_type
    if model_type not in FORWARDS | OF_TEXT_PARTS and not builds(job) and kernels_of(job.setup.kernels or ()).layers is None:
        raise NeedsTraceError(f"activations of model type {model_type}")
    check_family(job)
    if any(block.state_space is not None for block in job.architecture.blocks):
        check_mixer(job)
    if any(block.delta_rule is not None for block in job.architecture.blocks):
        check_delta_rule(job)
    if any(attention.clipped for block in job.architecture.blocks for attention in block.attentions):
        raise NeedsTraceError(f"activations of model type {model_type} with clip_qkv")
    if job.method is None:
        raise NeedsTraceError(f"activations of {_unread(job.adapter)}")
    if job.adaptation.matched and job.method.peft_type not in (*ADAPTERS, "LN_TUNING"):
        raise NeedsTraceError(f"activations of method {job.method.name}")
    check_virtual_tokens(job)
    if job.setup.by.embeds:
        _check_embedding(job)
    if model_type in OF_TEXT_PARTS or job.architecture.has_towers:
        _check_text_part(job)
    _check_kernels(job)
    if job.method.module == "bottleneck":
        from peftplan.methods.bottleneck import refuse_unplaced

        refuse_unplaced(job.architecture, job.adaptation)


def _writes_alone(job: Job) -> bool:
    """Whether completions of one prompt each are learned as they were rehearsed."""
    setup = job.setup
    plain = setup.attn_implementation == "sdpa" and setup.kernels is None and setup.autocast == "bf16"
    return plain and job.method_name == "full" and job.architecture.model_type in WRITING_ALONE


def _packs_as_rehearsed(job: Job) -> bool:
    """Whether packed rows were rehearsed so: of a dense decoder in 16 bits or more, under sdpa without windows."""
    setup, shared = job.setup, job.distributed is not None and job.distributed.strategy != "ddp"
    whole = all(attention.window is None for block in job.architecture.blocks for attention in block.attentions)
    plain = setup.attn_implementation == "sdpa" and not setup.padding and setup.kernels is None and job.quant is None
    return plain and whole and not shared and job.method_name in ("full", "lora") and job.architecture.model_type in PACKED


def refused_product(job: Job) -> str | None:
    """Why bitsandbytes raises in the first forward; None where it runs (backends/cuda/ops.py, `_int8_linear_matmul_impl`)."""
    if job.quant is None or job.quant.name != "int8" or LATENT_CACHED.after(job.script.transformers):
        return None
    skipped = job.quant.skip_modules or ()
    if not any(module.name.endswith(LATENT) and not is_skipped(module.name, skipped) for module in job.architecture.modules):
        return None
    return (
        f"a step with int8 layers: bitsandbytes raises ValueError for {LATENT}, whose input has four dimensions since "
        f"{LATENT_CACHED.named} (add quant_skip_modules kv_b_proj,lm_head)"
    )


def _check_parameters(job: Job) -> None:
    """Raise NoEngineError for LoRA over parameters by axolotl, whose peft makes their whole updates, and holds them beside
    their sums (tuners/lora/layer.py, `_LoraParameterProxy`); later ones make each sum of its factors."""
    from peftplan.analytic.rehearsed import adapts_parameters

    if adapts_parameters(job):
        raise NoEngineError("LoRA on parameters with the peft that axolotl pins (no formula yet)")


def _check_stacks(job: Job) -> None:
    """Raise NoEngineError for stacks of experts in 8 bits whose non-reentrant checkpoints end within them.

    torch stops recomputing at the last tensor that backward needs. Where that is one of the experts', the hook that empties the
    cache of restored weights does not run, and all layers stay (axolotl 0.19.0, monkeypatch/moe_quant.py:77).
    """
    setup, quant = job.setup, job.quant
    if quant is not None and quant.name == "int8" and setup.gradient_checkpointing and not setup.use_reentrant:
        raise NoEngineError(
            "stacks of experts in int8 with non-reentrant checkpoints, which leave them restored (no formula yet)"
        )


def _check_text_part(job: Job) -> None:
    """Raise for what of a vision-language model does not run, or was not compared, where samples have no images."""
    adaptation, architecture = job.adaptation, job.architecture
    names = (*(tensor.name for tensor in adaptation.added), *(param.module for param in adaptation.trained))
    if job.distributed is not None and not _knows_shared(job, job.distributed):
        raise NoRankFormulaError(f"a step with {job.distributed.called} and model type {architecture.model_type}")
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    if divided and job.setup.by.shows_picture and architecture.model_type not in SHOWN_PICTURES:
        raise NoRankFormulaError(f"a tower that {job.setup.by.called} shows a picture, of model type {architecture.model_type}")
    if job.setup.by.reloads_weights and job.distributed is not None and job.distributed.strategy != "zero1":
        raise NoRankFormulaError(f"weights that wait on the host, of model type {architecture.model_type}")
    if job.setup.loss in loss_sizes.OF_SHARED_ROWS:
        raise NoEngineError(f"rows that ranks share, of model type {architecture.model_type} (no formula yet)")
    known = TRAINERS_OF_TEXT_PARTS.get(job.setup.by.name)
    if job.setup.by.of_preferences and (known is None or not architecture.model_type.startswith(known)):
        raise NoEngineError(f"model type {architecture.model_type} and {job.setup.by.called} (no formula yet)")
    if not architecture.blocks:
        raise NeedsTraceError(f"activations of the text part of model type {architecture.model_type}")
    if job.script.transformers is not None:
        raise NoEngineError(f"model type {architecture.model_type} with another release of transformers (no formula yet)")
    if getattr(job.config, "num_virtual_tokens", None):
        raise NeedsTraceError(f"virtual tokens in model type {architecture.model_type}")
    if kernels_of(job.setup.kernels or ()).layers is not None:
        return
    if job.distributed is None and job.setup.by.name in TEXT_ALONE and job.method_name != "adalora":
        return
    head, by_tool = f"{architecture.output_embedding}.", job.setup.by.own_lora
    if by_tool and job.method_name == "full":  # where `knows_tower` says so
        return
    names = tuple(name for name in names if not (by_tool and PROJECTOR in name))  # it gets no gradient without images
    if not all(is_in_text_part(architecture, name) and (by_tool or not name.startswith(head)) for name in names):
        raise NeedsTraceError(f"weights that train outside the text part of model type {architecture.model_type}")


def _knows_shared(job: Job, distributed: Distributed) -> bool:
    """Whether a text part was rehearsed on a rank like this one."""
    by_tool = job.setup.by.own_lora and knows_tower(job)
    return by_tool or (distributed.strategy in SHARED_TEXT_PARTS and job.quant is None)


def _check_kernels(job: Job) -> None:
    """Raise NoEngineError where a step with these kernels, or of these modules, has no formula."""
    why = kernels_without_formula(job)
    if why is None and job.setup.by.own_modules:
        from peftplan.job import built

        why = built.without_formula(job)
    if why is None and job.setup.by.own_lora:
        from peftplan.job import automodel

        why = automodel.without_formula(job)
    if why is not None:
        raise NoEngineError(f"{why} (no formula yet)")


EMBEDDED = ("bert", "xlm-roberta", "roberta", "distilbert", "modernbert", "llama", "qwen3", "gemma3_text")
"""Model types whose steps with embeddings of pairs were rehearsed, and RoBERTa, which runs XLM-RoBERTa's code."""


def _check_embedding(job: Job) -> None:
    """Raise NoEngineError for embeddings of pairs that no rehearsal was compared with."""
    name, model_type = "" if job.method is None else job.method.name, job.architecture.model_type
    if name not in ("full", "lora") or job.quant is not None or model_type not in EMBEDDED:
        base = "" if job.quant is None else f" on a base in {job.quant.name}"
        raise NoEngineError(f"{name}{base} of model type {model_type} with {job.setup.by.called} (no formula yet)")


def kernels_without_formula(job: Job) -> str | None:
    """Why a step with the job's kernels has no formula; None where it has one."""
    setup, architecture = job.setup, job.architecture
    if setup.packs_completions:
        if (why := _grpo_without_formula(job)) is not None:
            return f"Unsloth's GRPO {why}"
    elif setup.of_hidden_pairs:
        kernels = kernels_of(setup.kernels or ())
        if kernels.decoder is None or kernels.padding_free is not None:
            return "Unsloth's ORPO with layers of the model's own, or that torch compiles"
    elif setup.kernels and setup.by.of_preferences and not (setup.by.embeds and kernels_of(setup.kernels).layers is not None):
        return f"kernels with {setup.by.called}"
    if not setup.kernels or setup.kernels == OF_TORCHTUNE:
        return None
    if IN_INT4 in setup.kernels and (job.distributed is None or setup.loss != "liger" or job.method_name != "full"):
        return "fake-quantized layers but of full fine-tuning under FSDP2 with Liger's loss"
    if IN_MXFP4 in setup.kernels and not _rounds_as_rehearsed(job):
        return "layers fake-quantized in MXFP4 with these options"
    if job.distributed is not None and not _rehearsed_kernels(job, job.distributed):
        return f"kernels with {job.distributed.called}"
    if kernels_of(setup.kernels).embedding is not None and kernels_of(setup.kernels).layers is None:
        return "an embedding in host memory without layers that torch compiles"
    if kernels_of(setup.kernels).layers is not None:
        not_recorded = f"layers of {architecture.name} that torch compiles: not recorded with these options"
        return not_recorded if recorded(job) is None else None
    if kernels_of(setup.kernels).activations is not None and not _offloads_as_rehearsed(job):
        return "activations in host memory with these options"
    if (
        setup.attn_implementation == "eager"
        and not builds(job)
        and not all(name.startswith(WITH_EAGER) for name in setup.kernels)
    ):
        return "kernels with eager attention"
    if (why := without_formula(setup.kernels, architecture.model_type, architecture.task_type)) is not None:
        return why
    if kernels_of(setup.kernels).decoder is not None:
        if (windows := _windows(job)) and setup.seq_len > min(windows):
            return f"unsloth's kernels with a sequence above the window of {min(windows):,} tokens"
        if setup.autocast != setup.dtype:
            return f"unsloth's kernels in {setup.dtype} with autocast {setup.autocast}"
    of_lora = [kernel for name in setup.kernels if isinstance(kernel := KERNELS[name], Lora)]
    if not of_lora or job.method is None or job.method.peft_type != "LORA":
        return None
    if setup.autocast not in ("none", setup.dtype):
        return f"LoRA kernels in {setup.dtype} with autocast {setup.autocast}"
    if job.quant is not None and job.quant.name not in FOUR_BIT and not _reads_8_bits(job):
        return f"LoRA kernels over {job.quant.name}"
    drops = getattr(job.config, "lora_dropout", 0) and not all(kernel.drops_outside or kernel.drops_inside for kernel in of_lora)
    return "LoRA kernels with dropout or DoRA" if drops or getattr(job.config, "use_dora", False) else None


def _reads_8_bits(job: Job) -> bool:
    """Whether Unsloth's LoRA kernels make every product with a weight in FP8 (unsloth 2026.10.9, kernels/fp8.py), as was
    rehearsed: weights of whole blocks, without biases."""
    if job.quant is None or job.quant.name != "fp8" or job.quant.skip_modules is not None or job.distributed is not None:
        return False
    linear = [m for m in job.architecture.modules if m.kind == "Linear" and m.name != job.architecture.output_embedding]
    in_blocks = all(size % job.quant.blocksize == 0 for m in linear for size in m.shape("weight"))
    plain = in_blocks and not any(name == "bias" for m in linear for name, _ in m.params)
    adapted = {m.name for m in linear} == {m.name for m in job.adaptation.matched}
    return plain and adapted and UNSLOTH_LORA.issubset(job.setup.kernels or ())


def _writes_as_rehearsed(job: Job) -> bool:
    """Whether blocks behind anchors are written as was rehearsed (tests/rehearse/axolotl_strided.jsonl): by a Llama in 16 bits
    with checkpoints."""
    setup = job.setup
    alike = bool(setup.gradient_checkpointing) and job.quant is None and job.architecture.model_type == "llama"
    loaded = setup.attn_implementation in ("sdpa", "eager")
    return alike and loaded and job.method_name == ("lora" if setup.by.rows == 1 else "full")


def _offloads_as_rehearsed(job: Job) -> bool:
    """Whether activations go to the host as was rehearsed: of LoRA over 4 bits by axolotl, beside reentrant checkpoints
    (tests/rehearse/axolotl_offload.jsonl)."""
    setup = job.setup
    if "swift-offload.activations" in (setup.kernels or ()):
        return _offloads_layers(job)
    checkpoints = bool(setup.gradient_checkpointing) and setup.use_reentrant and not setup.offload_checkpoints
    of_lora = job.quant is not None and job.quant.name in FOUR_BIT and job.method is not None and job.method.peft_type == "LORA"
    return checkpoints and of_lora and setup.by.own_fsdp2 and setup.attn_implementation == "flash_attention_2"


def _offloads_layers(job: Job) -> bool:
    """Whether what layers save goes to the host as was rehearsed: of LoRA in bf16 by ms-swift under FSDP2, of a dense model with
    a head of its own (tests/rehearse/swift.jsonl)."""
    from peftplan.analytic.shown import is_bare, is_plain
    from peftplan.memory.sharded import tied

    setup, distributed = job.setup, job.distributed
    if distributed is None or distributed.strategy != "fsdp2" or distributed.accelerate is not None:
        return False
    if distributed.reshard_after_forward not in (None, True) or distributed.dp_shard_size not in (None, distributed.world_size):
        return False
    enough = sum(len(block.layers) for block in job.architecture.blocks) >= FEWEST_OFFLOADED
    of_lora = job.quant is None and job.method_name == "lora" and is_plain(job) and is_bare(job)
    alike = setup.trainer == DEFAULT and setup.attn_implementation == "sdpa" and setup.autocast == "bf16"
    plain = not (setup.padding or setup.gradient_checkpointing or tied(job.architecture)) and setup.loss == "full"
    return enough and of_lora and alike and plain and setup.kernels == ("swift-offload.activations",)


def _rounds_as_rehearsed(job: Job) -> bool:
    """Whether layers in MXFP4 were rehearsed with such a job: all weights in bf16, Liger's loss and checkpoints, of Llama on one
    GPU and of Qwen 2.5 under FSDP2 (tests/rehearse/axolotl_mx.jsonl)."""
    setup, shared = job.setup, job.distributed
    plain = job.method_name == "full" and setup.loss == "liger" and setup.dtype == setup.autocast == "bf16"
    known = "llama" if shared is None else "qwen2" if shared.strategy == "fsdp2" else ""
    on_card = not setup.offload_checkpoints and (shared is None or shared.offload_params != "cpu")
    return plain and on_card and bool(setup.gradient_checkpointing) and job.architecture.model_type == known


def _rehearsed_kernels(job: Job, distributed: Distributed) -> bool:
    """Whether these kernels were rehearsed on several GPUs (tests/distributed/rank_jobs.jsonl, tests/rehearse/axolotl.jsonl)."""
    from peftplan.analytic.shown import adapts_in_zero3

    setup = job.setup
    if distributed.strategy == "zero3" and adapts_in_zero3(job):
        return True
    if distributed.strategy == "fsdp2" and setup.by.own_fsdp2:
        return all(name.startswith(("liger.", "torchao-int4.", "torchao-mxfp4.")) for name in setup.kernels or ())
    return all(distributed.strategy in SHARED.get(name.partition(".")[0], ()) for name in setup.kernels or ())


def _many_scores(job: Job) -> bool:
    """Whether the prompts' scores in 16 bits and in fp32 take over 1 GiB (unsloth_zoo, temporary_patches/gpt_oss.py:
    `_EAGER_ATTENTION_CHECK_BYTES`)."""
    setup, attention = job.setup, job.architecture.blocks[0].attentions[0]
    if job.architecture.model_type != "gpt_oss":
        return False
    scores = setup.generation_rows * attention.num_attention_heads * setup.prompt_len * setup.seq_len
    return scores * (ITEMSIZE[setup.dtype] + ITEMSIZE["fp32"]) > GIB


def _windows(job: Job) -> list[int]:
    """The windows of sliding attention."""
    return [a.window for block in job.architecture.blocks for a in block.attentions if a.window]


def _grpo_without_formula(job: Job) -> str | None:
    """What of Unsloth's GRPO has no formula; None where all of it has one: vLLM generates the completions, two or more are packed
    (unsloth_zoo 2026.10.9, `grpo_accumulated_loss`), and no forward before scores them (`compute_efficient`)."""
    setup = job.setup
    kernels = kernels_of(setup.kernels or ())
    if kernels.layers is not None:  # recorded are rows too long for a window, which it does not pack
        missing = {
            "with layers that torch compiles beside vLLM": setup.use_vllm,
            "with a reference": len(setup.forwards) > 1,
            "of rows that it packs, not longer than the window": setup.batch_size >= FEWEST_PACKED
            and setup.seq_len <= min(_windows(job), default=setup.seq_len),
            "of prompts with scores that Unsloth makes in parts, by the card's free memory": _many_scores(job),
            f"of completions of more than {loss_sizes.MAX_ROWS:,} tokens with a head that trains": job.method_name == "full"
            and setup.seq_len - setup.prompt_len > loss_sizes.MAX_ROWS,
        }
        return next((what for what, is_so in missing.items() if is_so), None)
    packed = kernels.padding_free is not None
    missing = {
        "with layers of the model's own": kernels.decoder is None,
        "where its own generation writes": not setup.use_vllm,
        "with a reference of its own": len(setup.forwards) > 1 and job.reference != "adapter_off",
        "of a packed completion": packed and setup.batch_size < FEWEST_PACKED,
        "of padded completions": not packed and setup.batch_size > 1,
    }
    return next((what for what, is_so in missing.items() if is_so), None)


def _merges_beside_tower(job: Job) -> bool:
    """Whether a merge beside a tower was rehearsed (tests/rehearse/swift.jsonl): of LoRA of Qwen2.5-VL under DDP."""
    shared = job.distributed is not None and job.distributed.strategy == "ddp" and job.setup.vllm_mode != "server"
    return shared and job.method_name == "lora" and job.architecture.model_type == "qwen2_5_vl"


def _merges_into(job: Job) -> bool:
    """Whether a merge into such a base was rehearsed (tests/rehearse/swift.jsonl)."""
    of_4_bits = job.quant is not None and job.quant.layout in FOUR_BIT and job.setup.vllm_mode != "server"
    return of_4_bits and job.is_full_or_lora and job.distributed is not None and job.distributed.strategy == "zero2"


def _unread(adapter: Mapping[str, object]) -> str:
    """The part of an adapter config that only peft itself can read."""
    try:
        methods.from_peft_config(adapter)
    except NeedsPeftError as what:
        return str(what)
    return "this adapter config"
