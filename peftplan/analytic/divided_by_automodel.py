"""Which models were rehearsed with NeMo Automodel over ranks that share matrices, or take turns (tests/rehearse/automodel*.jsonl,
tests/rehearse/pipeline.jsonl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.distributed.layout import AUTOMODEL
from peftplan.distributed.pipeline import INTERLEAVED
from peftplan.distributed.tensor_parallel import BY_AUTOMODEL, WHOLE_TABLES, ranks_of
from peftplan.job.automodel import builds, knows_experts
from peftplan.job.kernels import OF_COMPILED, kernels_of
from peftplan.job.loss_sizes import NO_UPCAST

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed
    from peftplan.job.job import Job

DIVIDED_BY_AUTOMODEL = (
    *(("llama", "lora"), ("llama", "full"), ("qwen2", "full"), ("qwen2", "lora"), ("qwen3", "full")),
    *(("phi3", "full"), ("phi3", "lora"), ("phi", "lora"), ("seed_oss", "full")),
    *(("mixtral", "lora"), ("falcon_h1", "lora"), ("ministral3", "lora")),
    *(("gemma4", "partial"), ("qwen3_5", "partial")),
)
"""Model type and method of NeMo Automodel's jobs that were rehearsed with tensor parallelism beside FSDP2."""
OVER_ALL_RANKS = ("seed_oss", "ministral3")
"""Those of them whose matrices all ranks shared."""
MODULES_OF_TRANSFORMERS = (("llama", "lora"),)
"""Model type and method where all ranks shared matrices of transformers' modules, for whose names the tool has a plan."""
PROJECTIONS = 7
"""Linear layers of a layer of Llama and Qwen 2."""
ADAPTED_HEADS = ("ministral3",)
"""Those of them whose divided head had an adapter too."""
TIED_HEADS = ("gemma4",)
"""Those of them whose divided head was the embedding."""


def knows_division(job: Job, distributed: Distributed) -> bool:
    """Whether matrices were rehearsed that ranks share beside FSDP2: by NeMo Automodel, of a model of its own or of one
    for which it has a plan of its own."""
    architecture, config = job.architecture, job.config
    head = () if architecture.model_type in ADAPTED_HEADS else (architecture.output_embedding,)
    kind, beside_others = (architecture.model_type, job.method_name), distributed.world_size > ranks_of(distributed)
    if builds(job) or (job.setup.by.layout is AUTOMODEL and architecture.model_type in BY_AUTOMODEL):
        rehearsed = kind in DIVIDED_BY_AUTOMODEL and (beside_others or architecture.model_type in OVER_ALL_RANKS)
    else:
        rehearsed = job.setup.by.layout is AUTOMODEL and kind in MODULES_OF_TRANSFORMERS and not beside_others
    return (
        rehearsed
        and (not architecture.ties or architecture.model_type in TIED_HEADS)
        and not (architecture.vocab_size or 0) % ranks_of(distributed)
        and not getattr(config, "lora_dropout", 0)
        and not any(module.name in (architecture.input_embedding, *head) for module in job.adaptation.matched)
        and (job.setup.loss == "full" or architecture.model_type in WHOLE_TABLES)
    )


def knows_prefetch(job: Job, distributed: Distributed) -> bool:
    """Whether layers that are gathered ahead were rehearsed: of Llama and Qwen 2 in bf16 with checkpoints, whose rows no ranks
    share, in one stage."""
    plain = job.quant is None and job.setup.dtype == "bf16" and bool(job.setup.gradient_checkpointing)
    plain &= {distributed.cp_size, distributed.pp_size} <= {None, 1} and distributed.reshard_after_forward is None
    return plain and job.is_full_or_lora and job.architecture.model_type in ("llama", "qwen2")


def knows_compiled(job: Job) -> bool:
    """Whether layers that torch compiles whole were rehearsed, and do not hold the peak: LoRA of all projections over checkpoints
    in bf16, two ranks that share matrices, and a vocabulary at least four times as wide as the MLP (rehearsed: 4.5 and 5.5)."""
    distributed, setup = job.distributed, job.setup
    if OF_COMPILED not in (setup.kernels or ()):
        return True
    block = job.architecture.blocks[0]
    shared = distributed is not None and ranks_of(distributed) == 2 and bool(distributed.forward_prefetch)
    plain = job.method_name == "lora" and job.quant is None and setup.dtype == "bf16" and setup.loss == "full"
    checkpoints = bool(setup.gradient_checkpointing) and not setup.padding and setup.attn_implementation == "sdpa"
    plain &= len(job.adaptation.matched) == PROJECTIONS and not getattr(job.config, "use_dora", False)
    wide = (job.architecture.vocab_size or 0) >= 4 * block.mlp.intermediate_size
    return shared and plain and checkpoints and wide and setup.kernels == (OF_COMPILED,)


def knows_pipeline(job: Job, distributed: Distributed) -> bool:
    """Whether stages were rehearsed: by NeMo Automodel, of a model of its own in bf16 without windows, over two ranks or more,
    with gradients that wait for the last micro batch. Matrices that ranks share too: of Llama, fully trained on packed rows, or
    with LoRA and checkpoints on others, also where no other ranks hold the same stage. Beside experts that ranks divide also one
    that is no unit itself."""
    whole = distributed.dp_shard_size is None and (distributed.shards > 1 or ranks_of(distributed) > 1)
    packed, apart = kernels_of(job.setup.kernels or ()).attention is not None, distributed.pp_stage_is_unit is False
    of_experts = distributed.pp_schedule == INTERLEAVED and knows_experts(job)
    trained = job.method_name == "full" if packed else job.method_name == "lora" and bool(job.setup.gradient_checkpointing)
    divided = job.architecture.model_type == "llama" and trained
    return (
        (builds(job) or _stages_transformers_modules(job, distributed))
        and whole
        and (ranks_of(distributed) == 1 or (divided and distributed.pp_schedule == INTERLEAVED))
        and job.setup.dtype == "bf16"
        and distributed.offload_params in (None, "none")
        and not any(a.window for block in job.architecture.blocks for a in block.attentions)
        and (of_experts or not (apart or distributed.sync_each_batch or (distributed.ep_size or 1) > 1))
        and (distributed.reshard_after_forward is None or of_experts)
        and (job.setup.loss == "full" or (of_experts and job.setup.loss == NO_UPCAST))
        and (job.method_name in ("full", "lora") or distributed.pp_schedule == INTERLEAVED)
        and (job.method_name != "lora" or _adapts_each_layer(job))
    )


def _adapts_each_layer(job: Job) -> bool:
    """Whether each layer has an adapter that gets a gradient, so that no stage is without one."""
    trained = (tensor for tensor in job.adaptation.added if tensor.trainable and ".indexer." not in tensor.name)
    adapted = {layer for tensor in trained for layer in tensor.layers or ()}
    return adapted.issuperset(layer for block in job.architecture.blocks for layer in block.layers)


def _stages_transformers_modules(job: Job, distributed: Distributed) -> bool:
    """Whether stages of transformers' modules were rehearsed: of Qwen2 with LoRA and checkpoints, on rows without padding, that
    take turns, with torch's attention; each stage keeps the mask that an eager one makes."""
    setup, of_qwen2 = job.setup, (job.architecture.model_type, job.method_name) == ("qwen2", "lora")
    plain = bool(setup.gradient_checkpointing) and not setup.padding and job.quant is None and setup.attn_implementation == "sdpa"
    return setup.by.layout is AUTOMODEL and of_qwen2 and plain and distributed.pp_schedule == INTERLEAVED
