"""A setup with every field filled in, and what its trainer refuses."""

from peftplan.errors import InputError, OptionError, RefusedError, UnknownNameError, nearest
from peftplan.job.kernels import OF_AUTOMODEL as KERNELS_OF_AUTOMODEL
from peftplan.job.kernels import OF_AXOLOTL, OF_TORCHTUNE
from peftplan.job.setup import OF_PREFERENCES, Setup
from peftplan.job.trainers import OLDER, TRAINERS
from peftplan.optim import OF_AUTOMODEL, OPTIMIZERS, parse_optim
from peftplan.versions import AXOLOTL_READ, is_read, named

OWNERS = {
    "torchtune-linear": ("torchtune",),
    "torchtune-chunked": ("torchtune",),
    "torchtune-kl": ("torchtune-kd",),
    "full-no-upcast": ("automodel",),
    "te-parallel": ("automodel", "automodel-hf", "automodel-vlm"),
    "cut-apart": ("automodel", "automodel-hf", "automodel-vlm"),
    "received-kl": ("automodel-kd", "automodel-kd-beside"),
    "unsloth-logits": ("transformers",),
    "per-token": ("llamafactory", "transformers", "swift-text-part"),
    "shared-rows": ("transformers", "swift-text-part"),
    "shared-rows-chunked": ("transformers", "swift-text-part"),
    "eaft": ("axolotl", "transformers"),
    "eaft-behind": ("llamafactory", "transformers"),
    "masked-tokens": ("axolotl",),
}
"""Loss → the only trainers that compute it."""
LOSSES_OF_SLICES = ("full", "liger")
"""Losses that accept `logits_to_keep`. TRL 1.16 (`add_fused_lm_head`) uses the hidden states of all tokens, for which there are
then too few labels; Unsloth 2026.10.9 (`CausalLM_fast_forward`) computes logits and skips its fused loss."""


def resolved(
    setup: Setup,
    *,
    quantized: bool,
    supports_sdpa: bool,
    use_cache: bool,
    supports_flash_attn: bool = True,
    max_positions: int | None = None,
) -> Setup:
    """The setup with every unset field filled in, from the trainer's defaults or else from the model.

    peft leaves adapters in fp32 (`autocast_adapter_dtype`); TRL casts them to bf16, on a bitsandbytes base only. transformers
    uses sdpa if the model class supports it, else eager; it raises if the user selects sdpa or FlashAttention without support.
    `use_cache` is what the model's config says. A `seq_len` that nobody set is no longer than `max_positions`; one that is set
    longer is refused.
    """
    filled = {k: v for k, v in setup.by.defaults._asdict().items() if getattr(setup, k) in (None, "auto")}
    if not quantized:
        if setup.kbit_prepare:
            raise OptionError("kbit_prepare", True, "nothing is quantized; add --quant nf4, for example")
        filled["kbit_prepare"] = False
    if setup.use_cache is None and filled["use_cache"] is None:
        filled["use_cache"] = use_cache
    if setup.adapter_dtype is None:
        narrow = "bf16" if quantized and setup.by.casts_adapter(setup.quant) else "fp32"
        filled["adapter_dtype"] = setup.dtype if setup.by.adapters_as_base else narrow
    if setup.attn_implementation is None:
        filled["attn_implementation"] = "sdpa" if supports_sdpa else "eager"
    elif setup.attn_implementation == "sdpa" and not supports_sdpa:
        raise RefusedError("attn_implementation: this model class has no sdpa attention in transformers; accepted: eager")
    elif setup.attn_implementation == "flash_attention_2" and not supports_flash_attn:
        accepted = "sdpa, eager" if supports_sdpa else "eager"
        raise RefusedError(
            f"attn_implementation: this model class has no flash_attention_2 in transformers; accepted: {accepted}"
        )
    if max_positions is not None and "seq_len" not in setup.model_fields_set:
        filled["seq_len"] = min(setup.seq_len, max_positions)
    if setup.by.n_passages is not None and setup.n_passages is None:
        filled["n_passages"] = setup.by.n_passages
    filled |= _lengths(setup, filled.get("seq_len", setup.seq_len))
    complete = setup.model_copy(update=filled)
    check_length(complete.seq_len, max_positions)
    check_logits_to_keep(complete.logits_to_keep, complete.seq_len)
    _check_trainer(complete)
    _check_checkpointing(complete)
    return complete


def _lengths(setup: Setup, seq_len: int) -> dict[str, int]:
    """The lengths of what a trainer generates: of a completion as trl's config has it, and of prompt and completion together.

    Raises InputError for a prompt's length beside that of both, and for a completion that leaves no prompt.
    """
    if not setup.by.generates:
        return {}
    block, chosen = setup.by.block, "seq_len" in setup.model_fields_set
    of_blocks = max((seq_len - block) // 2 // block * block, block) if block else 0
    by_default = of_blocks if block and chosen else min(setup.by.completion or 1, of_blocks or seq_len - 1)
    completion = setup.max_completion_length or by_default
    if block and not chosen and setup.max_prompt_length is None:
        seq_len = 2 * completion + block
    if setup.max_prompt_length is not None:
        if chosen:
            raise InputError(
                "max_prompt_length", setup.max_prompt_length, "seq_len is prompt and completion; give one of the two"
            )
        seq_len = setup.max_prompt_length + completion
    before = seq_len - 2 * completion  # the first anchor
    longer = setup.by.scores_documents and before % block == 0  # by the tokens of a prompt
    if block and (completion % block or before < block or (before > block and not longer)):
        option = "seq_len" if setup.max_completion_length is None else "max_completion_length"
        raise InputError(
            option,
            seq_len if option == "seq_len" else completion,
            f"accepted: max_completion_length a multiple of {block}, and a seq_len of twice as many tokens and {block} more, "
            f"such as {of_blocks} and {2 * of_blocks + block}",
        )
    if completion >= seq_len:
        raise InputError("max_completion_length", completion, f"accepted: below the {seq_len} tokens of prompt and completion")
    return {"seq_len": seq_len, "max_completion_length": completion}


def check_length(seq_len: int, max_positions: int | None) -> None:
    """Raise InputError if a sequence has more tokens than the model's table of positions has rows."""
    if max_positions is not None and seq_len > max_positions:
        raise InputError("seq_len", seq_len, f"accepted: up to {max_positions}, the positions of the model")


def check_logits_to_keep(logits_to_keep: int | None, seq_len: int) -> None:
    """Raise InputError if `logits_to_keep` exceeds the sequence length."""
    if logits_to_keep is not None and logits_to_keep > seq_len:
        raise InputError("logits_to_keep", logits_to_keep, f"accepted: up to {seq_len}, the tokens of a sequence")


def _check_checkpointing(setup: Setup) -> None:
    """Raise InputError for checkpointing settings while checkpointing is off."""
    if setup.gradient_checkpointing:
        return
    if (setup.every_n_layers or 1) > 1:
        raise InputError("every_n_layers", setup.every_n_layers, "accepted: 1, or more with gradient_checkpointing")
    if setup.offload_checkpoints:
        raise OptionError("offload_checkpoints", True, "there are none without gradient_checkpointing")


def _check_trainer(setup: Setup) -> None:
    """Raise RefusedError for what the trainer cannot do, InputError for an option that its loss does not accept."""
    by = setup.by
    if by.name not in (owners := OWNERS.get(setup.loss, (by.name,))):
        raise RefusedError(f"loss: {by.called} cannot compute the {setup.loss} loss; add --trainer {owners[0]}")
    if by.losses is not None and setup.loss not in by.losses:
        raise RefusedError(f"loss: {by.called} cannot compute the {setup.loss} loss; accepted: {', '.join(by.losses)}")
    if setup.optim in OF_AUTOMODEL and not by.own_lora:
        near = " or ".join(nearest(setup.optim, sorted(OPTIMIZERS)))
        raise RefusedError(
            f"optim: {by.called} makes no {setup.optim}; did you mean {near}? NeMo Automodel's recipe makes it "
            "(--trainer automodel)"
        )
    if by.makes_optimizer and str(setup.optim).endswith("layerwise") and setup.gradient_accumulation_steps > 1:
        raise RefusedError(
            f"optim: {named('transformers')} refuses gradient accumulation with {setup.optim}: ValueError "
            "(trainer_optimizer.py:166); accepted: gradient_accumulation_steps 1"
        )
    if by.prepares_model and parse_optim(str(setup.optim)).package == "lomo-optim" and setup.autocast == "fp16":
        raise RefusedError(
            f"optim: {setup.optim} fails in the first backward in fp16: accelerate hands the learning rate to the scaled loss: "
            "TypeError: Tensor.backward() got an unexpected keyword argument 'learning_rate' (accelerator.py:2857); accepted: "
            "autocast bf16"
        )
    if setup.optimizer_in_backward and not by.own_modules:
        raise RefusedError(f"optimizer_in_backward: {by.called} steps after backward; add --trainer torchtune")
    if setup.optimizer_in_backward and setup.gradient_accumulation_steps > 1:
        raise RefusedError("optimizer_in_backward: torchtune's recipes accept it with gradient_accumulation_steps 1 alone")
    if setup.device_map != "none" and by.own_modules:
        raise RefusedError(f"device_map: {by.called} builds the model on its card; accepted: none")
    if setup.kernels and by.own_modules and setup.kernels != OF_TORCHTUNE:
        raise RefusedError(f"kernels: {by.called} runs modules of its own, which only torchao's replace; leave out --kernels")
    if OF_TORCHTUNE[0] in (setup.kernels or ()) and not (by.own_modules or by.own_lora):
        raise RefusedError(f"kernels: {by.called} has no fake-quantized layers of torchao; add --trainer torchtune or automodel")
    of_axolotl = next((name for name in setup.kernels or () if name in OF_AXOLOTL), None)
    if of_axolotl is not None and not by.own_fsdp2:
        raise RefusedError(f"kernels: {by.called} has no {of_axolotl}; add --trainer axolotl")
    if not by.own_lora and (of_tool := next((name for name in setup.kernels or () if name in KERNELS_OF_AUTOMODEL), None)):
        raise RefusedError(f"kernels: {by.called} has no {of_tool}; add --trainer automodel")
    if setup.logits_to_keep is not None and setup.loss not in LOSSES_OF_SLICES:
        raise InputError(
            "logits_to_keep", setup.logits_to_keep, f"accepted: with loss {' or '.join(LOSSES_OF_SLICES)}, not {setup.loss}"
        )
    if by.drops_outputs and setup.keep_outputs:
        raise RefusedError(
            f"keep_outputs: {setup.trainer} drops the outputs in compute_loss; add --trainer plain, which keeps them"
        )
    if setup.tool_version is not None and by.name not in OLDER:
        having = ", ".join(OLDER)
        raise RefusedError(f"tool_version: one release of {by.called} is counted; accepted: with trainer {having}")
    if setup.tool_version is not None and not is_read(setup.tool_version):
        raise InputError("tool_version", setup.tool_version, f"accepted: {' or '.join(AXOLOTL_READ)}, which were read")
    if by.narrows and not (setup.autocast == "bf16" and setup.quant == "nf4" and setup.kbit_prepare):
        raise RefusedError("narrow_tables: accepted with quant nf4, kbit_prepare and autocast bf16, where trl casts tables")
    for name in sorted(OF_PREFERENCES - by.options):
        if (value := getattr(setup, name)) is not None and value is not False:
            having = ", ".join(trainer.name for trainer in TRAINERS.values() if name in trainer.options)
            raise OptionError(name, value, f"{by.called} has no such option; accepted: with --trainer {having}")
    if by.teaches and setup.beta is not None and setup.beta > 1:
        raise InputError("beta", setup.beta, f"{by.called} accepts a number from 0 to 1")
    if (by.teaches or by.taught) and "teacher_model" in by.options and setup.teacher_model is None:
        raise RefusedError(f"teacher_model: {by.called} needs one; accepted: a model of the same vocabulary")
    if by.values and setup.gradient_checkpointing:
        raise RefusedError(f"gradient_checkpointing: {by.called} never makes checkpoints; accepted: false")
    if by.rewards and setup.reward_model is None:
        raise RefusedError(f"reward_model: {by.called} needs one; accepted: a model")
    if setup.loss_type is not None:
        types = setup.loss_type.split(",") if by.many_losses else [setup.loss_type]
        for unknown in (name for name in types if name.strip() not in by.loss_types):
            raise UnknownNameError("loss_type", unknown, by.loss_types)
