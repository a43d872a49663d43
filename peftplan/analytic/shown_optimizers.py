"""Which optimizers' steps were rehearsed or traced over several GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.shown import FLAT, FSDP, adapts_in_zero3, adapts_mixture, knows_optimizers, packs_on_card
from peftplan.optim import OF_AUTOMODEL, OF_AXOLOTL, OF_DEEPSPEED, OPTIMIZERS
from peftplan.optim.community import by_muon

if TYPE_CHECKING:
    from peftplan.job.job import Job


SHOWN_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
"""Optimizers whose steps were rehearsed under every strategy."""
BY_NAME = {name: optimizer for name, optimizer in OPTIMIZERS.items() if not optimizer.untraced}
"""The optimizers whose steps an engine reproduces."""
OVER_PARTITIONS = tuple(BY_NAME)
"""Optimizers whose step over DeepSpeed's flat partitions, and over views of FSDP1's flat parameters, is that of one GPU over
vectors: each way to step (fused, foreach, a kernel or a loop for each parameter) was traced or rehearsed there
(tests/rehearse/optimizers.jsonl)."""
TAKING_DTENSORS = ("torch", "schedulefree", "torch-optimi")
"""Packages whose optimizers step over DTensors."""
OVER_DTENSORS = (
    *(name for name, optimizer in BY_NAME.items() if optimizer.package in TAKING_DTENSORS),
    *("adamw_torch_8bit", "adamw_torch_4bit", "grokadamw"),
)
"""Those whose step over rows of matrices was traced or rehearsed under FSDP2."""
DECOMPOSED = ("galore_adamw",)
"""Those whose decomposition was rehearsed on the host under FSDP2, where shards in 16 bits lie there. On the GPU cuSOLVER alone
knows its workspace."""
STEPPED = {"fsdp2": OVER_DTENSORS, **dict.fromkeys((*FLAT, "zero3", "fsdp1"), OVER_PARTITIONS)}
"""Strategy → the optimizers that have a formula there."""
LORA = ("lora", "rslora")
ADAPTED = (*LORA, "qlora")
"""Methods under FSDP1 with tensors of one dtype alone that train: Adagrad makes its states of shards that are not yet cast, and
8-bit optimizers take an embedding for any other part of a flat parameter."""


def shown_optimizers(job: Job) -> tuple[str, ...]:
    """The optimizers whose steps were rehearsed or traced with such a job."""
    assert job.distributed is not None
    known: tuple[str, ...] = (*SHOWN_OPTIMIZERS, *OF_AUTOMODEL, *OF_DEEPSPEED, *(OF_AXOLOTL if _knows_muon(job) else ()))
    if _knows_gathered_muon(job):
        known = (*known, "moonlight_muon")
    if _knows_8_bits(job):
        known = (*known, "adamw_torch_8bit")
    if adapts_mixture(job):
        known = (*known, "adamw_torch_8bit")
    if job.distributed.strategy == "zero3" and adapts_in_zero3(job):
        known = (*known, "adamw_8bit")
    if _knows_paged(job):
        known = (*known, "paged_adamw_8bit")
    over = STEPPED.get(job.distributed.strategy, ())
    flat, method = job.distributed.strategy == "fsdp1", job.method_name
    if flat and method not in ADAPTED and job.distributed.use_orig_params is False:
        over = ()
    made_before_cast = flat and method != "full" and (method not in ADAPTED or job.setup.adapter_dtype != "fp32")
    kept = method in ADAPTED or (method == "full" and job.distributed.strategy == "fsdp2")
    made_of_whole = job.distributed.strategy in ("zero3", "fsdp2") and not (
        kept and (job.quant is None or packs_on_card(job, whole=True)) and not job.distributed.cpu_ram_efficient_loading
    )
    if made_before_cast or made_of_whole:
        over = tuple(name for name in over if name != "adagrad")
    if job.distributed.strategy == "fsdp2" and job.distributed.offload_params == "cpu":
        in_4_bits = job.quant is not None  # beside which reserved bytes were 5 % low and 3 % high
        over = tuple(name for name in over if name != "adagrad") if in_4_bits else (*over, *DECOMPOSED)
    if _knows_lomo(job):
        over = (*over, "lomo", *(("adalomo",) if flat and method in ("full", *ADAPTED) else ()))
    return (*known, *over) if knows_optimizers(job) else known


def _knows_lomo(job: Job) -> bool:
    """Whether LOMO was rehearsed, which steps over FSDP's shards after each backward: FSDP1 has one micro batch."""
    distributed = job.distributed
    assert distributed is not None
    on_card = distributed.use_orig_params is not False
    several = job.setup.gradient_accumulation_steps > 1
    known = job.method_name in (("full", "lora") if several else ("full", *ADAPTED))
    strategies = ("fsdp2",) if several and not distributed.sync_each_batch else () if several else FSDP
    return distributed.strategy in strategies and on_card and known


def _knows_8_bits(job: Job) -> bool:
    """Whether axolotl trains GPT-OSS in full under FSDP2, with gradients beside a second micro batch, as torchao's 8-bit AdamW
    was rehearsed (tests/rehearse/axolotl_gpt_oss.jsonl)."""
    assert job.distributed is not None
    by_axolotl = job.setup.by.own_fsdp2 and job.distributed.strategy == "fsdp2" and job.method_name == "full"
    return by_axolotl and job.architecture.model_type == "gpt_oss" and job.setup.gradient_accumulation_steps > 1


def _knows_paged(job: Job) -> bool:
    """Whether axolotl trains Mixtral in 4 bits under FSDP1, as bitsandbytes' paged AdamW was rehearsed
    (tests/rehearse/published.jsonl)."""
    assert job.distributed is not None
    by_axolotl = job.setup.by.own_fsdp2 and job.distributed.strategy == "fsdp1" and job.method_name == "qlora"
    return by_axolotl and job.architecture.model_type == "mixtral" and job.distributed.offload_params != "cpu"


def _knows_muon(job: Job) -> bool:
    """Whether axolotl's Muon was rehearsed: of matrices in bf16, whose rows all ranks of FSDP2 share; it asserts that all get as
    many."""
    return _divides_matrices(job) and job.setup.by.own_fsdp2 and job.method_name == "full" and job.setup.dtype == "bf16"


def _knows_gathered_muon(job: Job) -> bool:
    """Whether the Muon of LLaMA-Factory's v1 was rehearsed, which gathers one matrix after the other: of Qwen 3."""
    on_card = job.distributed is not None and job.distributed.offload_params != "cpu"
    of_qwen = job.architecture.model_type == "qwen3" and job.method_name == "full"
    return on_card and of_qwen and _divides_matrices(job) and job.setup.by.weighs_tokens


def _divides_matrices(job: Job) -> bool:
    """Whether all ranks of FSDP2 share the rows of each matrix that Muon orthogonalizes, and all get as many."""
    distributed = job.distributed
    if distributed is None or distributed.strategy != "fsdp2" or distributed.shards != distributed.world_size:
        return False
    shapes = [shape for m in job.architecture.modules for name, shape in m.params if by_muon(f"{m.name}.{name}", shape)]
    return all(rows % distributed.shards == 0 for rows, _ in shapes)
