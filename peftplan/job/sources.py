"""Where a model comes from: a built-in name, a path, a Hub id, a config object; each becomes an `Architecture`.

A built-in name or id comes first (write `./gpt2` for a folder of that name), then an existing path, then the Hub; where that
cannot be asked, the name of a repository may say which built-in model it holds (`repositories.py`). A model type
with a reader is read by it; a built-in model without one has a weight table; any other is read by the installed transformers
on the meta device (extra `trace`). No code from a model repository is ever executed.
"""

import os
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

from peftplan.arch import catalogue
from peftplan.arch.configfile import CONFIG_NAME, check, read_file
from peftplan.arch.fields import MAX_LABELS
from peftplan.arch.heads import TASK_TYPES
from peftplan.arch.modules import Architecture
from peftplan.arch.readers import READERS, read_config
from peftplan.arch.text_part import SCORED, with_score, with_text_part
from peftplan.dtypes import ALIASES, MODEL_DTYPES, SIXTEEN_BITS
from peftplan.errors import InputError, MissingExtraError, RefusedError, UnknownNameError, UnreadableError
from peftplan.files import is_file
from peftplan.job.repositories import ASSUMED, TAKEN, config_by_name

SUFFIXES_OF_JOBS = (".yml", ".yaml", ".sh", ".py", ".ipynb")
"""Of files that hold a job, not a model alone."""
DEFAULT_LABELS = 2
"""Of a config that names none (transformers, `PretrainedConfig.num_labels`)."""
BUILT_INS_KEPT = 512
"""Size of the cache of built-in models, larger than their number: each is read once per process and task."""


@runtime_checkable
class ConfigObject(Protocol):
    """The part of a transformers `PretrainedConfig` that is used."""

    model_type: str

    def to_dict(self) -> dict[str, object]: ...


class Tensor(Protocol):
    """The part of a `torch.nn.Parameter` that is used."""

    shape: tuple[int, ...]
    dtype: object
    requires_grad: bool

    def numel(self) -> int: ...


class LoadedModel(Protocol):
    """The part of a loaded model that is used: transformers' `PreTrainedModel`, with or without peft's wrapper."""

    config: ConfigObject

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...


def base_of(model: object) -> object:
    """The model inside peft's wrapper; another object is its own base."""
    unwrap = getattr(model, "get_base_model", None) if hasattr(model, "peft_config") else None
    return unwrap() if callable(unwrap) else model


def module_config(model: object) -> ConfigObject | None:
    """The transformers config of a loaded model; None for other objects, such as a torch module without a config."""
    if isinstance(model, (str, Mapping, type)) or not callable(getattr(model, "named_parameters", None)):
        return None
    config = getattr(base_of(model), "config", None)
    return config if isinstance(config, ConfigObject) and not isinstance(config, type) else None


def is_loaded(model: object) -> TypeGuard[LoadedModel]:
    """Whether an object is a loaded model of transformers."""
    return module_config(model) is not None


class Source(NamedTuple):
    """A model whose config has been read: the config, the name that led to it, and where it was."""

    config: dict[str, object]
    name: str
    place: str


def read(model: object) -> object:
    """A model in a file or on the Hub, together with its config, so that it is read once. Returns any other model unchanged, and
    a built-in one by a name of the catalogue."""
    model = _listed(model)
    if not isinstance(model, (str, os.PathLike)) or (isinstance(model, str) and catalogue.find(model)):
        return model
    return Source(*_from_text(os.fspath(model)))


def load(
    model: object, *, task_type: str | None = None, num_labels: int | None = None, trust_remote_code: bool = False
) -> Architecture:
    """The `Architecture` of a model.

    `model` is a built-in name, alias or repository id; a path to a config.json or its folder; a Hub id; a parsed config; or a
    transformers `PretrainedConfig`. `task_type` is one of `heads.TASK_TYPES`, None for the task that the config names;
    `num_labels` sets the classes of a classification head. `trust_remote_code` is accepted for compatibility and
    changes one message: code from a repository is never executed.
    """
    if task_type is not None and (not isinstance(task_type, str) or task_type not in TASK_TYPES):
        raise UnknownNameError("task_type", task_type, TASK_TYPES)
    _check_labels(num_labels)
    model = _listed(model)
    if task_type == "SEQ_CLS" and load_config(model).get("model_type") in SCORED:
        return with_score(load(model, trust_remote_code=trust_remote_code), num_labels or DEFAULT_LABELS)
    if isinstance(model, str) and (entry := catalogue.find(model)):
        return _built_in(entry.name, model if entry.is_sibling(model) else None, task_type, num_labels)
    config, name, source = _config(model)
    arch = _read(_with_labels(config, num_labels), name=name, task_type=task_type, trust_remote_code=trust_remote_code)
    return replace(arch, name=name, source=source, notes=(*arch.notes, *_notes(config)))


_KEPT: list[tuple[Architecture, Mapping[str, object]]] = []
"""The architectures of the jobs prepared last, each with the config that it was read from."""
MOST_KEPT = 32


def kept(architecture: Architecture, config: Mapping[str, object]) -> Architecture:
    """An equal architecture of the same config, if there is one: steps are cached by its identity (`analytic.compiled`).

    Not for a loaded model, whose config does not say what trains.
    """
    for known, of_config in _KEPT:
        if known is architecture or (known == architecture and of_config == config):
            return known
    _KEPT.append((architecture, deepcopy(dict(config))))  # a caller may change its own in place
    del _KEPT[:-MOST_KEPT]
    return architecture


def _listed(model: object) -> object:
    """A name of the catalogue for one spelled otherwise, which no file or folder has. Returns any other model unchanged."""
    if not isinstance(model, str) or "/" in model or os.path.exists(model):
        return model
    return catalogue.spelled(model) or model


def _check_labels(num_labels: object) -> None:
    whole = isinstance(num_labels, int) and not isinstance(num_labels, bool) and 1 <= num_labels <= MAX_LABELS
    if num_labels is not None and not whole:
        raise InputError("num_labels", num_labels, f"accepted: a whole number from 1 to {MAX_LABELS}")


def load_config(model: object) -> dict[str, object]:
    """The config of a model, as `load` finds it: a new dict."""
    if isinstance(model, str) and (entry := catalogue.find(model)):
        return dict(entry.facts()["config"])
    return _config(model)[0]


def checkpoint_dtype(model: object, config: Mapping[str, object]) -> str | None:
    """The dtype that transformers gives a model with `dtype="auto"`: its config's, else that of its weights; None if unknown.

    An instruct model may be stored in other bits than the base of the same shapes: Gemma 2 2B is in fp32, its instruct model in
    bf16. Without a config of its own its dtype is known only where the base has 16 bits too, and comes of the same run.
    """
    of_text = config.get("text_config")
    inner: Mapping[str, object] = of_text if isinstance(of_text, Mapping) else {}
    stated = [each.get(name) for each in (config, inner) for name in ("dtype", "torch_dtype")]
    dtype = next((ALIASES.get(str(each).removeprefix("torch.")) for each in stated if each is not None), None)
    entry = catalogue.find(model) if isinstance(model, str) else None
    if entry is not None and isinstance(model, str):
        dtype = dtype or catalogue.stored_dtype(entry)
        if entry.is_sibling(model) and (dtype not in SIXTEEN_BITS or catalogue.is_other_run(model)):
            return None
    return dtype if dtype in MODEL_DTYPES else None


@lru_cache(maxsize=BUILT_INS_KEPT)
def _built_in(name: str, sibling: str | None, task_type: str | None, num_labels: int | None) -> Architecture:
    """A built-in model: by its reader, else by its weight table, else (another task or head) by transformers."""
    entry = catalogue.find(name)
    assert entry is not None
    facts = entry.facts()
    table = _table(entry)
    if table is not None and num_labels is None and task_type in (None, table.task_type):
        arch = with_text_part(table, facts["config"])
    else:
        arch = _read(_with_labels(facts["config"], num_labels), name=name, task_type=task_type, trust_remote_code=False)
    source = f"built-in: {entry.repo_id}, {entry.exactness} ({facts['source']})"
    asides = tuple(_of_count(entry, facts.get("note")))
    of_sibling = (f"{sibling} has the shapes of the built-in {entry.repo_id}, which is used for it",) if sibling else ()
    return replace(arch, name=name, source=source, notes=(*arch.notes, *of_sibling, *asides), asides=asides)


def _table(entry: catalogue.ModelEntry) -> Architecture | None:
    if entry.model_type in READERS:
        return None
    from peftplan.arch.table import load_table

    return load_table(entry.name)


_TOTAL = re.compile(r"published total is (\d+)")


def _of_count(entry: catalogue.ModelEntry, note: str | None) -> Iterator[str]:
    """How the model's count compares with the published one."""
    if note:
        yield _TOTAL.sub(lambda total: f"published total is {int(total[1]):,}", note)
    if not entry.verified:
        yield "not checked: no published parameter count was found"


def _config(model: object) -> tuple[dict[str, object], str, str]:
    """The config, the name and the source of a model that is not built in."""
    if isinstance(model, Source):
        return {**model.config}, model.name, model.place
    if isinstance(model, Mapping):
        config = check(model, name="config")
        return config, _own_name(config), "a config given as a mapping"
    if isinstance(model, (str, os.PathLike)):
        return _from_text(os.fspath(model))
    if (of_module := module_config(model)) is not None:
        base = type(base_of(model)).__name__
        config = check({**of_module.to_dict(), "architectures": [base]}, name=base)
        return config, _own_name(config), f"a loaded {base}"
    if isinstance(model, ConfigObject) and not isinstance(model, type):
        config = check(model.to_dict(), name=type(model).__name__)
        return config, _own_name(config), f"a {type(model).__name__} object"
    raise InputError("model", model, "accepted: a built-in name, a Hub id, a path, a config, or a loaded transformers model")


def _from_text(text: str) -> tuple[dict[str, object], str, str]:
    path = Path(os.path.expanduser(text))  # Path.expanduser raises where a name is no user's
    if os.path.exists(path):
        file = _config_file(path, text)
        return read_file(file, name=text), text, f"file {file}"
    if text.startswith((".", "~", os.sep)) or text.endswith(".json") or "\\" in text:
        raise UnreadableError("model", text, "no such file or folder")
    from peftplan.arch import hub

    if not hub.is_repo_id(text):
        raise catalogue.unknown(text)
    cached = hub.cached_config(text)
    try:
        file = cached or hub.fetch_config(text)
    except (hub.UnreachableError, MissingExtraError) as error:
        if (config := config_by_name(text)) is None:
            near = catalogue.near_models(text.rpartition("/")[2])
            if near:
                error.args = (f"{error}; similar built-in names: {', '.join(near)}",)
            raise
        return config, text, "built-in, by the repository's name: the Hub was not asked"
    source = f"Hub {text}" + (", from the local cache" if cached else "")
    return read_file(file, name=text), text, source


def _config_file(path: Path, text: str) -> Path:
    file = path / CONFIG_NAME if os.path.isdir(path) else path
    if not is_file(file):
        if is_file(path / "adapter_config.json"):
            raise InputError("model", text, "the folder holds a peft adapter: name its base model")
        raise InputError("model", text, f"accepted: a {CONFIG_NAME} or a folder that contains one")
    if file.suffix in SUFFIXES_OF_JOBS:
        raise InputError("model", text, f"accepted: a {CONFIG_NAME} or its folder; a training config is read by --config {text}")
    return file


def _own_name(config: Mapping[str, object]) -> str:
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and name else str(config["model_type"])


def _with_labels(config: Mapping[str, object], num_labels: int | None) -> Mapping[str, object]:
    """The config with `num_labels` in place of its own labels."""
    if num_labels is None:
        return config
    return {**{k: v for k, v in config.items() if k not in ("id2label", "label2id")}, "num_labels": num_labels}


def _notes(config: Mapping[str, object]) -> Iterator[str]:
    if config.get("auto_map"):
        yield f"the repository ships its own code (auto_map); this counts transformers' own {config['model_type']}"
    stored = config.get("quantization_config")
    if isinstance(stored, Mapping):
        how = stored.get("quant_method") or "bitsandbytes"
        how = getattr(how, "value", how)  # an enum in the config of a loaded model
        effect = "taken from it unless --quant says otherwise" if how in TAKEN else "counted as --quant says, not as stored"
        yield f"the config states a quantized checkpoint ({how}): {effect}"
    if isinstance(stored, Mapping) and (assumed := stored.get(ASSUMED)):
        yield str(assumed)


def _read(config: Mapping[str, object], *, name: str, task_type: str | None, trust_remote_code: bool) -> Architecture:
    """By the reader of the model type, else by transformers on the meta device."""
    model_type = str(config["model_type"])
    if model_type in READERS:
        return read_config(config, name=name, task_type=task_type)
    from peftplan.libraries import meta

    if config.get("auto_map") and not meta.is_native(model_type):
        raise _remote_code(name, model_type, trust_remote_code)
    return with_text_part(meta.read_architecture(config, name=name, task_type=task_type), config)


def _remote_code(name: str, model_type: str, trust_remote_code: bool) -> RefusedError:
    why = "code from a model repository is never executed" + (" here, trust_remote_code or not" if trust_remote_code else "")
    return RefusedError(f"{name}: model_type {model_type!r} is not in transformers, only in the repository's own code; {why}")
