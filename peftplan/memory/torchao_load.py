"""How a recipe of torchtune loads a base in nf4. Its check of the keys takes the state dict, whose hook restores each weight.

Source: torchtune, recipes/lora_finetune_single_device.py (`_setup_model`), modules/common_utils.py
(`reparametrize_as_dtype_state_dict_post_hook`); torchao, `NF4Tensor.get_original_weight`. Left out: quantizing before it,
which takes less (about 5.5 bytes an element and 64 MiB, against 14).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.load import load_order
from peftplan.memory.loaded import Handle, Memory
from peftplan.memory.quantized import restoring
from peftplan.parameters import Parameters
from peftplan.storage import QuantConfig

if TYPE_CHECKING:
    from peftplan.memory.dora_load import Norm


def load_nf4(
    memory: Memory[Handle],
    *,
    parameters: Parameters,
    quant: QuantConfig,
    dtype: str,
    norms: Iterable[Norm],
    workspace: int | None,
) -> None:
    """Load module by module; then restore the weights, one after the other; then make the norms of DoRA's layers, whose first
    product takes the `workspace`.
    """
    for p, _ in load_order(parameters, by_name=False, moved=True)[0]:
        memory.keep(tuple(a.nbytes for a in p.allocations if a.place == "device"))
    for p in (p for p in parameters.all if p.quantized):
        for handle in [memory.allocate(nbytes) for nbytes in restoring(p.numel, quant.blocksize, ITEMSIZE[dtype])]:
            memory.release(handle)
    untaken = [workspace]
    for norm in norms:
        for handle in norm.take(memory, lambda: memory.keep((untaken.pop() or 0,)) if untaken else None):
            memory.release(handle)
