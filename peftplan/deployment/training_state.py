"""Files of a checkpoint beside the model: `optimizer.pt` and `scheduler.pt`, as transformers' Trainer writes them.

Source: transformers, `trainer.py` (`create_optimizer`: two groups, with and without weight decay;
`_save_optimizer_and_scheduler`), `trainer_pt_utils.py` (`get_parameter_names`); torch, `optim/optimizer.py` (`state_dict`:
states by number, then groups), `optim/lr_scheduler.py` (`LambdaLR.state_dict`). torch's own optimizers are exact. Of others the
states are, and their file is taken as laid out like AdamW's: bitsandbytes and Adafactor write some fields more.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from peftplan.deployment.torch_save import SavedTensor, Value, file_bytes
from peftplan.ledger import Allocation
from peftplan.parameters import Parameter

GROUPS: Mapping[str, Mapping[str, Value]] = {
    "AdamW": {
        "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
        "differentiable": False, "fused": None, "decoupled_weight_decay": True,
    },
    "SGD": {
        "momentum": 0, "dampening": 0, "nesterov": False, "maximize": False, "foreach": None, "differentiable": False,
        "fused": None,
    },
    "RMSprop": {
        "momentum": 0, "alpha": 0.99, "eps": 1e-8, "centered": False, "capturable": False, "foreach": None, "maximize": False,
        "differentiable": False,
    },
    "Adagrad": {
        "lr_decay": 0, "eps": 1e-10, "initial_accumulator_value": 0, "foreach": None, "maximize": False,
        "differentiable": False, "fused": None,
    },
}  # fmt: skip
"""Class of torch.optim → the fields of its groups between `lr` and `initial_lr`."""

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names without weight decay (`Trainer.get_decay_parameter_names`); modules of class `nn.LayerNorm` have none either."""
STEPS = 1000
"""Steps that the scheduler has counted: more than 65,535 take some bytes more."""


class Trained(NamedTuple):
    """A tensor that trains, and its optimizer states; `order` is its place in `named_parameters()`."""

    family: str
    order: tuple[int, ...]
    states: tuple[Allocation, ...]


def optimizer_file_bytes(trained: Iterable[Trained], *, cls: str, device: str = "cuda:0") -> int:
    """Bytes of `optimizer.pt`: states of the tensors with weight decay, then of the others, each in their order."""
    ordered = sorted(trained, key=lambda tensor: tensor.order)
    spared = {family: NO_DECAY.search(family.lower()) is not None for family in {tensor.family for tensor in ordered}}
    decayed = [tensor for tensor in ordered if not spared[tensor.family]]
    others = [tensor for tensor in ordered if spared[tensor.family]]
    saved = {
        states: {a.name: SavedTensor(a.dtype, a.dims, "cpu" if a.place == "host" else device) for a in states}
        for states in {tensor.states for tensor in ordered}
    }
    state: dict[int, Value] = {number: saved[tensor.states] for number, tensor in enumerate((*decayed, *others)) if tensor.states}
    numbers = range(len(ordered))
    groups = [_group(cls, numbers[: len(decayed)]), _group(cls, numbers[len(decayed) :])]
    return file_bytes({"state": state, "param_groups": groups}, stem="optimizer")


def _group(cls: str, numbers: Iterable[int]) -> dict[str, Value]:
    fields = GROUPS.get(cls, GROUPS["AdamW"])
    return {"weight_decay": 0.0, "lr": 0.0, **fields, "initial_lr": 0.0, "params": list(numbers)}


def scheduler_file_bytes() -> int:
    """Bytes of `scheduler.pt` of a schedule that is a function of the step, such as Trainer's linear one."""
    value: dict[str, Value] = {"base_lrs": [0.0, 0.0], "last_epoch": STEPS, "_step_count": STEPS + 1, "_is_initial": False}
    value |= {"_get_lr_called_within_step": False, "_last_lr": [0.0, 0.0], "lr_lambdas": [{}, {}]}
    return file_bytes(value, stem="scheduler")


def in_order(parameters: Iterable[Parameter]) -> Iterator[tuple[Parameter, tuple[int, ...]]]:
    """Every tensor of a list of families with its place: neighbouring families take turns, layer by layer."""
    run, before = 0, False
    for number, family in enumerate(parameters):
        layered = family.layers is not None
        run += layered != before
        before = layered
        for layer in sorted(family.layers) if family.layers is not None else (0,):
            yield family, (run, layer, number)
