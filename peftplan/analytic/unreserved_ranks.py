"""Jobs over several GPUs of which the analytic engine knows allocated bytes and not reserved ones."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

from peftplan.job.exchanges import IN_TURN
from peftplan.job.further_tokens import OF_QWEN
from peftplan.job.loss_sizes import CUT_APART, SHARED_CHUNKS
from peftplan.versions import PACKED_POSITIONS_CHECKED

if TYPE_CHECKING:
    from peftplan.job.job import Job


def _offloads_quantized(job: Job) -> bool:
    """Whether FSDP1 offloads a quantized base that SFTTrainer trains."""
    distributed = job.distributed
    flat = distributed is not None and distributed.strategy == "fsdp1" and distributed.offload_params == "cpu"
    return flat and job.quant is not None and job.setup.loss != "full"


def _moves_frozen_shards(job: Job) -> bool:
    """Whether a late GPU keeps shards from the host into the next step (`distributed.fsdp1`), where the host reads no mask."""
    distributed = job.distributed
    offloads = distributed is not None and distributed.strategy == "fsdp1" and distributed.offload_params == "cpu"
    return offloads and job.method_name != "full" and PACKED_POSITIONS_CHECKED.after(job.script.transformers)


def _steps_beside_host(job: Job) -> bool:
    """Whether ZeRO-3 keeps shards in 16 bits on the host, and their masters on the GPU."""
    distributed = job.distributed
    if distributed is None or distributed.strategy != "zero3" or job.quant is not None:
        return False
    return distributed.offload_params == "cpu" and distributed.offload_optimizer in (None, "none")


def _gathers_divided_ahead(job: Job) -> bool:
    """Whether FSDP2 gathers layers ahead whose matrices ranks share."""
    distributed = job.distributed
    if distributed is None or distributed.strategy != "fsdp2":
        return False
    return bool(distributed.forward_prefetch) and distributed.divided > 1


FEWEST_MAPPED = 8
"""Layers per GPU of a base in 4 bits with which reserved bytes of a `device_map` were within 1.2 % of the replay
(inferred from nine GPUs of four rehearsed jobs)."""


def _maps_few_in_4_bits(job: Job) -> bool:
    """Whether a `device_map` places few layers in 4 bits on each GPU."""
    if job.distributed is None or job.distributed.strategy != "device-map" or job.quant is None:
        return False
    return sum(len(block.layers) for block in job.architecture.blocks) < FEWEST_MAPPED * job.distributed.world_size


def _sends_all_to_one(job: Job) -> bool:
    """Whether all tokens go to the experts of one rank."""
    return job.distributed is not None and job.distributed.routing == "worst"


FEWEST_GATHERING = 8
"""Layers of gpt-oss, fully trained, with which reserved bytes were 1.1 % above the replay; with two they were 3.3 % above."""


def _gathers_for_experts(job: Job) -> bool:
    """Whether ranks that divide gpt-oss's experts gather the tokens of all, but where all of many layers trains."""
    divides = job.distributed is not None and (job.distributed.ep_size or 1) > 1
    shown = job.method_name == "full" and sum(len(block.layers) for block in job.architecture.blocks) >= FEWEST_GATHERING
    return divides and job.architecture.model_type == "gpt_oss" and not job.setup.kernels and not shown


def _ties_beside_experts(job: Job) -> bool:
    """Whether ERNIE's ranks divide its experts beside a table that the head reads too."""
    return job.architecture.model_type == "ernie4_5_moe" and job.distributed is not None


MOST_DEALING = 8
"""Ranks over which reserved bytes were near the replay: over 16 a rehearsal of Qwen 3 reserved 3.9 % more, over 32 of Moonlight
8.8 %."""


UNSTATED_IN_TURN = (
    *(("deepseek_v3", "hybridep.exchange"), ("glm4_moe", "hybridep.exchange"), ("glm4_moe_lite", "deepep.exchange")),
    ("nemotron_h", "deepep.exchange"),
)
"""Model types, and the exchange beside which reserved bytes were not within 3 % of the replay (GLM-4.7-Flash: -16 %, Nemotron 3
Nano -3.1 and -4.5 %), or not rehearsed over eight ranks (GLM-4.5)."""


def _deals_tokens(job: Job) -> bool:
    """Whether tokens take experts in turn as reserved bytes were not within 3 % of the replay: those of `UNSTATED_IN_TURN` and
    over more than eight ranks without stages, and in stages GLM-4.7's, DeepSeek-V3's but beside HybridEP (Kimi K2's last stage of
    4,096 tokens reserved 7.5 % more beside DeepEP, DeepSeek-V3's 3.1 % with torch's kernels), GLM-5's of two rows (6.3 % more),
    and Qwen 3's where several ranks own the same experts."""
    kernels, distributed, model_type = job.setup.kernels or (), job.distributed, job.architecture.model_type
    if IN_TURN not in kernels or distributed is None:
        return False
    if (distributed.pp_size or 1) == 1:
        return (distributed.ep_size or 1) > MOST_DEALING or any((model_type, name) in UNSTATED_IN_TURN for name in kernels)
    if model_type == "deepseek_v3":
        return "hybridep.exchange" not in kernels
    if model_type == "glm_moe_dsa":
        return job.setup.rows > 1
    return model_type == "glm4_moe" or (model_type == "qwen3_moe" and distributed.shards != distributed.ep_size)


def _routes_beside_norms(job: Job) -> bool:
    """Whether Moonlight's own gate chooses experts beside Transformer Engine's norms."""
    kernels = job.setup.kernels or ()
    return job.architecture.model_type == "deepseek_v3" and "te-norm.rms_norm" in kernels and IN_TURN not in kernels


def _cuts_beside_experts(job: Job) -> bool:
    """Whether ranks divide Qwen 3's experts over an exchange, and the loss reads the head behind the model or they share rows."""
    apart = job.setup.loss == CUT_APART or (job.distributed is not None and (job.distributed.cp_size or 1) > 1)
    return job.architecture.model_type == "qwen3_moe" and apart and bool(job.setup.kernels)


def _chunks_between_units(job: Job) -> bool:
    """Whether ranks share Qwen 3 Next, or NeMo Automodel's Qwen 3.5, whose delta rule runs in operations of torch: of eight
    layers of Qwen3.5 27B reserved bytes were 5.9 % above the replay, of four within 0.15 %."""
    by_tool = job.architecture.model_type in OF_QWEN and job.setup.by.own_decoders
    return (by_tool or job.architecture.model_type == "qwen3_next") and job.distributed is not None


def _gathers_adapted_gemma(job: Job) -> bool:
    """Whether FSDP2 gathers Gemma 4's layers beside adapters: in which order a unit holds its weights differs from here."""
    divided = job.distributed is not None and job.distributed.strategy == "fsdp2" and not job.setup.by.own_lora
    return divided and job.architecture.model_type in ("gemma4", "gemma4_unified") and job.method_name != "full"


def _trains_dense_scans(job: Job) -> bool:
    """Whether ranks train all of NeMo Automodel's dense Nemotron 3."""
    by_tool = job.architecture.model_type == "nemotron_h" and job.setup.by.own_lora and job.method_name == "full"
    return by_tool and job.distributed is not None and not any(block.mlp.num_experts for block in job.architecture.blocks)


def _divides_beside_tower(job: Job) -> bool:
    """Whether ranks divide the experts of NeMo Automodel's Qwen3-VL."""
    return job.architecture.model_type == "qwen3_vl_moe" and job.setup.by.own_decoders and job.distributed is not None


def _trains_further_tokens(job: Job) -> bool:
    """Whether ranks train all of a Nemotron 3 that predicts further tokens, and divide its experts."""
    shared = job.architecture.model_type == "nemotron_h" and job.distributed is not None
    return shared and bool(job.setup.mtp_depths) and job.method_name == "full"


def _trains_biases(job: Job) -> bool:
    """Whether biases train beside LoRA in FSDP1's flat parameters, without checkpoints or beside packed weights."""
    flat = job.distributed is not None and job.distributed.strategy == "fsdp1"
    unlike = not job.setup.gradient_checkpointing or job.quant is not None
    return flat and getattr(job.config, "bias", "none") != "none" and unlike


def _masks_ranks_by_sft(job: Job) -> bool:
    """Whether SFTTrainer trains AdaLoRA under ZeRO-3."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    return divided and job.method_name == "adalora" and job.setup.loss != "full"


def _reloads_weights(job: Job) -> bool:
    """Whether weights that all train come back from the host beside the flat ones of ZeRO-1."""
    flat = job.distributed is not None and job.distributed.strategy == "zero1"
    return flat and job.setup.by.reloads_weights and job.method_name == "partial"


def _normalizes_beside_ties(job: Job) -> bool:
    """Whether DoRA stands in a Gemma 3 most of which is a table that the head reads too, made and divided tensor by tensor."""
    distributed = job.distributed
    if distributed is None or distributed.strategy != "zero3" or not getattr(job.config, "use_dora", False):
        return False
    if job.quant is not None or distributed.zero3_init is False:
        return False
    arch = job.architecture
    table = [prod(shape) for m in arch.modules if m.name == arch.input_embedding for _, shape in m.params]
    return arch.model_type == "gemma3_text" and bool(arch.ties) and 2 * sum(table) > arch.num_parameters


def _permutes_from_host(job: Job) -> bool:
    """Whether BOFT's permutations stay on the host under ZeRO-3."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    return job.method_name == "boft" and divided and job.quant is None


def _keeps_whole_weights(job: Job) -> bool:
    """Whether the optimizer that was made before FSDP2 divided all weights keeps whole ones, not all of them in equal parts."""
    divided = job.distributed if job.distributed is not None and job.distributed.strategy == "fsdp2" else None
    if divided is None or job.method_name != "full" or str(job.setup.optim) != "adagrad":
        return False
    return any(shape[0] % divided.shards for module in job.architecture.modules for _, shape in module.params)


def _adapts_stages(job: Job) -> bool:
    """Whether stages that are not interleaved train LoRA."""
    if job.distributed is None or (job.distributed.pp_size or 1) == 1 or job.method_name == "full":
        return False
    from peftplan.distributed.pipeline import INTERLEAVED  # which few jobs need

    return job.distributed.pp_schedule != INTERLEAVED


OF_LEAVES = (
    "LoRA over experts under ZeRO-3: DeepSpeed waits for a block's parameters in the order of their addresses, which differs "
    "from run to run: replays of such orders reserve up to 7 % less than others"
)
"""DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (`_fetch_sub_module_impl`): a buffer lives until the last
parameter in it was waited for, and `params_to_fetch` is a set. What is fully trained, or has adapters in attention alone,
reserves the same in any order."""


def adapts_leaves(job: Job) -> bool:
    """Whether LoRA stands over stacks of experts that ZeRO-3 gathers at once."""
    if job.distributed is None or job.distributed.strategy != "zero3":
        return False
    from peftplan.memory.zero3_modules import LEAVES  # which few jobs need

    leaf = LEAVES.get(job.architecture.model_type)
    return leaf is not None and any(tensor.name.startswith(leaf) for tensor in job.adaptation.added)


def _stacks_on_card(job: Job) -> bool:
    """Whether ms-swift trains Nemotron 3 under ZeRO-2, whose checkpoint has experts apart."""
    return job.architecture.model_type == "nemotron_h" and job.distributed is not None and job.distributed.strategy == "zero2"


def _gathers_tower(job: Job) -> bool:
    """Whether ZeRO-3 gathers the tower that ms-swift shows a picture, for an adapter or beside a second model."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    tower = divided and job.setup.by.shows_picture and job.architecture.has_towers
    return tower and (job.reference == "copy" or job.method_name == "lora")


def _adapts_by_kernels_in_zero3(job: Job) -> bool:
    """Whether axolotl's LoRA kernels read weights that ZeRO-3 gathers."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    return divided and any(name.startswith("axolotl.") for name in job.setup.kernels or ())


BY_LLAMA_FACTORY = ("llamafactory",)
"""Trainers of which the replay under FSDP1 was rehearsed and did not hold."""


def _shares_long_rows(job: Job) -> bool:
    """Whether ms-swift's ranks share rows under ZeRO-3, with weights on the host."""
    hosted = job.distributed is not None and job.distributed.strategy == "zero3" and job.distributed.offload_params == "cpu"
    return hosted and job.setup.loss == SHARED_CHUNKS


def _shards_by_llama_factory(job: Job) -> bool:
    """Whether LLaMA-Factory trains all weights under FSDP1."""
    flat = job.distributed is not None and job.distributed.strategy == "fsdp1"
    return flat and job.setup.by.name in BY_LLAMA_FACTORY and job.method_name == "full"


def _scores_by_large_table(job: Job) -> bool:
    """Whether ms-swift's generative reranker trains a table that is larger than a bucket of ZeRO-2's gradients."""
    trains = job.setup.by.scores_words is not None and job.method_name == "full"
    if not trains or job.distributed is None or job.distributed.strategy != "zero2":
        return False
    from peftplan.distributed.zero import reduce_bucket  # which few jobs need

    hidden_size = job.architecture.hidden_size
    return job.architecture.vocab_size * hidden_size > reduce_bucket(job.distributed, hidden_size)


OVER_GPUS: tuple[tuple[Callable[[Job], bool], str], ...] = (
    (_offloads_quantized, "FSDP1 offloads a quantized base: a rehearsal reserved 7 % less than the replay"),
    (
        _moves_frozen_shards,
        f"FSDP1 offloads a frozen base before {PACKED_POSITIONS_CHECKED.named}, whose forward does not wait for the GPU: no late "
        "rehearsal",
    ),
    (
        _steps_beside_host,
        "shards on the host, and masters on the GPU: rehearsals reserved from 3 % less to 24 % more than the replay",
    ),
    (
        _maps_few_in_4_bits,
        "a device_map places few layers in 4 bits on each GPU: rehearsals of three and four reserved from 5 % less to 3.4 % more "
        "than the replay",
    ),
    (_sends_all_to_one, "all tokens go to one rank: rehearsals reserved from 5 % less to 13 % more than the replay"),
    (_stacks_on_card, "experts that become stacks on each card: a rehearsal of six layers reserved 10 % more than the replay"),
    (adapts_leaves, OF_LEAVES),
    (
        _keeps_whole_weights,
        "Adagrad in full fine-tuning under FSDP2, beside whole weights, in unequal parts: a rehearsal of five layers over 3 GPUs "
        "reserved 11 % more than the replay",
    ),
    (_adapts_stages, "LoRA in 1F1B: rehearsals of eight layers reserved 3.7 % more and 6 % less than the replay"),
    (_routes_beside_norms, "Moonlight beside Transformer Engine's norms: too few rehearsals compare reserved bytes"),
    (
        _cuts_beside_experts,
        "a head behind the model or shared rows, and divided experts: rehearsals reserved 10 % less and 4 % more than the replay",
    ),
    (_deals_tokens, "tokens that take experts in turn: rehearsals reserved 3 to 18 % more than the replay"),
    (_chunks_between_units, "a delta rule in torch's operations: rehearsals reserved 9 % less than the replay and 5.9 % more"),
    (_gathers_adapted_gemma, "LoRA of Gemma 4 under FSDP2: a rehearsal reserved 3.9 % more than the replay"),
    (
        _trains_dense_scans,
        "mamba-ssm's functions in full fine-tuning of a dense model: a rehearsal reserved 25 % more than the replay",
    ),
    (
        _trains_further_tokens,
        "further tokens in full fine-tuning beside divided experts: a rehearsal reserved 4.8 % more than the replay",
    ),
    (_divides_beside_tower, "divided experts beside a frozen tower: a rehearsal reserved 6 % less than the replay"),
    (_ties_beside_experts, "a tied head beside divided experts: a rehearsal reserved 12 % more than the replay"),
    (
        _gathers_for_experts,
        "experts without an exchange of tokens, with LoRA or fewer than 8 layers: rehearsals reserved 3 to 8 % more than "
        "the replay",
    ),
    (
        _trains_biases,
        "biases in FSDP1's flat parameters, without checkpoints or beside packed weights: rehearsals reserved 3.3 and 10 % less "
        "than the replay",
    ),
    (_masks_ranks_by_sft, "AdaLoRA by SFTTrainer under ZeRO-3: a rehearsal of three layers reserved 6 % less than the replay"),
    (_reloads_weights, "weights that come back under ZeRO-1: a rehearsal of four layers reserved 9 % more than the replay"),
    (
        _normalizes_beside_ties,
        "DoRA beside a tied table that is most of the model, under ZeRO-3: Python's garbage collector takes the head's own part "
        "before or after the first norm takes cuBLAS's workspace, and a rehearsal reserved 2 % more than the replay",
    ),
    (_permutes_from_host, "BOFT under ZeRO-3: a rehearsal of three layers reserved 13 % more than the replay"),
    (
        _gathers_tower,
        "a tower that ms-swift shows a picture under ZeRO-3, with LoRA or a second model: rehearsals reserved 18 % less and 4 % "
        "more than the replay",
    ),
    (_scores_by_large_table, "a reranker's table beyond DeepSpeed's bucket: a rehearsal reserved 14 % less than the replay"),
    (
        _shares_long_rows,
        "ranks share rows under ZeRO-3 with weights on the host: a rehearsal of six layers reserved 4.7 % more than the replay",
    ),
    (_adapts_by_kernels_in_zero3, "LoRA kernels under ZeRO-3: a rehearsal of twelve layers reserved 3.6 % more than the replay"),
    (
        _gathers_divided_ahead,
        "layers that are gathered ahead, whose matrices ranks share: a rehearsal of six layers reserved 1.6 % more than the "
        "replay, and one of three 0.8 % more",
    ),
    (_shards_by_llama_factory, "LLaMA-Factory under FSDP1: a rehearsal of six layers reserved 22 % more than the replay"),
)
"""Which jobs, and why: what a rehearsal reserved that the replay did not."""
