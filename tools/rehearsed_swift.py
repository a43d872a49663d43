"""Rehearse ms-swift's `swift sft` and `swift rlhf` and keep what they held beside the arguments that peftplan reads of them.

    python -m tools.rehearsed_swift FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values`, the arguments, how many `layers` of the model run, `gpus` if more than one,
`program` if not `swift sft`, the `environment` besides, the `quantization_config` of the repository's config.json, and the
release of `deepspeed` if it is not `RELEASE`. Rows are as long as `max_length` says, or have `tokens` where a tokenizer joins
letters of prompts. Each token is scored, or so many as are `labelled` (Qwen 3.5's template adds empty thoughts without labels).
GRPO's completions were written elsewhere. Needs ms-swift 4.6.0 and the CUDA build of torch.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest.mock import patch

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.job.repositories import copied_model
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from peftplan.versions import FSDP2_KEEPS_LAST_LOADED
from tools.rank_grid import cut
from tools.rehearsed_recipes import WITHOUT_NVCC, complete, kept_of

ROWS = 64
RELEASE = "0.19.8"
"""The release of DeepSpeed that ran, unless a row names its `deepspeed`."""
OF_ROW = 2
"""Tokens of a row beside its answer: GKD cuts none (rlhf_trainers/gkd_trainer.py, `_template_context`)."""
WORDS = {"GENERATIVE_RERANKER_POSITIVE_TOKEN": "g", "GENERATIVE_RERANKER_NEGATIVE_TOKEN": "p"}
"""The words that generative rerankers score: the tokenizer has letters alone."""
OTHERS = 7
"""Texts that do not answer an example's query."""
SHARED: dict[str, Any] = {
    "use_hf": True,
    "dataset": "rows.jsonl",
    "split_dataset_ratio": 0,
    "torch_dtype": "bfloat16",
    "template": "dummy",
    "truncation_strategy": "right",
    "loss_scale": "all",
    "save_strategy": "no",
    "report_to": "none",
    "num_train_epochs": 3,
}
"""Arguments of every job."""
SFT, RLHF = "swift sft", "swift rlhf"
WITH_FLASH = "from tools.programs.ms_swift import flash_attention; flash_attention(); "
"""Pictures are attended to by the lengths of their patches, which the card cannot say to kernels that need them on the host."""
WITH_UNSLOTH = "import unsloth; "
"""As `swift/cli/sft.py` does, before anything of ms-swift."""
WITH_TEXTS = ("embedding", "reranker", "generative_reranker")
"""Tasks that tell apart the texts of a row."""
OF_TEXTS = "from tools.programs.ms_swift import known_texts; known_texts({max_length}); "
OF_PAIRS = "from tools.programs.ms_swift import known_lengths; known_lengths({max_length}); "
OF_GKD = "from tools.programs.ms_swift import numbers_by_kernel; numbers_by_kernel(); "
WITH_SERVER = "from tools.programs.ms_swift import sent_elsewhere; sent_elsewhere({mode!r}, {sleep_level}); "
PROGRAMS = {
    SFT: "import sys; from swift import sft_main; sft_main(sys.argv[1:])",
    RLHF: "import sys; from swift import rlhf_main; from tools.programs.ms_swift import written_elsewhere\n"
    "written_elsewhere({max_completion_length}); rlhf_main(sys.argv[1:])",
}
"""Command → its program; fields in braces are arguments."""
CARD = "a100-80gb"
OF_SERVER = ("use_vllm", "vllm_mode")
"""Arguments for completions from a server, which does not run here."""
OF_ENGINE = ("vllm_enable_lora", "offload_model", "offload_optimizer", "sleep_level")
"""Arguments of an engine beside the trainer that decide what the trainer holds."""


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's arguments."""
    environment = row.get("environment", {}) | ({"NPROC_PER_NODE": str(row["gpus"])} if row.get("gpus", 1) > 1 else {})
    program = row.get("program", SFT)
    return read_values(SHARED | row["values"], file="a.sh", tool="swift", kind="command", program=program, **environment)


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it: what was read, over the first layers of the model."""
    values, layers = row["values"], row["layers"]
    read = {"model": cut(plan(row).model, layers), **plan(row).options}
    read |= {"seq_len": row["tokens"]} if "tokens" in row else {}
    read |= {"logits_to_keep": row["labelled"]} if "labelled" in row else {}
    read |= {"accelerate": FSDP2_KEEPS_LAST_LOADED.before} if read.get("strategy") == "fsdp2" else {}  # rows ran with it
    read |= {"deepspeed_version": row.get("deepspeed", RELEASE)} if "deepspeed_version" in read else {}
    return read | ({"teacher_model": shallow(values["teacher_model"], layers)} if "teacher_model" in read else {})


@cache
def shallow(name: str, layers: int) -> str:
    """The path of a config of the first layers of a model."""
    path = Path(mkdtemp(), "config.json")
    path.write_text(json.dumps(cut(name, layers)), encoding="utf-8")
    return str(path)


def arguments(row: dict[str, Any], folder: str, teacher: str, output: str) -> list[str]:
    """The command line."""
    values = SHARED | row["values"] | {"model": folder, "dataset": f"{output}/rows.jsonl", "output_dir": output}
    its_own = row["values"].get("teacher_model") == row["values"]["model"]
    values |= {"teacher_model": folder if its_own else teacher} if "teacher_model" in values else {}
    values |= {"chord_sft_dataset": f"{output}/answers.jsonl"} if "chord_sft_dataset" in values else {}
    values |= {"reward_model": f"{output}/reward"} if "reward_model" in values else {}
    words = {key: value if isinstance(value, list) else [value] for key, value in values.items() if key not in OF_SERVER}
    return [word for key, listed in words.items() for word in (f"--{key}", *map(str, listed))]


def _lines(values: dict[str, Any]) -> dict[str, dict[str, Any] | list[dict[str, Any]]]:
    """File → the line, or lines, that its data repeat."""
    length, kind = values["max_length"], values.get("rlhf_type")
    answer = {"role": "assistant", "content": "g" * (length - OF_ROW if kind == "gkd" else 8 * length)}
    prompt = [{"role": "user", "content": "a" * length}]
    line: dict[str, Any] = {"messages": prompt if kind in ("grpo", "ppo") else [{"role": "user", "content": "a"}, answer]}
    if kind == "dpo":
        line["rejected_response"] = "p" * 8 * length
    if values.get("task_type") == "seq_cls":
        line = {"messages": [{"role": "user", "content": "a" * 8 * length}], "label": 0}
    if values.get("task_type") == "embedding":
        text = [{"role": "user", "content": "a" * 8 * length}]
        line = {"messages": text, "positive_messages": [text]}
    if str(values.get("task_type")).endswith("reranker"):
        line = {"messages": prompt, "positive_messages": [[answer]], "negative_messages": [[answer]] * OTHERS}
    answers = {"messages": [*prompt, {"role": "assistant", "content": "g" * values.get("max_completion_length", 512)}]}
    if kind == "kto":  # completions of a batch are scored behind other prompts too, and have to be others
        question, letters = line["messages"][0], "ghijklmn"
        talks = [{"messages": [question, answer | {"content": letter * 8 * length}]} for letter in letters]
        return {"rows.jsonl": [row | {"label": place % 2 == 0} for place, row in enumerate(talks)]}
    return {"rows.jsonl": line} | ({"answers.jsonl": answers} if "chord_sft_dataset" in values else {})


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the tool held."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as teacher, TemporaryDirectory() as output:
        for name, part in (("model", folder), ("teacher_model", teacher)):
            if name in row["values"]:
                config = cut(copied_model(row["values"][name]) or row["values"][name], row["layers"])
                packed = {"quantization_config": row["quantization_config"]} if "quantization_config" in row else {}
                standins.write_repository(Path(part), {**config, "dtype": "bfloat16", **packed})
        if "reward_model" in row["values"]:
            scores = {**cut(row["values"]["reward_model"], row["layers"]), "num_labels": 1, "dtype": "bfloat16"}
            Path(output, "reward").mkdir()
            (name,) = scores["architectures"]
            scores["architectures"] = [name.replace("CausalLM", "SequenceClassification")]
            standins.write_repository(Path(output, "reward"), scores)
        program, kind = row.get("program", SFT), row["values"].get("rlhf_type")
        for name, line in _lines(row["values"]).items():
            lines = line if isinstance(line, list) else [line]
            text = "".join(f"{json.dumps(each)}\n" for each in lines)
            Path(output, name).write_text(text * (ROWS // len(lines)), encoding="utf-8")
        with_flash = WITH_FLASH if row["values"].get("attn_impl") == "flash_attn" else ""
        mode = row["values"].get("vllm_mode")
        takes = mode == "server" or any(row["values"].get(key) for key in OF_ENGINE)
        with_server = WITH_SERVER.format(mode=mode, sleep_level=row["values"].get("sleep_level", 0)) if takes else ""
        of_gkd = OF_GKD if kind == "gkd" else ""
        with_unsloth = WITH_UNSLOTH if row["values"].get("tuner_backend") == "unsloth" else ""
        code = (
            with_unsloth
            + (WITHOUT_NVCC if "quantization_config" in row else "")
            + with_flash
            + with_server
            + of_gkd
            + (OF_PAIRS.format(**row["values"]) if kind == "dpo" and row["values"].get("padding_free") else "")
            + (OF_TEXTS.format(**row["values"]) if row["values"].get("task_type") in WITH_TEXTS else "")
            + PROGRAMS[program].format(**{"max_completion_length": 512} | row["values"])
        )
        command = [sys.executable, "-c", code, *arguments(row, folder, teacher, output)]
        with patch.dict(os.environ, WORDS | row.get("environment", {})):
            return row | kept_of(rehearse(command, world_size=row.get("gpus"), gpu=CARD, timeout=900, stdout=sys.stderr.fileno()))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
