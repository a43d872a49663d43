"""axolotl casts the embedding and the head to fp32 while it loads a model to be adapted, and back, one after the other.

Source: axolotl 0.19.0, loaders/model.py:446 and :486 (`_convert_embedding_modules_dtype`). Rehearsed: `axolotl train` with QLoRA,
and on ranks; on one GPU it loads a dense model on the host. Left out: norms, which are cast too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.job.trainer import TABLES
from peftplan.memory.loaded import Handle, Loader, Memory, Whole

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.setup import Setup
    from peftplan.storage import QuantConfig

SOURCE = "axolotl 0.19.0, loaders/model.py:446"
WHOLE = ("ddp", "zero1", "zero2")
"""Strategies under which a rank casts the whole model on its GPU."""


def is_recast(setup: Setup, quant: QuantConfig | None, distributed: Distributed | None, *, adapted: bool) -> bool:
    """Whether a job casts these on the GPU."""
    on_device = quant is not None if distributed is None else distributed.strategy in WHOLE
    return setup.by.recasts_tables and adapted and on_device and setup.dtype != "fp32"


def is_table(name: str) -> bool:
    """Whether a weight of this name is cast."""
    return any(part in name for part in TABLES)


def load_recast(memory: Memory[Handle], *, load: Loader, of_base: Loader) -> None:
    """The base alone with its casts (`of_base`), and then loading as it ends."""
    whole = Whole(memory, {})
    of_base(whole)
    whole.drop([nbytes for nbytes, handles in whole.handles.items() for _ in handles])
    memory.empty_cache()
    load(memory)
