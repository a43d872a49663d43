"""How the models of a job run: the facts of its setup, its card and its trainer that the formulas ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.analytic.sizes import NO_LIMITS, TABLE_MULTIPLE, Limits, shape_facts
from peftplan.arch.text_part import keeps_its_cache
from peftplan.arrays import Fact
from peftplan.distributed.ddp import copies_outputs
from peftplan.dtypes import ITEMSIZE
from peftplan.hardware.processors import processors
from peftplan.job.automodel import FEWEST_TOKENS, builds, longest_row, packs_documents, rows_of, tokens_at_once, tokens_unchunked
from peftplan.job.automodel_scans import has_own_code
from peftplan.job.beside_towers import hands_keys_on
from peftplan.job.compiled_layers import BLOCK_OF_FLEX, OUTSIDE, keeps_cache, recorded
from peftplan.job.exchanges import fits_blocks, pads
from peftplan.job.inventory import adapter_dtypes, keeps_on_host
from peftplan.job.kernels import kernels_in, kernels_of
from peftplan.job.loss_sizes import CHORD, OF_FUNCTION, LossSizes
from peftplan.job.requirements import pair
from peftplan.job.router_loss import check_router_loss
from peftplan.job.setup import Setup
from peftplan.job.tasks import as_told, rotary_positions
from peftplan.ledger import Dim
from peftplan.memory.attention import FLASH_CAPABILITY, MAX_FLASH_HEAD
from peftplan.memory.packed import FEWEST_DENSE
from peftplan.memory.parts import Running
from peftplan.memory.program import Program
from peftplan.methods.adaptation import PROMPTED, MethodConfig
from peftplan.optim import parse_optim
from peftplan.storage.modules import CONVERTED_KINDS
from peftplan.tape.split_keys import most_tokens
from peftplan.units import ceil_div

if TYPE_CHECKING:
    from peftplan.job.job import Job
    from peftplan.storage.fused_products import Chip


SHOWN_PICTURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_5")
"""Models that ms-swift embeds the tokens of before it calls them (template/templates/qwen.py, `Qwen2VLTemplate._post_encode`)."""
OF_MODULES = ("gpt2", "gpt_neo", "gptj")
"""Models whose dropout is all modules, which trl's `disable_dropout_in_model` turns off; others call the function."""


MASKED = ("gemma3",)
"""Model types whose class reads fp32 logits through the mask, in place of transformers' loss, in the release that a tool pins
(models/gemma3/modeling_gemma3.py:1024)."""


def running_of(job: Job, compute_capability: str) -> Running:
    """How the step of a job runs."""
    check_router_loss(job.setup, job.script)
    setup, loss, chip = job.setup, loss_sizes(job), chip_of(job, compute_capability)
    split = tokens_split(job, compute_capability)
    tokens = loss.row(setup.seq_len)
    of_llama = job.architecture.model_class.endswith("ForCausalLM")  # others had a loss of their own, such as GPT2LMHeadModel
    uncast = job.script.reads_16_bits(job.architecture.model_type)
    return Running(
        autocast=autocast_of(setup),
        checkpointing=bool(setup.gradient_checkpointing),
        checkpoints_parts=bool(job.distributed and job.distributed.checkpoints_parts),
        attention=str(setup.attn_implementation),
        padding=setup.padding or setup.by.values,  # the prompts of a rollout are padded to the longest
        use_cache=(bool(setup.use_cache) or keeps_its_cache(job.architecture))
        and not (setup.by.turns_cache_off or packs_documents(job) or hands_keys_on(job))
        and setup.loss != "trl-chunked",
        keeps_keys=bool(setup.use_cache and setup.gradient_checkpointing) and job.script.keeps_keys(job.architecture.model_type),
        adapter_buffers=adapter_dtypes(setup)[0],
        adapter_on_host=keeps_on_host(job),
        masks_unpadded=job.script.masks_unpadded(job.architecture.model_type, setup),
        flattens=setup.by.own_lora and setup.rows == 1,  # NeMo Automodel takes flash-attn for packed rows alone
        repeats_kv=has_own_code(job) or job.script.repeats_before(str(setup.attn_implementation), job.architecture.model_type),
        keeps_4bit_inputs=job.script.keeps_4bit_inputs,
        merged_4bit=setup.merges_for_vllm and job.quant is not None,
        rotary_by_product=job.script.rotary_by_product,
        shifts_logits=job.script.shifts_logits and of_llama,
        freezes_ranknum=job.script.freezes_ranknum,
        loss_of_16_bits=uncast,
        masks_logits=bool(setup.by.transformers) and job.architecture.model_type in MASKED,
        logits_in_fp32=job.script.logits_in_fp32 and of_llama and not uncast and not job.architecture.logits_ops,
        card=processors(compute_capability, job.multiprocessors),
        flash=pair(compute_capability) >= FLASH_CAPABILITY,
        peft_type=None if job.method is None else job.method.peft_type,
        peft_task=as_told(job.architecture, job.adapter).task_type,
        config=_dropping(job),
        seq_len=tokens,
        batch_size=setup.rows,
        dtype=setup.dtype,
        loss=setup.loss,
        of_completions=setup.packs_completions,
        holds_hidden_states=setup.packs_completions and not _returns_last(job),  # unsloth, models/rl.py:2089
        returns_hidden_states=setup.by.values or setup.by.passages == "apart" or (setup.of_hidden_pairs and setup.by.sums_rows),
        scored_rows=setup.scored_rows // setup.rows,
        kept_caches=setup.generation_rows // setup.rows if keeps_cache(job) else 0,
        loss_facts=loss.facts(setup.rows, loss.length(tokens + loss.virtual_tokens)),
        logits_to_keep=_scored(setup),
        router_loss=bool(setup.router_loss),
        reentrant=setup.use_reentrant,
        checkpoints_forward=job.script.checkpoints_forward,
        every_n_layers=setup.every_n_layers or 1,
        published_code=has_own_code(job),
        own_modules=setup.by.own_modules,
        own_decoders=builds(job),
        hooks_inputs=setup.by.hooks_inputs,
        noisy_embeddings=bool(setup.noisy_embeddings),
        mtp_depths=setup.mtp_depths or 0,
        checkpoints_frozen=setup.by.checkpoints_frozen,
        hooks_adapted=setup.by.hooks_adapted or _asks_gradients(job),
        kernels=kernels_in(setup.kernels or (), job.architecture),
        rows_of_experts=rows_of(job),
        chip=chip,
        fuses_first=setup.rows * (tokens + loss.virtual_tokens) <= (fused_first(job, chip) or 0),
        splits_keys=setup.rows * (tokens + loss.virtual_tokens) <= (split or 0),
        rotary_rows=rotary_rows(job)[0],
        hosted=bool(setup.offload_checkpoints) and setup.rows * tokens > (tokens_kept(job) or 0),
        older_liger=setup.by.pins_liger,
        scan=setup.by.transformers,
        recorded=recorded(job),
        worst_routing=job.distributed is not None and job.distributed.routing == "worst",
        ulysses=1 if job.distributed is None else job.distributed.sp_size or 1,
        token_outputs=setup.by.token_outputs,
        shows_picture=setup.by.shows_picture and job.architecture.model_type in SHOWN_PICTURES,
        embeds_rows=setup.by.embeds_rows,
        passages=setup.n_passages or 0,
        reads_answer=setup.loss_type == CHORD,
        scores_words=setup.by.scores_words,
        parts_of_row=job.distributed.world_size if job.distributed and setup.by.shares_texts else 1,
        without_loss=not setup.by.adds_own_loss
        and (
            (setup.by.scoring is not None or setup.of_hidden_pairs)
            or setup.by.loss_apart
            or setup.by.teaches
            or setup.by.embeds_rows
            or setup.by.passages is not None
            or setup.loss in OF_FUNCTION
        ),
    )


def _asks_gradients(job: Job) -> bool:
    """Whether Unsloth asks gradients of the embeddings although nothing is checkpointed (unsloth 2026.10.9, models/vision.py,
    `requires_grad_for_gradient_checkpointing`; unsloth_zoo, training_utils.py:511, `prepare_model_for_training`)."""
    kernels = kernels_of(job.setup.kernels or ())
    return (kernels.layers or kernels.decoder) is not None and not job.setup.gradient_checkpointing and not job.setup.by.embeds


def _returns_last(job: Job) -> bool:
    """Whether layers that torch compiles end in a forward that Unsloth wrote, which returns the last hidden states in place of
    logits (unsloth_zoo 2026.10.9, compiler.py, `UNSLOTH_RETURN_HIDDEN_STATES`). That of gpt-oss hands out those of each layer.
    """
    return kernels_of(job.setup.kernels or ()).layers is not None and job.architecture.model_type != "gpt_oss"


def autocast_of(setup: Setup) -> str | None:
    """The dtype of autocast while the models of a step run; None where they run without."""
    return None if setup.autocast == "none" or setup.by.skips_autocast else setup.autocast


def chip_of(job: Job, compute_capability: str) -> Chip | None:
    """The card by which a 4-bit job's products are fused; None for other jobs."""
    if not job.may_fuse:
        return None
    from peftplan.storage.fused_products import Chip

    return Chip(*pair(compute_capability), processors(compute_capability, job.multiprocessors).number)


def _dropping(job: Job) -> MethodConfig | None:
    """The method's config as the trainer leaves it: without dropout where it disables that (trl `disable_dropout_in_model`)."""
    if job.config is None or not job.setup.by.disables_dropout or not getattr(job.config, "lora_dropout", 0):
        return job.config
    return job.config.model_copy(update={"lora_dropout": 0.0})


def _scored(setup: Setup) -> int | None:
    """Tokens of a row that have logits: the last ones, where it is not all of them."""
    if setup.by.completions_alone and setup.max_completion_length is not None:
        return setup.max_completion_length + 1
    return setup.logits_to_keep


def loss_sizes(job: Job) -> LossSizes:
    """What the sizes of a job's loss depend on besides the batch."""
    before_embeddings = job.method is not None and job.method.peft_type in PROMPTED
    row, flex = recorded(job), job.architecture.model_type == "gpt_oss"
    return LossSizes(
        job.setup.loss,
        hidden_size=job.architecture.hidden_size or 0,
        vocab_size=job.architecture.vocab_size or 0,
        virtual_tokens=getattr(job.config, "num_virtual_tokens", None) or 0,
        prompted=before_embeddings,
        kept=_scored(job.setup),
        # rows of the data, whose tokens may all have labels, are larger than those that a student writes
        completion=job.setup.max_completion_length
        if job.setup.by.completions_alone or not job.setup.by.compares_at_once
        else None,
        by_rows=job.setup.by.scoring == "rows" and not job.setup.by.teaches,
        of_pairs=job.setup.of_hidden_pairs and not job.setup.by.sums_rows,
        chosen_apart=job.setup.by.rows == 2 and job.setup.by.scoring is not None and not job.setup.by.sums_rows,
        at_once=job.setup.by.compares_at_once,
        block=job.setup.by.block,
        before=job.setup.seq_len - 2 * (job.setup.max_completion_length or 0) if job.setup.by.block else 0,
        shared_by=1 if job.distributed is None else job.distributed.sharing,
        parts=1 if job.distributed is None else job.distributed.parts,
        multiple=BLOCK_OF_FLEX if job.setup.packs_completions and row is not None and flex else 1,
        answers=job.setup.loss_type == CHORD,
        passages=(job.setup.n_passages or 0) if job.setup.by.passages == "apart" else 0,
        trains_head=job.method_name == "full" or not OUTSIDE.isdisjoint(getattr(job.config, "modules_to_save", None) or ()),
        hidden_bytes=ITEMSIZE["fp32" if row is not None and row.wide_norm else job.setup.dtype],
    )


def tokens_kept(job: Job) -> int | None:
    """Tokens of the largest input of a checkpointed layer that is too small to be offloaded."""
    checkpoint = kernels_of(job.setup.kernels or ()).checkpoint
    if checkpoint is None or not job.setup.offload_checkpoints or not job.architecture.hidden_size:
        return None
    return checkpoint.least_bytes // (ITEMSIZE[job.setup.dtype] * job.architecture.hidden_size)


def rotary_rows(job: Job) -> tuple[Dim, Limits]:
    """Rows of the rotary tables that a package's decoder keeps, and the tokens above which they are more.

    Without positions in the batch, as many as a row needs, but `positions` at least; with them all of the config. Source: unsloth
    2026.10.9, models/llama.py (`_PerDeviceRopeCache`, `LlamaModel_fast_forward`).
    """
    kernels, setup = kernels_of(job.setup.kernels or ()), job.setup
    if kernels.decoder is None:
        return 0, NO_LIMITS
    configured = rotary_positions(job.model, job.architecture) or kernels.decoder.positions
    first = min(kernels.decoder.positions, configured)
    if kernels.padding_free is None and setup.scored_rows <= 1:
        return (first if setup.seq_len <= first else f"s%{TABLE_MULTIPLE}"), Limits(of_row=(first,))
    rows = first if configured == first else ceil_div(configured, TABLE_MULTIPLE) * TABLE_MULTIPLE
    tokens = max(setup.scored_rows, setup.rows) * setup.seq_len
    return (rows if tokens <= configured else f"b·s%{TABLE_MULTIPLE}"), Limits(of_batch=(configured,))


def limits_of(job: Job, compute_capability: str) -> Limits:
    """Numbers of tokens above which the kernels of a job allocate otherwise, or were rehearsed."""
    of_tables = rotary_rows(job)[1]
    fused = fused_first(job, chip_of(job, compute_capability))
    packed = FEWEST_DENSE - 1 if job.quant is not None and job.quant.name == "awq" else None
    too_few = FEWEST_TOKENS - 1 if job.setup.mtp_depths else None
    mosts = (
        fused,
        packed,
        too_few,
        tokens_kept(job),
        tokens_at_once(job),
        tokens_unchunked(job),
        tokens_split(job, compute_capability),
    )
    tokens = [most for most in mosts if most is not None]
    rows = () if (longest := longest_row(job)) is None else (longest,)
    return Limits(of_batch=(*tokens, *of_tables.of_batch), of_row=(*rows, *of_tables.of_row))


def facts_of(job: Job, compute_capability: str) -> tuple[Fact, ...]:
    """What the sizes of a job decide of its operations."""
    setup, loss = job.setup, loss_sizes(job)
    length = loss.row(setup.seq_len) + (getattr(job.config, "num_virtual_tokens", None) or 0)
    facts = shape_facts(setup.rows, length, job.architecture, loss, limits_of(job, compute_capability))
    return (*facts, loss.uneven(setup.seq_len), pads(job), fits_blocks(job))


def fused_first(job: Job, chip: Chip | None) -> int | None:
    """Tokens up to which the first product with a 4-bit weight is fused, and takes no workspace of cuBLAS; None where none is."""
    modules = (m for m in job.architecture.modules if m.layers is not None and m.kind in CONVERTED_KINDS["nf4"])
    first = next(modules, None)
    if chip is None or first is None or job.quant is None:
        return None
    n, k = reversed(first.shape("weight")) if first.kind == "Conv1D" else first.shape("weight")
    most = chip.most_tokens(n=n, k=k, dtype=str(job.quant.compute_dtype), blocksize=job.quant.blocksize)
    return most or None


def tokens_split(job: Job, compute_capability: str) -> int | None:
    """Tokens of a batch up to which torch's FlashAttention may split keys; None where it never does."""
    if job.setup.attn_implementation != "sdpa" or pair(compute_capability) < FLASH_CAPABILITY:
        return None
    attentions = (a for block in job.architecture.blocks for a in block.attentions)
    ranks = 1  # that divide heads
    if job.distributed is not None:
        from peftplan.distributed.tensor_parallel import ranks_of

        ranks = ranks_of(job.distributed) * (job.distributed.sp_size or 1)
    heads = {(max(1, a.num_attention_heads // ranks), a.head_dim) for a in attentions if a.head_dim <= MAX_FLASH_HEAD}
    card, virtual = processors(compute_capability, job.multiprocessors), getattr(job.config, "num_virtual_tokens", None) or 0
    return most_tokens(heads, card, virtual_tokens=virtual) or None


def program_of(job: Job) -> Program:
    """What a job's trainer does around forward and backward."""
    setup = job.setup
    return Program(
        setup.by._replace(reference_lasts=job.reference_lasts),
        bool(setup.keep_outputs),
        parse_optim(str(setup.optim)),
        accumulation=setup.gradient_accumulation_steps,
        collects=job.script.collects_batches(setup),
        keep_gradients=setup.keep_gradients,
        holds_gradients=setup.by.weighs_tokens and setup.optim == "moonlight_muon",  # 0.9.6.dev0, base_trainer.py:305
        updates_ranks=job.script.updates_ranks(setup),
        forwards=setup.forwards,
        beta=setup.by.beta if setup.beta is None else setup.beta,
        frees_outputs=job.script.outputs_end_with_backward or job.setup.by.holds_outputs,
        scales=setup.autocast == "fp16",
        unscales_fp16=job.distributed is not None and job.distributed.strategy == "fsdp1",
        copies_outputs=copies_outputs(job.distributed),
    )


def segments_grow(setup: Setup) -> bool:
    """Whether segments are expandable: unless it is said, as the trainer's package or that of the kernels sets them; Unsloth not
    where its vLLM sleeps."""
    sleeps = setup.packs_completions and setup.vllm_enable_sleep_mode  # unsloth_zoo, __init__.py:335
    by_kernels = setup.expandable_segments is None and kernels_of(setup.kernels or ()).sets_up_allocator
    return setup.segments_grow or (by_kernels and not sleeps)
