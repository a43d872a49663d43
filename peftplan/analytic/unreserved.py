"""Jobs of which the analytic engine knows allocated bytes and not reserved ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peftplan.allocator.config import LARGE_SEGMENT_SIZE
from peftplan.dtypes import ITEMSIZE
from peftplan.job.kernels import kernels_of
from peftplan.job.loss_sizes import MASKED
from peftplan.job.requirements import pair
from peftplan.memory.attention import FLASH_CAPABILITY
from peftplan.optim import parse_optim

if TYPE_CHECKING:
    from peftplan.job.job import Job

MARGIN = 1.45
"""What a verdict grants such a job, as a share of what the replay reserves: twice the largest difference that was rehearsed."""


def _packs_for_experts(job: Job) -> bool:
    """Whether Transformer Engine runs Qwen 3's experts over DeepEP."""
    kernels = job.setup.kernels or ()
    return job.architecture.model_type == "qwen3_moe" and "deepep.exchange" in kernels and kernels_of(kernels).experts is not None


def _copies_in_8_bits(job: Job) -> bool:
    """Whether Transformer Engine's experts keep copies in MXFP8."""
    return "te-mxfp8.experts" in (job.setup.kernels or ())


FEWEST_IN_TURN = 2048
"""Tokens of a GPU with which rehearsals reserved what the replay did; two of 1,000 reserved 12 % less and 3 % more."""


def _few_in_turn(job: Job) -> bool:
    """Whether few tokens take Qwen 3's experts of Transformer Engine in turn over HybridEP."""
    setup, model_type = job.setup, job.architecture.model_type
    few = setup.rows * setup.seq_len < FEWEST_IN_TURN
    by_engine = kernels_of(setup.kernels or ()).experts is not None
    in_turn = {"balanced.gate", "hybridep.exchange"} <= {*(setup.kernels or ())}
    return few and by_engine and in_turn and model_type == "qwen3_moe"


def _compiles_attention(job: Job) -> bool:
    """Whether torch compiles the attention of NeMo Automodel's mixture."""
    return kernels_of(job.setup.kernels or ()).self_attention is not None


def _times_products(job: Job) -> bool:
    """Whether the first step times quack-kernels' products."""
    return "quack-linear.dense" in (job.setup.kernels or ())


FEWEST_FUSED = 24
"""Layers of Phi-4 in 8 bits with which reserved bytes were within 0.03 % of the replay; with two they were 20 % above."""


def _fuses_in_8_bits(job: Job) -> bool:
    """Whether few layers compute in 8 bits whose projections are fused as Phi-3's are."""
    fused = job.architecture.model_type == "phi3" and _num_layers(job) < FEWEST_FUSED
    return fused and kernels_of(job.setup.kernels or ()).linear is not None


def _num_layers(job: Job) -> int:
    return sum(len(block.layers) for block in job.architecture.blocks)


def _sends_text_part(job: Job) -> bool:
    """Whether ms-swift's GRPO trains a text part under ZeRO-3."""
    divided = job.distributed is not None and job.distributed.strategy == "zero3"
    return divided and job.setup.by.gathers_when_called and job.method_name == "partial"


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
    """Whether ms-swift's GRPO whose weights leave the host, or are sent in groups, trains on longer rows than were rehearsed."""
    sends = job.setup.by.sends_from_host or job.setup.move_model_batches is not None
    return sends and job.method_name == "lora" and job.setup.seq_len > LONGEST_UNHOSTED


def _sends_from_host(job: Job) -> bool:
    """Whether ms-swift's GRPO sends groups of weights that wait on the host."""
    return job.setup.by.sends_from_host and job.method_name == "full"


def _sends_groups(job: Job) -> bool:
    """Whether it sends groups of weights, which are on the cards, to a server."""
    setup = job.setup
    return setup.move_model_batches is not None and setup.vllm_mode == "server" and not setup.by.sends_from_host


FEWEST_RESTORING = 16
"""Layers of Llama that restore masked tokens with which a rehearsal reserved what the replay did; two reserved 9.7 % more."""


def _restores_masked_tokens(job: Job) -> bool:
    """Whether axolotl trains a model of few layers to restore tokens that it masks."""
    return job.setup.loss == MASKED and _num_layers(job) < FEWEST_RESTORING


def _scores_documents(job: Job) -> bool:
    """Whether axolotl's EBFT in strides makes logits of documents too."""
    return job.setup.by.scores_documents


def _prepares_delta_rule(job: Job) -> bool:
    """Whether layers in 4 bits hand a gated delta rule hidden states in fp32."""
    prepared = job.quant is not None and bool(job.setup.kbit_prepare)
    return prepared and any(block.delta_rule is not None for block in job.architecture.blocks)


SQUARING = ("axolotl",)
"""Trainers whose layers in 4 bits hand Arcee's activation what it squares in fp32."""


def _squares_in_4_bits(job: Job) -> bool:
    """Whether such a trainer trains Arcee in 4 bits."""
    return job.setup.by.name in SQUARING and job.architecture.model_type == "arcee" and job.quant is not None


def _runs_xielu(job: Job) -> bool:
    """Whether Apertus is trained over weights in 16 bits or more."""
    return job.architecture.model_type == "apertus" and job.quant is None


def _times_matrices(job: Job) -> bool:
    """Whether torchao's AdamW steps over matrices of the base that no ranks divide."""
    whole = job.distributed is None or job.distributed.strategy == "ddp"
    return whole and job.method_name == "full" and parse_optim(str(job.setup.optim)).copies is not None


UNKNOWN: tuple[tuple[Callable[[Job], bool], str], ...] = (
    (
        lambda job: bool(job.setup.narrow_tables),
        "tables that SFTTrainer of an earlier trl casts back: rehearsals reserved from 4 % less to 2 % more than the replay",
    ),
    (_runs_xielu, "xIELU over a dense base: the replay was 2.5 % above and 5.3 % below traces of two layers"),
    (
        _times_matrices,
        "the first step of torchao's AdamW times kernels beside a buffer of 256 MiB and copies of whole matrices: rehearsals of "
        "three to five layers reserved up to 8 % less than the replay",
    ),
    (
        _copies_in_8_bits,
        "experts in MXFP8: rehearsals of three to five layers reserved 0.2 to 3.6 % less than the replay, of 65,536 tokens 26 % "
        "more",
    ),
    (
        _few_in_turn,
        f"fewer than {FEWEST_IN_TURN:,} tokens that take experts in turn: a rehearsal reserved 12 % less than the replay",
    ),
    (
        _compiles_attention,
        "attention that torch compiles: a rehearsal of 1,000 tokens reserved 13 % less than the replay, one over 4 GPUs 8 % more",
    ),
    (_times_products, "quack-kernels times its products in the first step, which no rehearsal ran"),
    (_packs_for_experts, "one tensor per expert over DeepEP: a rehearsal of three layers reserved 21 % more than the replay"),
    (_fuses_in_8_bits, "few fused layers in 8 bits: a rehearsal of two layers of Phi-4 reserved 20 % more than the replay"),
    (
        _trains_long_rows,
        f"weights that leave the host, or groups of weights, beside longer rows than {LONGEST_UNHOSTED}: the replay has up to a "
        "third more than is allocated, and no rehearsal shows it",
    ),
    (
        _sends_from_host,
        "weights that reach vLLM in groups from the host: rehearsals of two layers reserved 2 % more and 3 % less than "
        "the replay",
    ),
    (_sends_groups, "groups of weights for a server of vLLM: a rehearsal of four layers reserved 11 % more than the replay"),
    (_sends_text_part, "a text part for a server of vLLM: a rehearsal of four layers reserved 5 % more than the replay"),
    (_learns_what_it_wrote, "completions written beside the optimizer's states: a rehearsal reserved 5 % less than the replay"),
    (_scores_completions, "completions of trl's older online trainers: rehearsals reserved up to ten times what the replay does"),
    (_shares_completions, "ranks share rows of completions: a rehearsal of ms-swift reserved 13 % less than the replay"),
    (_squares_in_4_bits, "Arcee's activation in 4 bits: a rehearsal of two layers reserved 9 % more than the replay"),
    (_scores_documents, "a cross entropy beside blocks: a rehearsal reserved 14 % less than the replay"),
    (_prepares_delta_rule, "a delta rule behind kbit preparation: a rehearsal of six layers reserved 10 % more than the replay"),
    (_restores_masked_tokens, "a loss of masked tokens: a rehearsal of two layers reserved 10 % more than the replay"),
)
"""Which jobs, and why: what a rehearsal reserved that the replay did not."""


def untraced(job: Job) -> str | None:
    """Why a trace does not state a job's reserved bytes either: those of the kept trace are 6 % below the rehearsal's."""
    if job.distributed is None:
        return None
    from peftplan.analytic.unreserved_ranks import OF_LEAVES, adapts_leaves  # which jobs on one GPU do not need

    return OF_LEAVES if adapts_leaves(job) else None


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
    unknown = UNKNOWN
    if job.distributed is not None:
        from peftplan.analytic.unreserved_ranks import OVER_GPUS  # which jobs on one GPU do not need

        unknown = (*OVER_GPUS, *unknown)
    return next((why for matches, why in unknown if matches(job)), None)
