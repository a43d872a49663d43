"""One optimizer: a function from a parameter to the tensors that the first step creates for it."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from peftplan.ledger import Allocation, Line, Place

StepImplementation = Literal["fused", "foreach", "kernel", "for-loop", "in-backward"]
"""How the default path of the optimizer runs on CUDA, which decides the temporaries of the step.

- `fused`: multi-tensor kernels that update parameters and states in place.
- `foreach`: multi-tensor operations, so temporaries as large as all the parameters they cover.
- `kernel`: one kernel per parameter, in place but for `temporaries`.
- `for-loop`: plain operations per parameter, temporaries as large as one parameter.
- `in-backward`: a hook steps each parameter as soon as its gradient exists and then frees the gradient.
"""

OptimArgs = Mapping[str, str]
"""`TrainingArguments.optim_args`, split at its commas: the values are strings."""


class Param(NamedTuple):
    """The facts about one parameter that its states depend on. Its gradient has the same shape and dtype."""

    shape: tuple[int, ...]
    dtype: str
    in_embedding: bool
    in_target: bool
    name: str = ""


StatesFunction = Callable[[Param, OptimArgs], tuple[Allocation, ...]]
SharedFunction = Callable[[Iterable[Allocation]], tuple[Allocation, ...]]
StepFunction = Callable[[tuple[int, ...]], tuple[Allocation, ...]]
"""What the step of one parameter of a shape allocates at once, and frees."""
CopiesFunction = Callable[[tuple[int, ...], int], tuple[int, ...] | None]
"""Bytes of what a kernel changes, by argument, that steps over a parameter of a shape and an itemsize; None if none is timed."""


def nothing_shared(states: Iterable[Allocation]) -> tuple[Allocation, ...]:
    """No shared tensors: most optimizers hold only the states of their parameters."""
    return ()


VERSIONS: dict[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "bitsandbytes": "0.50.2",
    "torchao": "0.18.0",
    "galore-torch": "1.0",
    "apollo-torch": "1.0.3",
    "lomo-optim": "0.1.1",
    "grokadamw": "0.1.2",
    "schedulefree": "1.4.1",
    "torch-optimi": "0.3.3",
    "flashoptim": "0.1.4",
    "adam-mini": "1.1.1",
    "badam": "1.4",
    "dion": "0.1.0",
    "transformer-engine": "2.20.2",
    "llamafactory": "0.9.5",
    "axolotl": "0.19.0",
    "deepspeed": "0.19.8",
}
"""The packages that optimizers come from, with the version whose source was read and run."""


class Optimizer(NamedTuple):
    """One name that `TrainingArguments.optim` accepts, and the class that transformers makes for it.

    `reads` lists the keys of `optim_args` that transformers reads for it, each with the reader it applies.
    `low_rank`: states depend on whether `optim_target_modules` selects the parameter.
    `states_for_frozen`: frozen parameters get states too.
    `made_with_states`: the constructor creates the states of all its parameters, or the one of this name; others create them at
    the first gradient.
    `temporaries`: those of a kernel that is compiled for each shape; None if the step works in place or has a formula of its own.
    `copies`: what a compiled kernel runs over while the first step times it; None if nothing is compiled.
    """

    name: str
    package: str
    cls: str
    step_implementation: StepImplementation
    param_states: StatesFunction
    reads: Mapping[str, Callable[[str], object]] = MappingProxyType({})
    shared: SharedFunction = nothing_shared
    low_rank: bool = False
    states_for_frozen: bool = False
    made_with_states: bool | str = False
    temporaries: StepFunction | None = None
    copies: CopiesFunction | None = None

    def unknown(self, optim_args: OptimArgs) -> str | None:
        """Why no engine knows what a step needs besides the states; None if one does."""
        if self.low_rank and (self.package == "galore-torch" or optim_args.get("proj") == "svd"):
            return (
                "it decomposes gradients into singular values; cuSOLVER alone knows its workspace, so only states are counted; "
                "for a peak, measure one step on a GPU"
            )
        return None

    @property
    def untraced(self) -> str | None:
        """Why the trace engine does not know it; None if it does."""
        if self.step_implementation == "in-backward":
            return "it steps inside backward"
        return f"the projections of {self.package} are not traced" if self.low_rank else None

    def makes(self, line: Line) -> bool:
        """Whether the constructor makes a line of the states."""
        of_name = self.made_with_states if isinstance(self.made_with_states, str) else ""
        return bool(self.made_with_states) and line.source == self.source and line.name.endswith(of_name)

    @property
    def source(self) -> str:
        """The class, the package it comes from, and the version that was read: `torch.optim.AdamW (torch)`."""
        return f"{self.cls} ({self.package} {VERSIONS[self.package]})"


def like(param: Param, name: str, *, dtype: str | None = None, place: Place = "device") -> Allocation:
    """`torch.zeros_like(p)`: the parameter's shape, and its dtype unless another is given."""
    return Allocation(name, dtype or param.dtype, param.shape, place)


def scalar(name: str, *, dtype: str = "fp32", place: Place = "device") -> Allocation:
    """A 0-dimensional tensor; on the device the allocator still rounds it to 512 B."""
    return Allocation(name, dtype, (), place)


def truth(text: str) -> bool:
    """transformers' `strtobool` (utils/generic.py 5.24); raises ValueError for anything else."""
    if text.lower() in ("y", "yes", "t", "true", "on", "1"):
        return True
    if text.lower() in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(text)
