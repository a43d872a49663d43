"""What layers allocate that torch compiles whole, as rehearsals of the package that does so recorded it.

torch's partitioner decides what such a layer keeps for backward, and its inductor what is written over, by all widths of the
layer and of its adapters. So a record holds for one model, rank and set of adapted modules. It is a list of events: `8t`
allocates 8 bytes per token, `640` so many bytes, `-3` frees what was allocated third; backward begins behind the bar. What is
left at its end are the gradients, that of the input in tokens. Left out: inductor's padding of rows, below 1 kB for a tensor.
Source: `data/compiled_layers.json`, which `tools/compiled_layers.py` makes of two rehearsals of unequal length.
"""

from typing import TYPE_CHECKING, NamedTuple

from peftplan.datafiles import load, record

if TYPE_CHECKING:
    from peftplan.job.job import Job

UNLIKE = ("lora_dropout", "use_dora", "lora_bias", "rank_pattern", "modules_to_save", "layers_to_transform", "target_parameters")
"""Options of LoRA whose steps were not recorded."""


class Recorded(NamedTuple):
    """The events of a layer. `output` is the number of its result in `training`, `tuned` after which allocations of `training`
    the first step times kernels."""

    model: str
    r: int
    modules: tuple[str, ...]
    forward: str
    training: str
    output: int
    tuned: tuple[int, ...]
    source: str


def recorded(job: "Job") -> "Recorded | None":
    """The record of a job's layers: with LoRA, on a base in 16 bits under reentrant checkpoints. None if there is none."""
    setup, config = job.setup, job.config
    lora = job.method is not None and job.method.peft_type == "LORA" and job.quant is None
    if not lora or any(getattr(config, name, None) for name in UNLIKE):
        return None
    if not (setup.gradient_checkpointing and setup.use_reentrant) or setup.padding:
        return None
    if (setup.dtype, setup.autocast, setup.adapter_dtype) != ("bf16", "bf16", "fp32"):
        return None
    modules = {module.name.rpartition(".")[2] for module in job.adaptation.matched}
    rows = (record(Recorded, row) for row in load("compiled_layers.json", list[dict[str, object]]))
    alike = (row for row in rows if set(row.modules) == modules and row.r == getattr(config, "r", None))
    return next((row for row in alike if row.model == job.architecture.name), None)
