"""Bytes of a stored weight: which tensors each format keeps on the device, and which modules it converts.

`stored` gives one `Allocation` per CUDA tensor, unrounded; the ledger's lines round each to the allocator's 512
bytes. A quantized weight still counts as its real number of elements wherever parameters are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import prod

from peftplan.dtypes import ITEMSIZE
from peftplan.errors import InputError
from peftplan.ledger import Allocation, Category
from peftplan.storage import bnb
from peftplan.storage.config import FORMATS, TORCHAO_NF4, Format, QuantConfig, check_trainable, parse_quant, without_peak
from peftplan.storage.dense import dense
from peftplan.storage.modules import STACKS, is_skipped, keys_to_not_convert, quantized_modules, skip_list
from peftplan.units import round512

__all__ = [
    "FORMATS",
    "STACKS",
    "Format",
    "QuantConfig",
    "category",
    "check_trainable",
    "dense",
    "is_skipped",
    "keys_to_not_convert",
    "parse_quant",
    "quantized_modules",
    "shared",
    "skip_list",
    "stored",
    "without_peak",
]


def _lazily(module: str, function: str) -> Callable[..., tuple[Allocation, ...]]:
    """A layout whose module is imported on first use, since few runs need more than bitsandbytes' formats."""

    def layout(*args: object, **kwargs: object) -> tuple[Allocation, ...]:
        allocations: tuple[Allocation, ...] = getattr(import_module(f"peftplan.storage.{module}"), function)(*args, **kwargs)
        return allocations

    return layout


_LAYOUTS: dict[str, Callable[..., tuple[Allocation, ...]]] = {
    "nf4": bnb.four_bit,
    "fp4": bnb.four_bit,
    "int8": bnb.int8,
    "fp8": _lazily("floats", "fp8"),
    "mxfp4": _lazily("floats", "mxfp4"),
    "gptq": _lazily("packed", "gptq"),
    "awq": _lazily("packed", "awq"),
    "hqq": _lazily("packed", "hqq"),
    TORCHAO_NF4: _lazily("torchao", "nf4"),
}

_RANKS: dict[str, tuple[int, ...]] = {"fp8": (2, 3), "mxfp4": (3,)}
"""Format → the ranks of the weights that it stores, if not only the 2 of a linear layer."""

_WEIGHTS = frozenset({"weight", "qweight", "W_q", "CB"})


def stored(quant: QuantConfig | None, *, shape: tuple[int, ...], dtype: str, kind: str = "Linear") -> tuple[Allocation, ...]:
    """The tensors that hold one weight of the model: one dense tensor, or those of its format.

    `shape` is the parameter's shape in the unquantized model, `dtype` the dtype that the model is loaded in, `kind`
    the module's torch class: Conv1D stores (in, out), and is transposed before it is quantized; the linear layers of
    `ExpertsApart` are stored one by one, and counted together; a stack of experts is one weight of all their rows. Raises
    InputError for a shape that the format does not store, RefusedError for sizes that the library refuses.
    """
    if quant is None:
        return dense(dtype=dtype, shape=shape)
    if kind == "ExpertsApart":
        experts, *of_one = shape
        each = stored(quant, shape=tuple(of_one), dtype=dtype)
        return tuple(a._replace(dims=(experts, _rounded(a))) for a in each)
    if quant.experts and len(shape) > len(("out", "in")):
        *rows, columns = shape
        shape = prod(rows), columns
    ranks = _RANKS.get(quant.name, (2,))
    if len(shape) not in ranks:
        accepted = " or ".join(map(str, ranks))
        raise InputError("shape", shape, f"{quant.name} stores weights of {accepted} dimensions")
    return _LAYOUTS[quant.layout](quant, shape=shape[::-1] if kind == "Conv1D" else shape, dtype=dtype)


def _rounded(allocation: Allocation) -> int:
    """Elements of a tensor that is as large as the allocator makes this one."""
    return round512(allocation.nbytes) // ITEMSIZE[allocation.dtype]


def shared(quant: QuantConfig | None) -> tuple[Allocation, ...]:
    """The tensors that all weights of a process share: one dynamic map for double quantization, else nothing.

    It is created when a weight is quantized, so a checkpoint that is already double quantized has none. torchao has none.
    """
    codes = quant is not None and quant.double_quant and not (quant.pre_quantized or quant.by_torchao)
    return (bnb.dynamic_map(),) if codes else ()


def category(name: str) -> Category:
    """The ledger's category of a tensor of `stored` or `shared`: `weights` for packed weights, else `quant_state`."""
    return "weights" if name in _WEIGHTS else "quant_state"
