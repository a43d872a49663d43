"""Kernels and modules of tools that have no formula in a job: by model, method, launch and what was rehearsed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.arrays import Fact, Size
from peftplan.dtypes import ITEMSIZE
from peftplan.job import loss_sizes
from peftplan.job.automodel import builds
from peftplan.job.compiled_layers import recorded
from peftplan.job.exchanges import fits_blocks
from peftplan.job.kernel_facts import Lora
from peftplan.job.kernels import IN_INT4, IN_MXFP4, KERNELS, OF_TORCHTUNE, kernels_of, without_formula
from peftplan.job.repositories import OVER_PACKED
from peftplan.job.trainers import DEFAULT
from peftplan.memory.packed import FEWEST_DENSE
from peftplan.storage.config import FOUR_BIT
from peftplan.units import GIB
from peftplan.versions import FSDP2_TAIL_APART

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job
    from peftplan.job.setup import Setup

SHARED = {
    "liger": ("ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"),
    "axolotl": ("ddp", "zero1", "zero2"),
    "torchao-float8": ("fsdp2",),
    "swift-offload": ("fsdp2",),
    "fla": ("fsdp2", "zero2", "zero3"),
    **dict.fromkeys(("te", "te-norm", "torch-norm", "torch-lora", "torch-compile", "quack"), ("fsdp2",)),
    "mamba-ssm": ("fsdp2", "zero2"),
    **dict.fromkeys(
        (
            *("deepep", "deepep-again", "hybridep", "uccl", "balanced", "te-linear", "te-experts"),
            *("te-mxfp8", "te-fp8", "te-fp8-blocks", "quack-linear", "torch-compile-attn"),
        ),
        ("fsdp2",),
    ),
}
"""Package → the strategies under which its kernels were rehearsed."""
WITH_EAGER = ("axolotl.", "torchao-float8.")
"""Packages whose kernels were rehearsed beside eager attention."""
UNSLOTH_LORA = frozenset({"unsloth.lora_mlp", "unsloth.lora_qkv", "unsloth.lora_o"})
PACKED_BITS = {"gptq": (4, 8), "awq": (4,)}
"""Format of gptqmodel → the bits whose kernels were rehearsed."""
SCALED_ACTIVATIONS = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")
"""Model types in which awq divides what an activation returns (transformers, integrations/awq.py, `AWQ_SCALES_MAPPINGS`)."""
WRITTEN = ("gpt2", "gpt_bigcode")
"""Model types whose class writes first values into the weight of `c_proj`, of which a packed layer has the shape alone:
transformers raises AttributeError as it loads gptq (models/gpt2/modeling_gpt2.py:449)."""
FEWEST_OFFLOADED = 3
"""ms-swift offloads nothing of a model with fewer units (callbacks/activation_cpu_offload.py, `enable_activation_offloading`)."""
FEWEST_PACKED = 2
"""Unsloth's GRPO packs so many completions or more into one row (`_pack_active`)."""
WITH_PICTURES, ROWS_WITH_PICTURES = ("qwen3_vl", "qwen3_5"), 2
"""What was rehearsed: the cache in which Unsloth writes two rows lasts through the step, and that of three does not."""


def _embeds_compiled(setup: Setup) -> bool:
    return setup.by.embeds and kernels_of(setup.kernels or ()).layers is not None


def _patches_layers(job: Job) -> bool:
    """Whether Liger's kernels of layers run in pairs of one GPU, or score completions there without a reference, as was rehearsed
    (tests/rehearse/preferences.jsonl), or read passages (tests/rehearse/automodel_passages.jsonl)."""
    of_liger = all(name.startswith("liger.") for name in job.setup.kernels or ())
    if job.setup.by.passages is not None:
        return of_liger
    compares = job.setup.by.generates and len(job.setup.forwards) > 1
    return job.setup.by.patches_layers and of_liger and job.distributed is None and not compares


def kernels_without_formula(job: Job) -> str | None:
    """Why a step with the job's kernels has no formula; None where it has one."""
    setup, architecture = job.setup, job.architecture
    if setup.packs_completions:
        if (why := _grpo_without_formula(job)) is not None:
            return f"Unsloth's GRPO {why}"
    elif setup.of_hidden_pairs:
        kernels = kernels_of(setup.kernels or ())
        if kernels.decoder is None or kernels.padding_free is not None:
            return "pairs that Unsloth scores, with layers of the model's own or in one row"
        if setup.by.sums_rows and (job.reference != "adapter_off" or (row := recorded(job)) is None or not row.bare):
            return f"Unsloth's DPO of {architecture.name}: its layers, with adapters and without, were not recorded"
    elif setup.kernels and setup.by.of_preferences and not (_embeds_compiled(setup) or _patches_layers(job)):
        return f"kernels with {setup.by.called}"
    if not setup.kernels or setup.kernels == OF_TORCHTUNE:
        return None
    if IN_INT4 in setup.kernels and (job.distributed is None or setup.loss != "liger" or job.method_name != "full"):
        return "fake-quantized layers but of full fine-tuning under FSDP2 with Liger's loss"
    if IN_MXFP4 in setup.kernels and not _rounds_as_rehearsed(job):
        return "layers fake-quantized in MXFP4 with these options"
    if job.distributed is not None and not _rehearsed_kernels(job, job.distributed):
        return f"kernels with {job.distributed.called}"
    if not fits_blocks(job):
        return f"layers in 8 bits of {setup.rows * setup.seq_len:,} tokens, which blocks do not divide"
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
    task = architecture.task_type if setup.by.passages is None else "CAUSAL_LM"  # whose layers they are
    if (why := without_formula(setup.kernels, architecture.model_type, task)) is not None:
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
    if job.quant is not None and job.quant.name not in FOUR_BIT and not reads_8_bits(job):
        return f"LoRA kernels over {job.quant.name}"
    drops = getattr(job.config, "lora_dropout", 0) and not all(kernel.drops_outside or kernel.drops_inside for kernel in of_lora)
    return "LoRA kernels with dropout or DoRA" if drops or getattr(job.config, "use_dora", False) else None


def _offloads_as_rehearsed(job: Job) -> bool:
    """Whether activations go to the host as was rehearsed: of LoRA over 4 bits by axolotl, beside reentrant checkpoints
    (tests/rehearse/axolotl_offload.jsonl), and by SFTTrainer, beside others (tests/rehearse/trl_offload.jsonl)."""
    setup = job.setup
    if "swift-offload.activations" in (setup.kernels or ()):
        return _offloads_layers(job)
    of_lora = job.quant is not None and job.quant.name in FOUR_BIT and job.method is not None and job.method.peft_type == "LORA"
    if "trl-offload.activations" in (setup.kernels or ()):
        by_liger = all(name.startswith(("liger.", "trl-offload.")) for name in setup.kernels or ())
        alone = by_liger and setup.by.sums_tokens and job.distributed is None
        return of_lora and alone and bool(setup.gradient_checkpointing) and not setup.use_reentrant
    checkpoints = bool(setup.gradient_checkpointing) and setup.use_reentrant and not setup.offload_checkpoints
    return checkpoints and of_lora and setup.by.own_fsdp2 and setup.attn_implementation == "flash_attention_2"


def _offloads_layers(job: Job) -> bool:
    """Whether what layers save goes to the host as was rehearsed: of LoRA in bf16 by ms-swift under FSDP2, of a dense model with
    a head of its own (tests/rehearse/swift.jsonl)."""
    from peftplan.analytic.shown import is_bare, is_plain
    from peftplan.memory.unit_groups import tied

    setup, distributed = job.setup, job.distributed
    if distributed is None or distributed.strategy != "fsdp2" or FSDP2_TAIL_APART.after(distributed.accelerate):
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
            and not job.architecture.has_towers  # rows with pictures stay apart
            and setup.seq_len <= min(_windows(job), default=setup.seq_len),
            "of rows with pictures, but two of Qwen3-VL or Qwen3.5": job.architecture.has_towers
            and not (job.architecture.model_type in WITH_PICTURES and setup.generation_rows == ROWS_WITH_PICTURES),
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


def fused_by_awq(job: Job, tokens: Size) -> Fact:
    """Whether awq multiplies so few tokens by its packed weight itself: at most `FEWEST_DENSE - 1`."""
    return (tokens < FEWEST_DENSE) & (job.quant is not None and job.quant.name == "awq")


def reads_packed(job: Job) -> bool:
    """Whether gptqmodel's kernels make the products of a plain LoRA as was rehearsed on one GPU, under DDP, ZeRO and FSDP2
    (tests/rehearse/packed.jsonl)."""
    setup, quant = job.setup, job.quant
    if quant is None or quant.bits not in PACKED_BITS.get(quant.name, ()) or setup.kernels:
        return False
    if job.distributed is not None and not _divides_packed(job, job.distributed.strategy):
        return False
    if job.method is None or job.method.peft_type != "LORA" or getattr(job.config, "use_dora", False):
        return False
    if setup.by_unsloth or setup.by.own_modules or setup.by.own_decoders or setup.by.scoring is not None:
        return False
    if str(getattr(job.config, "bias", "none")).endswith("_only"):  # of a layer whose bias is a buffer, which gets a gradient
        return False
    if any(block.mlp.variant == "moe" or block.state_space or block.delta_rule for block in job.architecture.blocks):
        return False
    few = bool(fused_by_awq(job, setup.batch_size * setup.seq_len))
    return quant.name == "gptq" or not (few or job.architecture.model_type in SCALED_ACTIVATIONS)


def _divides_packed(job: Job, strategy: str) -> bool:
    """Whether such a base was rehearsed with a strategy: under ZeRO and FSDP2 of models that run Llama's operations (one of OPT
    held 0.5 % less, another 0.4 % more), under FSDP2 with checkpoints."""
    if strategy == "ddp":
        return True
    from peftplan.analytic.shown import UNDER_DEVICE_MAP  # which few jobs need

    checkpointed = bool(job.setup.gradient_checkpointing) or strategy != "fsdp2"
    return strategy in OVER_PACKED and job.architecture.model_type in UNDER_DEVICE_MAP and checkpointed


def reads_8_bits(job: Job) -> bool:
    """Whether Unsloth's LoRA kernels make every product with a weight in FP8 (unsloth 2026.10.9, kernels/fp8.py), as was
    rehearsed: weights of whole blocks, without biases."""
    if job.quant is None or job.quant.name != "fp8" or job.quant.skip_modules is not None or job.distributed is not None:
        return False
    linear = [m for m in job.architecture.modules if m.kind == "Linear" and m.name != job.architecture.output_embedding]
    in_blocks = all(size % job.quant.blocksize == 0 for m in linear for size in m.shape("weight"))
    plain = in_blocks and not any(name == "bias" for m in linear for name, _ in m.params)
    adapted = {m.name for m in linear} == {m.name for m in job.adaptation.matched}
    return plain and adapted and UNSLOTH_LORA.issubset(job.setup.kernels or ())
