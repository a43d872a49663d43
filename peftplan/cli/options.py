"""The options of `estimate` and `inspect`, under the ecosystem's names. Values stay text; the library checks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import click

from peftplan.errors import InputError

FORMATS = ("table", "json", "csv", "markdown")

TEXT: dict[str, str] = {
    "task_type": "peft's task type: CAUSAL_LM, SEQ_CLS, TOKEN_CLS, …; default: as the config says",
    "num_labels": "classes of a classification head",
    "trainer": "plain | transformers | trl | qlora-paper: fills what is not set",
    "dtype": "dtype of the base model: bf16 | fp16 | fp32",
    "adapter_dtype": "dtype of the adapter; peft's default is fp32",
    "autocast": "none | bf16 | fp16",
    "quant": "storage of the frozen base: none | nf4 | fp4 | int8 | fp8 | mxfp4 | gptq | awq | hqq",
    "quant_bits": "bits of gptq and hqq",
    "quant_group_size": "group size of gptq, awq and hqq",
    "quant_blocksize": "block size of nf4 and fp4",
    "quant_skip_modules": "modules left unquantized, comma-separated (replaces the default list)",
    "compute_dtype": "compute dtype of 4-bit layers",
    "optim": "a name of TrainingArguments.optim",
    "optim_args": "as in TrainingArguments: key=value,…",
    "optim_target_modules": "modules that GaLore and APOLLO project",
    "batch_size": "per device and step (micro batch)",
    "seq_len": "tokens per sequence",
    "gradient_accumulation_steps": "micro batches per optimizer step",
    "attn_implementation": "sdpa | eager | flash_attention_2",
    "loss": "auto | full | trl-chunked | liger | unsloth",
}
SWITCHES: dict[str, str] = {
    "double_quant": "double quantization of nf4 and fp4",
    "gradient_checkpointing": "recompute each decoder layer in backward",
    "padding": "batches with a real padding mask",
    "kbit_prepare": "prepare_model_for_kbit_training on a quantized base",
    "use_cache": "build a KV cache in training",
}
KEEPS: dict[str, str] = {
    "outputs": "whether the caller holds the model's outputs through backward and step",
    "gradients": "whether gradients stay allocated (zero_grad(set_to_none=False))",
}
METHOD_TEXT: dict[str, str] = {
    "r": "rank",
    "lora_alpha": "scaling of the update",
    "lora_dropout": "dropout before A",
    "target_modules": "all-linear | attention | mlp | peft-default | names, comma-separated | a regular expression",
    "exclude_modules": "modules left out: names or a regular expression",
    "target_parameters": "parameters adapted directly, such as fused experts",
    "modules_to_save": "modules trained in full beside the adapter",
    "layers_to_transform": "layer indices, comma-separated",
    "rank_pattern": 'rank per module, JSON: {"q_proj": 4}',
    "bias": "none | all | lora_only",
    "num_virtual_tokens": "virtual tokens of prefix, prompt and p-tuning",
}
METHOD_FLAGS: dict[str, str] = {
    "use_dora": "DoRA on top of LoRA",
    "use_rslora": "scale by alpha / sqrt(r)",
}
INT_LISTS = ("layers_to_transform",)
JSON_VALUES = ("rank_pattern",)

Decorated = Callable[..., Any]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def setup_options(command: Decorated) -> Decorated:
    """Add every option of `planning.setup.Setup` to a command."""
    for name, text in reversed(KEEPS.items()):
        command = click.option(f"--keep-{name}/--drop-{name}", default=None, help=text)(command)
    for name, text in reversed(SWITCHES.items()):
        command = click.option(f"{_flag(name)}/--no-{name.replace('_', '-')}", default=None, help=text)(command)
    for name, text in reversed(TEXT.items()):
        command = click.option(_flag(name), default=None, metavar="VALUE", help=text)(command)
    return click.option("--trust-remote-code", is_flag=True, default=None, help="accepted, but no such code is ever run")(command)


def method_options(command: Decorated) -> Decorated:
    """Add --method, --peft-config, the common fields of peft's configs, and --set for all others."""
    command = click.option(
        "--set", "set_fields", multiple=True, metavar="FIELD=VALUE", help="any other field of the method's config"
    )(command)
    for name, text in reversed(METHOD_FLAGS.items()):
        command = click.option(_flag(name), is_flag=True, default=None, help=text)(command)
    for name, text in reversed(METHOD_TEXT.items()):
        command = click.option(_flag(name), default=None, metavar="VALUE", help=text)(command)
    command = click.option("--peft-config", default=None, metavar="FILE", help="a peft adapter_config.json, any method")(command)
    return click.option("--method", default=None, metavar="NAME", help="see `peftplan methods`; default: lora")(command)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were set, lists and JSON values parsed, `--set` fields merged in."""
    options = dict(options)
    fields = dict(_field(text) for text in options.pop("set_fields", ()))
    found = {name: value for name, value in options.items() if value is not None}
    for name in INT_LISTS:
        if name in found:
            found[name] = _json(name, f"[{found[name]}]", "whole numbers, comma-separated")
    for name in JSON_VALUES:
        if name in found:
            found[name] = _json(name, found[name], "a JSON object")
    return {**found, **fields}


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError("--set", text, "accepted: FIELD=VALUE")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value


def _json(name: str, text: str, accepted: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(name, text, f"accepted: {accepted}") from None


def check_format(name: str, accepted: Iterable[str] = FORMATS) -> str:
    """Raises UnknownNameError where the output format is unknown."""
    from peftplan.errors import UnknownNameError

    if name not in tuple(accepted):
        raise UnknownNameError("format", name, accepted)
    return name
