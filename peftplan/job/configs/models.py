"""The model that a file names, as peftplan knows it, and how a repository of that name stores its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase

from peftplan.arch import catalogue
from peftplan.dtypes import AS_LOADED, OF_CHECKPOINT
from peftplan.job.configs.documents import FileError
from peftplan.job.configs.facts import Facts, facts
from peftplan.job.configs.launch_files import OUTSIDE, in_tree
from peftplan.job.configs.plan import Effect, Refused, Unsupported
from peftplan.job.repositories import LAYERS_IN_16_BITS, PACKED, by_name, copied_model, stored
from peftplan.job.sources import checkpoint_dtype, load_config
from peftplan.versions import DTYPE_OF_CHECKPOINT
from peftplan.versions import named as release

QUANTIZED_OTHERWISE = (
    "the file asks bitsandbytes to quantize a repository that is quantized otherwise: transformers raises an error"
)
UNTRAINED = (
    f"{release('gptqmodel')} raises NotImplementedError: transformers asks it for the fastest kernels, Marlin's, which do not "
    "train (nn_modules/qlinear/__init__.py:569; without nvcc ModuleNotFoundError, marlin.py:345)"
)
"""No tool that is read here passes a backend on to `GPTQConfig` or `AwqConfig`."""
TRAINABLE = {"quantization_config.backend of the repository's config.json": "auto_trainable"}
"""The change with which it trains: transformers takes the backend from there (utils/quantization_config.py)."""
WITH_A_BACKEND: Mapping[str, tuple[str, ...]] = {"swift": PACKED, "llamafactory": PACKED}
"""Tools that were rehearsed with a repository of that change, and its formats."""
WITHOUT_CHECKPOINTS: Mapping[str, tuple[str, ...]] = {"swift": PACKED, "llamafactory": ("gptq",)}
"""The same of jobs without checkpoints: the peft that LLaMA-Factory takes has no layers for gptqmodel's awq, and keeps 0.4 % more
until backward than the formula."""


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
    if (name := copied_model(text)) is not None:
        return name, by_name(text, name)
    if os.path.exists(text):
        raise FileError(file, None, "model", text, f"{OUTSIDE}; name it as MODEL")
    return text, None


def is_folder(model: str) -> bool:
    """Whether a name is that of a folder, not of a built-in model or of a repository (`owner/name`)."""
    return catalogue.find(model) is None and (model.startswith((".", "~", "/")) or model.endswith("/") or model.count("/") > 1)


def weights_of(
    text: str, options: Mapping[str, object], tool: str
) -> tuple[dict[str, object], str | None, Unsupported | Refused | None]:
    """The options of a file whose model is a repository of stored weights, what is assumed of these, and what is not supported,
    or what the tool raises and the change with which it runs.

    The repository's storage wins over the file's. Full fine-tuning of quantized weights is what transformers refuses.
    """
    weights = stored(text.rstrip("/"))
    if weights is None:
        return dict(options), None, None
    why, assumed = weights.unsupported, weights.assumed
    if weights.options and options.get("method") == "full":
        why = "the repository holds quantized weights, which a full fine-tuning does not train"
    elif weights.options.get("quant") in PACKED:
        of_bitsandbytes = options.get("quant") in ("nf4", "fp4", "int8")
        why = QUANTIZED_OTHERWISE if of_bitsandbytes else UNTRAINED
    skips = facts("unsloth").in_16_bits.get(text.rstrip("/").lower()) if why == LAYERS_IN_16_BITS else None
    if skips is not None:
        why, assumed = None, f"{assumed}, but for {', '.join(skips)}"
    effect: Effect = "raises" if why == LAYERS_IN_16_BITS else "unknown"
    unsupported: Unsupported | Refused | None = None if why is None else Unsupported(text, why, effect, "quant")
    if why == UNTRAINED:
        if _with_a_backend(tool, {**options, **weights.options}):
            unsupported = Refused(text, why, TRAINABLE, "quant")
        else:
            unsupported = Unsupported(
                text, f"{why}; a program that loads with backend auto_trainable has a peak", effect, "quant"
            )
    if not weights.options:
        return dict(options), None, unsupported
    own = {name: value for name, value in options.items() if name not in ("quant", "double_quant", "quant_bits", "compute_dtype")}
    own |= {} if skips is None else {"quant_skip_modules": tuple(skips)}
    return {**own, **weights.options}, assumed, unsupported


def _with_a_backend(tool: str, options: Mapping[str, object]) -> bool:
    """Whether a tool was rehearsed with a repository of that change."""
    checkpointed = bool(options.get("gradient_checkpointing"))
    return options.get("quant") in (WITH_A_BACKEND if checkpointed else WITHOUT_CHECKPOINTS).get(tool, ())


def unknown_dtype(model: str, options: Mapping[str, object], releases: Mapping[str, str]) -> Unsupported | None:
    """What is not known of a built-in model that is loaded in its checkpoint's dtype.

    Fully trained under fp16 autocast it is fp32: torch unscales no gradients in 16 bits.
    """
    dtype, method = options.get("dtype"), options.get("method")
    by_checkpoint = dtype == OF_CHECKPOINT or (
        dtype == AS_LOADED and not DTYPE_OF_CHECKPOINT.after(releases.get(DTYPE_OF_CHECKPOINT.package))
    )
    if not by_checkpoint or catalogue.find(model) is None or (method, options.get("autocast")) == ("full", "fp16"):
        return None
    if checkpoint_dtype(model, load_config(model)) is not None:
        return None
    why = "the model is loaded in its checkpoint's dtype, which is not known here: name it with --dtype"
    return Unsupported("by default" if dtype == AS_LOADED else dtype, why, "unknown", "dtype")
