"""The teacher of a distillation, or the model that scores completions: dense, in the dtype of the model that trains; nothing
updates its parameters."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from peftplan import parameters
from peftplan.arch.modules import Architecture
from peftplan.errors import InputError, RefusedError
from peftplan.job import sources
from peftplan.methods.full import FullConfig, full
from peftplan.parameters import Parameters

if TYPE_CHECKING:
    from peftplan.job.job import Job


class Teacher(NamedTuple):
    """A model and its parameters. They require gradients, as `from_pretrained` leaves them, unless the trainer freezes them:
    autocast keeps casts of those that do."""

    architecture: Architecture
    parameters: Parameters


def teacher_of(job: Job) -> Teacher | None:
    """The teacher of a job; None where it has none.

    Raises RefusedError for one of another vocabulary where the trainer does not resize it (trl, `GKDTrainer.__init__`).
    """
    setup = job.setup
    if setup.teacher_model is None:
        return None
    student = job.architecture.vocab_size
    rows = student if setup.by.resizes_teacher else None
    in_16_bits = job.distributed is not None and job.distributed.strategy.startswith("zero") and setup.autocast != "none"
    dtype = str(setup.autocast) if in_16_bits else setup.dtype  # DeepSpeed casts it
    by = setup.by
    teacher = _read(
        "teacher_model", setup.teacher_model, rows, dtype, setup.trust_remote_code, by.own_modules, by.freezes_teacher
    )
    if student != (own := teacher.architecture.vocab_size):
        raise RefusedError(
            f"teacher_model: {setup.by.called} compares distributions over one vocabulary, not {own:,} with {student:,}"
        )
    return teacher


def reward_of(job: Job) -> Teacher | None:
    """The model that scores completions with one number each; None where the job has none."""
    setup = job.setup
    if setup.reward_model is None:
        return None
    return _read("reward_model", setup.reward_model, None, setup.dtype, setup.trust_remote_code, False, True)


@lru_cache(maxsize=8)
def _read(
    option: str, name: str, rows: int | None, dtype: str, trust_remote_code: bool, own_modules: bool, frozen: bool
) -> Teacher:
    """`rows`: of its embeddings; None: as its config says. `own_modules`: torchtune builds it. `frozen`: none of it trains."""
    scores = option == "reward_model"
    try:
        model = sources.read(name)
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
