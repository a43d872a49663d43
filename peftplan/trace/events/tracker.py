"""Track every storage of a traced step: when it is allocated and freed, by which operation and module, in which phase.

A `TorchDispatchMode` sees every operation below autograd; what is alive and the log are `Lifetimes`. Left out: memory that an
operation takes and frees within one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftplan.depth.log import AUTOGRAD
from peftplan.dtypes import parse_dtype
from peftplan.trace.cuda.differences import COMPOSITE, in_place, statistics
from peftplan.trace.events.lifetimes import Lifetimes, Ref

try:
    from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense
except ImportError:  # torch before 2.11 has it under its older name
    from torch._prims_common import is_non_overlapping_and_dense as is_dense  # type: ignore[attr-defined,no-redef]

DEVICE_OF = torch.ops.prim.device.default
"""A FakeTensor dispatches this operation for `.device`, twice as often as any other."""
SUM = torch.ops.aten.add.Tensor
ALONE = 2
"""References to a storage of a single tensor: the tensor's own, and that of the code that counts them."""
_ATEN = torch.ops.aten
KEEP_ONES = frozenset({_ATEN._to_copy.default, _ATEN.all.default, _ATEN.mul.Tensor})
"""Operations whose result is all ones if their input is."""
MAKE_ONES: dict[Any, Callable[..., bool]] = {
    _ATEN.ones.default: lambda made_by, size: True,
    _ATEN.eq.Tensor: lambda made_by, a, b: a is b,
    _ATEN.ne.Scalar: lambda made_by, a, b: b == math.inf,
    _ATEN.eq.Scalar: lambda made_by, a, b: b == 0 and "cumsum" in made_by(a),
}
"""Operations whose result is all ones if this holds for their arguments: new masks, both halves of `isfinite`, and positions
without a gap (transformers, masking_utils.py, `find_packed_sequence_indices`). `made_by`: the operation behind a tensor."""
IGNORED = frozenset({torch.ops.aten.detach.default})
"""Frequent operations that allocate no storage."""
LIFT_FRESH = torch.ops.aten.lift_fresh.default
"""The last operation of `torch.tensor`. In an optimizer it creates a step counter on the host."""

DROPOUT = torch.ops.aten.native_dropout.default
"""Allocates its last result first, the mask (torch, aten/src/ATen/native/cuda/Dropout.cu: `dropout_cuda`)."""


class Tracker(Lifetimes, TorchDispatchMode):
    """The log of one traced run."""

    def __init__(
        self,
        *,
        is_logits: Callable[[torch.Tensor], bool],
        scalar: Callable[[torch.Tensor], Any],
        temporaries: Mapping[Any, Callable[..., Sequence[torch.Tensor]]],
        after: Callable[[Tracker, Any, Any], None],
    ) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]
        Lifetimes.__init__(self, is_logits=is_logits)
        self.data_dependent: dict[str, int] = {}
        self._scalar = scalar
        self._temporaries = temporaries
        self._after = after
        self.known: Callable[[Any, Any, Any], Any] = lambda func, args, kwargs: NotImplemented
        """The output of an operation as the modes below this one know it, or NotImplemented: torch's dispatcher asks them."""
        self.below = 0
        """How many modes those are."""
        self._stack: list[str] = []
        self._module_of_node: dict[int, str] = {}
        self._summed: tuple[Ref, Ref] | None = None
        self.last_module = ""
        """The module that ran last, which names the place where a trace fails."""
        self.device = 0
        """The GPU of the operation that ran last, where one process has several."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip dynamo: nothing here is compiled, and its guard would take as long as everything else."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record the storages that it made."""
        if func is DEVICE_OF:
            return args[0].fake_device
        if func in IGNORED or (func is LIFT_FRESH and self.phase == "step"):
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            # What a mask's `all()` and an optimizer's step counter would say is known; any other value is a stand-in.
            if self.phase != "step" and args[0].dtype != torch.bool:
                self.data_dependent[self.module] = self.data_dependent.get(self.module, 0) + 1
            return self._scalar(args[0])
        if func in COMPOSITE:
            with self:
                return COMPOSITE[func](*args)
        self._enter_op()
        func = in_place(func)
        out = self.known(func, args, kwargs or {}) if torch._C._len_torch_dispatch_stack() == self.below else NotImplemented
        out = statistics(func, func(*args, **(kwargs or {})) if out is NotImplemented else out)
        if isinstance(out, torch.Tensor):
            self._see(out, func, args[0] if args else None)
            if func in MAKE_ONES or func in KEEP_ONES:
                self._note_ones(out, func, args)
        elif isinstance(out, (tuple, list)):
            listed = bool(args) and isinstance(args[0], (tuple, list)) and len(args[0]) == len(out)
            for number, item in enumerate(reversed(out) if func is DROPOUT else out):
                if isinstance(item, torch.Tensor):
                    self._see(item, func, args[0][number] if listed else None)
        if not self._paused:
            self._after(self, func, args)
        if func is SUM and self.phase == "backward" and not torch.is_grad_enabled():
            self._note_sum(args[0], out)
        if func in self._temporaries:
            self._pass_temporaries(self._temporaries[func](*args, **(kwargs or {})), op=str(func))
        return out

    def multiplied(self, module: str) -> None:
        """A matrix product ran in a module that no tensor of the trace shows."""
        self._stack.append(module)
        self._after(self, torch.ops.aten.mm.default, ())
        self._stack.pop()

    def _pass_temporaries(self, like: Sequence[torch.Tensor], *, op: str) -> None:
        """Record tensors as large as these, which the operation allocates one after the other and frees in reverse."""
        temporaries = [
            self.passing(nbytes=tensor.nbytes, shape=tuple(tensor.shape), dtype=parse_dtype(tensor.dtype), op=op)
            for tensor in like
            if tensor.numel()
        ]
        for temporary in reversed(temporaries):
            self.end(temporary)

    @property
    def module(self) -> str:
        """The module that is running: the innermost forward, or in backward the one whose forward made the node; empty for the
        caller's own code.
        """
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        return "" if node is None else self._module_of_node.get(node._sequence_nr(), AUTOGRAD)

    def _enter_op(self) -> None:
        """Note the module of the autograd node just made, and whether forward code or backward code is running.

        Forward code within backward is recomputation: gradients are on, or a module's forward is on the stack.
        """
        forward = self.phase == "forward" or (self.phase == "backward" and (bool(self._stack) or torch.is_grad_enabled()))
        if forward != self._in_forward:
            self._in_forward = forward
            self._segment += 1
        if self._stack:
            self.last_module = self._stack[-1]
        if forward and self._stack:
            # the first operation after a node was made is the one that it belongs to
            self._module_of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._stack[-1])

    def _see(self, tensor: torch.Tensor, func: Any, source: Any) -> None:
        """Record a new storage. In the optimizer's step it belongs to the parameter of the tensor that it was made from."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            if storage._cdata in self._live or self._paused:
                return
            record = self._add(storage, tensor, op=str(func))
            if self.phase == "step" and isinstance(source, torch.Tensor):
                known = self._live.get(source.untyped_storage()._cdata)
                record.name = None if known is None else known.record.name
            elif self.phase == "step" and isinstance(source, (tuple, list)) and any(map(torch.is_tensor, source)):
                record.name = "all parameters"

    def _note_sum(self, buffered: torch.Tensor, total: torch.Tensor) -> None:
        """Remember a result that may be autograd's sum of a buffered gradient and another one (`InputBuffer`).

        If nothing else refers to the storage of the buffered gradient, CUDA sums in place. A view's base always refers to it.
        """
        with torch._C.DisableTorchFunction():
            storage = buffered.untyped_storage()
            first, new = self._live.get(storage._cdata), self._live.get(total.untyped_storage()._cdata)
            alone = torch._C._storage_Use_Count(storage._cdata) == ALONE
        dense = buffered.shape == total.shape and is_dense(buffered)
        node = torch._C._current_autograd_node()
        if alone and dense and first and new and node is not None and first.node != node._sequence_nr():
            self._summed = first, new

    def _replaces(self, reference: Ref) -> bool:
        """Whether the gradient being freed was the buffer of the last sum and nothing else referred to it: CUDA sums in place."""
        if self._summed is None or self._summed[0] is not reference:
            return False
        new = self._summed[1]
        self._summed = None
        if self.log[-1].kind != "alloc" or self.log[-1].storage is not new.record:
            return False
        self.log.pop()
        new.record = reference.record
        return True

    def _note_ones(self, out: torch.Tensor, func: Any, args: Any) -> None:
        makes = MAKE_ONES.get(func)
        tensors = (a for a in args if isinstance(a, torch.Tensor))
        if all(map(self.of_ones, tensors)) if makes is None else makes(self.made_by, *args):
            with torch._C.DisableTorchFunction():
                live = self._live.get(out.untyped_storage()._cdata)
            if live is not None:
                live.record.ones = True

    def watch(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Hook these modules to record when their forward runs."""

        def entering(name: str) -> Callable[..., None]:
            return lambda module, args: self._stack.append(name)

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        for name, module in modules:
            module.register_forward_pre_hook(entering(name), prepend=True)  # before what FSDP does
            module.register_forward_hook(leaving, always_call=True)
