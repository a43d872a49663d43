"""Which jobs of a family have a formula that was compared with rehearsals and traces: Gemma 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.mixers import PLAIN_TRAINERS
from peftplan.errors import NeedsTraceError, NoEngineError, NoRankFormulaError, RefusedError
from peftplan.job.automodel import builds
from peftplan.job.beside_towers import knows_tower
from peftplan.job.kernels import kernels_of
from peftplan.memory.attention import MAX_FLASH_HEAD

if TYPE_CHECKING:
    from peftplan.job.job import Job

GEMMA4 = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")


def check_family(job: Job) -> None:
    """Raise where a step of Gemma 4 was not compared; RefusedError where flash attention has no kernel for its heads."""
    setup, model_type = job.setup, job.architecture.model_type
    if model_type not in GEMMA4 or kernels_of(setup.kernels or ()).layers is not None:
        return
    by_tool = job.setup.by.own_lora and knows_tower(job)
    if job.distributed is not None and not by_tool and not _knows_shared(job, job.distributed.strategy):
        raise NoRankFormulaError(f"a step with {job.distributed.called} and model type {model_type}")
    widest = max((a.head_dim for block in job.architecture.blocks for a in block.attentions), default=0)
    if setup.attn_implementation == "flash_attention_2" and widest > MAX_FLASH_HEAD:
        raise RefusedError(f"attn_implementation: flash-attn has no kernel for heads of {widest} numbers; accepted: eager, sdpa")
    if job.adaptation.rests:
        raise NoEngineError(f"layers that take turns in model type {model_type} (no formula yet)")
    from peftplan.methods.bottleneck import BOTTLENECKS

    unknown = {
        "kernels": bool(setup.kernels) and not builds(job),
        f"loss {setup.loss}": setup.loss not in ("full", "trl-chunked"),
        "reentrant checkpoints": bool(setup.gradient_checkpointing and setup.use_reentrant),
        "checkpoints in host memory": bool(setup.offload_checkpoints),
        "another release of transformers": job.script.transformers is not None,
        f"method {job.method_name}": not (job.is_full_or_lora or by_tool) or job.method_name in BOTTLENECKS,
        f"a base in {job.quant and job.quant.name}": job.quant is not None and job.quant.name != "nf4",
        f"autocast {setup.autocast}": setup.autocast == "fp16" or setup.dtype == "fp16",
    }
    if (what := next((what for what, is_so in unknown.items() if is_so), None)) is not None:
        raise NeedsTraceError(f"model type {model_type} with {what}")
    if setup.by.name not in PLAIN_TRAINERS and not by_tool:
        raise NoEngineError(f"model type {model_type} and {setup.by.called} (no formula yet)")


def _knows_shared(job: Job, strategy: str) -> bool:
    """Whether Gemma 4 was rehearsed on a rank like this one (tests/rehearse/idle_towers.jsonl, text_parts.jsonl): dense under
    ZeRO, and so under FSDP without keys that layers borrow; LoRA of experts under ZeRO and FSDP2."""
    from peftplan.analytic.idle_towers import SHARED_TEXT_PARTS  # which few jobs need
    from peftplan.analytic.shown import FLAT
    from peftplan.analytic.text_parts import knows_wrapped

    if any(block.mlp.variant == "moe" for block in job.architecture.blocks):
        return job.quant is None and (
            strategy == "ddp" or (strategy in (*FLAT, "zero3", "fsdp2") and job.method_name in ("lora", "rslora"))
        )
    borrows = any(a.borrows for block in job.architecture.blocks for a in block.attentions)
    return strategy in SHARED_TEXT_PARTS or (knows_wrapped(job) and not borrows)
