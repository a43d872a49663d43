"""The teacher of a distillation, or the model that scores completions: dense, in the dtype of the model that trains; nothing
updates its parameters."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from peftplan import parameters
from peftplan.arch.modules import Architecture
from peftplan.errors import InputError, RefusedError
from peftplan.job import sources
from peftplan.methods.full import FullConfig, full
from peftplan.parameters import Parameters
from peftplan.units import ceil_div

if TYPE_CHECKING:
    from peftplan.job.job import Job
    from peftplan.job.setup import Setup


MOST_LIVE = 10**9
"""`stage3_max_live_parameters` of the config that ms-swift ships (config/zero3.json)."""


class Teacher(NamedTuple):
    """A model and its parameters. They require gradients, as `from_pretrained` leaves them, unless the trainer freezes them:
    autocast keeps casts of those that do."""

    architecture: Architecture
    parameters: Parameters


def teacher_of(job: Job) -> Teacher | None:
    """The teacher of a job; None where it has none.

    Raises RefusedError for one of another vocabulary where the trainer does not resize it (trl, `GKDTrainer.__init__`).
    """
    return _teacher(job) if job.setup.by.teaches and job.setup.teacher_model is not None else None


def scoring_teacher_of(job: Job) -> Teacher | None:
    """The teacher that scores completions before a step; None where a job has none."""
    return _teacher(job) if job.setup.by.taught else None


def divided_teacher_of(job: Job) -> tuple[Teacher, Parameters] | None:
    """The same, and what a rank holds of it."""
    if (teacher := scoring_teacher_of(job)) is None:
        return None
    from peftplan.distributed.shards import holding

    assert job.distributed is not None
    divided = job.distributed.model_copy(update={"strategy": "zero3"})
    autocast = str(job.setup.autocast)
    return teacher, holding(teacher.parameters, divided, teacher.architecture, autocast=autocast, upcasts=False).parameters


def most_gathered(teacher: Teacher) -> tuple[int, int, int]:
    """An upper bound of what ZeRO-3 gathers of a teacher at a time, in elements: a table, and a layer's largest matrix so many
    times: what its config fetches ahead at most, and one on its way (DeepSpeed, partitioned_param_coordinator.py)."""
    every = teacher.parameters.all
    table, matrix = max(p.numel for p in every), max(p.numel for p in every if p.layers is not None)
    live = min(MOST_LIVE, sum(p.numel * p.copies for p in every) - table)
    return table, matrix, ceil_div(live, matrix) + 1


def loads_most(job: Job) -> bool:
    """Whether a job with such a teacher needs more while the teacher is whole than when it scores, where the student's states are
    there: masters and moments in fp32, which ranks share. All else is there both times."""
    divided = divided_teacher_of(job)
    assert divided is not None
    assert job.distributed is not None
    teacher, shards = divided
    whole, part = (sum(a.nbytes * p.copies for p in each.all for a in p.allocations) for each in (teacher.parameters, shards))
    states = 12 * job.adaptation.num_trainable // job.distributed.world_size
    logits = 2 * job.setup.rows * ((job.setup.max_completion_length or 0) + 1) * (teacher.architecture.vocab_size or 0)
    table, matrix, matrices = most_gathered(teacher)
    return whole - part > states + 2 * (table + matrix * matrices) + 2 * logits


def _teacher(job: Job) -> Teacher:
    setup = job.setup
    assert setup.teacher_model is not None
    student = job.architecture.vocab_size
    rows = student if setup.by.resizes_teacher else None
    by = setup.by
    described = "teacher_model", setup.teacher_model, job.second_config
    teacher = _read(*described, rows, _dtype(job), setup.trust_remote_code, by.own_modules, by.freezes_teacher)
    if student != (own := teacher.architecture.vocab_size):
        raise RefusedError(
            f"teacher_model: {setup.by.called} compares distributions over one vocabulary, not {own:,} with {student:,}"
        )
    return teacher


def _dtype(job: Job) -> str:
    """The dtype of a second model, which DeepSpeed casts as it casts the policy."""
    setup = job.setup
    in_16_bits = job.distributed is not None and job.distributed.strategy.startswith("zero") and setup.autocast != "none"
    return str(setup.autocast) if in_16_bits else setup.dtype


def reward_of(job: Job) -> Teacher | None:
    """The model that scores completions with one number each; None where the job has none."""
    setup = job.setup
    if setup.reward_model is None:
        return None
    described = "reward_model", setup.reward_model, job.second_config
    return _read(*described, None, _dtype(job), setup.trust_remote_code, False, True)


def value_of(job: Job) -> Teacher:
    """The value model, which begins as the reward model and trains."""
    reward = reward_of(job)
    assert reward is not None
    trained = tuple(p._replace(trainable=True) for p in reward.parameters.all)
    return reward._replace(parameters=reward.parameters._replace(all=trained))


VALUES = "value_model."
"""Before the names of a value model's parameters, where one engine trains them beside the policy's."""


def trained_together(job: Job, policy: Parameters) -> Parameters:
    """The parameters of the module that DeepSpeed trains: the policy's, and behind them those of a value model (trl
    `PolicyAndValueWrapper`)."""
    if not job.setup.by.values or job.distributed is None:
        return policy
    values = (p._replace(name=VALUES + p.name) for p in value_of(job).parameters.all)
    return policy._replace(all=(*policy.all, *values))


def second_config(setup: Setup) -> str | None:
    """The config of a teacher or a reward model in a file or on the Hub, as JSON; None of a built-in one, and without one.

    A job reads it once: the file may be another one for the next job.
    """
    option = "teacher_model" if setup.teacher_model is not None else "reward_model"
    if (name := getattr(setup, option)) is None:
        return None
    try:
        model = sources.read(name)
    except InputError as error:
        raise InputError(option, name, error.accepted) from None
    return json.dumps(model.config) if isinstance(model, sources.Source) else None


@lru_cache(maxsize=8)
def _read(
    option: str,
    name: str,
    config: str | None,
    rows: int | None,
    dtype: str,
    trust_remote_code: bool,
    own_modules: bool,
    frozen: bool,
) -> Teacher:
    """`config`: see `second_config`. `rows`: of its embeddings; None: as its config says. `own_modules`: torchtune builds it.
    `frozen`: none of it trains."""
    scores = option == "reward_model"
    try:
        model: object = name if config is None else sources.Source(json.loads(config), name, name)
        if rows is not None:
            model = {**sources.load_config(model), "vocab_size": rows}
        task, labels = ("SEQ_CLS", 1) if scores else ("CAUSAL_LM", None)
        architecture = sources.load(model, task_type=task, num_labels=labels, trust_remote_code=trust_remote_code)
    except InputError as error:
        raise InputError(option, name, error.accepted) from None
    if own_modules:
        from peftplan.job.built import as_torchtune_builds

        architecture = as_torchtune_builds(architecture, sources.load_config(model), adapted=False)
    adaptation = full(architecture, FullConfig())
    built = parameters.build(architecture, adaptation, dtype=dtype, adapter_dtype=dtype, quant=None, kbit_prepare=False)
    buffers = parameters.buffers(architecture, adaptation, dtype=dtype, adapter_dtype=dtype, on_host=False)
    if frozen:
        built = built._replace(all=tuple(p._replace(trainable=False) for p in built.all))
    return Teacher(architecture, built._replace(buffers=buffers))
