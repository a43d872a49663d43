"""Which jobs have formulas for kernels of other packages."""

from __future__ import annotations

from peftplan.job.job import Job
from peftplan.job.kernels import KERNELS, Lora, kernels_of, without_formula
from peftplan.memory.parts import FOUR_BIT


def kernels_without_formula(job: Job) -> str | None:
    """Why a step with the job's kernels has no formula; None where it has one."""
    setup, architecture = job.setup, job.architecture
    if not setup.kernels:
        return None
    if job.distributed is not None:
        return f"kernels with {job.distributed.called}"
    if setup.by.of_preferences:
        return f"kernels with {setup.by.called}"
    if setup.attn_implementation == "eager":
        return "kernels with eager attention"
    if (why := without_formula(setup.kernels, architecture.model_type, architecture.task_type)) is not None:
        return why
    if kernels_of(setup.kernels).decoder is not None:
        windows = [a.window for block in architecture.blocks for a in block.attentions if a.window]
        if windows and setup.seq_len > min(windows):
            return f"unsloth's kernels with a sequence above the window of {min(windows):,} tokens"
        if setup.autocast != setup.dtype:
            return f"unsloth's kernels in {setup.dtype} with autocast {setup.autocast}"
    of_lora = [kernel for name in setup.kernels if isinstance(kernel := KERNELS[name], Lora)]
    if not of_lora or job.method is None or job.method.peft_type != "LORA":
        return None
    if setup.autocast not in ("none", setup.dtype):
        return f"LoRA kernels in {setup.dtype} with autocast {setup.autocast}"
    if job.quant is not None and job.quant.name not in FOUR_BIT:
        return f"LoRA kernels over {job.quant.name}"
    drops = getattr(job.config, "lora_dropout", 0) and not all(kernel.drops_outside for kernel in of_lora)
    return "LoRA kernels with dropout or DoRA" if drops or getattr(job.config, "use_dora", False) else None
