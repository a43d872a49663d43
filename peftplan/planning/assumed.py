"""What a result depends on, in words: every assumed value, notes on surprises, and what the numbers leave out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, cast

from peftplan import parameters
from peftplan.arch.modules import Architecture
from peftplan.dtypes import AS_LOADED, OF_CHECKPOINT
from peftplan.job.job import Job
from peftplan.job.repositories import PACKED
from peftplan.job.script import EXAMPLES
from peftplan.job.sources import checkpoint_dtype, load_config
from peftplan.job.tasks import OF_TOKENS, PICTURES, head_notes, task_notes
from peftplan.methods.adaptation import MethodConfig
from peftplan.storage import QuantConfig
from peftplan.storage.modules import CONVERTED_KINDS
from peftplan.versions import DTYPE_OF_CHECKPOINT, EXPERTS_FUSED, LOADING_IN_THREADS, MIXTURE_ADDED, QUANTIZING_IN_TURN

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.results.documents import Assumptions, ModelDocument
    from peftplan.results.peaks import Peaks

NOT_COUNTED = ("activations", "logits", "temporaries of forward, backward and step", "cuBLAS workspaces", "CUDA context")
"""What an estimate without a peak leaves out."""

SAID_ELSEWHERE = {"r", "target_modules", "target_parameters", "lora_alpha"}
"""Fields of a method that a result states elsewhere, or that change no number."""

EXPERTS = ("Experts", "ExpertsTransposed")
LEFT_OUT = {
    "the fused experts": EXPERTS,
    "the layers whose class is derived from nn.Linear": ("LinearSubclass",),
}
"""Kinds of modules that hold most of a model's weights and that a format may not quantize, in words."""

BEFORE = f"; not so before {EXPERTS_FUSED.named} (--transformers 4.57)"

NO_PICTURES = "the batch is text only: with images the vision tower runs too, and the peak is higher"

NOTED = 0.01
"""Less than this share of a model is not worth a note."""

NCCL = "buffers of NCCL, outside torch's allocator"
RECORDED = "what a GPU that lags behind reserves in addition under FSDP1 (record_stream)"
OTHER_RANKS = "what other ranks reserve beyond the one with the highest peak; verdicts count it"
BESIDE_PEAK = {"fsdp1": RECORDED, "zero1": OTHER_RANKS, "zero2": OTHER_RANKS}
"""Strategy → reserved bytes beside those of the peak. Of FSDP1 formulas state them too."""
OUTSIDE = ("CUDA context",)
"""What is outside torch's allocator, and so in no peak."""

CUDNN_ATTENTION = ("9.0", "10.0")
"""Compute capabilities on which `scaled_dot_product_attention` prefers cuDNN's kernel (cuDNN 9.19 and 9.20:
`_fused_sdp_choice`, asked on an emulated card). It is counted as the other fused kernels are."""
BY_CUDNN = "what cuDNN's attention takes beyond torch's own kernels"
IN_THREADS = (
    "gaps left by threads that copy weights to the card while others are quantized "
    f"({LOADING_IN_THREADS.named} to {QUANTIZING_IN_TURN.before})"
)
"""One job, measured twice in one session, reserved 11,880 and 13,272 MiB (`data/runs/fitcheck_t4.jsonl`)."""


def of_ranks(distributed: Distributed, peaks: Peaks | None) -> tuple[str, ...]:
    """What the numbers of a rank leave out. One process runs a device_map, without NCCL."""
    if distributed.strategy == "device-map":
        return ()
    known = distributed.strategy not in BESIDE_PEAK or (peaks is not None and peaks.by_pace)
    return (NCCL,) if known else (NCCL, BESIDE_PEAK[distributed.strategy])


def outside(job: Job, capabilities: Iterable[str], peaks: Peaks) -> tuple[str, ...]:
    """What no peak holds: kernels of 16 bits that may be cuDNN's on one of the cards, holes that threads leave while loading."""
    setup = job.setup
    low = not {"fp16", "bf16"}.isdisjoint((setup.dtype, setup.autocast))
    by_cudnn = setup.attn_implementation == "sdpa" and low and not set(CUDNN_ATTENTION).isdisjoint(capabilities)
    in_threads = job.quant is not None and job.script.loads_in_threads
    return (
        *OUTSIDE,
        *(of_ranks(job.distributed, peaks) if job.distributed else ()),
        *([BY_CUDNN] if by_cudnn else []),
        *([IN_THREADS] if in_threads else []),
    )


def model_facts(architecture: Architecture) -> ModelDocument:
    """The model facts of a result."""
    return {
        "name": architecture.name,
        "model_type": architecture.model_type,
        "model_class": architecture.model_class,
        "num_parameters": architecture.num_parameters,
        "source": architecture.source,
    }


def config_facts(config: MethodConfig | None, adapter: Mapping[str, object]) -> dict[str, object]:
    """What a result says of its method's options."""
    return config.model_dump(mode="json", exclude_none=True) if config is not None else dict(adapter)


COMPILED_UP_TO = 1024
"""Tokens up to which a kernel that gptqmodel compiles multiplies awq's packed weights (nn_modules/qlinear/gemm_awq.py)."""


def assumptions(job: Job, *, quantized: int) -> Assumptions:
    """Every value that the numbers rest on, defaults included; of the method's fields those that were set."""
    setup, quant, architecture, adaptation = job.setup, job.quant, job.architecture, job.adaptation
    assumed: dict[str, object] = {"model": architecture.source, "model_class": architecture.model_class}
    unread = set(OF_TOKENS if architecture.task_type == PICTURES else ())
    unread |= {"device_map"} if setup.device_map == "none" else set()
    assumed |= {key: value for key, value in setup.model_dump(mode="json").items() if value is not None and key not in unread}
    if job.setup.by.of_preferences:
        assumed["reference"] = job.reference
    if job.distributed is not None:
        assumed |= job.distributed.model_dump(mode="json", exclude_none=True) | {"world_size": job.distributed.world_size}
    assumed["quant"] = quant.name if quant else "none"
    assumed |= {} if quant is None else quant.options()
    assumed |= {key: list(value) if isinstance(value, tuple) else value for key, value in adaptation.resolved if value}
    if job.method is not None and job.config is not None:
        fields = job.config.model_dump(mode="json", exclude_defaults=True, exclude_none=True, exclude=SAID_ELSEWHERE)
        assumed |= {name: value for name, value in fields.items() if job.method.defaults.get(name) != value}
    ran = {package: getattr(job.script, package) for package in EXAMPLES}
    assumed |= {package: version for package, version in ran.items() if version is not None}
    if adaptation.matched:
        assumed["matched_modules"] = sum(module.copies for module in adaptation.matched)
    notes = [
        *architecture.notes,
        *adaptation.notes,
        *task_notes(job.model, architecture, setup),
        *head_notes(architecture, job.adapter),
        *_dtype_notes(job),
        *_load_notes(job),
    ]
    if quant is not None:
        assumed["quantized_parameters"] = quantized
        notes += unquantized(architecture, quant, cast=bool(setup.kbit_prepare) and quant.name in parameters.PREPARED)
    return cast("Assumptions", assumed | ({"notes": notes} if notes else {}))


def _dtype_notes(job: Job) -> Iterator[str]:
    """A note that the weights are counted in a dtype that nobody knows."""
    dtype = job.request.all_options().get("dtype")
    of_checkpoint = dtype == OF_CHECKPOINT or (dtype == AS_LOADED and not DTYPE_OF_CHECKPOINT.after(job.script.transformers))
    if of_checkpoint and checkpoint_dtype(job.model, load_config(job.model)) is None:
        yield f"the model is loaded in its checkpoint's dtype, which is not known here; {job.setup.dtype} is counted (--dtype)"


def _load_notes(job: Job) -> Iterator[str]:
    """Notes on the kernels that a program must load, and that the peak of loading depends on the checkpoint: torchtune divides
    tensor by tensor, in the order of its files. Rehearsals read one file, sorted by names (tests/rehearse/torchtune.jsonl)."""
    if job.quant is not None and job.quant.name in PACKED:
        yield (
            f"{job.quant.name} is counted with kernels that can train: load it with backend auto_trainable "
            f"({'GPTQConfig' if job.quant.name == 'gptq' else 'AwqConfig'}), since transformers' default raises an error in "
            "training; with peft alone, name target_modules too, since its all-linear finds no packed layer"
        )
        if job.setup.device_map == "none" and not job.setup.by.loads_on_device:
            yield "without a device_map, gptqmodel picks kernels for the CPU, which hold other bytes while the model loads"
        if job.quant.name == "awq" and job.setup.batch_size * job.setup.seq_len <= COMPILED_UP_TO:
            yield f"awq up to {COMPILED_UP_TO:,} tokens is counted without nvcc, with which gptqmodel compiles another kernel"
    distributed = job.distributed
    if job.setup.by.own_modules and distributed is not None and distributed.offload_params != "cpu":
        yield (
            "load counts the head as the last tensor that a rank divides; the checkpoint's files decide, and rehearsals held "
            "from 19 % less to 6 % more there"
        )


def unquantized(architecture: Architecture, quant: QuantConfig, *, cast: bool) -> list[str]:
    """A common surprise: formats that replace linear layers leave fused experts and subclasses of `nn.Linear` (Falcon's)
    unquantized, and peft's `prepare_model_for_kbit_training` casts them to fp32 with everything else that is not quantized.
    """
    then = ", and prepare_model_for_kbit_training casts them to fp32 (--no-kbit-prepare)" if cast else ""
    notes = []
    for what, kinds in LEFT_OUT.items():
        if kinds == EXPERTS and quant.experts:
            continue
        left = [m for m in architecture.modules if m.kind in kinds and m.kind not in CONVERTED_KINDS[quant.name]]
        count = sum(m.copies * prod(shape) for m in left for _, shape in m.params)
        share = count / architecture.num_parameters
        if share >= NOTED:
            before = BEFORE if architecture.model_type in MIXTURE_ADDED else ""
            notes.append(f"{quant.name} leaves {what} ({count:,} parameters, {share:.0%} of the model) unquantized{then}{before}")
    return notes
