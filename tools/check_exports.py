"""Check what `peftplan export` writes by the tools themselves, and keep what they accepted in `data/configs/checked.json`.

    python -m tools.check_exports axolotl llamafactory …

Run it in an environment that has the tools. Jobs are those of the round trips (`tests/job/configs/drawn.py`). Kept are the keys
of all configs that a tool accepted, with the types of their values, and the words of keys whose values are words. A test compares
what is written today with them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

from peftplan.datafiles import DATA
from peftplan.job.configs.documents import flat
from peftplan.job.configs.read import document_of_text
from tests.job.configs.drawn import SEED, Trip, trips

CHECKED = DATA / "configs" / "checked.json"
OPEN = (
    "model",
    "base_model",
    "model_name_or_path",
    "dataset",
    "output_dir",
    "path",
    "checkpoint",
    "builder",
    "_component_",
    "load.0",
)
"""Words in the names of keys whose values are anything."""
ON_A_CPU = {"use_cpu": True}
"""What TrainingArguments needs where no card is there to ask for bf16."""
SUFFIX = {"trl-script": "py", "ms-swift": "sh", "deepspeed": "json"}


def values_of(tool: str, text: str) -> dict[str, Any]:
    """The values of a config under dotted keys; of calls and commands under the names that the tool gives them."""
    document = document_of_text(text, file=f"{tool}.{SUFFIX.get(tool, 'yml')}")
    if document.kind == "calls":
        return {
            f"{call['call']}.{name}": value for call in document.values["calls"] for name, value in flat(call["kwargs"]).items()
        }
    return flat(document.values)


def shapes(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and type of each value; of a word the word itself, where it is one of a few."""
    for key, value in values.items():
        of_word = isinstance(value, str) and not any(name in key for name in OPEN) and not value.startswith(("{", "<"))
        yield key, str(value) if of_word else type(value).__name__


def axolotl(text: str) -> str:
    """axolotl's own validation, for a card of compute capability 8.0."""
    import yaml
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    ranks = 8 if "num_processes" in text else 1
    capabilities = {"bf16": True, "fp8": False, "n_gpu": ranks, "n_node": 1, "compute_capability": "sm_80"}
    validate_config(DictDefault(yaml.safe_load(text)), capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
    return "axolotl.utils.config.validate_config"


def llamafactory(text: str) -> str:
    """LLaMA-Factory's dataclasses by HfArgumentParser, unknown keys an error."""
    import yaml
    from llamafactory.hparams.parser import _TRAIN_ARGS
    from transformers import HfArgumentParser

    HfArgumentParser(_TRAIN_ARGS).parse_dict({**yaml.safe_load(text), **ON_A_CPU}, allow_extra_keys=False)
    return "HfArgumentParser of llamafactory.hparams.parser._TRAIN_ARGS"


def trl(text: str) -> str:
    """The parser of `trl sft`; `num_processes` is of accelerate, which the command line hands on."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

    lines = [line for line in text.splitlines() if not line.startswith(("num_processes", "num_machines", "accelerate_config"))]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        file.write("\n".join([*lines, *(f"{key}: true" for key in ON_A_CPU)]))
        file.flush()
        TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(["--config", file.name])
    return "trl.TrlParser of ScriptArguments, SFTConfig, ModelConfig"


def trl_script(text: str) -> str:
    """The objects that the script makes, without the model and the trainer."""
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    def nothing(*args: object, **kwargs: object) -> object:
        return type("Made", (), {"train": lambda self: None, "from_pretrained": staticmethod(nothing)})()

    names: dict[str, object] = {"LoraConfig": LoraConfig, "BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch}
    names["SFTConfig"] = partial(SFTConfig, **ON_A_CPU)
    names |= {"AutoModelForCausalLM": nothing(), "SFTTrainer": nothing, "load_dataset": nothing}
    names["prepare_model_for_kbit_training"] = nothing
    source = "\n".join(line for line in text.splitlines() if not line.startswith(("from ", "import ")))
    exec(compile(source, "script.py", "exec"), names)  # written by peftplan
    return "SFTConfig, LoraConfig and BitsAndBytesConfig themselves"


def torchtune(text: str) -> str:
    """torchtune's check that every component is there and takes its arguments."""
    from omegaconf import OmegaConf
    from torchtune.config import validate

    validate(OmegaConf.create(text))
    return "torchtune.config.validate"


def ms_swift(text: str) -> str:
    """The argument parser of `swift sft`; what the arguments do once they are parsed needs the model's files."""
    from swift.arguments import SftArguments
    from swift.utils.utils import HfArgumentParser

    words = shlex.split(text.replace("\\\n", " "), comments=True)
    _, rest = HfArgumentParser([SftArguments]).parse_known_args(words[words.index("sft") + 1 :])
    if rest:
        raise ValueError(f"unknown: {rest}")
    return "HfArgumentParser of swift.arguments.SftArguments"


def accelerate(text: str) -> str:
    """accelerate's config class, and the plugin that FSDP's fields make."""
    from accelerate.commands.config.config_args import load_config_from_file

    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        file.write(text)
        file.flush()
        load_config_from_file(file.name)
    return "accelerate.commands.config.config_args.load_config_from_file"


def deepspeed(text: str) -> str:
    """DeepSpeed's pydantic model of `zero_optimization`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = json.loads(text)["zero_optimization"]
    DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    return "deepspeed.runtime.zero.config.DeepSpeedZeroConfig"


CHECKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "axolotl": ("axolotl", axolotl),
    "llamafactory": ("llamafactory", llamafactory),
    "trl": ("trl", trl),
    "trl-script": ("trl", trl_script),
    "torchtune": ("torchtune", torchtune),
    "ms-swift": ("ms-swift", ms_swift),
    "accelerate": ("accelerate", accelerate),
    "deepspeed": ("deepspeed", deepspeed),
}
"""Tool → its package, and what checks a text; the check returns its own name and raises what the tool raises."""


def check(tool: str) -> dict[str, Any]:
    """The record of a tool: its version, how it checks, how many configs it accepted, and what they hold."""
    package, accepted = CHECKS[tool]
    keys: dict[str, set[str]] = {}
    by, count, failed = "", 0, []
    for trip in trips(tool):
        if not isinstance(trip, Trip):
            continue
        count += 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                by = accepted(trip.exported.text)
        except (Exception, SystemExit) as error:
            failed.append(f"{trip.model} {trip.options}: {type(error).__name__}: {' '.join(str(error).split())[:600]}")
            continue
        for key, shape in shapes(values_of(tool, trip.exported.text)):
            keys.setdefault(key, set()).add(shape)
    for line in failed:
        print(f"{tool}: {line}")
    print(f"{tool}: {count - len(failed)} of {count} accepted")
    return {
        "version": version(package),
        "by": by,
        "seed": SEED,
        "plans": count,
        "accepted": count - len(failed),
        "keys": {key: sorted(each) for key, each in sorted(keys.items())},
    }


def main(tools: list[str]) -> None:
    """Check the tools that are named; keep what the others accepted before."""
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    checked = json.loads(CHECKED.read_text(encoding="utf-8")) if CHECKED.exists() else {}
    for tool in tools:
        checked[tool] = check(tool)
    rows = ",\n".join(
        f" {json.dumps(tool)}: {json.dumps(checked[tool], ensure_ascii=False)}" for tool in CHECKS if tool in checked
    )
    CHECKED.write_text("{\n" + rows + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
