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
    """The option that a word means. `values`: theirs in lower case → ours, `*` any other; None is a value that sets nothing.

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
OF_ALL_NODES = ("num_processes", "world_size")
"""Words for the ranks of all nodes, which are those of one node where there is one."""
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
    "quantization": Meaning("quant", {"4": "nf4", "4bit": "nf4", "8": "int8", "8bit": "int8", "16": "none"}),
    **_switch("double_quant", True, "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization", false=False),
    **_named("compute_dtype", "bnb_4bit_compute_dtype"),
    **_named("quant_storage", "bnb_4bit_quant_storage"),
    **_named("dtype", "torch_dtype", "model_dtype"),
    **_switch("autocast", "bf16", "bf16", auto=None),
    **_switch("autocast", "fp16", "fp16", auto=None),
    **_named("autocast", "mixed_precision", no="none"),
    # several GPUs
    **_named("gpus", "num_gpus", "nproc_per_node", "nproc", "n_gpu", *OF_ALL_NODES),
    **_named("nodes", "nnodes", "num_machines", "num_nodes"),
    **_named("tp_size", "tensor_parallel_size", "tp"),
    **_named("cp_size", "context_parallel_size", "cp"),
    **_named("ep_size", "expert_parallel_size", "ep"),
    **_named("pp_size", "pipeline_parallel_size", "pp"),
    "zero_stage": Meaning("strategy", {str(stage): f"zero{stage}" for stage in range(4)}),
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
    "neftune_noise_alpha": Meaning("noisy_embeddings", {"none": None, "*": True}),
    **_switch("loss", "liger", "use_liger_kernel", "enable_liger_kernel", "use_liger"),
    **_switch("loss", "cut-cross-entropy", "cut_cross_entropy"),
}  # fmt: skip
"""Another tool's word → its meaning here."""

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("packing", "sample_packing", "padding_free"),
        "name a trainer that packs: trl-packed, swift-dpo-packed or swift-generative-reranker-packed (trl with FlashAttention); "
        "the batch size is 1, and the sequence length that of all its rows",
    ),
    **dict.fromkeys(
        ("model", "model_name_or_path", "model_name", "model_id", "model_id_or_path", "base_model"),
        "the model is the first argument: peftplan estimate MODEL, peftplan.estimate(MODEL)",
    ),
    "fsdp": "accepted: --strategy fsdp2 or fsdp1 with its parameters, or --accelerate-config FILE",
    "torch_compile": "compiled kernels are not counted",
}
"""Words of other tools for which peftplan has no option → what to do instead."""

NO_EFFECT = "it does not change memory: leave it out"


def without_effect(word: str) -> bool:
    """Whether a word is an argument of transformers' Trainer that changes no byte of a step, such as `learning_rate`."""
    from peftplan.job.configs.facts import facts  # only an error asks

    known = facts("transformers").known(word)
    return known is not None and not known.row.get("ignored", "not counted").endswith("not counted")


ON = ("true", "1", "yes", "on")
OFF = ("false", "0", "no", "off")


def refuse(word: str, typed: str, value: object) -> None:
    """Raise RefusedError for a word that is set and that no engine counts."""
    if word in REFUSED and _text(value) not in (*OFF, "none"):
        raise RefusedError(f"{typed}: {REFUSED[word]}")


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
    return values.get(text, values.get("*", value))


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
        if value is not None and word in REFUSED:
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
    check_nodes(typed, our_options.get("nodes"))
    return our_options, typed


def check_nodes(typed: Mapping[str, str], nodes: object) -> None:
    """Raise RefusedError where the ranks of all nodes stand beside a number of nodes."""
    word = typed.get("gpus", "")
    if nodes is not None and word.lstrip("-").replace("-", "_") in OF_ALL_NODES:
        raise RefusedError(f"{word} counts the ranks of all nodes; beside a number of nodes say how many GPUs each has: gpus")


def twice(first: str, second: str) -> RefusedError:
    """The error for two words that set one option."""
    return RefusedError(f"{first} is given twice" if first == second else f"{first} and {second} set the same option: give one")
