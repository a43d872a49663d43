"""`inspect`: the modules of a model as rows, with what a target pattern would match."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import peftplan.methods as methods
from peftplan.arch.modules import Architecture, Module
from peftplan.dtypes import ITEMSIZE, MODEL_DTYPES, parse_dtype
from peftplan.errors import InputError
from peftplan.frames import as_html, dataframe
from peftplan.job import sources
from peftplan.methods.endless import refuse_endless
from peftplan.methods.lora import LoraConfig
from peftplan.methods.targets import match, resolve_targets
from peftplan.units import round512

if TYPE_CHECKING:
    from pandas import DataFrame


class Row(NamedTuple):
    """One module, or one family of `copies` of them; `num_parameters` and `bytes` are those of all copies, ties excluded."""

    name: str
    kind: str
    shapes: str
    copies: int
    num_parameters: int
    bytes: int
    matched: int
    """How many of the copies the pattern matches."""


@dataclass(frozen=True)
class Inspection:
    """The rows of a model, in the order of its modules, and how the pattern was resolved."""

    architecture: Architecture
    dtype: str
    rows: tuple[Row, ...]
    pattern: str | None
    targets: tuple[str, ...] | str | None

    def records(self) -> list[dict[str, object]]:
        """One row per module or family, which pandas and polars accept."""
        return [{**row._asdict(), "name": row.name.replace("{}", "*")} for row in self.rows]

    def to_dict(self) -> dict[str, object]:
        """The JSON."""
        arch = self.architecture
        return {
            "name": arch.name,
            "model_class": arch.model_class,
            "num_parameters": arch.num_parameters,
            "dtype": self.dtype,
            "targets": list(self.targets) if isinstance(self.targets, tuple) else self.targets,
            "modules": self.records(),
        }

    def to_dataframe(self) -> DataFrame:
        """`records()` as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)


def inspect(
    model: object,
    *,
    pattern: str | None = None,
    expand: bool = False,
    dtype: str = "bf16",
    task_type: str | None = None,
    num_labels: int | None = None,
) -> Inspection:
    """The module tree of `model` (as for `estimate`): shapes, copies, parameters and bytes of each family of modules.

    `pattern`: a LoRA `target_modules`, whose matches are counted. `expand`: one row per module instead of per family. `dtype`:
    that of the weights, for their bytes; each tensor is rounded as the allocator rounds it.

    Raises InputError or UnknownNameError for an unknown model or dtype, or a pattern that matches nothing.
    """
    dtype = parse_dtype(dtype, accepted=MODEL_DTYPES)
    arch = sources.load(model, task_type=task_type, num_labels=num_labels)
    targets, matched = None, {}
    if pattern is not None:
        try:
            _, config = methods.configure("lora", {"target_modules": pattern})
            assert isinstance(config, LoraConfig)
            refuse_endless(arch, {"target_modules": config.target_modules})
            targets = resolve_targets(arch, config.target_modules, peft_type="LORA")
            matched = {m.name: frozenset(m.names()) for m in match(arch, config, targets)}
        except InputError as error:
            raise error.named("pattern") from None
    rows = []
    for module in arch.modules:
        hits = matched.get(module.name, frozenset())
        if expand:
            rows += [_row(arch, module, name, 1, dtype, int(name in hits)) for name in module.names()]
        else:
            rows.append(_row(arch, module, module.name, module.copies, dtype, len(hits)))
    return Inspection(arch, dtype, tuple(rows), pattern, targets)


def _row(arch: Architecture, module: Module, name: str, copies: int, dtype: str, matched: int) -> Row:
    owned = arch.owned_params(module)
    tied = {param for param, _ in module.params} - {param for param, _ in owned}
    shapes = ", ".join(
        f"{param} {'×'.join(map(str, shape))}{' (tied)' if param in tied else ''}" for param, shape in module.params
    )
    numels = [prod(shape) for _, shape in owned]
    num_bytes = sum(round512(ITEMSIZE[dtype] * numel) for numel in numels)
    return Row(name, module.kind, shapes, copies, copies * sum(numels), copies * num_bytes, matched)
