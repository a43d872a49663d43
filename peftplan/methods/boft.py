"""BOFT (Liu et al. 2023, arXiv 2311.06243, eq. 3): rotates the input by a product of m butterfly factors, and scales the output.

An input of width `in` is cut into n blocks of size b, in = n·b: R is (m, n, b, b), whole blocks, and s is (out, 1). Each layer
also registers P (m, in, in) in fp32, the permutation matrices: in no count, but on the device once the model moves there.
Source: peft, `tuners/boft/layer.py` (`BOFTLayer.update_layer`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from peftplan.arch.modules import Architecture, Module
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import Adaptation, AddedBuffer, AddedTensor
from peftplan.methods.targets import LayeredConfig
from peftplan.methods.tuner import LINEAR, require_kind, tune

Blocks = Annotated[int, Field(ge=0, le=2**24)]

EXTENSION = (
    "boft_n_butterfly_factor above 1 needs peft's CUDA extension, built when the adapter is created (ninja, nvcc). "
    "It is assumed to be built; if it cannot be, peft warns and sets the factor to 1"
)
"""`get_fbd_cuda`."""


class BOFTConfig(LayeredConfig):
    """peft's `BOFTConfig`, less what changes no tensor. Exactly one of `boft_block_size` and `boft_block_num` is not zero."""

    boft_block_size: Blocks = 4
    boft_block_num: Blocks = 0
    boft_n_butterfly_factor: Annotated[int, Field(ge=1, le=32)] = 1
    boft_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias: Literal["none", "all", "boft_only"] = "none"
    no_effect: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_weights"})


def boft(arch: Architecture, config: BOFTConfig) -> Adaptation:
    """The tensors that `get_peft_model` adds for a BOFTConfig if peft's CUDA extension builds."""
    if (config.boft_block_size == 0) == (config.boft_block_num == 0):
        raise RefusedError(
            f"boft_block_size, boft_block_num: peft takes exactly one of boft_block_size ({config.boft_block_size}) and "
            f"boft_block_num ({config.boft_block_num}); the other must be 0, because their product is in_features"
        )
    m = config.boft_n_butterfly_factor

    def tensors(module: Module) -> list[AddedTensor]:
        require_kind(module, LINEAR, method="BOFT", by_peft=("Conv2d",))
        n, b = _blocks(module, config)
        return [
            AddedTensor(f"{module.name}.boft_R", (m, n, b, b), module.layers),
            AddedTensor(f"{module.name}.boft_s", (module.out_features, 1), module.layers),
        ]

    def buffers(module: Module) -> list[AddedBuffer]:
        width = module.in_features
        return [AddedBuffer(f"{module.name}.boft_P", (m, width, width), "float32", module.layers, from_host=True)]

    adaptation = tune(arch, config, tensors, peft_type="BOFT", bias=config.bias, buffers=buffers)
    return adaptation._replace(notes=(EXTENSION,)) if m > 1 else adaptation


def _blocks(module: Module, config: BOFTConfig) -> tuple[int, int]:
    """(number of blocks, block size). Raises RefusedError unless both divide the width and the butterfly can pair the blocks."""
    width, extra = module.in_features, config.boft_n_butterfly_factor - 1
    name = "boft_block_size" if config.boft_block_size else "boft_block_num"
    choice = config.boft_block_size or config.boft_block_num
    if width % choice:
        raise RefusedError(f"{name}: in_features ({width}) of {module.name} must be divisible by {name} ({choice})")
    n, b = (width // choice, choice) if config.boft_block_size else (choice, width // choice)
    if extra and (n % 2**extra or n % 2 or b % 2):
        raise RefusedError(
            f"boft_n_butterfly_factor: invalid combination of {extra + 1} factors with {n} blocks of size {b} at {module.name} "
            f"(the number of blocks must divide by {2**extra}, the block size by 2)"
        )
    return n, b
