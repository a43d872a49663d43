"""Which modules each format converts; all others keep their own dtype. Names are those of `named_modules()`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from peftplan.errors import InputError, RefusedError
from peftplan.storage.config import QuantConfig

CONVERTED_KINDS: dict[str, frozenset[str]] = {
    "nf4": frozenset({"Linear", "Conv1D", "ExpertsApart"}),
    "fp4": frozenset({"Linear", "Conv1D", "ExpertsApart"}),
    "int8": frozenset({"Linear", "Conv1D"}),
    "fp8": frozenset({"Linear", "Experts", "ExpertsTransposed"}),
    "mxfp4": frozenset({"Experts", "ExpertsTransposed"}),
    "gptq": frozenset({"Linear", "Conv1D", "Conv2d"}),
    "awq": frozenset({"Linear", "LinearSubclass"}),
    "hqq": frozenset({"Linear"}),
}
"""The torch classes that each format replaces, by the test it makes: `type(module) is nn.Linear` is `Linear` alone,
`isinstance` also `LinearSubclass`. So embeddings, routers and norms stay as they are in every format, and **fused
experts in all but fp8 and mxfp4**: bitsandbytes leaves Mixtral's and Qwen3-MoE's experts in 16 bits. Sources,
transformers: integrations/bitsandbytes.py, finegrained_fp8.py, mxfp4.py, awq.py; optimum/gptq/utils.py 2.3.0;
hqq/models/base.py 0.2.8. Left out: the grouped linear layer of deepseek_v4 in fp8; the experts of llama4 in an nf4,
fp4 or int8 checkpoint, which become linear layers."""

STACKS = frozenset({"Experts", "ExpertsTransposed"})
"""Fused experts, which `quant_experts` converts whatever is skipped (axolotl 0.19.0, monkeypatch/moe_quant.py:109)."""

GPTQ_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)
"""Where gptq looks for the blocks, in this order (`BLOCK_PATTERNS`, optimum/gptq/constants.py 2.3.0)."""

HQQ_SKIPPED = ("lm_head",)
"""Last parts of names that hqq does not convert (`_IGNORE_LINEAR`, hqq/models/base.py 0.2.8). It has no option for them."""


def quantized_modules(
    quant: QuantConfig | None,
    *,
    modules: Iterable[tuple[str, str]],
    ties: Mapping[str, str],
    output_embedding: str | None,
    last_parameter: str,
    keep_in_fp32: tuple[str, ...] = (),
    model_type: str | None = None,
) -> set[str]:
    """Names of the modules that the format converts, out of `modules`: (name, kind) as `arch.modules.Module` has them.

    `ties` maps tied parameter names to their source (`all_tied_weights_keys`), `output_embedding` is the name of the
    module that `get_output_embeddings()` returns, `last_parameter` the last of `named_parameters()`, `keep_in_fp32`
    the model class's `_keep_in_fp32_modules` (T5: `wo`). `model_type` is needed by mxfp4 alone, which exists for
    gpt_oss. Raises RefusedError for mxfp4 on another model, and for gptq where it finds no blocks.
    """
    if quant is None:
        return set()
    kinds = dict(modules)
    stacks = {name for name, kind in kinds.items() if quant.experts and kind in STACKS}
    candidates = {name for name, kind in kinds.items() if kind in CONVERTED_KINDS[quant.name]}
    if quant.name == "gptq":
        block = _gptq_block(kinds)
        return {name for name in candidates if name.startswith(block)}
    if quant.name == "hqq":
        return {name for name in candidates if name.rpartition(".")[2] not in HQQ_SKIPPED}
    if quant.name == "mxfp4" and model_type != "gpt_oss":
        raise RefusedError(f"quant: mxfp4 stores the experts of gpt_oss only; model_type {model_type!r} has none")
    skip = skip_list(
        quant,
        default=keys_to_not_convert(ties=ties, output_embedding=output_embedding, last_parameter=last_parameter),
        keep_in_fp32=keep_in_fp32,
    )
    return stacks | {name for name in candidates if not is_skipped(name, skip)}


def keys_to_not_convert(*, ties: Mapping[str, str], output_embedding: str | None, last_parameter: str) -> set[str]:
    """What transformers does not convert by default: both sides of every tie, the output embedding, the last parameter.

    Source: `get_keys_to_not_convert`, transformers/quantizers/base.py 5.24.0. Only `.weight` is cut off: a model
    whose last parameter is a bias (BERT's classifier) gets a key that matches no module, and **its head is
    quantized**.
    """
    keys = {*ties.keys(), *ties.values(), last_parameter}
    if output_embedding is not None:
        keys.add(output_embedding)
    return {key.removesuffix(".weight") for key in keys}


def skip_list(quant: QuantConfig, *, default: set[str], keep_in_fp32: tuple[str, ...]) -> set[str]:
    """The patterns of modules that are not converted. The user's list *replaces* the default (awq: is added to it).

    Source: `HfQuantizer.get_modules_to_not_convert`, transformers/quantizers/base.py 5.24.0 (`add_default_skips` for
    awq). Modules kept in fp32 always join.
    """
    listed = set(quant.skip_modules or ())
    skipped = default if quant.skip_modules is None or quant.name == "awq" else set()
    return skipped | listed | set(keep_in_fp32)


def is_skipped(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names this module: a regular expression from the start up to a dot or the end, or a suffix.

    Source: `should_convert_module`, transformers/quantizers/quantizers_utils.py 5.24.0, negated.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    try:
        return any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in patterns)
    except re.error as error:
        raise InputError("quant_skip_modules", error.pattern, f"not a regular expression: {error.msg}") from error


def _gptq_block(names: Collection[str]) -> str:
    """The prefix of the blocks. gptq converts nothing outside of them, and has no skip list."""
    for block in GPTQ_BLOCKS:
        if any(name.startswith(block) for name in names):
            return block
    raise RefusedError(f"quant: gptq finds no blocks in this model; it looks for {', '.join(GPTQ_BLOCKS)}")
