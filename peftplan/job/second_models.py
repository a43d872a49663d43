"""What lasts of models beside the one that trains: a reference, a teacher, a reward and a value model."""

from collections.abc import Callable

from peftplan.job.job import Job
from peftplan.job.lines import buffer_lines, gradient_lines, weight_lines
from peftplan.job.teacher import VALUES, divided_teacher_of, reward_of, teacher_of, value_of
from peftplan.ledger import Ledger, Line
from peftplan.optim import Optimizer
from peftplan.parameters import Parameters
from peftplan.storage import dense

OF_REFERENCE = "trl: a second model, loaded as the policy is"
"""In the dtypes of the policy (trl `DPOTrainer.__init__`: `ref_model_init_kwargs`)."""


def second_models(job: Job, on_rank: Parameters, optimizer: Optimizer, *, states_of: Callable[[Parameters], Ledger]) -> Ledger:
    """The lines of all of them. `on_rank`: what the rank holds of the model that trains; `states_of`: the optimizer's states of
    parameters that train."""
    return (
        (_reference(job, on_rank) if job.reference == "copy" else Ledger(()))
        + _reward_model(job)
        + _value_model(job, optimizer, states_of)
        + _scoring_teacher(job)
    )


def _reference(job: Job, on_rank: Parameters) -> Ledger:
    """The lines of a reference model, or of a teacher."""
    if not job.setup.by.teaches:
        copy = as_copied(job, _of_policy(job, on_rank))
        return _named("reference model", OF_REFERENCE, *weight_lines(copy), *buffer_lines(copy))
    teacher = teacher_of(job)
    assert teacher is not None
    shards = teacher.parameters
    if job.distributed is not None:
        from peftplan.distributed.shards import holding

        autocast = str(job.setup.autocast)
        shards = holding(shards, job.distributed, teacher.architecture, autocast=autocast, upcasts=False).parameters
    source = f"{job.setup.by.called}: teacher_model"
    return _named("teacher", source, *weight_lines(shards), *buffer_lines(shards))


def _of_policy(job: Job, on_rank: Parameters) -> Parameters:
    """Without the value model's."""
    if not job.setup.by.values:
        return on_rank
    return on_rank._replace(all=tuple(p for p in on_rank.all if not p.name.startswith(VALUES)))


def _reward_model(job: Job) -> Ledger:
    """The lines of the model that scores completions."""
    if not job.setup.by.rewards:
        return Ledger(())
    reward = reward_of(job)
    assert reward is not None
    lines = (*weight_lines(reward.parameters), *buffer_lines(reward.parameters))
    return _named("reward model", f"{job.setup.by.called}: reward_model", *lines)


def _value_model(job: Job, optimizer: Optimizer, states_of: Callable[[Parameters], Ledger]) -> Ledger:
    """The lines of a value model that trains: weights, gradients and states. DeepSpeed has those beside the policy's."""
    if not job.setup.by.values:
        return Ledger(())
    values = value_of(job).parameters
    if job.distributed is not None:
        return _named("value model", None, *buffer_lines(values))
    trains = (*gradient_lines(values, optimizer), *states_of(values))
    return _named("value model", None, *weight_lines(values), *buffer_lines(values), *trains)


def _scoring_teacher(job: Job) -> Ledger:
    """The lines of a teacher that scores completions, of which each rank has a part."""
    if not job.setup.by.taught or job.distributed is None:
        return Ledger(())
    divided = divided_teacher_of(job)
    assert divided is not None
    teacher, shards = divided
    source = f"{job.setup.by.called}: teacher_model"
    return _named("teacher", source, *weight_lines(shards), *buffer_lines(teacher.parameters))


def as_copied(job: Job, policy: Parameters) -> Parameters:
    """The parameters of a second model that is made of the policy: in its dtypes, or cast to 16 bits (axolotl 0.19.0,
    core/trainers/ebft/strided.py:461); or one that is read in fp32."""
    by = job.setup.by
    if not by.block and not by.wide_reference:
        return policy
    dtype = "fp32" if by.wide_reference else job.setup.dtype
    return policy._replace(all=tuple(p._replace(dtype=dtype, allocations=dense(dtype=dtype, shape=p.shape)) for p in policy.all))


def _named(model: str, source: str | None, *lines: Line) -> Ledger:
    """Lines under the name of their model; `source`: where it comes from, in place of where each does."""
    return Ledger(tuple(line._replace(name=f"{model}: {line.name}", source=source or line.source) for line in lines))
