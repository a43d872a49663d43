"""DeepSpeed's ZeRO: its flat groups and their partitions, its buckets, and what a rank holds of them between steps.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py, config.py; transformers, trainer.py and
integrations/deepspeed.py. W ranks, N parameters, T of them trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from peftplan.distributed.strategy import Distributed
from peftplan.parameters import Parameter
from peftplan.units import ceil_div

ALIGNMENT = 2
"""`nccl_start_alignment_factor`: flat groups are padded to a multiple of so many elements per rank (stage_1_and_2.py)."""
REDUCE_BUCKET, PERSISTENCE = 500_000_000, 100_000
"""DeepSpeed's own values, in elements (runtime/zero/config.py)."""
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names of parameters without weight decay, which transformers' Trainer puts into a group of their own
(`Trainer.get_decay_parameter_names`)."""


def reduce_bucket(distributed: Distributed, hidden_size: int) -> int:
    """Elements of the reduce bucket; `auto` is h² (transformers, integrations/deepspeed.py)."""
    value = distributed.reduce_bucket_size
    return REDUCE_BUCKET if value is None else hidden_size**2 if value == "auto" else value


def persistence(distributed: Distributed, hidden_size: int) -> int:
    """Parameters of at most so many elements stay whole under ZeRO-3; `auto` is 10 h."""
    value = distributed.stage3_param_persistence_threshold
    return PERSISTENCE if value is None else 10 * hidden_size if value == "auto" else value


def overlaps(distributed: Distributed) -> bool:
    """Whether gradients are reduced on a stream of their own while backward runs; unset it is so under ZeRO-3 alone."""
    return distributed.strategy == "zero3" if distributed.overlap_comm is None else distributed.overlap_comm


def groups_of(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """The optimizer's parameter groups, those with weight decay first; DeepSpeed drops one that is empty."""
    trained = [p for p in parameters if p.trainable]
    groups = [[p for p in trained if bool(UNDECAYED.search(p.name)) is undecayed] for undecayed in (False, True)]
    return [group for group in groups if group]


def partition(group: Iterable[Parameter], world_size: int) -> int:
    """Elements of a rank's part of a flat group under ZeRO-1 and ZeRO-2: padded, so that all parts are equal."""
    return ceil_div(sum(p.copies * p.numel for p in group), ALIGNMENT * world_size) * ALIGNMENT
