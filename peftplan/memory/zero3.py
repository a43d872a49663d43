"""ZeRO-3 on the tape: buckets of gradients, and the step over flat masters. Modules gather their parameters (`zero3_modules`).

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py; methods have its names.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import trained_groups
from peftplan.distributed.zero3 import REDUCE, Module, Sharded
from peftplan.memory.model import Model
from peftplan.memory.parts import Running
from peftplan.memory.zero3_modules import Earlier, Gathering, Habits
from peftplan.parameters import Parameter as Family
from peftplan.tape.tensors import Parameter, Tensor

NORM_PART = 250_000_000
"""Elements that an offloaded gradient's norm reads at once (stage3.py, `_constant_buffered_norm2`)."""


def switched_off(policy: Model, running: Running) -> Model:
    """The policy without its adapter, which peft's layers and the hooks on them still know. `running`: how it runs then."""
    zero = policy.units
    assert isinstance(zero, Zero3)
    off = Model(
        *(policy.tape, policy.arch, policy.parameters, policy.adaptation, running, policy.quant),
        adapter=lambda f, part, x, base, running: base(x),
        stacks=policy.stacks,
        units=zero,
    )
    zero.models.append(off)
    return off


class Zero3(Gathering):
    """Gathered parameters, gradients, buckets and flat groups of one rank. `before`: what the step before left, if there was."""

    def __init__(
        self, model: Model, distributed: Distributed, *, dtype: str, habits: Habits, before: Earlier | None = None
    ) -> None:
        super().__init__(model, distributed, dtype=dtype, habits=habits, before=before)
        self.reloads = habits.reloads and distributed.offload_params != "cpu"
        self.reloaded: list[list[Tensor]] = []
        self.of_groups = [[self.sharded[key] for key in group] for group in trained_groups(model.parameters, distributed)]
        self.stream = REDUCE if self.overlaps else 0
        self.bucketed: list[Sharded] = []
        self.of_leaves = {p for inside in self.of_leaf.values() for p in inside}
        """The parameters of all leaf blocks."""
        self.waiting: dict[Sharded, Parameter] = {}
        """Parameters of leaf blocks whose gradients wait for the end of the block's backward."""

    def _gather_persistent(self) -> None:
        if self.reloads:
            self.reloads = False
            self.reloaded = [
                [self._new((p.part,), p.dtype, "weights from the host", 0, "weights") for p in group] for group in self.of_groups
            ]
        super()._gather_persistent()

    # -- backward ----------------------------------------------------------------------------------------------------------------

    def begin_backward(self, *, syncs: bool) -> None:
        """Backward begins; `syncs`: it ends at a boundary of gradient accumulation."""
        super().begin_backward(syncs=syncs)
        self.f.modules, self.f.accumulated = self, self.accumulated

    def accumulated(self, p: Parameter) -> None:
        """The hook of a parameter that has its gradient."""
        sharded = self.sharded[self._key(p)]
        self.reduced.add(p.name)
        if sharded in self.of_leaves:
            self.waiting[sharded] = p
        else:
            self._reduce(sharded, p)

    def _reduce(self, sharded: Sharded, p: Parameter) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`: a gradient moves into the bucket, after a full one is reduced."""
        if self.bucketed and self.num_bucketed + sharded.numel > self.bucket_size:
            self.reduce_and_partition()
        if self.num_bucketed + sharded.numel > self.bucket_size:
            self.large = p.grad
        p.grad = None
        self.bucketed.append(sharded)
        self.num_bucketed += sharded.numel

    def reduce_and_partition(self) -> None:
        """`__reduce_and_partition_ipg_grads`: interleave the gradients' parts in one tensor, unless one that divides evenly."""
        flat, dtype = None, self.reduced_dtype or self.dtype
        large = (self.bucketed[0].numel,) if self.reduced_dtype and self.large is not None else None
        wide = None if large is None else self._new(large, dtype, "gradient in the dtype of the reduction", self.stream)
        if len(self.bucketed) > 1 or any(p.numel % self.world_size for p in self.bucketed):
            numel = sum(p.part for p in self.bucketed) * self.world_size
            flat = self._new((numel,), dtype, "interleaved gradients", self.stream)
        narrow = [self._new((p.part,), self.dtype, "reduced gradient", self.stream) for p in self.bucketed if self.reduced_dtype]
        if self.offloads:
            self._to_host()
        del flat, wide, narrow
        self.large = None
        self.bucketed.clear()
        self.num_bucketed = 0

    def _to_host(self) -> None:
        """`partition_grads` where the optimizer is on the host: a part comes back to the device for its norm and its cast."""
        for p in self.bucketed:
            _back = self._new((p.part,), self.dtype, "gradient on its way back", self.stream)
            if self.syncs:
                for start in range(0, p.part, NORM_PART):
                    self._norm(min(NORM_PART, p.part - start), self.stream)
                self._new((p.part,), "fp32", "fp32 gradient", self.stream, "temporaries")

    def end_backward(self) -> None:
        """`independent_gradient_partition_epilogue`, then `release_backward_leftovers`."""
        self.reduce_and_partition()
        if self.keeps:
            self.running.clear()
        for module in [*reversed(self.running.values())]:
            self.running.pop(module.name)
            also = self.recomputed.pop(module.name, ())
            for p in dict.fromkeys((*module.parameters, *also)):
                p.active.discard(module.name)
                if not p.persists:
                    self.coordinator.free(p)

    def _reduce_leaf(self, module: Module) -> None:
        """`reduce_leaf_module_grads`: the gradients of a block that has run backward, in the optimizer's order."""
        for p in (p for group in self.of_groups for p in group if p in module.parameters):
            self._reduce(p, self.waiting.pop(p))

    # -- step --------------------------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """All parameters are released; each gradient's norm is taken, cast to fp64; then the first sub group is flattened."""
        self.coordinator.release_all(self.sharded.values())
        if self.dtype == "fp16" and not self.offloads:
            self._look_for_overflow()
        if not self.offloads:
            for p in (p for group in self.of_groups for p in group):
                self._norm(p.part, 0)
            self._flatten(self.of_groups[0])
        self.norms.clear()

    def _look_for_overflow(self) -> None:
        """`has_overflow`: `isinf` of all gradients compares their magnitudes, `isnan` themselves."""
        dims = (sum(p.part for group in self.of_groups for p in group),)
        magnitudes = self._new(dims, self.dtype, "abs", self.stream, "temporaries")
        self._new(dims, "bool", "isinf", self.stream, "temporaries")
        del magnitudes
        self._new(dims, "bool", "isnan", self.stream, "temporaries")

    def groups(self, trained: list[Family]) -> Iterator[list[Family]]:
        """What the optimizer steps over, sub group by sub group; nothing where it is on the host."""
        for number, master in enumerate(trained if not self.offloads else ()):
            if number:
                self._flatten(self.of_groups[number])
            yield [master]
            self.flat = None
            del self.reloaded[:1]
        self.coordinator.gather_together([p for p in self.sharded.values() if p.persists])
        if self.reference is not None:
            self.reference.coordinator.release_all(self.reference.sharded.values())

    def _flatten(self, group: list[Sharded]) -> None:
        """`_prepare_fp32_grad_for_sub_group`: gradients in one tensor, cast to fp32."""
        dims = (sum(p.part for p in group),)
        flat = self._new(dims, self.dtype, "flat gradients", 0, "gradients") if len(group) > 1 else None
        self.flat = self._new(dims, "fp32", "fp32 gradients", 0, "gradients")
        del flat
