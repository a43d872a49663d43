"""What a layer allocates that torch compiles whole, as rehearsals recorded it.

torch's partitioner decides what such a layer keeps for backward, and inductor which buffers are used again; both depend on all
widths of the layer and of its adapters. So a record holds for one model, rank and set of adapted modules. It is a list of events:
`8t` allocates 8 bytes per token, `8r` 8 bytes per token of a batch up to a multiple of 128, `640` allocates 640 bytes, `-3` frees
what was allocated third, and `|` stands where backward begins. What is left at the end are the gradients: that of the input, in
bytes per token, and those of the adapters. Left out: inductor's padding of rows, below 1 kB a tensor.
Source: `data/compiled_layers.json`, made by `tools/compiled_layers.py` from two rehearsals of unequal length.
"""

from typing import TYPE_CHECKING, NamedTuple

from peftplan.datafiles import load, record
from peftplan.job.kernels import kernels_of

if TYPE_CHECKING:
    from peftplan.job.job import Job

NOT_RECORDED = ("lora_dropout", "use_dora", "lora_bias", "rank_pattern", "modules_to_save", "target_parameters", "freeze_a")
"""Options of LoRA with which no step was recorded."""


class Recorded(NamedTuple):
    """The events of a layer without a graph (`forward`), and with one, up to the end of its backward (`training`).

    `output`: which allocation of `training` is the layer's result. `tuned`: after which of them the first step times kernels.
    `multiplied`: the embedding is multiplied. `wide_norm`: the result of the last norm is in fp32, as its weight is.
    """

    model: str
    r: int
    modules: tuple[str, ...]
    forward: str
    training: str
    output: int
    tuned: tuple[int, ...]
    source: str
    multiplied: bool = False
    wide_norm: bool = False


def recorded(job: "Job") -> "Recorded | None":
    """The record of a job's layers, which are all adapted by LoRA, on a base in 16 bits, under reentrant checkpoints.

    None if there is none, or if torch compiles no layers.
    """
    setup, config = job.setup, job.config
    if kernels_of(setup.kernels or ()).layers is None:
        return None
    lora = job.method is not None and job.method.peft_type == "LORA" and job.quant is None
    if not lora or any(getattr(config, name, None) for name in NOT_RECORDED):
        return None
    if not (setup.gradient_checkpointing and setup.use_reentrant) or setup.padding:
        return None
    if (setup.dtype, setup.autocast, setup.adapter_dtype) != ("bf16", "bf16", "fp32"):
        return None
    num_layers = sum(len(block.layers) for block in job.architecture.blocks)
    if any(module.copies != num_layers for module in job.adaptation.matched):  # some layers are not adapted
        return None
    modules = {module.name.rpartition(".")[2] for module in job.adaptation.matched}
    rows = (record(Recorded, row) for row in load("compiled_layers.json", list[dict[str, object]]))
    alike = (row for row in rows if set(row.modules) == modules and row.r == getattr(config, "r", None))
    return next((row for row in alike if row.model == job.architecture.name), None)
