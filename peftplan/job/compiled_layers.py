"""What a layer allocates that torch compiles whole, as rehearsals recorded it.

torch's partitioner decides what such a layer keeps for backward, and inductor which buffers are used again; both depend on all
widths of the layer and of its adapters. So a record holds for one model, rank and set of adapted modules, or for one model of
which all trains, with or without fake-quantized weights. It is a list of events: `8t` allocates 8 bytes per token, `8t%128` 8
bytes per token of a batch up to a multiple of 128, `8r%128` of each row, `2q` 2 bytes per pair of tokens, the second ones up to
the next multiple of 8, `2a` up to a multiple of 8, `2m` as `2q` but of one row, `2p` per pair of tokens of one row, `8t^100` 8
bytes per token of 100 at least, `640` allocates 640 bytes, `-3` frees what was allocated third, and `|` stands where backward
begins. What is left at the end are the gradients: that of the input, in bytes per token, and those of what trains. What is left
of forward besides its result lasts until the layer's next forward: scales of fake quantization. Left out: inductor's padding of
rows, below 1 kB a tensor, and how its partial sums grow with the batch, below 4 MiB; of experts that run one after the other, how
a few numbers per row grow; and of rows that became one, what flash attention's backward allocates for each of them besides.
Source: `data/compiled_layers.json`, made by `tools/compiled_layers.py` from two rehearsals of unequal length.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from peftplan.arch.text_part import is_in_text_part
from peftplan.datafiles import load, record
from peftplan.job.kernels import kernels_of

if TYPE_CHECKING:
    from peftplan.job.job import Job

NOT_RECORDED = ("use_dora", "lora_bias", "rank_pattern", "freeze_a", "freeze_adapter")
"""Options of LoRA with which no step was recorded."""
OUTSIDE = {"embed_tokens", "lm_head"}
"""What may train beside recorded layers (`modules_to_save`)."""
MASK = "2q"
"""Attention's mask in 16 bits, in a record."""
BLOCK_OF_FLEX = 128
"""Rows of flex attention are padded to a multiple of it (unsloth_zoo, temporary_patches/gpt_oss.py), prompts and completions
each (unsloth, models/rl.py:3510)."""
LONG = 1000 * BLOCK_OF_FLEX
"""Tokens of a row of which this padding is less than 0.1 %."""


class Events(NamedTuple):
    """What a layer does without a graph (`forward`), and with one, up to the end of its backward (`training`).

    `output`: which allocation of `training` is the layer's result.
    """

    forward: str
    training: str
    output: int

    @property
    def result(self) -> str:
        """The layer's result."""
        return [event for event in self.training.split() if event[0] not in "-|"][self.output - 1]


class Recorded(NamedTuple):
    """The events of a layer without a graph (`forward`), and with one, up to the end of its backward (`training`).

    `output`: which allocation of `training` is the layer's result. `tuned`: after which of them the first step times kernels;
    `3:8t` over a copy of so many bytes. `timed`: the layer in whose backward, where it is not the last. `r`: the rank of
    adapters; None where all weights train. `modules`: what they adapt. `scheme`: that of the fake quantization. `multiplied`: the
    embedding is multiplied. `wide_norm`: the result of the last norm is in fp32, as its weight is. `by_function`: the loss is
    that of `memory.unsloth_function_loss`; with `loss_op_by_op`, uncompiled. `in_16_bits`: of a base in NF4, the modules left
    out. `first`: what the first layer does (forward, training, output), whose input is in 16 bits where results are in fp32.
    `generates`: the rows are prompts with completions that the policy wrote, with a mask of them and no pictures (unsloth_zoo,
    `grpo_accumulated_loss`). `rows`: the rows of a batch stay apart, each full. `others`: the numbers of layers that do something
    else, and what (forward, training, output). `adapted`: how many layers have an adapter of this name, where it is not all.
    `of_pairs`: the rows are one column of pairs of texts. Not `checkpointed`: a layer's input stays until its backward is done.
    `dropout`: adapters have one. `tiles`: the MLP runs over tiles of tokens, of which the record has two: later ones do what the
    second does. `unread_mask`: the model makes a mask of all pairs of tokens, which no layer reads. `wide_tables`: its rotary
    tables are in fp32. `bare`: the forward of a reference, without adapters.
    """

    model: str
    forward: str
    training: str
    output: int
    tuned: tuple[int | str, ...]
    source: str
    r: int | None = None
    modules: tuple[str, ...] = ()
    scheme: str = ""
    multiplied: bool = False
    wide_norm: bool = False
    by_function: bool = False
    in_16_bits: tuple[str, ...] | None = None
    first: tuple[str, str, int] | None = None
    generates: bool = False
    rows: bool = False
    others: tuple[tuple[Collection[int], str, str, int], ...] = ()
    adapted: Mapping[str, int] = MappingProxyType({})
    of_pairs: bool = False
    timed: int | None = None
    checkpointed: bool = True
    dropout: bool = False
    tiles: bool = False
    unread_mask: bool = False
    wide_tables: bool = False
    loss_op_by_op: bool = False
    bare: str = ""

    @property
    def stored(self) -> tuple[str, bool, set[str]] | None:
        """How the base is stored: the format, whether its scales are quantized too, and the modules left out."""
        return None if self.in_16_bits is None else ("nf4", True, set(self.in_16_bits))

    @property
    def of(self) -> tuple[object, ...]:
        """What a job must have for the record to hold."""
        adapted = self.r, set(self.modules)
        by = self.generates, self.of_pairs, self.checkpointed, self.dropout, self.tiles
        return (self.model, self.scheme, self.rows, *adapted, self.stored, *by)

    def of_layer(self, number: int) -> Events:
        """What a layer does, by its place."""
        if (kind := self.kind(number)) > 0:
            return Events(*self.others[kind - 1][1:])
        return Events(self.forward, self.training, self.output) if number or self.first is None else Events(*self.first)

    def kind(self, number: int) -> int:
        """Layers of one kind do the same."""
        return next((kind for kind, (layers, *_) in enumerate(self.others, 1) if number in layers), 0)


def recorded(job: "Job") -> "Recorded | None":
    """The record of a job's layers, in 16 bits under reentrant checkpoints, of which all are adapted by LoRA or all train.

    None if there is none, or if torch compiles no layers.
    """
    setup, config = job.setup, job.config
    layers = kernels_of(setup.kernels or ()).layers
    if layers is None or job.method is None or any(getattr(config, name, None) for name in NOT_RECORDED):
        return None
    if not OUTSIDE.issuperset(getattr(config, "modules_to_save", None) or ()) or getattr(config, "bias", "none") != "none":
        return None
    checkpointed = bool(setup.gradient_checkpointing and setup.use_reentrant)
    kept = not setup.gradient_checkpointing
    if not (kept or checkpointed) or setup.padding or setup.dtype != "bf16":
        return None
    modules: set[str] = set()
    copies: Counter[str] = Counter()
    if job.method.peft_type == "LORA":
        matched = job.adaptation.matched
        for module in matched:
            if setup.by.embeds or is_in_text_part(job.architecture, module.name):
                copies[module.leaf] += module.copies
        modules = set(copies) | {name.rpartition(".")[2] for name in getattr(config, "target_parameters", None) or ()}
        if not modules or (setup.autocast, setup.adapter_dtype) != ("bf16", "fp32"):
            return None
    elif job.method.name != "full" or setup.autocast != "none":
        return None
    quant = None if job.quant is None else (job.quant.name, job.quant.double_quant, set(job.quant.skip_modules or ()))
    rank = getattr(config, "r", None) if modules else None
    of_texts = setup.by.generates and not job.architecture.has_towers  # rows with pictures stay apart, as where nobody writes
    by = of_texts, setup.by.embeds, checkpointed, bool(getattr(config, "lora_dropout", 0)), layers.tiles
    wanted = (job.architecture.name, layers.scheme, layers.rows, rank, modules, quant, *by)
    rows = (record(Recorded, row) for row in load("compiled_layers.json", list[dict[str, object]]))
    row = next((row for row in rows if row.of == wanted and _all_adapted(job, copies, row)), None)
    if row is not None and row.rows and MASK in row.training and setup.batch_size > 1:
        return None  # recorded of one row
    if row is not None and row.tiles and (setup.batch_size > 1 or setup.seq_len < 2 * (job.architecture.hidden_size or 0)):
        return None  # recorded of one row of two tiles or more
    if row is not None and layers.by_function:
        row = row._replace(by_function=True)
    padded = row is not None and (row.generates or setup.seq_len % BLOCK_OF_FLEX == 0 or setup.seq_len >= LONG)
    return None if row is not None and (row.first is not None or row.tiles) and not padded else row


def _all_adapted(job: "Job", copies: Mapping[str, int], row: Recorded) -> bool:
    """Whether as many layers are adapted as in the record."""
    num_layers = sum(len(block.layers) for block in job.architecture.blocks)
    return all(number == row.adapted.get(name, num_layers) for name, number in copies.items())


def keeps_cache(job: "Job") -> bool:
    """Whether the cache in which the policy wrote its completions lasts: Unsloth asks transformers for a static one, which the
    model holds (unsloth 2026.10.9, models/vision.py:2077; transformers, generation/utils.py, `_cache`). Linear attention has
    none: its cache grows, and ends with the generation."""
    grows = any(block.delta_rule is not None for block in job.architecture.blocks)
    return job.setup.packs_completions and job.architecture.has_towers and not (job.setup.use_vllm or grows)
