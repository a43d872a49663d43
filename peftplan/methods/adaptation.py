"""What a PEFT method does to a model: the tensors that it adds, and the parameters of the base that it trains."""

from collections.abc import Iterator
from math import prod
from typing import ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from peftplan.arch.modules import Architecture, Module, Shape
from peftplan.errors import PeftplanError

PROMPTED = ("PROMPT_TUNING", "P_TUNING")
"""peft types whose virtual tokens come before the embeddings."""


class NeedsPeftError(PeftplanError):
    """A configuration that only the installed peft can count (extra `trace`); the message names the part."""


class MethodConfig(BaseModel):
    """Base of all method configurations: peft's own field names, checked once, frozen.

    `no_effect` names the fields of peft's config class that change no tensor (initialisation, scaling, bookkeeping);
    everything else that is set and unknown here is counted by peft itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)
    no_effect: ClassVar[frozenset[str]] = frozenset()


class AddedTensor(NamedTuple):
    """One family of tensors that a method adds. `name`: as in `named_parameters()`, without `base_model.model.` and `.default`.

    `dtype`: whose dtype it takes. peft casts an adapter's own parameters (`autocast_adapter_dtype`); a `modules_to_save` copy
    keeps that of its module. `in_embedding`: whether it is the weight of an `nn.Embedding`.
    """

    name: str
    shape: Shape
    layers: tuple[int, ...] | None = None
    trainable: bool = True
    dtype: Literal["adapter", "base"] = "adapter"
    in_embedding: bool = False
    group: int = 0
    """Which group of the optimizer has it, where the method brings one along that has several."""

    @property
    def copies(self) -> int:
        """The number of tensors in this family."""
        return 1 if self.layers is None else len(self.layers)

    def names(self) -> Iterator[str]:
        """The full name of every tensor of the family."""
        for layer in self.layers or (None,):
            yield self.name if layer is None else self.name.replace("{}", str(layer))


class AddedBuffer(NamedTuple):
    """One family of buffers that a method adds: on the device, in no parameter count. The dtype `adapter` is the adapter's."""

    name: str
    shape: Shape
    dtype: Literal["adapter", "float32", "int64"]
    layers: tuple[int, ...] | None = None
    from_host: bool = False
    """Whether peft creates it in host memory (`Trainer.adapter_on_host`)."""

    @property
    def copies(self) -> int:
        """The number of buffers in this family."""
        return 1 if self.layers is None else len(self.layers)


class TrainedParam(NamedTuple):
    """One family of base parameters that the method leaves trainable, such as every bias in BitFit."""

    module: str
    param: str
    shape: Shape
    layers: tuple[int, ...] | None = None

    @property
    def copies(self) -> int:
        """The number of parameter tensors in this family."""
        return 1 if self.layers is None else len(self.layers)


class Adaptation(NamedTuple):
    """What a method adds to an architecture and trains in it. `matched`: the module families that it targets."""

    added: tuple[AddedTensor, ...] = ()
    trained: tuple[TrainedParam, ...] = ()
    matched: tuple[Module, ...] = ()
    resolved: tuple[tuple[str, object], ...] = ()
    buffers: tuple[AddedBuffer, ...] = ()
    notes: tuple[str, ...] = ()
    by_layer: bool = False
    """Whether only some layers of a family train. A model with fewer layers then does not represent it."""
    trained_dtype: str | None = None
    """What the base's own parameters that train are cast to; None: no cast."""
    rests: bool = False
    """Whether the base's other parameters have trained before and will again, so that the optimizer has their states."""

    @property
    def target_modules(self) -> tuple[str, ...] | str:
        """The resolved targets, names or a regular expression; empty for a method without."""
        targets = dict(self.resolved).get("target_modules")
        return targets if isinstance(targets, (tuple, str)) else ()

    @property
    def num_trainable(self) -> int:
        """The number of trainable parameters, as peft's `get_nb_trainable_parameters()` returns it."""
        added = sum(t.copies * prod(t.shape) for t in self.added if t.trainable)
        return added + sum(p.copies * prod(p.shape) for p in self.trained)

    @property
    def num_added(self) -> int:
        """The number of parameters that the method adds to the base, trainable or not."""
        return sum(t.copies * prod(t.shape) for t in self.added)


def trained_params(arch: Architecture, modules: tuple[Module, ...], *, only: str | None = None) -> tuple[TrainedParam, ...]:
    """The direct parameters of `modules`, ties once; `only` keeps one parameter name, such as `bias`."""
    return tuple(
        TrainedParam(m.name, param, shape, m.layers)
        for m in modules
        for param, shape in arch.owned_params(m)
        if only is None or param == only
    )


def restricted(module: Module, layers: tuple[int, ...]) -> Module:
    """The same family, restricted to some of its layers."""
    return module if module.layers == layers else module._replace(layers=layers)
