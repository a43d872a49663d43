"""The model that a file names, as peftplan knows it, and how a repository of that name stores its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from peftplan.arch import catalogue
from peftplan.job.configs.documents import FileError
from peftplan.job.configs.facts import Facts
from peftplan.job.configs.launching import OUTSIDE, in_tree
from peftplan.job.configs.plan import Effect, Unsupported

NF4: Mapping[str, object] = {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"}
OF_NF4 = "NF4 with double quantization, as Unsloth's repositories of this name have it"
LAYERS_IN_16_BITS = "the repository leaves some layers in 16 bits"
STORED: tuple[tuple[str, Mapping[str, object], str, str | None], ...] = (
    (r"-unsloth-bnb-4bit", NF4, OF_NF4, LAYERS_IN_16_BITS),
    (r"-bnb-4bit", NF4, OF_NF4, None),
    (r"-gptq-(?:int)?8(?:-?bits?)?", {"quant": "gptq", "quant_bits": 8}, "8 bits in groups of 128, by its name", None),
    (r"-gptq(?:-(?:int)?4(?:-?bits?)?)?", {"quant": "gptq", "quant_bits": 4}, "4 bits in groups of 128, by its name", None),
    (r"-awq(?:-(?:int)?4(?:-?bits?)?)?", {"quant": "awq"}, "4 bits in groups of 128, by its name", None),
    (r"-(?:aqlm|hqq|exl2|fp8|nvfp4|mxfp4|w4a16|w8a8)\b[\w.-]*", {}, "", "how the repository stores its weights is not known"),
)
"""End of a repository's name → the options of its weights, what they are assumed to be, and what is not known of them.

transformers takes the storage of a repository from its config.json, whatever a file says (`merge_quantization_configs`,
quantizers/auto.py). 4 bits in groups of 128 are what GPTQConfig and AwqConfig write if nobody says otherwise.
"""
RESHARDED = re.compile(r"(?:-(?:sharded|bf16|fp16|\d+GB))+", re.I)
"""End of the name of a copy that holds the same weights in other files."""
APART = re.compile(r"unsloth/phi-|(?:thudm|zai-org)/glm-4-9b$|allenai/olmo-[17]b$", re.I)
"""Repositories whose layers are not those of the built-in model of that name: Unsloth's Phi has separate projections like Llama
(unsloth 2026.10.9, models/mapper.py); the others, of classes of their own, have q, k and v in one matrix."""


class Stored(NamedTuple):
    """How a repository stores the weights of the model in whose name's place it stands."""

    name: str
    """The repository's name without that."""
    options: Mapping[str, object]
    assumed: str
    unsupported: str | None


def named(text: str, tool: Facts, *, file: str = "") -> tuple[str, str | None]:
    """A built-in name where a tool's own name, in any case, an id, or the last part of a path is one; else the text.

    Behind it, what is assumed: a folder, or a repository that is not built in, holds the model whose name it has. A folder
    outside the tree of the config `file` is not opened. Raises FileError for one whose name says nothing.
    """
    own = tool.models.get(text) or tool.models.get(text.rpartition(".")[2])
    if own is None:
        own = next((name for known, name in tool.models.items() if known.lower() == text.lower()), None)
    if own is None:
        own = next((name for pattern, name in tool.models.items() if "*" in pattern and fnmatchcase(text, pattern)), None)
    if own is not None:
        return own, None
    within = all(in_tree(path, file) for path in (text, os.path.join(text, "config.json")))
    if catalogue.find(text) is not None or (os.path.exists(text) and within):
        return text, None
    whole = text.rstrip("/").removesuffix("/original")
    of_weights = stored(whole)
    whole = of_weights.name if of_weights else RESHARDED.sub("", whole) if RESHARDED.search(whole) else whole
    last = whole.rpartition("/")[2]
    if last != text and not APART.match(whole):
        for name in (whole, last, f"{last}-hf", re.sub("-hf$", "", last), re.sub(r"(?<=\d)_(?=\d)", ".", last)):
            if (entry := catalogue.find(name)) is not None:
                return name, f"{text} holds {entry.repo_id}, by its name"
    if os.path.exists(text):
        raise FileError(file, None, "model", text, f"{OUTSIDE}; name it as MODEL")
    return text, None


def stored(text: str) -> Stored | None:
    """How a repository of this name stores its weights; None where the name does not say it."""
    for end, options, assumed, unsupported in STORED:
        if (match := re.search(f"{end}$", text, re.I)) is not None:
            return Stored(text[: match.start()], options, assumed, unsupported)
    return None


def weights_of(text: str, options: Mapping[str, object]) -> tuple[dict[str, object], str | None, Unsupported | None]:
    """The options of a file whose model is a repository of stored weights, what is assumed of these, and what is not supported.

    The repository's storage wins over the file's. Full fine-tuning of quantized weights is what transformers refuses.
    """
    weights = stored(text.rstrip("/"))
    if weights is None:
        return dict(options), None, None
    why = weights.unsupported
    if weights.options and options.get("method") == "full":
        why = "the repository holds quantized weights, which a full fine-tuning does not train"
    if weights.options.get("quant") in ("gptq", "awq") and options.get("quant") in ("nf4", "fp4", "int8"):
        why = "the file asks bitsandbytes to quantize a repository that is quantized otherwise: transformers raises an error"
    effect: Effect = "raises" if why == LAYERS_IN_16_BITS else "unknown"
    unsupported = None if why is None else Unsupported(text, why, effect, "quant")
    if not weights.options:
        return dict(options), None, unsupported
    own = {name: value for name, value in options.items() if name not in ("quant", "double_quant", "quant_bits", "compute_dtype")}
    return {**own, **weights.options}, weights.assumed, unsupported
