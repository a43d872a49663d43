"""FSDP2 on the tape: what a rank gathers before a unit runs, frees after it, and reduces in backward.

Source: torch, distributed/fsdp/_fully_shard/{_fsdp_param_group,_fsdp_collectives,_fsdp_state}.py. Methods have torch's names.
Buffers of collectives are allocated on their own streams, whose blocks the allocator keeps apart.

    forward     unit 0: gather into one buffer, copy out into its tensors | layer | free its tensors | unit 1: gather, free the
                buffer of unit 0, copy out …
    backward    unit 1: gather, copy out, free the buffer, gather unit 0 ahead | layer | free its tensors, copy gradients into
                the input of the reduce-scatter, free them, make its output; the input stays until the next unit's
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftplan.distributed.units import Member, Unit
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Category
from peftplan.parameters import Parameter as Shard
from peftplan.tape.devices import OneDevice
from peftplan.tape.hooks import all_hooked, hooked
from peftplan.tape.streams import on_stream
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Parameter, Tensor

FLOAT8 = "fp8_e4m3"
"""The dtype in which the weights of layers are gathered that compute in 8 bits."""
COPY_IN, REDUCE, ALL_REDUCE = 1, 2, 3
COPY_IN_OF_SECOND = ALL_REDUCE
"""Streams besides the default one, 0. The all-gather's stream allocates nothing, since its input is a view of its output.
A second model has its own (`FSDPCommContext`, one for each root), of which it needs the first alone, since it has no backward."""


class Fsdp2(OneDevice):
    """All units of a model, in the order in which torch finds them: the root first."""

    every_layer = True
    hooks_each_output = True
    micro_batches = 3
    copy_in = COPY_IN
    one_by_one = False
    """Whether the optimizer steps tensor by tensor (nemo_automodel, components/optim/optimizer.py, `_foreach_for_mesh`)."""

    def __init__(
        self,
        f: Tape,
        units: list[Unit],
        *,
        world_size: int,
        reduce_dtype: str | None,
        offloads: bool,
        replicates: bool,
        joined: Mapping[str, str],
    ) -> None:
        self.f, self.units, self.world_size = f, units, world_size
        self.ranks = world_size
        self.reduce_dtype, self.offloads, self.replicates = reduce_dtype, offloads, replicates
        self.by_name = {unit.name: unit for unit in units if unit.members}
        self.joined = joined
        """Modules that belong to another unit, which is gathered when the first of them runs."""
        self.syncs = True
        """Whether gradients are reduced in this backward."""
        self.reduced: set[str] = set()
        """Families that have received gradients."""
        self._order: list[Unit] = []
        self._copied_out: Tensor | None = None
        self._reducing: list[Tensor] = []
        self.waiting: dict[Parameter, Tensor] = {}
        """Gradients of micro batches that are not reduced, in the dtype of the reduction."""

    # -- forward -----------------------------------------------------------------------------------------------------------------

    def enter(self, name: str) -> None:
        """Before a unit's forward: gather its parameters."""
        unit = self.by_name.get(self.joined.get(name, name))
        if unit is None:
            return
        self._unshard(unit)
        self._wait(unit, forward=True)
        if self.f.replays:  # a checkpointed layer runs again while its parameters are there; a unit within it is gathered again
            return
        unit.state = "forward"
        for ahead in unit.gathers_in_forward:
            self._unshard(ahead)

    def enter_with(self, name: str, x: Tensor) -> Tensor:
        """The same with the unit's input `x`. After its gradient, the unit's are reduced, unless a part of it ran before."""
        unit = self.by_name.get(self.joined.get(name, name))
        first = unit is not None and unit.state != "forward"
        self.enter(name)
        if unit is None or self.f.replays or not first:
            return x
        return hooked(self.f, x, self.post_backward, unit)

    def enter_with_all(self, name: str, *xs: Tensor) -> tuple[Tensor, ...]:
        """The same of a module that is called with several tensors."""
        self.enter(name)
        unit = self.by_name.get(name)
        return xs if unit is None or self.f.replays else all_hooked(self.f, xs, self.post_backward, unit)

    def leave(self, name: str, x: Tensor) -> Tensor:
        """After a unit's forward, whose output is `x`. The root completes units of which a module never ran, such as a head
        whose weight the loss reads (`_force_complete_incomplete_states`)."""
        x = self._leave(self.by_name.get(name), x)
        for unit in reversed(self.units) if name == self.units[0].name else ():
            if unit.state == "forward":
                x = self._leave(unit, x)
        return x

    def _leave(self, unit: Unit | None, x: Tensor) -> Tensor:
        if unit is None or self.f.replays:
            return x
        if unit.reshards:
            self._free(unit)
        unit.indices.append(len(self._order))
        self._order.append(unit)
        unit.state = "idle"
        return hooked(self.f, x, self.pre_backward, unit)

    def as_read(self, name: str, parameter: Parameter) -> Operand:
        """A part's parameter. It is gathered for the reader alone where no module of its unit runs (`DTensor.full_tensor`), and
        its gradient is then divided without a reduction."""
        unit = self.by_name.get(name)
        member = next((m for m in unit.members if m.name == parameter.name), None) if unit is not None else None
        if unit is None or member is None or unit.state == "forward":
            return parameter
        node = self.f.record(_divided, (parameter,), self, unit, member)
        full = self._new((member.gathered,), member.master, f"{member.name} gathered", 0, "gathered_weights")
        return Tensor(full.storage, parameter.dims, full.dtype, node)

    def _free(self, unit: Unit) -> None:
        """Free what is gathered of a unit."""
        unit.unsharded = []

    def stay(self) -> None:
        """Gather the units of a model without a backward that stay gathered from step to step."""
        for unit in self.units:
            if not unit.reshards and unit.members:
                self._unshard(unit)  # of the first step; its buffer is there again for those of its stream
                self._wait(unit, forward=False)

    def go(self) -> None:
        """Free them, with the step."""
        for unit in self.units:
            self._free(unit)

    def end_forward(self) -> None:
        """The root's forward has returned."""
        self._copied_out = None

    def _unshard(self, unit: Unit) -> None:
        """`foreach_all_gather`: casts the shards of another dtype, then gathers all into one buffer."""
        if unit.buffer is not None or unit.unsharded or not unit.members:
            return
        if self.world_size == 1:
            unit.buffer = Tensor(None, (), unit.members[0].dtype)
            return
        narrow = self._moved(unit) if self.offloads else self._narrowed(unit)
        dtypes = {member.dtype for member in unit.members}
        if len(dtypes) == 1:
            dims, dtype = (sum(member.gathered for member in unit.members),), dtypes.pop()
        else:  # bytes
            dims, dtype = (sum(member.gathered * ITEMSIZE[member.dtype] for member in unit.members),), "uint8"
        unit.buffer = self._new(dims, dtype, "all-gather output", self.copy_in)
        del narrow

    def _narrowed(self, unit: Unit) -> list[Tensor]:
        """Shards of another dtype, cast in one piece."""
        narrow = [self._in_8_bits(member) for member in unit.members if member.dtype == FLOAT8]
        cast = [member for member in unit.members if member.casts and member.dtype != FLOAT8]
        numel = sum(member.shard for member in cast)
        return [*narrow, *([self._new((numel,), cast[0].dtype, "cast of shards", self.copy_in)] if cast else [])]

    def _in_8_bits(self, member: Member) -> Tensor:
        """A shard in 8 bits by a scale that was made after the step before (torchao, float8/fsdp_utils.py)."""
        wide = self._new((member.shard,), "fp32", "shard in fp32", self.copy_in)
        scaled = self._new((member.shard,), "fp32", "scaled shard", self.copy_in)
        del wide
        clamped = self._new((member.shard,), "fp32", "clamped shard", self.copy_in)
        narrow = self._new((member.shard,), member.dtype, "shard in 8 bits", self.copy_in)
        del scaled, clamped
        return narrow

    def _moved(self, unit: Unit) -> list[Tensor]:
        """Shards from the host, each moved and then cast (`all_gather_inputs`)."""
        moved = []
        for member in unit.members:
            shard = self._new((member.shard,), member.master, "shard from the host", self.copy_in)
            moved.append(self._new((member.shard,), member.dtype, "cast of a shard", self.copy_in) if member.casts else shard)
            del shard
        return moved

    def _wait(self, unit: Unit, *, forward: bool) -> None:
        """`wait_for_unshard`: copies the parameters out of the buffer. In forward the buffer lives until the next unit's are
        copied out: a local variable, `prev_all_gather_state`, holds it."""
        if unit.buffer is None:
            return
        _previous, by_rank = self._copied_out if forward else None, []
        unit.unsharded = []
        for member in unit.members:
            unit.unsharded.append(self._new((member.gathered,), member.dtype, f"{member.name} gathered", 0, "gathered_weights"))
            if unit.by_columns:
                by_rank.append(self._new((member.gathered,), member.dtype, f"{member.name} by ranks", 0))
        by_rank.clear()
        if forward:
            self._copied_out = unit.buffer
        unit.buffer = None

    def begin_backward(self, *, syncs: bool) -> None:
        """Start a backward. `syncs`: gradients are reduced; otherwise they stay whole."""
        self.syncs = syncs

    def idle(self, families: set[str]) -> set[str]:
        """The families that have received no gradients."""
        return families - self.reduced

    def before_step(self) -> None:
        """Nothing."""

    def groups(self, trained: list[Shard]) -> Iterable[list[Shard]]:
        """All shards at once; none on the device where they are on the host. Of matrices that ranks share one after the other:
        the root of the second moment and the denominator (torch, optim/adam.py, `_single_tensor_adam`)."""
        yield [] if self.offloads or self.one_by_one else trained
        for p in trained if self.one_by_one and not self.offloads else ():
            _root = self.f.new(p.shape, p.dtype, "sqrt")
            _denominator = self.f.new(p.shape, p.dtype, "div")
            del _root, _denominator

    # -- backward ----------------------------------------------------------------------------------------------------------------

    def pre_backward(self, unit: Unit) -> None:
        """The gradient of a unit's output has arrived: gather the unit, and prefetch the one before it."""
        if unit.state == "pre_backward":
            return
        unit.state = "pre_backward"
        self._unshard(unit)
        self._wait(unit, forward=False)
        for ahead in unit.gathers_in_backward:
            self._unshard(ahead)
        if not unit.gathers_in_backward and unit.indices and (index := unit.indices.pop()) > 0:
            self._unshard(self._order[index - 1])

    def post_backward(self, unit: Unit) -> None:
        """The gradients of a unit are complete: free its parameters and reduce the gradients."""
        unit.state = "post_backward"
        places = {member.name: place for place, member in enumerate(unit.members)}
        parameters = list(unit.parameters())
        for p in parameters:  # `accumulate_unsharded_grad_if_needed`
            p.grad = self.waiting.pop(p, p.grad)
        with_gradients = [p for p in parameters if p.grad is not None]
        with_gradients.sort(key=lambda p: places[p.name])
        if not self.syncs:
            unit.unsharded = []
            self._widen(with_gradients)
            return
        gradients = [self._part_of_gradient(p) for p in with_gradients]
        unit.unsharded = []
        self._reducing.clear()
        if gradients:
            self._reduce(unit, {p.name for p in with_gradients}, gradients)

    def _part_of_gradient(self, p: Parameter) -> Tensor | None:
        """The gradient of what ranks hold of a parameter that they share beside FSDP2; one of all of it is divided into a copy
        (`_get_grad_inner_tensor`)."""
        gradient, p.grad = p.grad, None
        if gradient is not None and gradient.dims != p.dims:
            return self._new(p.dims, gradient.dtype, "part of a gradient", 0, "gradients")
        return gradient

    def _widen(self, with_gradients: list[Parameter]) -> None:
        """`to_accumulated_grad_if_needed`: gradients that are not reduced yet are kept in the dtype of the reduction, beside
        those of the next micro batch."""
        for p in with_gradients:
            if p.grad is None or self.reduce_dtype in (None, p.dtype):
                continue
            if p.grad.dtype != self.reduce_dtype:
                p.grad = self._new(p.grad.dims, str(self.reduce_dtype), "gradient to be reduced", 0, "gradients")
            self.waiting[p], p.grad = p.grad, None

    def _reduce(self, unit: Unit, names: set[str], gradients: list[Tensor | None]) -> None:
        """`foreach_reduce`. The variable of its first loop keeps the last gradient alive until it returns."""
        members = [member for member in unit.members if member.name in names]
        self.reduced |= names
        dtype = self.reduce_dtype or members[0].dtype
        numel = sum(member.gathered for member in members)
        _last = self._by_ranks(gradients) if unit.by_columns else None
        self._reducing.append(self._new((numel,), dtype, "reduce-scatter input", 0))
        _last = gradients[-1] if _last is None else _last
        gradients.clear()
        output = self._new((numel // unit.ranks,), dtype, "reduce-scatter output", REDUCE)
        if self.replicates:
            unit.all_reduced = output
        if dtype != members[0].master:
            stream = ALL_REDUCE if self.replicates else REDUCE
            output = self._new((numel // unit.ranks,), members[0].master, "reduce-scatter output, cast", stream)
        if self.offloads:
            return
        if unit.gradient is None:
            unit.gradient = output
            number = output.storage.number  # type: ignore[union-attr]
            self.f.category[number] = "gradients"
            self.f.names[number] = f"gradients of {unit.name}"

    def _by_ranks(self, gradients: list[Tensor | None]) -> Tensor | None:
        """Write each gradient rank by rank in place of itself; the last one, which the loop's variable still holds."""
        last = None
        for number in range(len(gradients)):
            last = gradients[number]
            if last is not None:
                gradients[number] = self._new(last.dims, last.dtype, "gradient by ranks", 0)
        return last

    def end_backward(self) -> None:
        """`_root_post_backward_final_callback`."""
        for unit in self.units:
            if unit.state != "post_backward":
                self.post_backward(unit)
            unit.state = "idle"
            unit.buffer = unit.all_reduced = None
            unit.indices.clear()
        self._order.clear()
        self._reducing.clear()

    def _new(self, dims: Dims, dtype: str, op: str, stream: int, category: Category = "communication") -> Tensor:
        return on_stream(self.f, dims, dtype, op, stream, category)


class KeptRoot(Fsdp2):
    """The units of a model without a backward, whose root stays gathered from step to step. The buffer into which the first step
    gathers it is counted in each step."""

    def enter(self, name: str) -> None:
        """Before a unit's forward."""
        root = self.units[0]
        if name == root.name:
            kept, root.unsharded = root.unsharded, []
            self._unshard(root)
            self._copied_out, root.buffer, root.unsharded = root.buffer, None, kept
        super().enter(name)


def _divided(f: Tape, node: Node, saved: tuple[Fsdp2, Unit, Member], g: Tensor) -> tuple[None]:
    """This rank's part of a gradient, in its shard's dtype, is kept; later ones are added to it."""
    units, unit, member = saved
    part = f.new((member.shard,), member.master, "part of a gradient")
    if member.name not in units.reduced:
        f.category[part.storage.number] = "gradients"  # type: ignore[union-attr]
        unit.gradients.append(part)
    units.reduced.add(member.name)
    return (None,)
