"""What of a job has no formula as NeMo Automodel's recipe runs it: what was not rehearsed (tests/rehearse/automodel.jsonl)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.dtypes import ITEMSIZE
from peftplan.job.automodel_quack import knows_quack
from peftplan.job.automodel_scans import knows_recorded, knows_scan
from peftplan.job.beside_towers import is_mixture, knows_tower
from peftplan.job.exchanges import EXCHANGES, IN_TURN, MOST_GATHERING, ONE_BY_ONE, WORST, Exchanged, Rows, alike, pads
from peftplan.job.further_tokens import OF_QWEN, attends_then_mixes
from peftplan.job.kernels import BY_OPERATION, OF_COMPILED_ATTENTION, SCANNING, kernels_of
from peftplan.job.loss_sizes import CUT_APART, NO_UPCAST, RECEIVED
from peftplan.optim import OF_AUTOMODEL, parse_optim

if TYPE_CHECKING:
    from peftplan.job.job import Job

REHEARSED = (
    *("mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "cohere2", "granite", "olmo2", "starcoder2"),
    *("llama", "qwen2", "qwen3", "t5", "glm", "ernie4_5", "seed_oss", "gpt2", "gpt_oss", "nemotron_h"),
    *("mixtral", "glm4_moe", "qwen3_moe", "glm4_moe_lite", "deepseek_v3", "falcon_h1", "minimax_m2"),
    *("glm_moe_dsa", "ernie4_5_moe", "qwen3_next", "ministral3"),
)
"""Model types whose jobs in 16 and 32 bits were rehearsed."""
REHEARSED_QUANTIZED = (*REHEARSED, "qwen2_moe")
"""The same over a base in 4 bits."""
REHEARSED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", *OF_AUTOMODEL)
BUILT = (
    *("llama", "qwen2", "qwen3", "gpt_oss", "glm4_moe", "qwen3_moe", "glm4_moe_lite", "deepseek_v3", "nemotron_h"),
    *("minimax_m2", "glm_moe_dsa", "ernie4_5_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "ministral3"),
)
"""Of `REHEARSED`, and of vision-language models, those that the tool builds of modules of its own (`memory.models.automodel`)."""
TORCH_NORM = "torch-norm.rms_norm"
MOST_DEPTHS = 2
"""Further tokens that Nemotron 3 was rehearsed with."""
FEWEST_TOKENS = 2048
"""Tokens of its batch in full fine-tuning: five layers of 1,024 held 8 % less, where gradients of the head decide the peak."""
ALONE = ("llama", "qwen3")
"""Of transformers' models, those that were rehearsed on one GPU too."""
TRANSFORMERS_TOO = ("gemma4",)
"""Model types of which the tool builds mixtures alone, and runs transformers' modules of the others."""


def builds(job: Job) -> bool:
    """Whether the tool builds the model of modules of its own; bitsandbytes' layers are those of transformers' models."""
    model_type = job.architecture.model_type
    built = model_type in BUILT or (model_type in TRANSFORMERS_TOO and is_mixture(job))
    return job.setup.by.own_decoders and built and job.quant is None


MERGED = ("mixtral",)
"""Model types whose experts are one each in the checkpoint, and merged on the host for transformers' model."""


def merges_experts(job: Job) -> bool:
    """Whether the tool merges experts on the host."""
    return job.setup.by.own_lora and job.architecture.model_type in MERGED


def _knows_merged(job: Job) -> bool:
    """Whether such experts were rehearsed: beside LoRA in bf16, without checkpoints."""
    setup = job.setup
    plain = job.quant is None and setup.dtype == "bf16" and setup.loss == "full" and not setup.gradient_checkpointing
    return merges_experts(job) and job.method_name == "lora" and plain and _adapts_as_rehearsed(job)


def _knows_cut(job: Job) -> bool:
    """Whether the loss was rehearsed that reads the head behind the model: over several GPUs, of a head that has no adapter and,
    where transformers' model trains it, with gradients that each micro batch reduces, but of a tied head, and beside divided
    experts, with both."""
    adapts = any(module.name == job.architecture.output_embedding for module in job.adaptation.matched)
    if job.distributed is None or not job.is_full_or_lora:
        return False
    defers = (job.setup.gradient_accumulation_steps or 1) > 1 and not job.distributed.sync_each_batch
    unknown = adapts or (job.method_name == "full" and defers and not builds(job))
    return bool(job.architecture.ties) or not unknown or knows_experts(job)


def _knows_teacher(job: Job) -> bool:
    """Whether distillation was rehearsed: full, of a model of the tool's own, over several GPUs; beside a teacher in bf16, of
    Llama by Llama."""
    if not builds(job) or job.method_name != "full" or job.distributed is None:
        return False
    if job.setup.teacher_model is None:
        return True
    from peftplan.job.teacher import teacher_of

    teacher = teacher_of(job)
    return teacher is not None and (job.setup.dtype == "bf16" and teacher.architecture.model_type == "llama")


ROWS_AT_ONCE = 12_288
"""Rows of experts to which gpt-oss adds a bias at once, and which GLM-4.5 weights at once (nemo_automodel,
components/moe/experts.py, `_BIAS_CHUNK_THRESHOLD`; optimized_ops.py, `_RW_CHUNK_THRESHOLD`)."""


def tokens_at_once(job: Job) -> int | None:
    """Tokens of a batch whose experts have as many rows; None for models other than gpt-oss and GLM-4.5."""
    if not (builds(job) and job.architecture.model_type in ("gpt_oss", "glm4_moe", "glm4_moe_lite")):
        return None
    return ROWS_AT_ONCE // job.architecture.blocks[-1].mlp.num_experts_per_tok


EXPERTS_AT_ONCE = 2**29
"""Bytes of gate and up that experts with biases make of all rows at once behind an exchange (the same,
`_EXPERT_MLP_CHUNK_BYTES`)."""


def tokens_unchunked(job: Job) -> int | None:
    """Tokens of a batch whose experts run over all rows at once; above, chunks of rows are checkpoints. None where all do, and
    of Transformer Engine's experts."""
    kernels = kernels_of(job.setup.kernels or ())
    if not builds(job) or job.architecture.model_type != "gpt_oss" or kernels.exchange is None or kernels.experts is not None:
        return None
    mlp = job.architecture.blocks[-1].mlp
    return EXPERTS_AT_ONCE // (mlp.num_experts_per_tok * 2 * mlp.intermediate_size * ITEMSIZE[str(job.setup.dtype)])


def rows_of(job: Job) -> Rows:
    """How many rows of experts a batch has."""
    tokens = job.setup.rows * job.setup.seq_len
    if (few := tokens_at_once(job)) is not None and tokens <= few:
        return "few"
    return "most" if (most := tokens_unchunked(job)) is not None and tokens > most else "many"


def longest_row(job: Job) -> int | None:
    """Tokens of a row above which the first step may hold most, in which FlexAttention makes masks of all heads; None without.

    A mask has a byte for each key, and is summed up as two int64 (torch, nn/attention/flex_attention.py,
    `_convert_mask_to_block_mask`). That is compared with what later steps hold for a token: its logits, and in each layer gate
    and up of its experts, inputs of both norms, of the projections and of the output, and attention's arguments and result.
    """
    if job.architecture.model_type != "gpt_oss" or tokens_at_once(job) is None:
        return None
    architecture = job.architecture
    blocks, hidden, vocab = architecture.blocks, architecture.hidden_size or 0, architecture.vocab_size or 0
    a, mlp = blocks[0].attentions[0], blocks[0].mlp
    heads = 3 * a.num_attention_heads + 2 * a.num_key_value_heads
    of_layer = 2 * mlp.num_experts_per_tok * mlp.intermediate_size + 3 * hidden + heads * a.head_dim
    wide = job.distributed is not None and job.setup.loss == "full"  # three copies of the logits in fp32 live at once in backward
    of_logits = 3 * ITEMSIZE["fp32"] if wide else ITEMSIZE[str(job.setup.dtype)]
    kept = ITEMSIZE[str(job.setup.dtype)] * sum(len(block.layers) for block in blocks) * of_layer + of_logits * vocab
    return kept // ((ITEMSIZE["bool"] + 2 * ITEMSIZE["int64"]) * a.num_attention_heads)


def _knows_mixture(job: Job) -> bool:
    """Whether gpt-oss was rehearsed as the tool builds it: LoRA of attention on one GPU, over enough tokens, of rows whose masks
    are not the peak; with Transformer Engine's attention and linear layers, over few tokens."""
    setup, adapts = job.setup, job.method_name == "lora" and _adapts_as_rehearsed(job)
    plain = job.distributed is None and job.quant is None and not setup.gradient_checkpointing and setup.dtype == "bf16"
    few = setup.rows * setup.seq_len <= (tokens_at_once(job) or 0)
    by_engine = kernels_of(setup.kernels or ()).dense is not None
    return adapts and plain and (few if by_engine else not few and setup.seq_len <= (longest_row(job) or 0))


def knows_experts(job: Job) -> bool:
    """Whether experts that ranks divide were rehearsed: with another exchange than HybridEP's where all ranks own them once."""
    distributed, model_type = job.distributed, job.architecture.model_type
    if distributed is None or distributed.ep_size in (None, 1) or not builds(job) or model_type not in EXCHANGES:
        return False
    alone = {distributed.tp_size, distributed.dp_shard_size} <= {None, 1}
    plain = _reads_as_rehearsed(job) and _adapts_as_rehearsed(job)
    here = distributed.offload_params in (None, "none")
    mlp = job.architecture.blocks[-1].mlp
    whole = mlp.num_experts % distributed.ep_size == 0
    kernels = job.setup.kernels or ()
    if IN_TURN in kernels:
        gathers = kernels_of(kernels).exchange is None
        by_row = "hybridep.exchange" in kernels  # a row for each expert of a token, of which experts get as many, but for one
        if not (whole and (by_row or alike(distributed.ep_size, mlp.num_experts, mlp.num_experts_per_tok))):
            return False
        if pads(job) or (gathers and distributed.ep_size > MOST_GATHERING[_in_stages(job)]):
            return False
    return alone and plain and here and whole and any(_resembles(job, shown) for shown in EXCHANGES[model_type])


def knows_worst_routing(job: Job) -> bool:
    """Whether such experts were rehearsed that get every token of all ranks, fully trained and without stages."""
    distributed = job.distributed
    plain = job.method_name == "full" and distributed is not None and distributed.pp_size in (None, 1)
    return plain and (job.setup.kernels or ()) in WORST.get(job.architecture.model_type, ())


OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _reads_as_rehearsed(job: Job) -> bool:
    """Whether layers are of a kind that was rehearsed: DeepSeek's without compressed queries, but with them where torch
    compiles attention, and experts of no groups, of which some are chosen first, but in stages without an exchange, or where
    tokens take experts in turn, though not over DeepEP (a rehearsal held 1.1 % more); GLM-5's with torch's attention over
    rows of which an indexer chooses every key, or with Transformer Engine's where tokens take experts in turn."""
    setup, by_torch = job.setup, job.setup.attn_implementation == "sdpa"
    chosen = job.architecture.blocks[-1].attentions[0].num_chosen_keys if job.architecture.blocks[-1].attentions else None
    by_engine = IN_TURN in (setup.kernels or ())
    if chosen is not None and (setup.padding or not by_torch or (setup.seq_len > chosen and not by_engine)):
        return False
    router = job.architecture.blocks[-1].mlp.router
    grouped = job.architecture.model_type in ("deepseek_v3", "glm_moe_dsa") and router.groups > 1
    grouped = grouped and not (IN_TURN in (setup.kernels or ()) and "deepep.exchange" not in (setup.kernels or ()))
    compressed = grouped and (bool(setup.kernels) or not by_torch or not _in_stages(job))
    compiled = job.architecture.model_type == "deepseek_v3" and OF_COMPILED_ATTENTION in (setup.kernels or ())
    return not compressed and not (compiled and not any(m.name.endswith(".q_a_proj") for m in job.architecture.modules))


def _adapts_as_rehearsed(job: Job) -> bool:
    """Whether adapters are those that were rehearsed, without dropout: of both products of Qwen 3's experts and of those that
    tokens take in turn but Nemotron 3's, of none of others, and of gpt-oss's attention alone."""
    if job.method_name != "lora":
        return True
    config, model_type = job.config, job.architecture.model_type
    of_experts = {name.rpartition(".")[2] for name in getattr(config, "target_parameters", None) or ()}
    of_both = model_type == "qwen3_moe" or (IN_TURN in (job.setup.kernels or ()) and model_type != "nemotron_h")
    named = of_experts == ({"gate_up_proj", "down_proj"} if of_both else set())
    elsewhere = model_type == "gpt_oss" and not all(m.name.endswith(OF_ATTENTION) for m in job.adaptation.matched)
    plain = not getattr(config, "lora_dropout", 0) and not getattr(config, "modules_to_save", None)
    return named and plain and not elsewhere


def _resembles(job: Job, shown: Exchanged) -> bool:
    """Whether a job is one of these."""
    setup, distributed = job.setup, job.distributed
    assert distributed is not None
    several = setup.gradient_accumulation_steps * distributed.chunks > 1
    beside = (setup.kernels or ()) == shown.kernels and bool(setup.gradient_checkpointing) is shown.checkpoints
    as_often = (not several and not shown.apart) or (shown.several and shown.syncs is bool(distributed.sync_each_batch))
    stepped = not shown.optims or setup.optim in shown.optims
    stacked = setup.optim in ONE_BY_ONE or kernels_of(shown.kernels).experts is None  # torch steps no tensors beside DTensors
    owns = stacked if distributed.shards == distributed.ep_size else shown.shared
    ranks = (getattr(job.config, "r", 8), *getattr(job.config, "rank_pattern", {}).values())
    padded = IN_TURN in shown.kernels  # rehearsed with ranks of experts that are padded (components/_peft/lora_experts.py)
    aligned = padded or all(rank % 8 == 0 for rank in ranks)
    short = bool(shown.kernels) or setup.seq_len <= (longest_row(job) or setup.seq_len)
    as_long = rows_of(job) == shown.rows and short
    trains = (setup.dtype, setup.loss) == ("fp32" if shown.pretrains else "bf16", shown.loss)
    apart = ((shown.stages and not shown.whole) or shown.apart) is (distributed.pp_stage_is_unit is False)
    staged = apart and shown.stages is ((distributed.pp_size or 1) > 1)
    staged &= distributed.reshard_after_forward is (True if shown.frees else None)
    staged &= (distributed.cp_size or 1) == (2 if shown.shares_rows else 1)
    return (
        job.method_name == shown.method and trains and beside and as_often and stepped and owns and aligned and as_long and staged
    )


def _knows_muon(job: Job) -> bool:
    """Whether dion's Muon was rehearsed: of matrices in bf16 that ranks share by rows alone."""
    distributed = job.distributed
    shared = distributed is not None and distributed.tp_size in (None, 1) and distributed.shards == distributed.world_size
    return shared and builds(job) and job.method_name == "full" and job.setup.dtype == "bf16"


def packs_documents(job: Job) -> bool:
    """Whether Transformer Engine's attention tells the documents of a row apart; it takes no cache of keys and values."""
    return kernels_of(job.setup.kernels or ()).attention is not None


def _knows_documents(job: Job) -> bool:
    """Whether such rows were rehearsed: of a model of the tool's own, in bf16, over several GPUs or with LoRA."""
    setup, alone = job.setup, job.distributed is None and job.method_name != "lora"
    return builds(job) and not alone and setup.dtype == "bf16" and setup.loss == "full"


def _knows_further_tokens(job: Job) -> bool:
    """Whether layers that predict further tokens, if any, were rehearsed: with LoRA and checkpoints on one GPU, or one of
    Qwen 3.5."""
    setup = job.setup
    if not setup.mtp_depths or (job.architecture.model_type in OF_QWEN and setup.mtp_depths == 1):
        return True
    alone = job.distributed is None and job.method_name == "lora" and bool(setup.gradient_checkpointing)
    enough = job.method_name != "full" or setup.rows * setup.seq_len >= FEWEST_TOKENS
    beside = alone or (knows_experts(job) and not packs_documents(job) and enough)
    known = setup.loss in ("full", NO_UPCAST) and attends_then_mixes(job.architecture)
    return beside and known and setup.mtp_depths <= MOST_DEPTHS


def _knows_layers(job: Job) -> bool:
    """Whether torchao's layers, if any, were rehearsed: fully trained in bf16, of which ranks share rows of matrices alone; those
    that are fake-quantized of the tool's Llama without checkpoints."""
    setup, distributed, kernels = job.setup, job.distributed, kernels_of(job.setup.kernels or ())
    if kernels.linear is None and kernels.fake_quant is None:
        return True
    alone = distributed is not None and {distributed.tp_size, distributed.cp_size, distributed.pp_size} <= {None, 1}
    plain = job.method_name == "full" and setup.dtype == "bf16" and setup.loss == "full"
    of_llama = job.architecture.model_type == "llama" and builds(job) and not setup.gradient_checkpointing
    return alone and plain and (kernels.fake_quant is None or of_llama)


def _knows_by_operation(job: Job) -> bool:
    """Whether LoRA without the tool's autograd function was rehearsed: of transformers' modules in bf16, over several GPUs,
    without checkpoints."""
    plain = job.distributed is not None and job.quant is None and job.setup.dtype == "bf16" and not builds(job)
    return plain and job.method_name == "lora" and not job.setup.gradient_checkpointing


def _knows_ministral(job: Job) -> bool:
    """Whether Ministral 3 of the tool's own was rehearsed: LoRA with checkpoints, over ranks that share matrices."""
    setup, distributed = job.setup, job.distributed
    shared = distributed is not None and distributed.divided > 1 and {distributed.cp_size, distributed.pp_size} <= {None, 1}
    alone = job.method_name == "lora" and setup.dtype == "bf16" and bool(setup.gradient_checkpointing)
    return shared and alone and setup.attn_implementation == "sdpa" and not setup.kernels


def _in_stages(job: Job) -> bool:
    """Whether stages of a pipeline run the model, each of which makes a mask of padded rows for itself."""
    return job.distributed is not None and (job.distributed.pp_size or 1) > 1


def without_formula(job: Job) -> str | None:
    """Why a step of the recipe has no formula; None where it has one."""
    architecture, setup = job.architecture, job.setup
    unknown = {
        f"model type {architecture.model_type}": architecture.model_type
        not in (REHEARSED if job.quant is None else REHEARSED_QUANTIZED)
        and not knows_tower(job),
        f"method {job.method_name}": not (job.is_full_or_lora or knows_tower(job))
        or (architecture.model_type == "gpt2" and job.method_name != "full"),
        f"quant {setup.quant}": job.quant is not None and job.quant.name != "nf4",
        "autocast": setup.autocast != "none",
        "padding": setup.padding and builds(job) and not _in_stages(job),
        f"loss {setup.loss}": (setup.loss == CUT_APART and not _knows_cut(job))
        or (setup.loss == RECEIVED and not _knows_teacher(job)),
        f"optim {setup.optim}": (name := parse_optim(str(setup.optim)).name) not in REHEARSED_OPTIMIZERS
        or (name == "dion_muon" and not _knows_muon(job))
        or (name == "te_fused_adam" and builds(job) and not (packs_documents(job) or (setup.kernels and knows_experts(job)))),
        "further tokens as they were not rehearsed": not _knows_further_tokens(job),
        "torchao's layers as they were not rehearsed": not _knows_layers(job),
        "LoRA operation by operation, as it was not rehearsed": BY_OPERATION in (setup.kernels or ())
        and not _knows_by_operation(job),
        "quack's kernels as they were not rehearsed": not (knows_quack(job) or knows_experts(job)),
        "packed documents as they were not rehearsed": packs_documents(job) and not _knows_documents(job),
        "gpt-oss as it was not rehearsed": architecture.model_type == "gpt_oss"
        and not (_knows_mixture(job) or knows_experts(job)),
        "Ministral 3 as it was not rehearsed": architecture.model_type == "ministral3" and not _knows_ministral(job),
        f"{architecture.model_type} as it was not rehearsed": (
            architecture.model_type in {*EXCHANGES, *SCANNING, *MERGED} - {"gpt_oss"}
            and (builds(job) or architecture.model_type not in TRANSFORMERS_TOO)
            and not (knows_experts(job) or knows_scan(job, built=builds(job)) or _knows_merged(job) or knows_recorded(job))
        ),
        "torch's RMSNorm, other than in full fine-tuning under FSDP2": TORCH_NORM in (setup.kernels or ())
        and (job.distributed is None or job.method_name != "full"),
        "another strategy than fsdp2": job.distributed is not None and job.distributed.strategy != "fsdp2",
    }
    missing = next((f"with {what}" for what, is_so in unknown.items() if is_so), None)
    if missing is None and job.distributed is None and not (builds(job) or architecture.model_type in ALONE):
        missing = "on one GPU"
    return missing and f"{setup.by.called} {missing}"
