"""axolotl casts the embedding and the head to fp32 while it loads a model to be adapted, and back, one after the other.

Source: axolotl 0.19.0, loaders/model.py:446 and :486 (`_convert_embedding_modules_dtype`). Rehearsed: `axolotl train` with QLoRA,
and on ranks; on one GPU it loads a dense model on the host. Left out: norms, which are cast too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.distributed.order import tensors
from peftplan.dtypes import ITEMSIZE
from peftplan.job.trainer import TABLES
from peftplan.memory.loaded import Handle, Loader, Memory, Whole
from peftplan.storage import dense

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.setup import Setup
    from peftplan.parameters import Parameters
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


def tables_of(parameters: Parameters) -> tuple[int, ...]:
    """Elements of each weight that is cast."""
    return tuple(p.numel for p in parameters.all if p.owner == "base" and is_table(p.name))


def unprepared(base: Parameters, *, dtype: str) -> tuple[Parameters, tuple[int, ...]]:
    """The base as it arrives, and the elements of each weight that kbit preparation leaves in fp32."""
    lasting = [not p.quantized and p.dtype == "fp32" != dtype for p in base.all]
    arriving = [
        p._replace(dtype=dtype, allocations=dense(dtype=dtype, shape=p.shape)) if lasts else p
        for p, lasts in zip(base.all, lasting, strict=True)
    ]
    wide = [p for p, lasts in zip(base.all, lasting, strict=True) if lasts]
    return base._replace(all=tuple(arriving)), tuple(p.numel for p, _ in tensors(wide))


def load_recast(
    memory: Memory[Handle], *, load: Loader, of_base: Loader, tables: tuple[int, ...], widened: tuple[int, ...] = ()
) -> None:
    """The casts, beside the base alone; and then loading as it ends. `tables`: elements of what is cast and cast back; `widened`:
    of what kbit preparation casts for good, between the two (peft 0.20, utils/other.py, `prepare_model_for_kbit_training`)."""
    whole = Whole(memory, {})
    of_base(whole)
    copies = [whole.taken(ITEMSIZE["bf16"] * numel) for numel in tables]
    for dtype in ("fp32", "bf16"):
        if dtype == "bf16":
            for numel in widened:
                wide = memory.allocate(ITEMSIZE["fp32"] * numel)
                memory.release(whole.taken(ITEMSIZE["bf16"] * numel))
                copies.append(wide)
            if widened:
                memory.empty_cache()
        for place, numel in enumerate(tables):
            after = memory.allocate(ITEMSIZE[dtype] * numel)
            memory.release(copies[place])
            copies[place] = after
    for handle in copies:
        memory.release(handle)
    whole.drop([nbytes for nbytes, handles in whole.handles.items() for _ in handles])
    memory.empty_cache()
    load(memory)
