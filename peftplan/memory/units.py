"""Parts of a model whose parameters may be gathered before they run: each layer, the embedding, the tail, the root."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from peftplan.parameters import Parameter
from peftplan.tape.devices import OneDevice
from peftplan.tape.tensors import Operand, Tensor
from peftplan.tape.tensors import Parameter as TapeParameter

ROTARY = "model.rotary_emb"
ROOT, BACKBONE, EMBEDDING, NORM, TAIL, FURTHER = "root", "backbone", "embedding", "norm", "tail", "further tokens"
"""The whole model; all of it but the head; the input embedding; the final norm; the head; the first layer that predicts further
tokens. A layer is called by its number."""


def layer(number: int) -> str:
    """The name of a layer's unit."""
    return f"layer {number}"


EXPERTS = " experts"


def experts(number: int) -> str:
    """The name of the unit of a layer's experts, where ranks divide them."""
    return layer(number) + EXPERTS


def further(name: str, *, divided: bool = False) -> str:
    """The name of the unit of a layer that predicts further tokens, by that of one of its modules (`mtp.layers.1.…`), or, where
    ranks divide them, of its experts."""
    number = name.split(".")[2]
    return FURTHER + (f" {number}" if number != "0" else "") + EXPERTS * divided


IN_FP32 = " in fp32"


def in_fp32(number: int) -> str:
    """The name of the unit of what a layer computes in fp32, where that is a unit of its own."""
    return layer(number) + IN_FP32


def is_of_experts(unit: str) -> bool:
    """Whether a unit is that of a layer's experts."""
    return unit.endswith(EXPERTS)


def number_of(unit: str) -> int | None:
    """The number of a layer's unit; None of any other."""
    number = unit.removeprefix("layer ").removesuffix(EXPERTS).removesuffix(IN_FP32)
    return int(number) if number.isdigit() else None


class Units(Protocol):
    """Called around each part."""

    every_layer: bool
    """Whether each layer is run, since the first, the last and those between differ."""
    micro_batches: int
    """How many are run: one that finds no gradients, one that finds some, and one more that finds what the allocator kept of
    both, or that differs as the last."""

    ranks: int
    """How many hold shards of each parameter that the optimizer steps over."""

    keeps_gradients: bool
    """Whether gradients live until the next step's forward begins."""

    hooks_each_output: bool
    """Whether the gradient of any output of the model tells that its backward begins, not that of its loss alone."""

    def enter(self, name: str) -> None:
        """Before the part runs on what needs no gradient."""

    def enter_with(self, name: str, x: Tensor) -> Tensor:
        """Before the part runs on `x`: what it runs on."""

    def enter_with_all(self, name: str, *xs: Tensor) -> tuple[Tensor, ...]:
        """The same of a part that runs on several."""

    def leave(self, name: str, x: Tensor) -> Tensor:
        """After it gave `x`: what is handed on."""

    def arrive(self, layer: int, x: Tensor) -> Tensor:
        """Before a layer, or its checkpoint, is called on `x`: what it is called on."""

    def beside(self, layer: int, mask: Tensor | None, tables: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """What a layer is called with beside the hidden states: the mask, and the tables where it has its own."""

    def as_read(self, name: str, parameter: TapeParameter) -> Operand:
        """A part's parameter as the model's forward reads it, which does not call the part."""

    def read_mask(self) -> None:
        """The host reads whether a mask hides anything."""

    def hand_out(self, outputs: list[Tensor]) -> list[Tensor]:
        """What the model returns to its caller."""

    def end_forward(self) -> None:
        """The model's forward has returned."""

    def begin_backward(self, *, syncs: bool) -> None:
        """Backward begins; `syncs`: gradients are reduced."""

    def end_backward(self) -> None:
        """Backward has ended."""

    def idle(self, families: set[str]) -> set[str]:
        """Of trainable families without a `.grad`, those that got none."""

    def before_step(self) -> None:
        """The last backward has ended, and the optimizer has not begun."""

    def groups(self, trained: list[Parameter]) -> Iterable[list[Parameter]]:
        """What the optimizer steps over at once, one group after the other."""


class OneGpu(OneDevice):
    """Nothing happens."""

    every_layer = False
    micro_batches = 3

    def enter(self, name: str) -> None:
        """Nothing."""

    def enter_with(self, name: str, x: Tensor) -> Tensor:
        """The same."""
        return x

    def leave(self, name: str, x: Tensor) -> Tensor:
        """The same."""
        return x

    def end_forward(self) -> None:
        """Nothing."""

    def begin_backward(self, *, syncs: bool) -> None:
        """Nothing."""

    def end_backward(self) -> None:
        """Nothing."""

    def idle(self, families: set[str]) -> set[str]:
        """All of them."""
        return families

    def before_step(self) -> None:
        """Nothing."""

    def groups(self, trained: list[Parameter]) -> Iterable[list[Parameter]]:
        """All at once."""
        yield trained


ONE_GPU = OneGpu()
