"""Tensor parallelism on the tape: what transformers' hooks around a divided layer make, in forward and in backward.

Source: transformers, distributed/tensor_parallel.py (`transform_inputs_pre_forward`, `transform_output_post_forward`); torch,
distributed/tensor/_api.py (`_FromTorchTensor`), _redistribute.py (`Redistribute`), placement_types.py (`_to_replicate_tensor`),
_ops/_mask_buffer.py. A functional collective writes into a copy, and the hooks wait for it at once.

    colwise                 backward: the gradient of the input, summed over the ranks into a copy
    rowwise                 forward: the output, summed over the ranks into a copy
    colwise_gather_output   forward: the parts of all ranks one below the other, then side by side | backward: the rank's part
    rowwise_split_input     forward: the rank's part of the input, copied | backward: the parts of all ranks, as above
    embedding_rowwise       forward: rows of other ranks are masked, and the sum written into a copy | backward: the gradient of
                            the whole table, since indices and gradient are whole
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

from peftplan.distributed.tensor_parallel import BESIDE_FSDP2, COPIED_SUMS, WHOLE_LOGITS, Style, plans_of, ranks_of, style_of
from peftplan.memory import divided_mlp
from peftplan.memory.model import Model
from peftplan.memory.rank_parts import gather, gathered
from peftplan.memory.unit_groups import tied
from peftplan.memory.units import OneGpu
from peftplan.parameters import Parameter as Family
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Backward, Dims, Node, Parameter, Tensor

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed

X = TypeVar("X")
Y = TypeVar("Y")


class TensorParallel(OneGpu):
    """The hooks of one rank. `whole`: the undivided parameters."""

    def __init__(self, model: Model, distributed: Distributed, whole: Iterable[Family]) -> None:
        self.model, self.f, self.ranks = model, model.tape, ranks_of(distributed)
        self.plans = plans_of(distributed)
        self.whole_dims = {p.name: p.shape for p in whole}
        self.is_tied = tied(model.arch)
        self.copies_sums = self.plans is BESIDE_FSDP2 and model.arch.model_type in COPIED_SUMS
        self.latest: Tensor | None = None
        """The latest of these sums, which the tool holds."""
        model.tape.modules = self

    def call(
        self,
        name: str,
        layer: int | None,
        parameters: tuple[Parameter, ...],
        x: X,
        function: Callable[[X], Y],
        *,
        by_name: bool,
        reads: tuple[Parameter, ...] = (),
    ) -> Y:
        """Call a module on `x` between the hooks of its style."""
        style = self._style(name)
        if style is None or (style != "embedding_rowwise" and not isinstance(x, Tensor)):
            return function(x)
        of_one = cast("Callable[[X], Tensor]", function)  # a layer that ranks divide gives one tensor
        return cast("Y", self._divided(style, (*parameters, *reads), x, of_one))

    def _divided(self, style: Style, parameters: tuple[Parameter, ...], x: X, function: Callable[[X], Tensor]) -> Tensor:
        """Call a layer of this style on `x`."""
        if style == "embedding_rowwise":
            looked_up = self._looked_up_here if self.copies_sums else self._looked_up
            return looked_up(function, x, parameters[0])
        assert isinstance(x, Tensor)
        if style.startswith("colwise"):
            out = function(self._summed_in_backward(x))  # type: ignore[arg-type]
            return self.gathered(out) if style == "colwise_gather_output" else out
        if style == "rowwise_whole_input":
            return self._summed(self._by_whole_input(x, parameters[0], function))  # type: ignore[arg-type]
        part = self._part(x) if style == "rowwise_split_input" else x  # `tp_forward` holds it until it returns
        return self._summed(function(part))  # type: ignore[arg-type]

    def read(self, name: str, layer: int | None, parameter: Parameter) -> bool:
        """Nothing: a rank has its part at all times."""
        return False

    def whole(self, parameter: Parameter) -> Tensor | None:
        """No tensor: nothing is gathered."""
        return None

    def groups(self, trained: list[Family]) -> Iterator[list[Family]]:
        """All at once: a group of norms, which stay whole, is of no size. The step divides a gradient of the whole table, into a
        copy."""
        yield trained
        table = f"{self.model.arch.input_embedding}.weight"
        for p in trained if not self.is_tied else ():
            if p.name == table and p.trainable:
                self.f.new(p.shape, p.dtype, "part of a gradient")

    def _style(self, name: str) -> Style | None:
        """The style of a base layer, or of the matrix of an adapter that is divided as its base layer is."""
        base, _, leaf = name.rpartition(".")
        if self.plans is BESIDE_FSDP2 and leaf in ("lora_A", "lora_B", "base_layer"):  # the adapter is part of the layer
            style = style_of(self.model.arch, base, self.plans)
            low_rank: dict[tuple[Style | None, str], Style] = {
                ("colwise", "lora_A"): "colwise_gather_output",
                ("rowwise", "lora_B"): "rowwise_split_input",
            }
            return low_rank.get((style, leaf))
        if leaf in ("lora_A", "lora_B"):
            style = style_of(self.model.arch, base, self.plans)
            return style if (style, leaf) in (("rowwise", "lora_A"), ("colwise", "lora_B")) else None
        if self.plans is BESIDE_FSDP2:
            return style_of(self.model.arch, name, self.plans)
        return style_of(self.model.arch, name.removesuffix(".base_layer"))

    def _looked_up(self, function: Callable[[X], Tensor], ids: X, table: Parameter) -> Tensor:
        """Rows of the table, masked where another rank holds them."""
        f = self.f
        below, above = f.new(("b", "s"), "bool", "lt"), f.new(("b", "s"), "bool", "ge")
        mask = f.new(("b", "s"), "bool", "bitwise_or")
        del below, above
        shifted = f.new(("b", "s"), "int64", "sub")
        masked = f.new(("b", "s"), "int64", "index_put")
        del shifted
        with f.no_grad():
            rows = function(ids)
        del masked, mask
        node = f.record(_whole_table_backward, (table,), self.whole_dims[table.name], table.dims if self.is_tied else None)
        return f.new(rows.dims, rows.dtype, "all_reduce", node)

    def _looked_up_here(self, function: Callable[[X], Tensor], ids: X, table: Parameter) -> Tensor:
        """The same of a table that is no DTensor then: its gradient is the rank's part."""
        f = self.f
        shifted = f.new(("b", "s"), "int64", "sub")
        mask = f.new(("b", "s"), "bool", "bitwise_or")
        _masked = f.new(("b", "s"), "int64", "masked_fill")
        del shifted
        rows = function(ids)
        rows = f.new(rows.dims, rows.dtype, "masked_fill", f.record(_masked_backward, (rows,), mask))
        return self._summed(rows)

    def _summed_in_backward(self, x: Tensor) -> Tensor:
        return self._viewed(x, _copied_backward)

    def _viewed(self, x: Tensor, backward: Backward) -> Tensor:
        node = self._record(backward, x)
        return x if node is None else Tensor(x.storage, x.dims, x.dtype, node)

    def _summed(self, x: Tensor) -> Tensor:
        if not self.copies_sums:
            return self.f.new(x.dims, x.dtype, "all_reduce", self._record(_handed_on, x))
        _sum = self.f.new(x.dims, x.dtype, "all_reduce")
        self.latest = self.f.new(x.dims, x.dtype, "clone", self._record(_handed_on, x))
        return self.latest

    def gathered(self, x: Tensor) -> Tensor:
        """The parts of all ranks."""
        return gathered(self.f, x, self.ranks)

    def _part(self, x: Tensor) -> Tensor:
        """The rank's part of the last dim."""
        node = self._record(_gather_backward, x, self.ranks)
        *rows, width = x.dims
        assert isinstance(width, int)
        return self.f.new((*rows, width // self.ranks), x.dtype, "part of the ranks' input", node)

    def _by_whole_input(self, x: Tensor, weight: Parameter, function: Callable[[Tensor], Tensor]) -> Tensor:
        with self.f.no_grad():
            product = function(self._part(x))
        return divided_mlp.down(self.f, x, weight, product)

    def _record(self, backward: Backward, x: Tensor, *saved: object) -> Node | None:
        node = self.f.record(backward, (x,), *saved)
        if node is not None:
            node.in_python = True
        return node


def whole_logits(f: Tape, logits: Tensor) -> Tensor:
    """Logits as a loss behind the model reads them: `full_tensor()` of those of which a rank has some columns, in fp32
    (nemo_automodel, components/loss/masked_ce.py)."""
    if not isinstance(f.modules, TensorParallel) or f.modules.model.arch.model_type in WHOLE_LOGITS:
        return logits
    return f.modules.gathered(f.to(logits, "fp32"))


def _masked_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "masked_fill")


def _copied_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "all_reduce")


def _handed_on(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


def _gather_backward(f: Tape, node: Node, saved: tuple[int], g: Tensor) -> Tensor:
    return gather(f, g, saved[0])


def _whole_table_backward(f: Tape, node: Node, saved: tuple[Dims, Dims | None], g: Tensor) -> Tensor:
    """The gradient of the whole table. Of a tied one, the rank's part is copied and added to the head's."""
    whole, part = saved
    grad = ops.table_gradient(f, whole, g.dims[:-1], g.dtype)
    if part is None:
        return grad
    node.context = f.new(part, g.dtype, "part of a gradient")
    return Tensor(grad.storage, part, grad.dtype)
