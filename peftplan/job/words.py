"""Option names of other tools, accepted wherever peftplan's own are: on the command line and as keywords.

One table: their word → our option, with their values for ours where those differ. `lora_rank=16` is `r=16`,
`load_in_4bit=True` is `quant="nf4"`. Sources: transformers' TrainingArguments, TRL's SFTConfig and ModelConfig, axolotl's
and LLaMA-Factory's configs, ms-swift, Unsloth, torchtune, DeepSpeed, accelerate, and the QLoRA paper's script.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from peftplan.errors import InputError, RefusedError, quoted


class Meaning(NamedTuple):
    """The option that a word means. `values`: theirs in lower case → ours; None is a value that sets nothing.

    A `switch` is on where it is typed without a value.
    """

    option: str
    values: Mapping[str, object] = {}
    switch: bool = False


def _named(option: str, *words: str, **values: object) -> dict[str, Meaning]:
    return {word: Meaning(option, values) for word in words}


def _switch(option: str, on: object, *words: str, **values: object) -> dict[str, Meaning]:
    """Words with a true or false value; false sets nothing."""
    return {word: Meaning(option, {"true": on, "false": None, **values}, switch=True) for word in words}


FLASH = "flash_attention_2"
MEANINGS: Mapping[str, Meaning] = {
    # method
    **_named("method", "finetuning_type", "train_type", "tuner_type", "peft_type", "adapter"),
    **_named("r", "rank", "lora_r", "lora_rank"),
    **_named("target_modules", "lora_target_modules", "lora_target", all="all-linear"),
    **_switch("target_modules", "all-linear", "lora_target_linear"),
    **_named("modules_to_save", "lora_modules_to_save", "additional_target"),
    **_named("task_type", "lora_task_type"),
    **_switch("use_dora", True, "peft_use_dora", "lora_use_dora", false=False),
    **_switch("use_rslora", True, "peft_use_rslora", "lora_use_rslora", false=False),
    # lengths and batches
    **_named("seq_len", "max_length", "max_seq_length", "max_seq_len", "sequence_len", "sequence_length", "seq_length"),
    **_named("seq_len", "cutoff_len", "model_max_length"),
    **_named("batch_size", "per_device_train_batch_size", "per_gpu_train_batch_size", "micro_batch_size", "mbs", "bs"),
    **_named("batch_size", "train_micro_batch_size_per_gpu"),
    **_named("gradient_accumulation_steps", "gradient_accumulation", "grad_accum", "accumulation_steps", "gas"),
    # storage and precision
    **_switch("quant", "nf4", "load_in_4bit"),
    **_switch("quant", "int8", "load_in_8bit"),
    **{word: Meaning("quant", {"4": "nf4", "8": "int8", "16": "none"}) for word in ("quantization_bit", "bits")},
    **_named("quant", "bnb_4bit_quant_type", "quantization_type"),
    **_switch("double_quant", True, "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization", false=False),
    **_named("compute_dtype", "bnb_4bit_compute_dtype"),
    **_named("quant_storage", "bnb_4bit_quant_storage"),
    **_named("dtype", "torch_dtype", "model_dtype"),
    **_switch("autocast", "bf16", "bf16", auto=None),
    **_switch("autocast", "fp16", "fp16", auto=None),
    **_named("autocast", "mixed_precision", no="none"),
    # several GPUs
    **_named("gpus", "num_gpus", "nproc_per_node", "n_gpu"),
    **_named("nodes", "nnodes", "num_machines", "num_nodes"),
    **_named("tp_size", "tensor_parallel_size"),
    **_named("cp_size", "context_parallel_size"),
    **_named("sp_size"),
    **_named("dp_shard_size", "hybrid_shard_size"),
    **_named("offload_params", "offload_param", "fsdp_offload_params", true="cpu", false="none"),
    **_named("offload_optimizer", "offload_optimizer_device"),
    # training
    **_named("optim", "optimizer"),
    **_switch("gradient_checkpointing", True, "use_gradient_checkpointing", "activation_checkpointing", false=False),
    **_switch("gradient_checkpointing", True, "enable_activation_checkpointing", false=False),
    **_switch(
        "attn_implementation", FLASH, "flash_attn", "flash_attention", "use_flash_attn", "use_flash_attention_2",
        fa2=FLASH, sdpa="sdpa", disabled="eager", auto=None,
    ),
    **_named("attn_implementation", "attn_impl", flash_attn=FLASH, flash_attention=FLASH, fa2=FLASH),
    **_switch("loss", "liger", "use_liger_kernel", "enable_liger_kernel", "use_liger"),
    **_switch("loss", "cut-cross-entropy", "cut_cross_entropy"),
}  # fmt: skip
"""Another tool's word → its meaning here."""

NOT_COUNTED: Mapping[str, str] = {
    **dict.fromkeys(
        ("packing", "sample_packing", "padding_free"),
        "packed batches are not supported yet; a single sequence of the packed length comes close",
    ),
    "fsdp": "accepted: --strategy fsdp2 or fsdp1 with its parameters, or --accelerate-config FILE",
    "torch_compile": "compiled kernels are not counted",
    "neftune_noise_alpha": "noise on the embeddings is not counted",
}
"""Words of other tools for which peftplan has no option."""

ON = ("true", "1", "yes", "on")
OFF = ("false", "0", "no", "off")


def refuse(word: str, typed: str, value: object) -> None:
    """Raise RefusedError for a word that is set and that no engine counts."""
    if word in NOT_COUNTED and _text(value) not in (*OFF, "none"):
        raise RefusedError(f"{typed}: {NOT_COUNTED[word]}")


def _text(value: object) -> str:
    return (value if isinstance(value, str) else quoted(value)).lower()


def our_value(word: str, typed: str, value: object) -> object:
    """Our value for the value of a word; None sets nothing. Raises InputError for a switch that is neither on nor off."""
    values, switch = MEANINGS[word].values, MEANINGS[word].switch
    text = _text(value)
    if switch:
        text = "true" if text in ON else "false" if text in OFF else text
        if text not in values:
            raise InputError(typed, value, f"accepted: {', '.join(values)}")
    return values.get(text, value)


@contextmanager
def named_as_typed(options: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Keywords under our names; an error about one of them names the word that was typed."""
    our_options, typed = ours(options)
    try:
        yield our_options
    except InputError as error:
        error.named(typed.get(error.field, error.field))
        raise


def ours(options: Mapping[str, object]) -> tuple[dict[str, object], dict[str, str]]:
    """Keywords under our names, and for each that has another one the word that was typed; None sets nothing.

    Raises RefusedError if two words set one option, and for what is not supported.
    """
    our_options: dict[str, object] = {}
    typed: dict[str, str] = {}
    for word, value in options.items():
        option = word
        if value is not None and word in NOT_COUNTED:
            refuse(word, word, value)
            continue
        if word in MEANINGS:
            option, value = MEANINGS[word].option, None if value is None else our_value(word, word, value)
        if value is None:
            if option == word:
                our_options.setdefault(option, None)
            continue
        if our_options.get(option) is not None:
            raise twice(typed.get(option, option), word)
        our_options[option] = value
        if option != word:
            typed[option] = word
    return our_options, typed


def twice(first: str, second: str) -> RefusedError:
    """The error for two words that set one option."""
    return RefusedError(f"{first} is given twice" if first == second else f"{first} and {second} set the same option: give one")
