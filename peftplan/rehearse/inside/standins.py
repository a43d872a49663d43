"""Repositories that are not on this machine: the model's own config, a tokenizer, and a checkpoint that is all holes.

A stand-in lies in the Hub's cache, inside the scratch layer, where every library finds it as it finds a download. The real loader
reads its header, allocates what it says, and copies zeros.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from peftplan.rehearse.inside import holes, texts
from peftplan.rehearse.inside.after_import import AfterImport

REVISION = "0" * 40
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
PACKED = ("gptq", "awq")
SAVED = ("qweight", "qzeros", "scales", "g_idx")
"""What a checkpoint holds of a packed layer."""
Kind: TypeAlias = tuple[str, Any, Any]
"""A tensor's name, dtype and shape."""


def start(say: Callable[[str], None]) -> None:
    """Answer for what is not there, once the program imports what asks for it. `say` is told each stand-in."""
    sys.meta_path.insert(
        0,
        AfterImport(
            {
                "huggingface_hub.file_download": lambda module: _watch_hub(module, say),
                "huggingface_hub._snapshot_download": lambda module: _watch_hub(module, say),
                "transformers.modeling_utils": lambda module: _watch_loader(module, say),
            }
        ),
    )


def _watch_hub(module: Any, say: Callable[[str], None]) -> None:
    """A file of a repository is wanted: where the cache has none of it, a stand-in is put there first."""
    known: set[str] = set()

    def first(function: Callable[..., Any]) -> Callable[..., Any]:
        def with_stand_in(repo_id: str, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("repo_type") in (None, "model") and repo_id not in known:
                known.add(repo_id)
                _ensure(repo_id, Path(kwargs.get("cache_dir") or module.constants.HF_HUB_CACHE), say)
            return function(repo_id, *args, **kwargs)

        return with_stand_in

    for name in ("hf_hub_download", "try_to_load_from_cache", "snapshot_download"):
        if hasattr(module, name):
            setattr(module, name, first(getattr(module, name)))


def _ensure(repo_id: str, cache: Path, say: Callable[[str], None]) -> None:
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    if (repository / "refs").exists() or (config := _config(repo_id)) is None:
        return
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION, encoding="ascii")
    _write_texts(snapshot, config)
    say(f"{repo_id}: the built-in config, and a tokenizer with one token per {texts.CHARACTERS} characters or per byte")


def _write_texts(folder: Path, config: Mapping[str, Any]) -> None:
    for name, content in (("config.json", config), *texts.tokenizer_files(config), *texts.processor_files(config)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def write_repository(folder: Path, model: str | Mapping[str, Any]) -> None:
    """Write the config of a model or its name, a tokenizer and a checkpoint of holes. Raises InputError for an unknown name."""
    from peftplan.job.sources import load_config

    _write_texts(folder, load_config(model))
    write_checkpoint(folder)


def _config(repo_id: str) -> dict[str, Any] | None:
    from peftplan.errors import PeftplanError
    from peftplan.job.sources import load_config

    try:
        return dict(load_config(repo_id))
    except PeftplanError:
        return None


def _watch_loader(module: Any, say: Callable[[str], None]) -> None:
    """A checkpoint is wanted: a folder with a config and no weights gets a file of holes first."""
    resolve = getattr(module, "_get_resolved_checkpoint_files", None)
    if resolve is None:  # a release that looks for the files in `from_pretrained` itself: the folder must hold them
        return

    def with_weights(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = _folder(str(pretrained_model_name_or_path))
        if folder is not None and not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            size = write_checkpoint(folder)
            say(f"{pretrained_model_name_or_path}: weights are a sparse file of {size:,} bytes, without data")
        return resolve(pretrained_model_name_or_path, *args, **kwargs)

    module._get_resolved_checkpoint_files = with_weights


def _folder(name: str) -> Path | None:
    """The folder that holds a model's config: its own, or its snapshot in the cache."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json") if not os.path.isdir(name) else None
    return Path(config).parent if isinstance(config, str) else None


def write_checkpoint(folder: Path) -> int:
    """Write `model.safetensors` for the config of a folder: true names, shapes and dtypes, and no data. Its length in bytes."""
    from unittest.mock import patch

    import torch
    import transformers
    from transformers.integrations import deepspeed

    from peftplan.libraries.meta import untie

    config = transformers.AutoConfig.from_pretrained(folder)
    # a tower is made by `_from_config`, which would divide it under ZeRO-3
    with torch.device("meta"), patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None):
        model = getattr(transformers, config.architectures[0])(config)
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        untie(model, raw)
    dtype = config.dtype or torch.float32
    kinds = ((name, dtype if tensor.is_floating_point() else tensor.dtype, tensor.shape) for name, tensor in _saved(model))
    stored = _packed(model, kinds, raw) if (raw.get("quantization_config") or {}).get("quant_method") in PACKED else kinds
    return holes.write(folder / "model.safetensors", stored, {"format": "pt"}, different={"lm_head.weight"})


def _packed(model: Any, kinds: Iterable[Kind], raw: Mapping[str, Any]) -> Iterator[Kind]:
    """The tensors of a checkpoint whose linear layers gptq or awq has packed; a table of shifts is made as they are loaded."""
    import torch

    from peftplan.job.separate import stored_format
    from peftplan.storage import parse_quant, stored
    from peftplan.trace.model import quantized_names

    options: dict[str, Any] = {name.removeprefix("quant_"): value for name, value in stored_format(raw, {}).items()}
    quant = parse_quant(options.pop("quant"), **options)
    assert quant is not None
    packed = quantized_names(model, quant)
    for name, dtype, shape in kinds:
        module, _, param = name.rpartition(".")
        if module not in packed:
            yield name, dtype, shape
        elif param == "bias":
            yield name, torch.float16, shape
        else:
            for a in stored(quant, shape=tuple(shape), dtype="fp16", kind=type(model.get_submodule(module)).__name__):
                if a.name in SAVED:
                    yield f"{module}.{a.name}", {"int32": torch.int32, "fp16": torch.float16}[a.dtype], a.dims


def _saved(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a checkpoint: each parameter once, and persistent buffers."""
    parameters = dict(model.named_parameters())
    others = model.state_dict(keep_vars=True)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = {**parameters, **{name: tensor for name, tensor in others.items() if name not in tied}}
    yield from _one_by_one(model, saved).items()


def _one_by_one(model: Any, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stacks of experts as `save_pretrained` writes them, where transformers stacks what it loads."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return saved
    tensors: Mapping[str, Any] = revert_weight_conversion(model, dict(saved))
    return tensors
