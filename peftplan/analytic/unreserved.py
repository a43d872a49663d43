"""Jobs of which the analytic engine knows allocated bytes and not reserved ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peftplan.allocator.config import LARGE_SEGMENT_SIZE
from peftplan.dtypes import ITEMSIZE
from peftplan.job.kernels import kernels_of
from peftplan.job.loss_sizes import MASKED, SHARED_CHUNKS
from peftplan.job.requirements import pair
from peftplan.memory.attention import FLASH_CAPABILITY
from peftplan.versions import PACKED_POSITIONS_CHECKED

if TYPE_CHECKING:
    from peftplan.job.job import Job

MARGIN = 1.45
"""What a verdict grants such a job, as a share of what the replay reserves: twice the largest difference that was rehearsed."""


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


def _packs_for_experts(job: Job) -> bool:
    """Whether Transformer Engine runs Qwen 3's experts over DeepEP."""
    kernels = job.setup.kernels or ()
    return job.architecture.model_type == "qwen3_moe" and "deepep.exchange" in kernels and kernels_of(kernels).experts is not None


def _sends_all_to_one(job: Job) -> bool:
    """Whether all tokens go to the experts of one rank."""
    return job.distributed is not None and job.distributed.routing == "worst"


FEWEST_FUSED = 24
"""Layers of Phi-4 in 8 bits with which reserved bytes were within 0.03 % of the replay; with two they were 20 % above."""


def _fuses_in_8_bits(job: Job) -> bool:
    """Whether few layers compute in 8 bits whose projections are fused as Phi-3's are."""
    fused = job.architecture.model_type == "phi3" and _num_layers(job) < FEWEST_FUSED
    return fused and kernels_of(job.setup.kernels or ()).linear is not None


def _num_layers(job: Job) -> int:
    return sum(len(block.layers) for block in job.architecture.blocks)


FEWEST_GATHERING = 8
"""Layers of gpt-oss, fully trained, with which reserved bytes were 1.1 % above the replay; with two they were 3.3 % above."""


def _gathers_for_experts(job: Job) -> bool:
    """Whether ranks that divide gpt-oss's experts gather the tokens of all, but where all of many layers trains."""
    divides = job.distributed is not None and (job.distributed.ep_size or 1) > 1
    shown = job.method_name == "full" and _num_layers(job) >= FEWEST_GATHERING
    return divides and job.architecture.model_type == "gpt_oss" and not job.setup.kernels and not shown


def _ties_beside_experts(job: Job) -> bool:
    """Whether ERNIE's ranks divide its experts beside a table that the head reads too."""
    return job.architecture.model_type == "ernie4_5_moe" and job.distributed is not None


def _chunks_beside_experts(job: Job) -> bool:
    """Whether ranks divide Qwen 3 Next's experts beside a delta rule in operations of torch."""
    return job.architecture.model_type == "qwen3_next" and job.distributed is not None


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


def _permutes_from_host(job: Job) -> bool:
    """Whether BOFT's permutations stay on the host under ZeRO-3."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    return job.method_name == "boft" and divided and job.quant is None


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


def _adapts_leaves(job: Job) -> bool:
    """Whether LoRA stands over stacks of experts that ZeRO-3 gathers at once."""
    if job.distributed is None or job.distributed.strategy != "zero3":
        return False
    from peftplan.memory.zero3_modules import LEAVES  # which few jobs need

    leaf = LEAVES.get(job.architecture.model_type)
    return leaf is not None and any(tensor.name.startswith(leaf) for tensor in job.adaptation.added)


def _learns_what_it_wrote(job: Job) -> bool:
    """Whether trl's SSDTrainer writes completions beside the states of the optimizer."""
    return job.setup.by.leaves_temperature


def _scores_completions(job: Job) -> bool:
    """Whether one of trl's older online trainers writes completions, some of which with the logits of all tokens so far, or
    scores them with an emptied cache."""
    return job.setup.by.scoring == "rows of completions"


def _shares_completions(job: Job) -> bool:
    """Whether ms-swift's ranks share rows of completions, which they score before each step too."""
    return job.setup.by.shares_rows and job.setup.by.generates


LONGEST_UNHOSTED = 576
"""Tokens of a row with which rehearsals reserved what the replay did."""


def _trains_long_rows(job: Job) -> bool:
    """Whether ms-swift's GRPO whose weights leave the host trains on longer rows than were rehearsed."""
    hosts = "move_model_batches" in job.setup.by.options and job.method_name == "lora"
    return hosts and job.setup.seq_len > LONGEST_UNHOSTED


def _stacks_on_card(job: Job) -> bool:
    """Whether ms-swift trains Nemotron 3 under ZeRO-2, whose checkpoint has experts apart."""
    return job.architecture.model_type == "nemotron_h" and job.distributed is not None and job.distributed.strategy == "zero2"


def _sends_from_host(job: Job) -> bool:
    """Whether ms-swift's GRPO sends groups of weights that wait on the host."""
    return "move_model_batches" in job.setup.by.options and job.method_name == "full"


FEWEST_RESTORING = 16
"""Layers of Llama that restore masked tokens with which a rehearsal reserved what the replay did; two reserved 9.7 % more."""


def _restores_masked_tokens(job: Job) -> bool:
    """Whether axolotl trains a model of few layers to restore tokens that it masks."""
    return job.setup.loss == MASKED and _num_layers(job) < FEWEST_RESTORING


def _scores_documents(job: Job) -> bool:
    """Whether axolotl's EBFT in strides makes logits of documents too."""
    return job.setup.by.scores_documents


def _gathers_tower(job: Job) -> bool:
    """Whether ZeRO-3 gathers the tower that ms-swift shows a picture, for an adapter or beside a second model."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    tower = divided and job.setup.by.shows_picture and job.architecture.has_towers
    return tower and (job.reference == "copy" or job.method_name == "lora")


def _prepares_delta_rule(job: Job) -> bool:
    """Whether layers in 4 bits hand a gated delta rule hidden states in fp32."""
    prepared = job.quant is not None and bool(job.setup.kbit_prepare)
    return prepared and any(block.delta_rule is not None for block in job.architecture.blocks)


def _adapts_by_kernels_in_zero3(job: Job) -> bool:
    """Whether axolotl's LoRA kernels read weights that ZeRO-3 gathers."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    return divided and any(name.startswith("axolotl.") for name in job.setup.kernels or ())


BY_LLAMA_FACTORY = ("llamafactory",)
"""Trainers of which the replay under FSDP1 was rehearsed and did not hold."""
SQUARING = ("axolotl",)
"""Trainers whose layers in 4 bits hand Arcee's activation what it squares in fp32."""


def _squares_in_4_bits(job: Job) -> bool:
    """Whether such a trainer trains Arcee in 4 bits."""
    return job.setup.by.name in SQUARING and job.architecture.model_type == "arcee" and job.quant is not None


def _shares_long_rows(job: Job) -> bool:
    """Whether ms-swift's ranks share rows under ZeRO-3, with weights on the host."""
    hosted = job.distributed is not None and job.distributed.strategy == "zero3" and job.distributed.offload_params == "cpu"
    return hosted and job.setup.loss == SHARED_CHUNKS


def _shards_by_llama_factory(job: Job) -> bool:
    """Whether LLaMA-Factory trains all weights under FSDP1."""
    flat = job.distributed is not None and job.distributed.strategy == "fsdp1"
    return flat and job.setup.by.name in BY_LLAMA_FACTORY and job.method_name == "full"


def _runs_xielu(job: Job) -> bool:
    """Whether Apertus is trained over weights in 16 bits or more."""
    return job.architecture.model_type == "apertus" and job.quant is None


def _scores_by_large_table(job: Job) -> bool:
    """Whether ms-swift's generative reranker trains a table that is larger than a bucket of ZeRO-2's gradients."""
    trains = job.setup.by.scores_words is not None and job.method_name == "full"
    if not trains or job.distributed is None or job.distributed.strategy != "zero2":
        return False
    from peftplan.distributed.zero import reduce_bucket  # which few jobs need

    hidden_size = job.architecture.hidden_size
    return job.architecture.vocab_size * hidden_size > reduce_bucket(job.distributed, hidden_size)


UNKNOWN: tuple[tuple[Callable[[Job], bool], str], ...] = (
    (_runs_xielu, "xIELU over a dense base: the replay was 2.5 % above and 5.3 % below traces of two layers"),
    (_offloads_quantized, "FSDP1 offloads a quantized base: a rehearsal reserved 7 % less than the replay"),
    (
        _moves_frozen_shards,
        f"FSDP1 offloads a frozen base before {PACKED_POSITIONS_CHECKED.named}, whose forward does not wait for the GPU: no late "
        "rehearsal",
    ),
    (_packs_for_experts, "one tensor per expert over DeepEP: a rehearsal of three layers reserved 21 % more than the replay"),
    (_sends_all_to_one, "all tokens go to one rank: rehearsals reserved from 5 % less to 13 % more than the replay"),
    (_fuses_in_8_bits, "few fused layers in 8 bits: a rehearsal of two layers of Phi-4 reserved 20 % more than the replay"),
    (
        _trains_long_rows,
        f"weights that leave the host beside longer rows than {LONGEST_UNHOSTED}: the replay has a third more than is allocated, "
        "and no rehearsal shows it",
    ),
    (_stacks_on_card, "experts that become stacks on each card: a rehearsal of six layers reserved 10 % more than the replay"),
    (
        _sends_from_host,
        "weights that reach vLLM in groups from the host: rehearsals of two layers reserved 2 % more and 3 % less than "
        "the replay",
    ),
    (_adapts_leaves, OF_LEAVES),
    (_adapts_stages, "LoRA in 1F1B: rehearsals of eight layers reserved 3.7 % more and 6 % less than the replay"),
    (_learns_what_it_wrote, "completions written beside the optimizer's states: a rehearsal reserved 5 % less than the replay"),
    (_scores_completions, "completions of trl's older online trainers: rehearsals reserved up to ten times what the replay does"),
    (_shares_completions, "ranks share rows of completions: a rehearsal of ms-swift reserved 13 % less than the replay"),
    (_chunks_beside_experts, "a delta rule beside divided experts: a rehearsal reserved 9 % less than the replay"),
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
    (_squares_in_4_bits, "Arcee's activation in 4 bits: a rehearsal of two layers reserved 9 % more than the replay"),
    (_reloads_weights, "weights that come back under ZeRO-1: a rehearsal of four layers reserved 9 % more than the replay"),
    (_permutes_from_host, "BOFT under ZeRO-3: a rehearsal of three layers reserved 13 % more than the replay"),
    (_scores_documents, "a cross entropy beside blocks: a rehearsal reserved 14 % less than the replay"),
    (
        _gathers_tower,
        "a tower that ms-swift shows a picture under ZeRO-3, with LoRA or a second model: rehearsals reserved 18 % less and 4 % "
        "more than the replay",
    ),
    (_prepares_delta_rule, "a delta rule behind kbit preparation: a rehearsal of six layers reserved 10 % more than the replay"),
    (_scores_by_large_table, "a reranker's table beyond DeepSpeed's bucket: a rehearsal reserved 14 % less than the replay"),
    (
        _shares_long_rows,
        "ranks share rows under ZeRO-3 with weights on the host: a rehearsal of six layers reserved 4.7 % more than the replay",
    ),
    (_adapts_by_kernels_in_zero3, "LoRA kernels under ZeRO-3: a rehearsal of twelve layers reserved 3.6 % more than the replay"),
    (_shards_by_llama_factory, "LLaMA-Factory under FSDP1: a rehearsal of six layers reserved 22 % more than the replay"),
    (_restores_masked_tokens, "a loss of masked tokens: a rehearsal of two layers reserved 10 % more than the replay"),
)
"""Which jobs, and why: what a rehearsal reserved that the replay did not."""


def untraced(job: Job) -> str | None:
    """Why a trace does not state a job's reserved bytes either: those of the kept trace are 6 % below the rehearsal's."""
    return OF_LEAVES if _adapts_leaves(job) else None


OF_TURNS = "the turns after tools have answered need most: rehearsals of short ones reserved up to 3.0 % more than the replay"


BY_STREAM = (
    "under checkpoints xformers runs each group of heads in a stream of its own, whose cached memory no other one uses: "
    "rehearsals of three and eight layers on a T4 reserved 23 to 69 % more than the replay"
)
"""xformers 0.0.35, ops/fmha/cutlass.py (`FwOp.apply`, of five dims): Unsloth calls it so where no gradients are recorded."""


def _runs_in_streams(job: Job, compute_capability: str) -> bool:
    """Whether Unsloth's attention of grouped heads runs by xformers in forwards that a checkpoint runs again."""
    by_xformers = kernels_of(job.setup.kernels or ()).decoder is not None and pair(compute_capability) < FLASH_CAPABILITY
    heads = [a for block in job.architecture.blocks for a in block.attentions]
    grouped = any(a.num_attention_heads != a.num_key_value_heads for a in heads)
    return by_xformers and grouped and bool(job.setup.gradient_checkpointing)


STREAMS = 32
"""Streams that torch hands out in turn (c10/cuda/CUDAStream.cpp, `kStreamsPerPool`)."""


def beside_replay(job: Job, compute_capability: str) -> int:
    """Bytes that a verdict grants such a job beside its margin: a segment for each stream; where policy and reference write
    together, five tensors of logits for each token, which fit no block of those before it."""
    setup, streams = job.setup, STREAMS * LARGE_SEGMENT_SIZE if _runs_in_streams(job, compute_capability) else 0
    logits = ITEMSIZE["fp32"] * setup.generation_rows * setup.seq_len * (job.architecture.vocab_size or 0)
    return streams + (5 * logits * (setup.max_completion_length or 0) if setup.by.mixes else 0)


def unreserved(job: Job, phase: str, compute_capability: str) -> str | None:
    """Why a job's reserved bytes are not stated; None where they are. `phase`: where its peak lies.

    Rehearsals hold the allocated bytes of the peak, within 1 %, and reserve more than 3 % more or less than the replay.
    """
    if phase == "generate" and job.setup.tool_turns:
        return OF_TURNS
    if _runs_in_streams(job, compute_capability):
        return BY_STREAM
    return next((why for matches, why in UNKNOWN if matches(job)), None)
