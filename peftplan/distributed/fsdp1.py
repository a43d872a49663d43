"""FSDP1 on the tape: flat parameters that a rank gathers before a unit runs and frees after it, and flat gradients to reduce.

Source: torch, distributed/fsdp/{_flat_param,_runtime_utils}.py. Methods have torch's names. What peft trains is a unit of its own
for each tensor, inside its layer's. Modules of LoRA are gathered and reduced so (`memory.leaf_units`), other tensors with their
layer.

    forward     unit: cast its shard, gather into the flat parameter, free the cast | layer | free
    backward    unit: gather, and the one before it ahead (BACKWARD_PRE) | layer | gradients into one flat tensor, free them, free
                the flat parameter, make the shard of the gradient, free the flat gradient

Of a hybrid group (HYBRID_SHARD) a rank sums the shards of gradients with the other groups in place, and casts them afterwards on
the stream of the sum.

What another stream still reads is marked with `record_stream`: the allocator gives it out again when the GPU has read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from peftplan.distributed.fsdp2 import Fsdp2
from peftplan.distributed.lag import ALL_REDUCE, DEFAULT, POST_BACKWARD, PRE_UNSHARD, UNSHARD, Lag
from peftplan.distributed.units import Member, Unit
from peftplan.tape.allocations import PASSED
from peftplan.tape.tensors import Parameter, Tensor
from peftplan.units import ceil_div


class Flat(NamedTuple):
    """A flat parameter: the tensors that one all-gather brings."""

    name: str
    members: tuple[Member, ...]
    numel: int
    """Elements of the gathered flat parameter, a multiple of W."""


def flats_of(unit: Unit, ranks: int) -> list[Flat]:
    """The flat parameter of a unit, and one for each tensor that peft trains."""
    apart = [member for member in unit.members if member.apart]
    together = tuple(member for member in unit.members if not member.apart)
    flats = [Flat(f"{member.name}.flat_param", (member,), ceil_div(member.numel, ranks) * ranks) for member in apart]
    if together:
        flats.append(Flat(f"{unit.name}.flat_param", together, ceil_div(sum(m.numel for m in together), ranks) * ranks))
    return flats


class Fsdp1(Fsdp2):
    """All units of a model, the root first. `prefetch`: when backward gathers ahead, `pre`, `post` or `none`."""

    micro_batches = 3
    prefetch = "none"
    prefetches_forward = False
    """Whether forward gathers the next unit while one runs (`_PrefetchMode.FORWARD`)."""
    knows_order = True
    """Whether a forward has run, whose order is recorded until the first backward has ended (`_ExecOrderData.next_iter`)."""
    in_checkpoints = False
    """Whether units lie in reentrant checkpoints. Then a frozen unit's hook holds its detached input, and with it the gradient,
    until backward ends (torch, autograd/graph.py, `register_multi_grad_hook`), and no layer is gathered ahead."""
    views_shards = True
    """Whether a module's own tensors are views of its shard, and of the copy from the host (`flat_param_to`): with
    `use_orig_params`."""

    @property
    def keeps_gradients(self) -> bool:  # type: ignore[override]
        """A flat parameter forgets its gradient when the root's forward begins, where Trainer has forgotten the gradients of the
        tensors that are views of it (`_reset_flat_param_grad_info_if_needed`)."""
        return self.views_shards and not self.offloads

    reads_masks = False
    """Whether the host does so in each forward, since `versions.PACKED_POSITIONS_CHECKED`."""
    lag: Lag | None = None
    """None: the GPU passes every read at once."""

    @cached_property
    def _from_host(self) -> dict[Unit, list[Tensor]]:
        """Shards from the host that a unit's own tensors are views of while it is gathered."""
        return {}

    @cached_property
    def _ahead(self) -> set[Unit]:
        """Units that were gathered before they are needed."""
        return set()

    @cached_property
    def _split_early(self) -> set[Unit]:
        """Units that forward gathered ahead, and split into views before the unit before them ran: autograd, which runs later
        nodes first, makes their gradients flat behind the backward of that one. Not those of an adapter's modules, a choice that
        is inferred from rehearsals: 2 MiB less."""
        return set()

    _whole: Unit | None = None
    """A unit whose gradients wait for that."""
    _saved: Sequence[Tensor] = ()
    """Shards of gradients that the host has copied, which backward keeps until it ends (`_saved_grad_shard`)."""
    _reshards_late: Unit | None = None
    """A unit whose base is frozen. Its hook is on its input, behind that of the unit before it, which gathers first
    (`_register_post_backward_reshard_only_hook`)."""

    def _unshard(self, unit: Unit) -> None:
        """`FlatParamHandle.unshard`: the gathered buffer is the flat parameter that the layer runs on."""
        if unit.unsharded or not unit.members:
            return
        for flat in flats_of(unit, self.world_size):
            first, shard = flat.members[0], (flat.numel // self.world_size,)
            narrow = self._new(shard, first.dtype, "cast of a shard", PRE_UNSHARD) if first.casts else None
            moved = self._new(shard, first.master, "shard from the host", PRE_UNSHARD) if self.offloads else None
            read = [tensor for tensor in (narrow, moved) if tensor is not None][:1]
            if moved is not None and narrow is None and self.views_shards:
                self._from_host.setdefault(unit, []).append(read.pop())
            del narrow, moved
            if self.lag is not None:
                self.lag.wait()
            gathered = self._new((flat.numel,), first.dtype, f"{flat.name} gathered", UNSHARD, "gathered_weights")
            unit.unsharded.append(gathered)
            if self.lag is not None:
                self.lag.join(UNSHARD, PRE_UNSHARD)
                self.lag.collective(UNSHARD)
                self.lag.keep(read, UNSHARD)
            del read

    def enter(self, name: str) -> None:
        """Before a unit's forward. A checkpointed layer runs again while its parameters are there."""
        if self.f.replays:
            return
        super().enter(name)
        unit = self.by_name.get(name)
        if unit is not None and self.prefetches_forward and self.knows_order:
            for following in self._in_order[unit]:
                self._gather_ahead(following)
                self._split_early.add(following)

    @cached_property
    def _in_order(self) -> dict[Unit, list[Unit]]:
        """Unit → the one behind it in forward, where there is one: a layer runs before the modules of its adapter."""
        order: list[Unit] = []
        apart: list[Unit] = []
        for unit in self.units:
            if all(member.apart for member in unit.members):
                apart.append(unit)
            else:
                order += [unit, *apart]
                apart = []
        order += apart
        return {unit: order[number : number + 1] for number, unit in enumerate(order, start=1)}

    def _gather_ahead(self, unit: Unit) -> None:
        if not unit.unsharded:
            self._ahead.add(unit)
        self._unshard(unit)

    def _unshard_again(self, unit: Unit) -> None:
        """A unit is there: of what is on the host its shard is moved and cast all the same (`FlatParamHandle.pre_unshard`)."""
        for flat in flats_of(unit, self.world_size):
            first, shard = flat.members[0], (flat.numel // self.world_size,)
            moves = self.offloads and first.casts
            narrow = self._new(shard, first.dtype, "cast of a shard", PRE_UNSHARD) if moves else None
            _moved = self._new(shard, first.master, "shard from the host", PRE_UNSHARD) if moves else None
            del _moved
            if self.lag is not None:
                self.lag.wait()
                self.lag.join(UNSHARD, PRE_UNSHARD)
                self.lag.keep([narrow] if narrow is not None else [], UNSHARD)
            del narrow

    def leave(self, name: str, x: Tensor) -> Tensor:
        """After a unit's forward, whose output is `x`."""
        unit = self.by_name.get(name)
        if unit is not None and unit.reshards and not self.f.replays:
            self._reshard(unit)
        return super().leave(name, x)

    def _reshard(self, unit: Unit, stream: int = DEFAULT) -> None:
        """Free a unit on the stream that runs. Where that is the stream of the gather, the unit's own, nothing waits."""
        if self.lag is not None and unit.unsharded:
            self.lag.keep(self._from_host.get(unit, []), UNSHARD)  # `_all_gather_flat_param`
            if stream != UNSHARD:
                self.lag.keep(unit.unsharded, stream)
            self.lag.free(stream)
        self._from_host.pop(unit, None)
        unit.unsharded = []

    def _wait(self, unit: Unit, *, forward: bool) -> None:
        """Nothing is copied out."""
        if self.lag is not None:
            self.lag.join(DEFAULT, UNSHARD)

    def pre_backward(self, unit: Unit) -> None:
        """The gradient of a unit's output has arrived: gather the unit, and under BACKWARD_PRE the one before it."""
        if unit.state == "pre_backward":
            return
        unit.state = "pre_backward"
        if unit.unsharded and unit not in self._ahead:
            self._unshard_again(unit)
        self._ahead.discard(unit)
        self._unshard(unit)
        self._wait(unit, forward=False)
        self._reshard_late()
        if self.prefetch == "pre":  # of an adapted layer its adapters do it, while its backward runs
            self._gather_before(unit)

    def _reshard_late(self) -> None:
        if self._reshards_late is not None:
            of_adapter = all(member.apart for member in self._reshards_late.members)
            self._reshard(self._reshards_late, UNSHARD if of_adapter else DEFAULT)
            self._reshards_late = None

    def _gather_before(self, unit: Unit) -> None:
        if unit.indices and (index := unit.indices.pop()) > 0:
            self._gather_ahead(self._order[index - 1])

    def post_backward(self, unit: Unit) -> None:
        """The gradients of a unit are complete: make them flat, free its parameters and reduce the gradients."""
        unit.state = "post_backward"
        waiting, self._whole = self._whole, None
        if waiting is not None:
            self.post_backward(waiting)
        if unit in self._split_early and any(member.trainable and not member.apart for member in unit.members):
            self._split_early.remove(unit)
            self._whole = unit
            return
        gradients = {p.name: p for p in unit.parameters() if p.grad is not None}
        flats = [flat for flat in flats_of(unit, self.world_size) if any(m.name in gradients for m in flat.members)]
        whole = [self._flattened(flat, gradients) for flat in flats]
        trains = any(member.trainable and not member.apart for member in unit.members)
        if self.in_checkpoints or trains:
            self._reshard(unit, UNSHARD if trains else DEFAULT)
        else:
            self._reshard_late()
            self._reshards_late = unit
        if self.prefetch == "post":
            self._gather_before(unit)
        if not self.syncs:
            if unit.whole:
                return  # added in place
            unit.whole = whole
            return
        whole, unit.whole = unit.whole or whole, []
        for number, flat in enumerate(flats):
            self._reduce_grad(unit, flat, whole, number)

    def end_backward(self) -> None:
        """`_post_backward_final_callback`."""
        super().end_backward()
        self._split_early.clear()
        self.knows_order = True
        self._reshard_late()
        self._saved = ()
        if self.f.kept_inputs is not None:
            self.f.kept_inputs.clear()
        if self.lag is not None:
            self.lag.join(DEFAULT, POST_BACKWARD)
            self.lag.join(DEFAULT, ALL_REDUCE)
            self.lag.read()  # Trainer reads the loss (`logging_nan_inf_filter`)

    def before_step(self) -> None:
        """What the GPU has not passed stays until the host reads the mask of the next step."""
        self.f.handed_on = set() if self.lag is None else self.lag.leave()

    def read_mask(self) -> None:
        """The host reads whether a mask hides anything, before the first layer."""
        if self.lag is not None and self.reads_masks:
            self.lag.read()
            self.f.mark(PASSED)

    def _flattened(self, flat: Flat, gradients: dict[str, Parameter]) -> Tensor:
        """The backward of the split into views: one tensor of all gradients, on the stream of the gather, as the split was. Of
        what got none they are zeros, and the optimizer steps over them too."""
        dtype, without = flat.members[0].dtype, [member for member in flat.members if member.name not in gradients]
        _zeros = [self._new((member.numel,), dtype, f"{member.name} zeros", UNSHARD) for member in without]
        self.reduced |= {member.name for member in flat.members if member.trainable}
        tensor = self._new((flat.numel,), dtype, f"{flat.name} gradient", UNSHARD)
        if self.lag is not None:  # autograd's engine: a node's stream waits for that of its inputs, and is recorded with them
            parts = [gradients[member.name].grad for member in flat.members if member.name in gradients]
            self.lag.join(UNSHARD, DEFAULT)
            self.lag.keep([part for part in parts if part is not None], UNSHARD)
        for member in flat.members:
            if member.name in gradients:
                self._sum_on_unshard(gradients[member.name].grad)
                gradients[member.name].grad = None
        return tensor

    def _sum_on_unshard(self, gradient: Tensor | None) -> None:
        """The sum of two gradients of one tensor is made for the split's backward, and so on its stream."""
        if gradient is not None and gradient.storage is not None:
            number = gradient.storage.number
            if self.f.made_as.get(number, self.f.names[number]).endswith(" add"):
                self.f.streams[number] = UNSHARD

    def _reduce_grad(self, unit: Unit, flat: Flat, whole: list[Tensor], number: int) -> None:
        first, shard = flat.members[0], (flat.numel // self.world_size,)
        dtype, computed = self.reduce_dtype or first.dtype, whole[number]
        if dtype != first.dtype:
            whole[number] = self._new((flat.numel,), dtype, f"{flat.name} gradient, cast", POST_BACKWARD)
        output = self._new(shard, dtype, "reduce-scatter output", POST_BACKWARD)
        if self.lag is not None and self.replicates:
            self.lag.keep([output], ALL_REDUCE)
        if dtype != first.master:
            stream = ALL_REDUCE if self.replicates else POST_BACKWARD
            output = self._new(shard, first.master, "reduce-scatter output, cast", stream)
        whole[number] = output  # the flat gradient is freed
        if self.lag is not None:
            self.lag.join(POST_BACKWARD, UNSHARD)
            self.lag.collective(POST_BACKWARD)
            self.lag.keep([computed], POST_BACKWARD)
        del computed
        if self.offloads:
            self._saved = [*self._saved, output]
        if self.offloads or len(unit.gradients) > number:
            return
        unit.gradients.append(output)
        storage = output.storage.number  # type: ignore[union-attr]
        self.f.category[storage] = "gradients"
        self.f.names[storage] = f"gradients of {flat.name}"
