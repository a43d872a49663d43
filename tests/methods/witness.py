"""The witness of the method tests: peft's own model on the meta device, name by name.

peft's names lose `base_model.model.` and the adapter's name, so that they read like ours; a base weight that peft moved into
`base_layer` or `original_module` is compared under its old name.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import peft
import torch

from peftplan.arch.modules import Architecture
from peftplan.methods.adaptation import Adaptation


def peft_model(model: Any, config: peft.PeftConfig, *, device: str = "meta") -> Any:
    """`get_peft_model` on a copy of the model, with a copy of the config (peft resolves `target_modules` in place)."""
    with torch.device(device):
        return peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))


def split(base: Any, adapted: Any) -> tuple[dict[str, tuple[tuple[int, ...], bool]], set[str]]:
    """What peft added, name → (shape, trains), and the names of the base's own parameters that it left trainable."""
    known = {name for name, _ in base.named_parameters()}
    prefix = "base_model." if adapted.active_peft_config.is_prompt_learning else "base_model.model."
    added: dict[str, tuple[tuple[int, ...], bool]] = {}
    trained: set[str] = set()
    for name, param in adapted.named_parameters():
        short = re.sub(r"\.default(?=\.|$)", "", name.removeprefix(prefix))
        plain = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", short)
        if plain not in known or ".modules_to_save." in short:
            added[short] = (tuple(param.shape), param.requires_grad)
        elif param.requires_grad:
            trained.add(plain)
    return added, trained


def assert_same(arch: Architecture, ours: Adaptation, base: Any, adapted: Any) -> None:
    """Added tensors (name, shape, trains), trained base parameters, and both of peft's counts are equal."""
    added, trained = split(base, adapted)
    assert {name: (t.shape, t.trainable) for t in ours.added for name in t.names()} == added
    names = {f"{p.module}.{p.param}".lstrip(".").replace("{}", str(i)) for p in ours.trained for i in p.layers or (0,)}
    assert names == trained
    assert (ours.num_trainable, arch.num_parameters + ours.num_added) == adapted.get_nb_trainable_parameters()
