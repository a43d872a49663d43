"""How a recipe of torchtune loads a base in nf4. Its check of the keys takes the state dict, whose hook restores each weight.

Source: torchtune, recipes/lora_finetune_single_device.py (`_setup_model`), modules/common_utils.py
(`reparametrize_as_dtype_state_dict_post_hook`); torchao, `NF4Tensor.get_original_weight`. Left out: quantizing before it,
which takes less (about 5.5 bytes an element and 64 MiB, against 14).
"""

from __future__ import annotations

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.load import load_order
from peftplan.memory.loaded import Handle, Memory
from peftplan.parameters import Parameters
from peftplan.storage import QuantConfig


def load_nf4(memory: Memory[Handle], *, parameters: Parameters, quant: QuantConfig, dtype: str) -> None:
    """Load module by module; then restore the weights, one after the other."""
    for p, _ in load_order(parameters, by_name=False, moved=True)[0]:
        memory.keep(tuple(a.nbytes for a in p.allocations if a.place == "device"))
    for p in (p for p in parameters.all if p.quantized):
        for handle in [memory.allocate(nbytes) for nbytes in _restoring(p.numel, quant.blocksize, ITEMSIZE[dtype])]:
            memory.release(handle)


def _restoring(n: int, blocksize: int, itemsize: int) -> tuple[int, ...]:
    """Bytes of what lives together: int64 indices, values and scaled values of two halves, the scalers, and the weight."""
    halves = (ITEMSIZE["int64"], itemsize, itemsize)
    return (*(size * n // 2 for size in halves for _ in range(2)), itemsize * n // blocksize, itemsize * n)
