"""axolotl before 0.21 casts the embedding and the head of a model to be adapted to fp32 and back while it loads, one by one.

Source: axolotl 0.19.0, loaders/model.py:446 and :486 (`_convert_embedding_modules_dtype`). Rehearsed: `axolotl train` with QLoRA,
and on ranks; on one GPU it loads a dense model on the host. Left out: norms, which are cast too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peftplan.job.trainer import TABLES
from peftplan.memory.loaded import Handle, Loader, Memory, Whole
from peftplan.parameters import Parameters
from peftplan.storage import dense

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


def load_narrowed(memory: Memory[Handle], *, load: Callable[..., None], parameters: Parameters, names: tuple[str, ...]) -> None:
    """Loading with tables in fp32, which trl casts to 16 bits once the adapters are there (0.11.4, trainer/utils.py:861)."""
    tables = [p for p in parameters.all if p.owner == "base" and not p.quantized and any(part in p.name for part in names)]
    wide = {id(p): p._replace(dtype="fp32", allocations=dense(dtype="fp32", shape=p.shape)) for p in tables}
    whole = Whole(memory, {})
    load(whole, parameters=parameters._replace(all=tuple(wide.get(id(p), p) for p in parameters.all)))
    for p in tables:
        memory.keep(tuple(a.nbytes for a in p.allocations))
        whole.drop([a.nbytes for a in wide[id(p)].allocations])


def load_recast(memory: Memory[Handle], *, load: Loader, of_base: Loader) -> None:
    """The base alone with its casts (`of_base`), and then loading as it ends."""
    whole = Whole(memory, {})
    of_base(whole)
    whole.drop([nbytes for nbytes, handles in whole.handles.items() for _ in handles])
    memory.empty_cache()
    load(memory)
