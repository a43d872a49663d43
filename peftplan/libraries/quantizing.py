"""Which layers of a model become stand-ins for quantized ones."""

from __future__ import annotations

from torch import nn

from peftplan.errors import RefusedError
from peftplan.storage import QuantConfig, without_peak


def quantize(model: nn.Module, names: set[str], quant: QuantConfig, *, dtype: str) -> None:
    """Replace the named linear layers of a model on meta by stand-ins. Raises RefusedError for formats `without_peak`."""
    if (why := without_peak(quant)) is not None:
        raise RefusedError(why)
    from peftplan.libraries.bnb_layers import FourBitLinear, Int8Linear  # bitsandbytes takes a second to import

    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        source = model.get_submodule(name)
        stand_in: nn.Module = Int8Linear(source, quant) if quant.name == "int8" else FourBitLinear(source, quant, dtype=dtype)
        setattr(model.get_submodule(parent), leaf, stand_in)
    setattr(model, "is_loaded_in_8bit" if quant.name == "int8" else "is_loaded_in_4bit", True)
