"""OFT (Qiu et al. 2023, arXiv 2306.07280, eq. 4): the input is rotated by a block-diagonal orthogonal matrix.

An input of width `in` is cut into r blocks of size b, in = r·b; each block keeps the b·(b-1)/2 entries of a skew-symmetric
matrix, so the weight is (r, b·(b-1)/2), or (1, b·(b-1)/2) if blocks share one. A size that does not divide `in` is replaced by
the nearest divisor. `coft` and the Cayley-Neumann settings change what a step allocates, but no weight.
Source: peft, `tuners/oft/layer.py` (`OFTLayer.update_layer`, `OFTRotationModule`, `adjust_oft_parameters`).
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


class OFTConfig(LayeredConfig):
    """peft's `OFTConfig`, less what changes no tensor. Exactly one of `r` and `oft_block_size` is not zero."""

    r: Blocks = 0
    oft_block_size: Blocks = 32
    module_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias: Literal["none", "all", "oft_only"] = "none"
    block_share: bool = False
    coft: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Field(ge=1)] = 5
    no_effect: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_weights", "eps"})


def oft(arch: Architecture, config: OFTConfig) -> Adaptation:
    """The tensors that `get_peft_model` adds for an OFTConfig; the buffers are the indices of the triangle's entries."""
    if (config.r == 0) == (config.oft_block_size == 0):
        raise RefusedError(
            f"r, oft_block_size: peft takes exactly one of r ({config.r}) and oft_block_size ({config.oft_block_size}); the "
            "other must be 0, because r x oft_block_size = in_features"
        )

    def tensors(module: Module) -> list[AddedTensor]:
        require_kind(module, (*LINEAR, "Embedding"), method="OFT", by_peft=("Conv2d",))
        r, entries = _blocks(module, config)
        part = "oft_embedding_R" if module.kind == "Embedding" else "oft_R"
        return [AddedTensor(f"{module.name}.{part}.weight", (1 if config.block_share else r, entries), module.layers)]

    def buffers(module: Module) -> list[AddedBuffer]:
        part = "oft_embedding_R" if module.kind == "Embedding" else "oft_R"
        _, entries = _blocks(module, config)
        return [AddedBuffer(f"{module.name}.{part}.{name}", (entries,), "int64", module.layers) for name in ("rows", "cols")]

    return tune(arch, config, tensors, peft_type="OFT", bias=config.bias, buffers=buffers)


def nearest_divisor(width: int, near: int) -> int:
    """The divisor of `width` nearest to `wanted`, the lower one of two (`adjust_oft_parameters`)."""
    if near >= width:
        return width
    higher = next(d for d in range(near, width + 1) if width % d == 0)
    lower = next(d for d in range(near, 0, -1) if width % d == 0)
    return lower if near - lower <= higher - near else higher


def _blocks(module: Module, config: OFTConfig) -> tuple[int, int]:
    """(number of blocks, entries of one block). An embedding rotates its output, the embedding width."""
    width = module.out_features if module.kind == "Embedding" else module.in_features
    size = nearest_divisor(width, config.oft_block_size) if config.oft_block_size else width // nearest_divisor(width, config.r)
    return width // size, size * (size - 1) // 2
