"""DoRA's layers while they are created beside a base on the device: the norm of W + ΔW, the first value of the magnitude.

Source: peft, tuners/lora/dora.py (`DoraLinearLayer.update_layer`, `get_weight_norm`), utils/integrations.py
(`dequantize_bnb_weight`); bitsandbytes, nn/modules.py (`Params4bit.__deepcopy__`), functional.py (`dequantize_4bit`,
`int8_vectorwise_dequant`); torchtune, modules/peft/dora.py (`initialize_dora_magnitude`). Left out: embeddings,
convolutions, dense Conv1D, formats of other libraries.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.loaded import Handle, Memory
from peftplan.memory.quantized import restoring
from peftplan.tape.ops import promoted

if TYPE_CHECKING:
    from peftplan.parameters import Parameters
    from peftplan.storage import QuantConfig

MAGNITUDE = ".lora_magnitude_vector."
"""What the names of magnitudes hold, behind the name of their layer."""
OF_A_LAYER = ("nf4", "fp4", "int8")
"""Formats whose layers are followed, besides a dense weight."""


class Norm(NamedTuple):
    """One layer: rows and columns of its weight, rank, dtypes of the weight as it takes part and of A and B.

    `packed`: bytes of a quantized weight; `state`: of the other tensors of a 4-bit one; `absmax`: of its restored scales;
    `restoring`: of what lives while torchao restores one.
    """

    n_out: int
    n_in: int
    rank: int
    dtype: str
    adapter_dtype: str
    packed: int = 0
    state: tuple[int, ...] = ()
    absmax: int = 0
    restoring: tuple[int, ...] = ()

    def take(self, memory: Memory[Handle], multiplied: Callable[[], None]) -> list[Handle]:
        """Allocate what lives until the norm is there. `multiplied`: called behind the product of B and A.

        A 4-bit layer is copied, and its quant state once more, as an attribute of the layer. fp16 matrices multiply as fp32.
        """
        numel, allocate = self.n_out * self.n_in, memory.allocate
        temporaries: list[Handle] = []
        half = self.adapter_dtype == "fp16"
        if half:
            temporaries += [allocate(ITEMSIZE["fp32"] * self.rank * n) for n in (self.n_in, self.n_out)]
        if self.restoring:
            _release(memory, [allocate(nbytes) for nbytes in self.restoring])
            temporaries.append(allocate(ITEMSIZE[self.dtype] * numel))
        if self.state:
            temporaries += map(allocate, (*self.state, self.packed, *self.state))
        if self.packed:
            scaled = [allocate(nbytes) for nbytes in (self.absmax if self.state else ITEMSIZE["fp32"] * numel,) if nbytes]
            temporaries.append(allocate(ITEMSIZE[self.dtype] * numel))
            _release(memory, scaled)
        product = allocate(ITEMSIZE["fp32" if half else self.adapter_dtype] * numel)
        multiplied()
        if half:
            wide, product = product, allocate(ITEMSIZE[self.adapter_dtype] * numel)
            memory.release(wide)
        scaled = [allocate(ITEMSIZE[self.adapter_dtype] * numel)]
        temporaries += [product, allocate(ITEMSIZE[promoted(self.dtype, self.adapter_dtype)] * numel)]
        _release(memory, scaled)
        return temporaries


def _release(memory: Memory[Handle], tensors: Iterable[Handle]) -> None:
    for tensor in tensors:
        memory.release(tensor)


def norms(parameters: "Parameters", quant: "QuantConfig | None", *, dtype: str, passing: tuple[str, ...]) -> dict[str, Norm]:
    """Name of each family of magnitudes → the norm of one of its layers. `dtype`, `passing`: as `load_into` takes them."""
    if quant is not None and quant.name not in OF_A_LAYER:
        return {}
    weights = {p.name: p for p in parameters.all if p.owner == "base"}
    matrices = {p.name: p for p in parameters.all if p.owner == "adapter"}
    of_magnitude = {}
    for name in matrices:
        layer, dot, _ = name.partition(MAGNITUDE)
        base, a = weights.get(f"{layer}.weight"), matrices.get(f"{layer}.lora_A.weight")
        if not dot or base is None or a is None or not (base.is_linear or base.quantized):
            continue
        rank, n_in = a.shape
        norm = Norm(base.numel // n_in, n_in, rank, base.dtype, passing[0] if passing else a.dtype)
        if base.quantized and quant is not None and quant.by_torchao:
            norm = norm._replace(dtype=dtype, restoring=restoring(base.numel, quant.blocksize, ITEMSIZE[dtype]))
        elif base.quantized:
            packed, *state = (each for each in base.allocations if each.place == "device")
            norm = norm._replace(packed=packed.nbytes, dtype="fp32")
            if quant is not None and quant.name != "int8":
                absmax = next((ITEMSIZE["fp32"] * each.numel for each in state if each.name == "absmax"), 0)
                beside = tuple(each.nbytes for each in state)
                norm = norm._replace(dtype=dtype, state=beside, absmax=absmax if quant.double_quant else 0)
        of_magnitude[name] = norm
    return of_magnitude
