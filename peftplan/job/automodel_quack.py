"""How quack-kernels' functions were rehearsed with NeMo Automodel's recipe (tests/rehearse/automodel.jsonl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.job.kernels import OF_QUACK
from peftplan.job.loss_sizes import CUT_APART

if TYPE_CHECKING:
    from peftplan.job.job import Job

SHOWN = {"llama": ("quack.rope",), "qwen2": OF_QUACK}
"""Model type → its kernels."""
WIDTHS = range(2049, 4097)
"""Hidden sizes for which the norm's backward has twice as many rows of sums as the card has multiprocessors (quack-kernels 0.6.4,
rmsnorm_config.py, `_get_sm_count_hopper`)."""


def knows_quack(job: Job) -> bool:
    """Whether they were rehearsed, if any: in full fine-tuning under FSDP2 with checkpoints, the loss that reads the head behind
    the model, and one row, which alone is turned where it lies (nemo_automodel 0.7.0, components/models/llama/rope_utils.py)."""
    setup, kernels, model_type = job.setup, job.setup.kernels or (), job.architecture.model_type
    if not set(kernels) & set(OF_QUACK):
        return True
    distributed = job.distributed
    alone = distributed is not None and {distributed.tp_size, distributed.cp_size, distributed.pp_size} <= {None, 1}
    plain = (job.method_name, setup.dtype, setup.loss, setup.rows) == ("full", "bf16", CUT_APART, 1)
    wide = "quack.rms_norm" not in kernels or job.architecture.hidden_size in WIDTHS
    shown = kernels == SHOWN.get(model_type) and bool(setup.gradient_checkpointing) and setup.attn_implementation == "sdpa"
    return alone and plain and shown and wide and setup.by.own_decoders
