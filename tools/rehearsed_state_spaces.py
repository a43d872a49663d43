"""Rehearse a plain loop over models with Mamba 2, and keep what it held beside the options of `peftplan estimate`.

    python -m tools.rehearsed_state_spaces FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `model`, how many of its `layers` run or which, by letters, the `options` of the estimate, and
what it held. Models have 8,192 tokens and random weights, on an A100. Kernels are not chosen by their time. Needs the CUDA build
of torch, transformers, peft, mamba-ssm and causal-conv1d; `"kernels": null` in a row's options says that it ran without the last
two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from peftplan.rehearse import rehearse
from tools.rank_grid import cut
from tools.rehearsed_recipes import complete, kept_of

VOCABULARY = 8192
CARD = "a100-80gb"
SHARED: dict[str, Any] = {"trainer": "plain", "kernels": "mamba-ssm", "use_cache": False, "device_map": "none", "gpu": CARD}
"""Options of every job."""
OF_LORA: dict[str, Any] = {"r": 8, "target_modules": r".*\.(in_proj|(q|k|v|o|gate|up|down)_proj)", "adapter_dtype": "bf16"}


def config(row: dict[str, Any]) -> dict[str, Any]:
    """The config of the model."""
    return cut(row["model"], row["layers"]) | {"vocab_size": VOCABULARY}


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it."""
    return {"model": config(row), **SHARED, **(OF_LORA if row["options"]["method"] == "lora" else {}), **row["options"]}


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the loop held."""
    with NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"config": config(row), **row["options"]}, file)
        file.flush()
        command = [sys.executable, "-m", __name__, "--job", file.name]
        return row | kept_of(rehearse(command, gpu=CARD, timeout=3000, stdout=sys.stderr.fileno()))


def loop(job: dict[str, Any]) -> None:
    """The program."""
    import torch
    import triton

    autotune = triton.autotune
    triton.autotune = lambda configs, key, **settings: autotune(configs[:1], key, **settings)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype, narrow = torch.float32 if job.get("dtype") == "fp32" else torch.bfloat16, "autocast" in job
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**job["config"]), dtype=dtype)
    model.train()
    model.config.use_cache = False
    if job["method"] == "lora":
        adapter = LoraConfig(r=OF_LORA["r"], target_modules=OF_LORA["target_modules"])
        model = get_peft_model(model, adapter, autocast_adapter_dtype=narrow)
    if job["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if job["method"] == "lora":
            model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)
    tokens = torch.ones((job["batch_size"], job["seq_len"]), dtype=torch.int64, device="cuda")
    while True:
        with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
            outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        loop(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        from tools import rehearsed_state_spaces

        complete(Path(sys.argv[1]), rehearsed_state_spaces.run)
