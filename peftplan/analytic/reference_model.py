"""The model that a trainer compares the policy with, or the value model that trains beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.memory.model import Model
from peftplan.memory.parts import NO_KERNELS
from peftplan.methods.adaptation import Adaptation

if TYPE_CHECKING:
    from peftplan.job.job import Job


def reference_of(job: Job, policy: Model) -> Model | None:
    """The reference model on the policy's tape: a second one, or the policy with its adapter switched off. The value model where
    one trains.

    None of its layers is checkpointed (trl `disable_gradient_checkpointing`).
    """
    if job.reference == "none" and not job.setup.by.values:
        return None
    running = policy.running._replace(peft_type=None, config=None, checkpointing=False, hosted=False)
    if job.setup.by.teaches and job.reference == "copy":
        from peftplan.job.teacher import teacher_of

        teacher = teacher_of(job)
        assert teacher is not None
        # trl's GKDTrainer leaves `use_cache` to the teacher's config
        caches = running.use_cache if job.setup.by.freezes_teacher else job.setup.loss == "full"
        parts = (
            policy.tape,
            teacher.architecture,
            teacher.parameters,
            Adaptation(),
            running._replace(use_cache=caches, without_loss=True),
        )
        return Model(*parts, None, stacks=policy.stacks)
    if job.setup.by.values:
        from peftplan.job.teacher import VALUES, value_of

        values = value_of(job)
        parts = (policy.tape, values.architecture, values.parameters, Adaptation(), running)
        return Model(*parts, None, stacks=policy.stacks, prefix=VALUES)
    base = tuple(p for p in policy.parameters.all if p.owner == "base")
    if job.setup.by.wide_reference and job.reference == "copy":
        from peftplan.job.second_models import as_copied

        base = as_copied(job, policy.parameters._replace(all=base)).all
        running = running._replace(attention="sdpa", dtype="fp32")
    if job.setup.by.patches_layers and job.reference == "copy":  # rotation is a function of the model's file, which both call
        running = running._replace(kernels=NO_KERNELS._replace(rope=running.kernels.rope))
    if job.reference == "adapter_off":
        base = tuple(p._replace(trainable=False) for p in base)
    if job.setup.by.anchors:  # called without labels, and with a KV cache (model/model_utils/kv_cache.py:31)
        running = running._replace(without_loss=True, use_cache=True)
    outputs = policy.running.token_outputs if job.reference == "adapter_off" else ()  # trl `add_fused_lm_head(self.ref_model)`
    return Model(
        policy.tape,
        policy.arch,
        policy.parameters._replace(all=base),
        policy.adaptation,
        running._replace(token_outputs=outputs),
        policy.quant,
        stacks=policy.stacks,
    )
