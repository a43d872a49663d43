"""Parameters that FSDP gathers and reduces together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from peftplan.tape.tensors import Parameter, Tensor


class Member(NamedTuple):
    """One parameter of a unit. Numbers of elements include the padding to W equal shards."""

    name: str
    gathered: int
    shard: int
    dtype: str
    """The dtype in which it is gathered."""
    casts: bool
    """Whether its shard has another dtype, and is cast before it is gathered."""
    master: str
    """The dtype of the shard."""
    trainable: bool
    numel: int
    """Elements without padding."""
    loaded: str
    """The dtype before accelerate casts what trains."""
    apart: bool
    """Whether FSDP1 makes a unit of it alone, as under peft's wrap policy."""
    packed: bool = False
    """Whether its elements hold packed weights, which get no gradient."""


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered and reduced together, and their state during a step."""

    name: str
    members: tuple[Member, ...]
    reshards: bool
    """Whether its gathered tensors are freed after forward."""
    ranks: int
    """How many share each of its parameters."""
    by_columns: bool
    """Whether they share another dim than the first: what is gathered is written a second time, and so are its gradients."""
    parameters: Callable[[], Iterable[Parameter]]
    """The unsharded parameters, which hold their gradients."""
    state: str = "idle"
    buffer: Tensor | None = None
    unsharded: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    whole: list[Tensor] = field(default_factory=list)
    """Flat gradients that are not reduced yet, under FSDP1."""
    gradients: list[Tensor] = field(default_factory=list)
    """Shards of flat gradients under FSDP1."""
    all_reduced: Tensor | None = None
    """What the replicas sum, held until backward ends (`_all_reduce_state`)."""
    gathers_in_forward: Sequence[Unit] = ()
    """Units that are gathered ahead when this one's forward begins (torch, `set_modules_to_forward_prefetch`)."""
    gathers_in_backward: Sequence[Unit] = ()
    """The same when its backward begins (`set_modules_to_backward_prefetch`); none: the one before it in forward."""
    indices: list[int] = field(default_factory=list)
