"""What the name of a repository says: the built-in model whose weights it holds, and how it stores them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from peftplan.arch import catalogue

NF4: Mapping[str, object] = {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"}
OF_NF4 = "NF4 with double quantization, as Unsloth's repositories of this name have it"
LAYERS_IN_16_BITS = "the repository leaves some layers in 16 bits"
EXPERTS_IN_4_BITS = "the repository stores each expert as layers in 4 bits of Unsloth's, which transformers fuses in 16 bits"
STORED: tuple[tuple[str, Mapping[str, object], str, str | None], ...] = (
    (r"(?<=gpt-oss-20b)-unsloth-bnb-4bit", NF4, OF_NF4, EXPERTS_IN_4_BITS),
    (r"(?<=gpt-oss-120b)-unsloth-bnb-4bit", NF4, OF_NF4, EXPERTS_IN_4_BITS),
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
IN_CACHE = re.compile(r"(?:^|/)models--([^/]+)--([^/]+)(?:/snapshots/[^/]+)?$")
"""A folder of the Hub's local cache, which has the repository's name (huggingface_hub, file_download.py, repo_folder_name)."""
DOT = "___"
"""What ModelScope writes for a dot in the name of a folder (modelscope, hub/utils/utils.py, model_id_to_group_owner_name)."""
APART = re.compile(r"unsloth/phi-|(?:thudm|zai-org)/glm-4-9b$|allenai/olmo-[17]b$", re.I)
"""Repositories whose layers are not those of the built-in model of that name: Unsloth's Phi has separate projections like Llama
(unsloth 2026.10.9, models/mapper.py); the others, of classes of their own, have q, k and v in one matrix."""

ASSUMED = "assumed"
"""Where the config of a repository that was not read says what is assumed of it."""
OF_BITSANDBYTES: Mapping[str, object] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
"""`quantization_config` of the repositories whose names end so (`NF4`)."""
OVER_PACKED = ("ddp", "zero1", "zero2", "fsdp2")
"""Strategies under which weights that gptqmodel packed were rehearsed: each rank holds all of them, which are buffers."""
PACKED = ("gptq", "awq")
TAKEN = ("bitsandbytes", *PACKED)
"""`quant_method` of checkpoints that transformers loads as they are stored, whatever else is asked."""


class Stored(NamedTuple):
    """How a repository stores the weights of the model in whose name's place it stands."""

    name: str
    """The repository's name without that."""
    options: Mapping[str, object]
    assumed: str
    unsupported: str | None


def copied_model(text: str) -> str | None:
    """The built-in name or repository id of the model that a repository or folder of this name holds; None for an unknown one."""
    whole = IN_CACHE.sub(r"/\1/\2", text.rstrip("/").removesuffix("/original")).replace(DOT, ".")
    of_weights = stored(whole)
    whole = of_weights.name if of_weights else RESHARDED.sub("", whole) if RESHARDED.search(whole) else whole
    last = whole.rpartition("/")[2]
    if last == text or APART.match(whole):
        return None
    names = (whole, last, f"{last}-hf", re.sub("-hf$", "", last), re.sub(r"(?<=\d)_(?=\d)", ".", last))
    known = next((name for name in names if catalogue.find(name) is not None), None)
    return known if known is not None else catalogue.spelled(last)


def by_name(text: str, name: str) -> str:
    """What is assumed of a repository in whose place a built-in model stands."""
    entry = catalogue.find(name)
    return f"{text} holds {entry.repo_id if entry else name}, by its name"


def stored(text: str) -> Stored | None:
    """How a repository of this name stores its weights; None where the name does not say it."""
    for end, options, assumed, unsupported in STORED:
        if (match := re.search(f"{end}$", text, re.I)) is not None:
            return Stored(text[: match.start()], options, assumed, unsupported)
    return None


def config_by_name(text: str) -> dict[str, object] | None:
    """The config.json of a repository of this name, if it is a copy of a built-in model; None where its name says too little."""
    name, weights = copied_model(text), stored(text.rstrip("/"))
    if name is None or (weights is not None and weights.unsupported is not None):
        return None
    entry = catalogue.find(name)
    assert entry is not None
    config = dict(entry.facts()["config"])
    if weights is None:
        return config
    quant, assumed = weights.options["quant"], f"{by_name(text, name)}; {weights.assumed}"
    if quant == "nf4":
        return config | {"quantization_config": {**OF_BITSANDBYTES, ASSUMED: assumed}}
    bits = weights.options.get("quant_bits", 4)
    return config | {"quantization_config": {"quant_method": quant, "bits": bits, "group_size": 128, ASSUMED: assumed}}
