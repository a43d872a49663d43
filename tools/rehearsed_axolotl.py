"""Rehearse `axolotl train` and keep what it held beside the values that peftplan reads of its config.

    python -m tools.rehearsed_axolotl FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values` of the config, how many `layers` of the model run, `sizes` of the model in place of its
own, `gpus` if more than one, and `one_config` where kernels are not chosen by their time. Rows are tokens already, as many as
`sequence_len` says; of EBFT they are prompts of so many `words`, whose tokens the tool counts, or, in strides, documents that are
cut to `sequence_len`. `axolotl` is the release that ran it. Needs that release with the libraries that it pins, and
the CUDA build of torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import yaml

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from tools.rank_grid import cut
from tools.rehearsed_jobs import OF_LAUNCHER
from tools.rehearsed_recipes import complete, kept_of

ROWS = 64
SHARED: dict[str, Any] = {
    "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": None}],
    "val_set_size": 0,
    "seed": 42,  # which ranks would ask each other for
    "bf16": "auto",
    "learning_rate": 0.0002,
    "num_epochs": 3,
    "max_steps": 6,
    "save_strategy": "no",
}
"""Values of every job."""
CARD = "a100-80gb"
PROGRAM = (
    "import os, sys; os.environ.update(ACCELERATE_USE_CPU='False', AXOLOTL_DO_NOT_TRACK='1', ACCELERATE_MIXED_PRECISION='bf16')\n"
    "sys.argv = ['axolotl', 'train', *sys.argv[1:], '--launcher', 'python']\n"
    "from axolotl.cli.main import main; main()"
)
"""`axolotl train` with what `accelerate launch` sets, in one process."""
WITH_FLASH = (
    "import importlib, importlib.util, transformers.utils as utils\n"
    "hub = 'axolotl.monkeypatch.attention.fa2_hub_kernel'  # until 0.20\n"
    "if importlib.util.find_spec(hub): importlib.import_module(hub).is_fa2_hub_kernel_available = lambda: True\n"
    "import transformers.modeling_utils as modeling_utils\n"
    "import transformers.modeling_flash_attention_utils as flash\n"
    "for module in utils, modeling_utils, flash: module.is_flash_attn_2_available = lambda *_, **__: True\n"
    "table = getattr(flash, 'FLASH_ATTENTION_COMPATIBILITY_MATRIX', {2: {}})  # which has that function of its own\n"
    "table[2]['general_availability_check'] = lambda: True\n"
    "from transformers import PreTrainedModel; PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True\n"
    "from tools.programs.ms_swift import flash_attention; flash_attention()\n"
)
"""flash-attn's kernels, which do not run on the card."""
OF_ONE_RANK = (
    "import axolotl.utils.samplers.multipack as packed\n"
    "packed.reduce_and_broadcast = lambda of_rank, of_all: of_all([of_rank()])\n"
)
"""How many packed rows this rank has, in place of the fewest of any rank, which nobody sends."""
OF_PAIRS = {f"field_{part}": part for part in ("prompt", "chosen", "rejected")}
"""Pairs whose completions are cut to fill `sequence_len`."""
STRIDED = ("ebft_pretrain.transform", "ebft_strided_structured.transform")
FIRST = "0.19.0"
"""The release that ran rows which name none."""
GENERATED = ("grpo", "gdpo")
"""Values of `rl` whose completions the model writes for prompts."""
WITHOUT_SVD = (
    "import torch\n"
    "def svd(a, full_matrices=False):\n"
    "    k = min(a.shape[-2:])\n"
    "    return a.new_empty(*a.shape[:-1], k), a.new_empty(a.shape[0], k), a.new_empty(a.shape[0], k, a.shape[-1])\n"
    "torch.linalg.svd = svd\n"
)
"""The results of `torch.linalg.svd` without cuSOLVER, which finds no size of its workspace on the card."""
ALL_MASKED = (
    "import importlib, importlib.util, inspect, axolotl.integrations.diffusion.plugin as plugin\n"
    "newer = 'axolotl.core.trainers.diffusion_lm'  # since 0.21\n"
    "home = newer if importlib.util.find_spec(newer) else 'axolotl.integrations.diffusion'\n"
    "trainer = importlib.import_module(f'{home}.trainer')\n"
    "source = inspect.getsource(trainer)\n"
    "numbers = 'torch.arange(input_ids.numel(), device=input_ids.device)'\n"
    "for old, new, of_all in (\n"
    "    ('masked_indices.sum() > 0', 'True', True), ('sample_mask.sum() > 0', 'True', False),\n"
    "    ('weighted_loss[sample_mask]', f'weighted_loss[{numbers}]', False),\n"
    "    ('torch.where(masked_indices)', f'torch.zeros_like(input_ids).view(-1), {numbers}', True),\n"
    "):\n"
    "    assert old in source or (home == newer and not of_all)\n"
    "    source = source.replace(old, new)\n"
    "exec(source, vars(trainer)); plugin.DiffusionTrainer = trainer.DiffusionTrainer\n"
)
"""Every token of a micro batch of one row masked, which the card cannot draw."""
ONE_CONFIG = (
    "import triton\nautotune = triton.autotune\n"
    "triton.autotune = lambda configs, key, **settings: autotune(configs[:1], key, **settings)\n"
)
"""Kernels that are not chosen by their time."""
ONE_DOCUMENT = (
    "import axolotl.monkeypatch.models.qwen3_next.modeling as modeling\n"
    "def of_one(kernel):\n"
    "    return lambda *args, cu_seqlens, **options: kernel(*args, **options)\n"
    "for name in 'fla_causal_conv1d', 'fla_chunk_gated_delta_rule':\n"
    "    setattr(modeling, name, of_one(getattr(modeling, name)))\n"
    "modeling.get_cu_seqlens = lambda position_ids: position_ids.new_zeros(2)\n"
)
"""A delta rule of one document a row: the card has no bounds of documents, of which it counts chunks."""
OF_OLDER_TORCH = {"PYTORCH_CUDA_ALLOC_CONF": OF_LAUNCHER["PYTORCH_ALLOC_CONF"]}
"""The tool sets this one where the other is set, with sizes rounded up to sixteenths of powers of two (utils/__init__.py:95)."""


def reward(prompts: list[str], completions: list[str], **_columns: object) -> list[float]:
    """What a reward of text gives."""
    return [float(len(completion)) for completion in completions]


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's config."""
    return read_values(SHARED | row["values"], file="a.yml", tool="axolotl", tool_version=row.get("axolotl", FIRST))


def config_of(row: dict[str, Any]) -> dict[str, Any]:
    """The config of the model that runs."""
    return cut(row["values"]["base_model"], row["layers"]) | row.get("sizes", {})


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it: what was read, over the first layers of the model."""
    job = {"model": config_of(row), **plan(row).options}
    if "words" in row:
        job["seq_len"] = row["prompt_tokens"] + job["max_completion_length"]
    return job | ({"gpus": row["gpus"]} if "gpus" in row else {})


def prompt_tokens(folder: str, values: dict[str, Any], words: int) -> int:
    """Tokens of a prompt of so many words, by the tokenizer and the chat template that axolotl takes."""
    from axolotl.utils.chat_templates import get_chat_template
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = get_chat_template(values["chat_template"])
    message = {"role": "user", "content": "word " * words}
    return len(tokenizer.apply_chat_template([message], chat_template=template, add_generation_prompt=True)["input_ids"])


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the tool held."""
    values = row["values"]
    with TemporaryDirectory(prefix="job") as folder, TemporaryDirectory(prefix="job") as output:  # "tmpt" is MPT to axolotl
        standins.write_repository(Path(folder), {**config_of(row), "dtype": "bfloat16"})
        tokens = [5 + 7 * place % 100 for place in range(values["sequence_len"])]
        content: dict[str, Any] = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens}
        of_rows: dict[str, Any] = {}
        strided = [kind for kind in STRIDED if kind in str(values.get("datasets"))]
        if strided:
            document = "word " * 2 * values["sequence_len"]
            content = (
                {"question": document, "answer": ""} if strided == [STRIDED[0]] else {"question": "word", "answer": document}
            )
            of_rows = {"type": strided[0]}
        if values.get("rl") == "dpo":
            words = "pass " * values["sequence_len"]
            content, of_rows = {"prompt": "word", "chosen": words, "rejected": words}, {"type": OF_PAIRS}
        if "words" in row:
            content, of_rows = {"input": "word " * row["words"], "output": "pass " * 8}, {"type": "ebft_opencode.transform"}
            row = row | {"prompt_tokens": prompt_tokens(folder, values, row["words"])}
        if values.get("rl") in GENERATED:
            content, of_rows = {"prompt": [{"role": "user", "content": "word " * row["words"]}]}, {}
        text = json.dumps(content)
        Path(output, "rows.jsonl").write_text(f"{text}\n" * ROWS, encoding="utf-8")
        if values.get("rl") in GENERATED:
            rewards = ["tools.rehearsed_axolotl.reward"] * len(values["trl"]["reward_funcs"])
            values = values | {"trl": values["trl"] | {"reward_funcs": rewards}}
        datasets = [{**SHARED["datasets"][0], "path": f"{output}/rows.jsonl", **of_rows}]
        prepared = {"datasets": datasets, "dataset_prepared_path": f"{output}/data"}
        places = {"base_model": folder, "output_dir": f"{output}/out", **prepared}
        masked, streamed = "diffusion" in values, "pretraining_dataset" in values
        if streamed:
            text = json.dumps({"text": "word " * 8 * values["sequence_len"]})
            Path(output, "rows.jsonl").write_text(f"{text}\n" * ROWS, encoding="utf-8")
            of_text = {"path": "json", "data_files": f"{output}/rows.jsonl", "type": "completion", "field": "text"}
            del places["datasets"]
            places |= {"pretraining_dataset": [of_text]}
        file = Path(output, "config.yml")
        shared = {key: value for key, value in SHARED.items() if not (streamed and key == "datasets")}
        file.write_text(yaml.safe_dump(shared | values | places), encoding="utf-8")
        with_flash = WITH_FLASH if values.get("attn_implementation") == "flash_attention_2" else ""
        packs = OF_ONE_RANK * bool(values.get("sample_packing") and row.get("gpus"))
        of_values = WITHOUT_SVD * len(strided) + ALL_MASKED * masked + ONE_CONFIG * bool(row.get("one_config"))
        of_values += ONE_DOCUMENT * ("Qwen3-Next" in values["base_model"])
        command = [sys.executable, "-c", of_values + with_flash + packs + PROGRAM, str(file)]
        with patch.dict(os.environ, OF_LAUNCHER | OF_OLDER_TORCH):  # read before the tool sets it, where WITH_FLASH imports torch
            return row | kept_of(rehearse(command, world_size=row.get("gpus"), gpu=CARD, timeout=900, stdout=sys.stderr.fileno()))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
