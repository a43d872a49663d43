"""Load checkpoints on the CPU, adapt and merge each: `python loaded_in_host.py TINY FOLDER…` prints a line of memory for each.

Own memory is anonymous: it stays out of the mapped pages of files. A tiny model goes first, so that libraries are loaded.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def own_bytes() -> int:
    """Anonymous resident memory of this process."""
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split("RssAnon:")[1].split()[0]) * 1024


def measured(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result, by how much own memory grew, and its peak on the way."""
    gc.collect()
    before = top = own_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal top
        while not done.is_set():
            top = max(top, own_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    gc.collect()
    return result, own_bytes() - before, top - before


def load(folder: str) -> peft.PeftModel:
    """In bf16, with LoRA on all linear layers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


if __name__ == "__main__":
    load(sys.argv[1]).merge_and_unload()
    for folder in sys.argv[2:]:
        model, loaded, _ = measured(partial(load, folder))
        _, _, merging = measured(model.merge_and_unload)
        print(json.dumps({"loaded": loaded, "merging": merging}))
        del model
