"""A stack of experts while it is loaded and stored by bitsandbytes: the matrices of all experts, one by one as the checkpoint has
them, become one weight, which is quantized at once. Then the cache is emptied.

Source: transformers, core_model_loading.py (`materialize_tensors`, `MergeModulelist`, `Concatenate`), axolotl 0.19.0,
monkeypatch/moe_quant.py:56 and :109; bitsandbytes, nn/parametrize.py (`replace_parameter_4bit`).
"""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.loaded import Handle, Memory
from peftplan.parameters import Parameter, Parameters
from peftplan.storage import QuantConfig

SOURCE = "axolotl 0.19.0, monkeypatch/moe_quant.py:109"


Stacks = Mapping[str, tuple[str, ...]]
"""Families that are stored as one weight → matrices of each expert in the checkpoint; none where it has the stack itself."""


def gathered(parameters: Parameters, quant: QuantConfig | None, model_type: str) -> Stacks:
    """The stacks of experts that bitsandbytes stores."""
    if quant is None or not quant.experts:
        return {}
    matrices = _of_experts(model_type)
    stacks = (p.name for p in parameters.all if p.quantized and len(p.shape) > len(("out", "in")))
    return {name: matrices.get(name.rpartition(".")[2], ()) for name in stacks}


def merged(parameters: Parameters, model_type: str) -> Stacks:
    """The stacks of experts that bitsandbytes leaves as they are, on the device that the checkpoint is read to."""
    stacks = [p.name for p in parameters.all if not p.quantized and len(p.shape) > len(("out", "in"))]
    matrices = _of_experts(model_type) if stacks else {}
    return {name: of_expert for name in stacks if (of_expert := matrices.get(name.rpartition(".")[2], ()))}


def _of_experts(model_type: str) -> Stacks:
    """What one expert's matrices are called in a checkpoint."""
    from peftplan.deployment.checkpoint import EXPERTS  # a room that most jobs do not need

    return EXPERTS.get(model_type, {})


def as_stored(p: Parameter, stacks: Stacks) -> Parameter:
    """A family under the name by which the checkpoint orders it: that of the first matrix of a stack."""
    module = p.name.rpartition(".")[0]
    return p._replace(name=f"{module}.{matrices[0]}") if (matrices := stacks.get(p.name)) else p


def load_stack(memory: Memory[Handle], p: Parameter, matrices: int, dtype: str) -> Handle:
    """The stack in the dtype that it is loaded in, from so many `matrices` of each expert; 0: as it is."""
    nbytes, experts = ITEMSIZE[dtype] * p.numel, p.shape[0]
    if not matrices:
        return memory.allocate(nbytes)
    apart = [[memory.allocate(nbytes // (matrices * experts)) for _ in range(experts)] for _ in range(matrices)]
    stacks = []
    for tensors in apart:
        stacks.append(memory.allocate(nbytes // matrices))
        _release(memory, tensors)
    if matrices == 1:
        return stacks[0]
    whole = memory.allocate(nbytes)
    _release(memory, stacks)
    return whole


def _release(memory: Memory[Handle], tensors: list[Handle]) -> None:
    for tensor in tensors:
        memory.release(tensor)


def initialize(memory: Memory[Handle], p: Parameter, *, dtype: str, absmax: int) -> None:
    """A stack is restored once more: transformers does not know that it is loaded (modeling_utils.py, `_init_weights`).

    In int8 by two products in fp32; `absmax`: bytes of it in fp32, where it is quantized too.
    """
    restored = ("fp32", "fp32") if any(a.name == "SCB" for a in p.allocations) else (dtype,)
    sizes = [*((absmax,) if absmax else ()), *(ITEMSIZE[each] * p.numel for each in restored)]
    _release(memory, [memory.allocate(nbytes) for nbytes in sizes])
