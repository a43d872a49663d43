"""What tools make of the values of a config, without a model: the fields of their own config objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from typing import Any

from peftplan.job.configs.documents import flat
from peftplan.rehearse.inside import standins
from tools.rank_grid import cut


def llamafactory(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the five dataclasses that `llamafactory-cli train` parses."""
    from llamafactory.hparams import get_train_args

    return {name: value for part in get_train_args(dict(values)) for name, value in vars(part).items()}


def llamafactory_v1(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the four dataclasses of `llamafactory-cli sft` in v1."""
    from llamafactory.v1.config import get_args

    return {name: value for part in get_args(dict(values)) for name, value in vars(part).items()}


def axolotl(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that axolotl validates."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    return dict(validate_config(DictDefault(values)))


def swift(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the arguments of `swift sft`, or of `swift rlhf` for a trainer of its own."""
    from swift.arguments import RLHFArguments, SftArguments

    with TemporaryDirectory() as folder:
        (model := Path(folder, "model")).mkdir()
        standins.write_repository(model, {**cut(values["model"], 1), "dtype": "bfloat16"})
        parsed = (RLHFArguments if "rlhf_type" in values else SftArguments)(**{**values, "model": str(model)})
    return {name: value for name, value in vars(parsed).items() if folder not in str(value)}


def examples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the `TrainingArguments` that transformers' examples parse."""
    from transformers import TrainingArguments

    return vars(TrainingArguments(**values))


def peft(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the config of an adapter."""
    from peft import PeftConfig

    return vars(PeftConfig.from_peft_type(**values))


def torchtune(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe's config, and the arguments with which it calls its components, with their defaults."""
    from omegaconf import OmegaConf
    from torchtune.config._utils import _get_component_from_path

    parts = OmegaConf.to_container(OmegaConf.create(dict(values)))
    for part in parts.values():
        if isinstance(part, dict) and "_component_" in part:
            arguments = {name: value for name, value in part.items() if name != "_component_"}
            bound = signature(_get_component_from_path(part["_component_"])).bind_partial(**arguments)
            bound.apply_defaults()
            part |= bound.arguments
    return flat(parts)


def automodel(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe's config, as it reads them, and the fields of its dataclasses of sharding."""
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes._dist_utils import parse_distributed_section

    sections = ConfigNode(dict(values)).to_dict()
    if "distributed" in values:
        parsed = parse_distributed_section(dict(values["distributed"]))
        sections["distributed"] = {name: asdict(part) if is_dataclass(part) else part for name, part in parsed.items()}
    return flat(sections)


def trl(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the dataclasses that a script parses: of the alignment handbook where a key is its own."""
    import trl as library
    from trl.experimental import online_dpo, orpo
    from trl.scripts.grpo import GRPOScriptArguments

    script: type = library.ScriptArguments
    kind: type = library.SFTConfig
    if "dataset_mixture" in values:
        vars(library)["ORPOConfig"] = orpo.ORPOConfig  # where the handbook looks for it
        package = find_spec("alignment")
        assert package is not None
        assert package.origin is not None
        configs = run_path(str(Path(package.origin).with_name("configs.py")))
        script, kind = configs["ScriptArguments"], configs["SFTConfig"]
    elif "num_generations" in values:
        script, kind = GRPOScriptArguments, library.GRPOConfig
    elif "max_new_tokens" in values:
        kind = online_dpo.OnlineDPOConfig
    parsed = library.TrlParser((script, kind, library.ModelConfig)).parse_dict(dict(values))
    return {name: value for part in parsed for name, value in vars(part).items()}


def unsloth(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the calls of a program, with the defaults of its classes."""
    import unsloth as library

    trainers = import_module("trl")  # behind Unsloth, which changes it
    trainer = trainers.GRPOTrainer if "reward_funcs" in values.get("trainer", ()) else trainers.SFTTrainer
    calls = {
        "load": library.FastModel.from_pretrained,
        "lora": library.FastLanguageModel.get_peft_model,
        "trainer": trainer.__init__,
    }
    resolved: dict[str, Any] = {}
    for kind, arguments in values.items():
        if kind == "args":
            config: type = trainers.SFTConfig
            if "epsilon_high" in arguments:
                config = trainers.GRPOConfig
            elif "embedding_learning_rate" in arguments:
                config = library.UnslothTrainingArguments
            elif "batch_sampler" in arguments:
                config = import_module("sentence_transformers").SentenceTransformerTrainingArguments
            kept = vars(config(**arguments))
        else:
            bound = signature(calls[kind]).bind_partial(**arguments)
            bound.apply_defaults()
            kept = bound.arguments
        resolved |= {f"{kind}.{name}": value for name, value in kept.items()}
    return resolved
