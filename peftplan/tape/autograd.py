"""A pocket autograd: runs modeling code on tensors that have names, dims and a dtype but no values, and logs their lifetimes.

Blocks are written as transformers writes them and follow Python's scoping: a tensor is freed when the last reference to it goes,
and one that an operation saves lives until backward has passed that operation. The log therefore follows the order of the
modeling code. Lifetimes do not depend on batch or sequence, so dims stay symbolic and the log is evaluated later
(`memory.timeline`).

Sources: torch, csrc/autograd/engine.cpp (order), input_buffer.cpp (sums), tools/autograd/derivatives.yaml (what is saved),
utils/checkpoint.py (`_CheckpointFrame`). It needs CPython, which counts references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

from peftplan.errors import RefusedError
from peftplan.tape.allocations import Allocations
from peftplan.tape.graph import RELEASED, Frame, Place, StopRecomputationError, reachable
from peftplan.tape.tensors import Backward, Broadcast, Dims, Node, Operand, Parameter, Tensor
from peftplan.versions import named

if TYPE_CHECKING:
    from peftplan.tape.grouped import Grouped
    from peftplan.tape.offloaded import Offloaded

T = TypeVar("T")
X = TypeVar("X")
Y = TypeVar("Y")


class Modules(Protocol):
    """Called in place of each module."""

    def call(
        self,
        name: str,
        layer: int | None,
        parameters: tuple[Parameter, ...],
        x: X,
        function: Callable[[X], Y],
        *,
        by_name: bool,
        reads: tuple[Parameter, ...],
    ) -> Y:
        """Call `function`, which is the module `name` of a layer, on `x`. `reads`: parameters of other modules."""

    def read(self, name: str, layer: int | None, parameter: Parameter) -> bool:
        """The module reads a parameter that is not its own, such as the dtype of a child's. Returns whether FSDP1 has gathered it
        ahead."""

    def whole(self, parameter: Parameter) -> Tensor | None:
        """The gathered tensor that holds a parameter's bytes now."""


class Autograd(Allocations):
    """The autograd of one step: nodes in forward, and their backward."""

    def __init__(self, *, several: bool = False) -> None:
        super().__init__()
        self.several = several
        """Whether the batch has several sequences, whose rows are one matrix only where each row is contiguous."""
        self.grad_enabled = True
        self.savers: dict[int, str] = {}
        self.products: list[tuple[int, str]] = []
        """Positions in the log of matrix products that write into an existing tensor, and the library that computes them."""
        self.leaves: set[tuple[int, Dims]] = set()
        """Storages of leaf tensors that require a gradient: embeddings under `enable_input_require_grads`."""
        self.keeps_graph = False
        """Whether the loop holds the loss, and with it the graph, until the next one is made."""
        self.lasting: set[int] = set()
        """Storages that the backward of a layer allocates and that live until the backward of all layers is done."""
        self._sequence = 0
        self._before_others = (0, several)
        """Where the model began to read other rows, and whether those before are several."""
        self._frame: Frame | None = None
        self._casts: dict[Parameter | int, Operand] = {}
        self._replaying: Frame | None = None
        self.recomputes = False
        """Whether forward code runs during backward."""
        self.nested = False
        """Whether a nested backward runs. It may reach nodes that another backward has already run."""
        self.kept_inputs: list[object] | None = None
        """Detached inputs of reentrant checkpoints with their gradients, where hooks hold them until backward ends."""
        self.modules: Modules | None = None
        """What is done around each module; None: nothing."""
        self.offloaded: Offloaded | Grouped | None = None
        """Where what operations save goes to the host."""

    @property
    def replays(self) -> bool:
        """Whether a checkpointed layer is being recomputed, but for a reentrant checkpoint."""
        return self._replaying is not None

    def record(self, backward: Backward, inputs: tuple[Operand | None, ...], *saved: object) -> Node | None:
        """The autograd node of an operation on `inputs` that saves `saved`; None if no input requires a gradient.

        Call it before the result is allocated: torch saves inputs before the kernel runs, and the recomputation of a checkpointed
        layer may end there. `keep` saves results.
        """
        if not self.grad_enabled:
            return None
        for i in inputs:
            if i is not None and i.node is not None:
                break
        else:
            return None
        self._sequence += 1
        edges = tuple([None if i is None or i.node is None else (i.node, i.index, i.dtype) for i in inputs])
        node = Node((self._sequence, 0), self.module, backward, edges, checkpointed=self._frame is not None)
        self.keep(node, *saved)
        return node

    def keep(self, node: Node | None, *saved: object) -> None:
        """Save more tensors on a node, such as the results of its operation."""
        if node is not None and saved:
            for value in saved:
                if type(value) is Tensor and value.storage is not None:
                    self.savers[value.storage.number] = node.backward.__name__
            apart = self._frame is None and self._replaying is None
            packed = saved if apart and self.offloaded is None else tuple(map(self._pack, saved))
            node.saved = (*node.saved, *packed)

    def _pack(self, value: object) -> object:
        """What a checkpointed call saves: a place for each tensor in forward; the tensor for that place in recomputation."""
        if self.offloaded is not None and self._frame is None and self._replaying is None:
            return self.offloaded.pack(value)
        if type(value) is not Tensor and type(value) is not Parameter:
            return value
        if self._replaying is None:
            frame = self._frame
            assert frame is not None
            frame.count += 1
            return Place(frame, frame.count)
        frame = self._replaying
        assert frame.recomputed is not None
        frame.replayed += 1
        packed = self._recomputed(value)
        if frame.replayed in frame.alive:
            frame.recomputed[frame.replayed] = packed
        if frame.replayed == frame.count:
            raise StopRecomputationError
        return packed

    def _recomputed(self, value: Tensor | Parameter) -> Operand:
        """What a recomputation saves: detached if it requires a gradient, so that the bytes of a gathered weight stay (torch,
        utils/checkpoint.py, `pack_hook`)."""
        if isinstance(value, Tensor):
            return value.detach()
        return self.gathered(value) if value.trainable else value

    def gathered(self, weight: Operand) -> Operand:
        """A view of the bytes that ranks have gathered for a weight, which keeps them; elsewhere the weight itself."""
        whole = self.modules.whole(weight) if self.modules is not None and isinstance(weight, Parameter) else None
        return weight if whole is None else Tensor(whole.storage, weight.dims, whole.dtype)

    def chosen(self, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run operations of which a checkpointed call keeps the results: recomputation finds these, and allocates none."""
        if self._replaying is not None:
            self.reused = [*self._replaying.chosen.pop(0)]
            return make()
        results = make()
        if self._frame is not None:
            self._frame.chosen.append(tuple(x.detach() for x in results))
        return results

    def read_another(self, sizes: Mapping[str, str], *, several: bool = False) -> None:
        """From here on the model reads one row, or `several`, of these sizes, until backward has reached the rows before."""
        self._before_others = (self._sequence, self.several)
        self.sizes_read, self.several = sizes, several

    def backward(self, root: Tensor) -> None:
        """Run backward from `root`, the latest node first. Each node releases its saved tensors when it is done.

        Raises RefusedError if the root requires no gradient.
        """
        if root.node is None:
            raise RefusedError(
                f"{named('torch')} refuses it: RuntimeError: element 0 of tensors does not require grad "
                "and does not have a grad_fn"
            )
        self.segment = -(abs(self.segment) + 1)
        self.backward_from([(root, self.new(root.dims, root.dtype, "ones_like"))])

    def backward_from(self, roots: list[tuple[Tensor, Tensor]]) -> None:
        """Run backward from (tensor, gradient) pairs. It may be nested in another backward. Empties `roots`."""
        order = reachable([x.node for x, _ in roots])
        while roots:
            x, grad = roots.pop(0)
            root = x.node
            assert root is not None
            root.receive(self, x.index, grad)
            del x, grad
            root.settle(self)
            del root
        while order:
            node = order.pop()
            if self.sizes_read and node.sequence[0] <= self._before_others[0]:
                self.sizes_read, self.several = {}, self._before_others[1]
            if any(node.grads):
                self._apply(node)
        if self.offloaded is not None and not self.nested:
            self.offloaded.end_backward()

    def _apply(self, node: Node) -> None:
        grads, node.grads = node.grads, [None]
        self.module = node.module
        if node.folds and self.is_permuted(grads[0]) and self.several:  # `reshape`, in the backward of `view`
            grads[0] = self.new(grads[0].dims, grads[0].dtype, "clone")  # type: ignore[union-attr]
        saved, node.saved = node.saved, ()
        if saved is RELEASED:
            raise RefusedError(f"{named('torch')} refuses it: RuntimeError: Trying to backward through the graph a second time")
        if self.nested and any(type(value) in (Tensor, Parameter) for value in saved):
            node.saved = RELEASED
        places = saved  # keeps the frames, and with them the inputs of recomputation, until the node is done
        if node.checkpointed:
            saved = [self._unpack(value) for value in saved]
        elif self.offloaded is not None:
            saved = self.offloaded.unpacked(saved, None if self.nested else node)
        leaving = None if self.offloaded is None else self.offloaded.take_leaving()
        result = node.backward(self, node, saved, grads) if node.releases else node.backward(self, node, saved, *grads)
        if node.in_python:
            grads = []
        self.module = node.module
        grads_of_inputs: list[Tensor | None] = [result] if isinstance(result, Tensor) else list(result)
        del result
        if node.checkpointed:
            saved = ()
        for i, edge in enumerate(node.edges):  # `validate_outputs`, before the node releases what it saved
            grad = grads_of_inputs[i]
            if type(grad) is Broadcast:
                source = () if self.is_permuted(grad) else grad.source  # else the fastest dim is one that is summed
                grad = grads_of_inputs[i] = self.column_sum(source, grad.dims, grad.dtype)
            if edge is not None and grad is not None and grad.dtype != edge[2]:
                grad = grads_of_inputs[i] = self.alike(grad, edge[2], "to")
        grad = None
        if self.offloaded is not None and leaving is not None:
            saved = ()
            self.offloaded.ran(leaving)
        del saved, grads, places
        for i, edge in enumerate(node.edges):
            grad, grads_of_inputs[i] = grads_of_inputs[i], None
            if edge is None:
                continue
            if grad is not None:
                edge[0].receive(self, edge[1], grad)
            elif isinstance(edge[0], Parameter) and edge[0].counts:
                edge[0].receive(self, edge[1], None)
            del grad
            edge[0].settle(self)
            if isinstance(edge[0], Node) and edge[0].at_once:
                self._apply(edge[0])
            if self.arrived and self.accumulated is not None:  # `AccumulateGrad` runs apart, when the sum is all that is left
                self.accumulated(self.arrived.pop())

    def _unpack(self, value: object) -> object:
        if type(value) is not Place:
            return value
        frame = value.frame
        if frame.recomputed is None:
            self._recompute(frame)
        assert frame.recomputed is not None
        return frame.recomputed.pop(value.number)

    def _recompute(self, frame: Frame) -> None:
        outer, self._frame = self._frame, None
        args = frame.inputs()
        frame.recomputed, self._replaying = {}, frame
        with self.recomputing(), suppress(StopRecomputationError):
            frame.rerun(*args)  # type: ignore[misc]
        self.reused = []
        self._replaying, self._frame = None, outer

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Run forward code during backward, with an autocast cache of its own."""
        module, casts = self.module, self._casts
        self.segment = abs(self.segment) + 1
        self._casts, self.recomputes = {}, True
        yield
        self._casts.clear()
        self.recomputes = False
        self._casts, self.module = casts, module
        self.segment = -(self.segment + 1)

    def checkpoint(self, function: Callable[..., T], *args: object, inputs: Callable[[], tuple[object, ...]] | None = None) -> T:
        """Non-reentrant `torch.utils.checkpoint`: keeps the arguments, and runs the function again when backward first needs it.

        `inputs`: returns the arguments for the second run, in place of those kept.
        """
        if self.offloaded is not None and inputs is None:
            inputs = self.offloaded.inputs(args)
        frame = self._frame = Frame()
        frame.rerun, frame.inputs = function, inputs or (lambda: args)
        out = function(*args)
        self._frame = None
        return out

    def checkpoint_within(self, function: Callable[[Tensor], Tensor], x: Tensor, *, by_name: bool) -> Tensor:
        """A checkpoint within a checkpointed call. The outer call runs again for its input, as for any saved tensor; one that is
        passed by name stays (torch, utils/checkpoint.py, `_NoopSaveInputs`)."""
        outer, replaying, frame = self._frame, self._replaying, Frame()
        saved, node, index = x if by_name else self._pack(x), x.node, x.index
        self._frame, self._replaying = frame, None
        again: list[Tensor] = []

        def inputs() -> tuple[object, ...]:
            if not again:
                unpacked = self._unpack(saved)
                assert isinstance(unpacked, Tensor)
                again.append(Tensor(unpacked.storage, unpacked.dims, unpacked.dtype, node, index))
            return (*again,)

        frame.rerun, frame.inputs = function, inputs
        out = function(x)
        self._frame, self._replaying = outer, replaying
        return out
