"""axolotl casts the embedding and the head to fp32 while it loads a model to be adapted, and back, one after the other.

Source: axolotl 0.19.0, loaders/model.py:446 and :486 (`_convert_embedding_modules_dtype`). Rehearsed: `axolotl train` with QLoRA,
and on ranks; on one GPU it loads a dense model on the host. Left out: norms, which are cast too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.loaded import Handle, Loader, Memory, Whole

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.setup import Setup
    from peftplan.parameters import Parameters
    from peftplan.storage import QuantConfig

SOURCE = "axolotl 0.19.0, loaders/model.py:446"
TABLES = ("embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings")
"""Parts of names of what is cast (loaders/utils.py:306, `get_linear_embedding_layers`)."""
WHOLE = ("ddp", "zero1", "zero2")
"""Strategies under which a rank casts the whole model on its GPU."""


def is_recast(setup: Setup, quant: QuantConfig | None, distributed: Distributed | None, *, adapted: bool) -> bool:
    """Whether a job casts these on the GPU, and not for good (`kbit_prepare`)."""
    on_device = quant is not None if distributed is None else distributed.strategy in WHOLE
    lasts = quant is not None and bool(setup.kbit_prepare)
    return setup.by.recasts_tables and adapted and on_device and not lasts and setup.dtype != "fp32"


def is_table(name: str) -> bool:
    """Whether a weight of this name is cast."""
    return any(part in name for part in TABLES)


def tables_of(parameters: Parameters) -> tuple[int, ...]:
    """Elements of each weight that is cast."""
    return tuple(p.numel for p in parameters.all if p.owner == "base" and is_table(p.name))


def load_recast(memory: Memory[Handle], *, load: Loader, of_base: Loader, tables: tuple[int, ...]) -> None:
    """The casts, beside the base alone; and then loading as it ends. `tables`: elements of what is cast."""
    whole = Whole(memory, {})
    of_base(whole)
    copies = [whole.taken(ITEMSIZE["bf16"] * numel) for numel in tables]
    for dtype in ("fp32", "bf16"):
        for place, numel in enumerate(tables):
            after = memory.allocate(ITEMSIZE[dtype] * numel)
            memory.release(copies[place])
            copies[place] = after
    for handle in copies:
        memory.release(handle)
    whole.drop([nbytes for nbytes, handles in whole.handles.items() for _ in handles])
    memory.empty_cache()
    load(memory)
