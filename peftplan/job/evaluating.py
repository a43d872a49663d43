"""Which evaluations have a formula: those that were rehearsed (tests/rehearse/evaluated.jsonl, axolotl_evaluated.jsonl)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.trainer_words import TrainerName

if TYPE_CHECKING:
    from peftplan.job.job import Job


class Evaluated(NamedTuple):
    """The evaluations of a trainer that were rehearsed."""

    strategies: tuple[str | None, ...]
    """None: one GPU."""
    losses: tuple[str, ...] = ("full", "trl-chunked")
    kernels: tuple[str, ...] = ()
    """How the names of kernels begin that ran."""
    task: str = "CAUSAL_LM"
    skips_logits: bool = False
    """Whether the trainer asks Liger's loss to leave logits out in an evaluation too (transformers, `prediction_step`)."""


OF_RANKS = (None, "ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
OF_LIGER = ("liger.",)
REHEARSED: Mapping[TrainerName, Evaluated] = MappingProxyType(
    {
        "transformers": Evaluated(OF_RANKS, losses=("full", "liger"), kernels=OF_LIGER, skips_logits=True),
        "trl": Evaluated(OF_RANKS, kernels=OF_LIGER),
        "trl-dpo": Evaluated((None, "ddp", "zero2", "zero3")),
        "trl-kto": Evaluated((None,)),
        "trl-reward": Evaluated((None,), task="SEQ_CLS"),
        "trl-orpo": Evaluated((None,)),
        "trl-cpo": Evaluated((None,)),
        "llamafactory": Evaluated((None,)),
        "llamafactory-dpo": Evaluated((None,)),
        "torchtune": Evaluated(("fsdp2",), losses=("full", "torchtune-linear", "torchtune-chunked")),
        "axolotl": Evaluated((None, "ddp", "fsdp1"), losses=("full", "liger"), kernels=("axolotl.", *OF_LIGER)),
    }
)


def without_formula(job: Job) -> str | None:
    """What evaluation of a job has no formula; None where its peak is counted."""
    setup, distributed = job.setup, job.distributed
    known = REHEARSED.get(setup.trainer)
    if known is not None and _is_plain(job, known.task) and setup.loss in known.losses and not setup.router_loss:
        ran = all(name.startswith(known.kernels) for name in setup.kernels or ())
        of_rows = distributed is None or not any(getattr(distributed, f"{each}_size") for each in ("tp", "pp", "cp", "sp", "ep"))
        if ran and of_rows and (None if distributed is None else distributed.strategy) in known.strategies:
            return None
    return f"an evaluation of {setup.by.called}{'' if distributed is None else f' with {distributed.called}'}"


def not_counted(job: Job) -> tuple[str, ...]:
    """What the peak of a job leaves out."""
    why = None if job.setup.eval_batch_size is None else without_formula(job)
    return () if why is None else (f"{why} is not counted (no formula yet)",)


def _is_plain(job: Job, task: str) -> bool:
    """Whether the model is a dense decoder with attention in each layer, trained in full, with LoRA or with DoRA."""
    arch = job.architecture
    dense = all(
        block.stack == "decoder" and block.mlp.variant != "moe" and not block.convolution
        and block.state_space is None and block.delta_rule is None
        for block in arch.blocks
    )  # fmt: skip
    of_lora = job.method is not None and job.method.peft_type in (None, "LORA")
    return dense and of_lora and arch.task_type == task and not arch.has_towers
