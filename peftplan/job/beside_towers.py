"""Which vision-language models with a tower that does not train were rehearsed with NeMo Automodel's recipes
(tests/rehearse/automodel.jsonl)."""

from typing import TYPE_CHECKING, NamedTuple

from peftplan.job.loss_sizes import CUT_APART

if TYPE_CHECKING:
    from peftplan.job.job import Job


class Shown(NamedTuple):
    """How a model was rehearsed."""

    trainer: str
    attention: tuple[str, ...] = ("sdpa", "flash_attention_2")
    checkpoints: tuple[bool, ...] = (False,)
    """Whether layers were checkpoints. Two layers of Ministral 3 that were, held 1.1 % more than was counted."""
    whole: bool = False
    """Whether each rank held all of the tower of a mixture (`whole_tower`), or shared it."""
    trains: bool = False
    """Whether the tower trained too, which gets no gradient of rows without pictures."""


TEXT, IMAGES = "automodel", "automodel-vlm"
WITH_TOWERS: dict[tuple[str, str], Shown] = {
    ("mistral3", "lora"): Shown(TEXT, trains=True),
    ("mistral3", "full"): Shown(TEXT, ("sdpa",)),
    ("qwen2_5_vl", "partial"): Shown(IMAGES),
    ("gemma3", "partial"): Shown(IMAGES, ("eager",)),
    ("gemma3", "lora"): Shown(IMAGES, ("eager",)),
    ("gemma4", "partial"): Shown(IMAGES, ("eager",), (False, True), whole=True),
    ("gemma4", "lora"): Shown(IMAGES, ("sdpa",), (False, True)),
    ("gemma4_unified", "full"): Shown(TEXT, ("eager",)),
    ("qwen3_vl", "partial"): Shown(IMAGES, ("sdpa",)),
    ("qwen3_5", "partial"): Shown(IMAGES, ("sdpa",), (False, True), trains=True),
    ("qwen3_5", "lora"): Shown(IMAGES, ("sdpa",), (True,)),
    ("qwen3_5_moe", "partial"): Shown(IMAGES, ("sdpa",), (False, True)),
    ("qwen3_5_moe", "lora"): Shown(IMAGES, ("sdpa",)),
    ("qwen3_vl_moe", "partial"): Shown(IMAGES, ("sdpa",)),
    ("mistral3", "partial"): Shown(IMAGES, ("eager",)),
    ("internvl", "partial"): Shown(IMAGES, ("sdpa",)),
}
"""By model type with a tower beside its text part, and method."""


def knows_tower(job: "Job") -> bool:
    """Whether a model with a frozen tower beside its text part was rehearsed so."""
    setup, architecture, model_type = job.setup, job.architecture, job.architecture.model_type
    shown = WITH_TOWERS.get((model_type, job.method_name))
    if shown is None or job.quant is not None or setup.trainer != shown.trainer:
        return False
    rehearsed = setup.attn_implementation in shown.attention and bool(setup.gradient_checkpointing) in shown.checkpoints
    if job.distributed is not None and job.distributed.whole_tower and not (shown.whole and is_mixture(job)):
        return False
    if model_type in ("gemma4", "gemma4_unified"):
        return rehearsed and _knows_gemma4(job)
    if model_type == "qwen3_5":
        at_once = setup.gradient_accumulation_steps == 1 and not (setup.gradient_checkpointing or architecture.ties)
        divided = _divides_once(job) and not architecture.ties
        cut = setup.loss == CUT_APART and job.method_name == "partial" and (at_once or divided)
        return rehearsed and _alone_in_bf16(job, cut=cut, divided=divided) and not setup.kernels
    if model_type == "mistral3":  # Ministral 3
        return rehearsed and all(a.scaled_queries for block in architecture.blocks for a in block.attentions)
    return rehearsed


def trains_tower(job: "Job") -> bool:
    """Whether a tower that trains was rehearsed."""
    shown = WITH_TOWERS.get((job.architecture.model_type, job.method_name))
    return shown is not None and shown.trains


def _knows_gemma4(job: "Job") -> bool:
    """Whether Gemma 4 was rehearsed so: in bf16, a micro batch a step; with checkpoints where no layer borrows keys, also over
    ranks that share matrices, which reduce the gradients of several micro batches once."""
    setup, blocks = job.setup, job.architecture.blocks
    borrows = any(a.borrows for block in blocks for a in block.attentions)
    borrows_or_mixes = borrows or is_mixture(job)
    if _divides_once(job):
        return _alone_in_bf16(job, divided=True) and not borrows_or_mixes
    at_once = setup.gradient_accumulation_steps == 1
    return _alone_in_bf16(job) and at_once and not (setup.gradient_checkpointing and borrows_or_mixes)


def _divides_once(job: "Job") -> bool:
    """Whether ranks share matrices beside checkpoints, and reduce the gradients of several micro batches once."""
    distributed = job.distributed
    divides = distributed is not None and distributed.divided > 1 and not distributed.sync_each_batch
    return divides and bool(job.setup.gradient_checkpointing)


def _alone_in_bf16(job: "Job", *, cut: bool = False, divided: bool = False) -> bool:
    """Whether ranks of FSDP2 alone share a model in bf16, of rows without padding, with the loss of all logits, or one that is
    `cut` apart where that was rehearsed. `divided`: or whether others share its matrices too."""
    setup, distributed = job.setup, job.distributed
    plain = setup.dtype == "bf16" and (setup.loss == "full" or cut) and not setup.padding
    return (
        plain
        and distributed is not None
        and {distributed.cp_size, distributed.pp_size} <= {None, 1}
        and (divided or distributed.divided == 1)
    )


def hands_keys_on(job: "Job") -> bool:
    """Whether no cache of keys and values is made, whatever `use_cache` says: layers of Gemma 4 that borrow them find them in
    what stands for a cache, and its mixture takes none (components/models/gemma4_moe/model.py, `_Gemma4KVShareHolder`)."""
    borrows = any(a.borrows for block in job.architecture.blocks for a in block.attentions)
    return job.setup.by.own_lora and job.architecture.model_type == "gemma4" and (borrows or is_mixture(job))


def is_mixture(job: "Job") -> bool:
    """Whether a layer has experts."""
    return any(block.mlp.num_experts for block in job.architecture.blocks)
