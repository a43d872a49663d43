"""What the stages of ZeRO share on the tape: settings, the state of a backward, and norms of gradients.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py.
"""

from __future__ import annotations

from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import Key, overlaps, reduce_bucket
from peftplan.ledger import Category
from peftplan.memory.model import Model
from peftplan.memory.units import OneGpu
from peftplan.tape.streams import on_stream
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter, Tensor


class Stage(OneGpu):
    """One rank under a stage of ZeRO. `dtype`: the 16 bits that it computes in."""

    every_layer = True

    def __init__(self, model: Model, distributed: Distributed, *, dtype: str) -> None:
        self.f: Tape = model.tape
        self.model, self.models, self.dtype = model, [model], dtype
        self.bucket_size = reduce_bucket(distributed, model.arch.hidden_size or 0)
        """Elements."""
        self.reduced_dtype = None if (reduced := distributed.reduced_in(dtype)) == dtype else reduced
        """The dtype in which gradients are reduced, where it is another one."""
        self.overlaps = overlaps(distributed)
        self.offloads = distributed.offload_optimizer == "cpu"
        self.syncs = True
        """Whether this backward ends at a boundary of gradient accumulation."""
        self.reduced: set[str] = set()
        """Families that have received gradients."""
        self.large: Tensor | None = None
        """The gradient of a parameter that is larger than a bucket."""
        self.flat: Tensor | None = None
        """fp32 gradients of the group that the optimizer steps over."""
        self.norms: list[Tensor] = []
        self.num_bucketed = 0
        """Elements in the bucket."""

    def begin_backward(self, *, syncs: bool) -> None:
        """Backward begins; `syncs`: it ends at a boundary of gradient accumulation."""
        self.syncs = syncs

    def idle(self, families: set[str]) -> set[str]:
        """The families that have received no gradients."""
        return families - self.reduced

    def _norm(self, numel: int, stream: int) -> None:
        """The norm of a gradient, cast to fp64."""
        wide = self._new((numel,), "fp64", "gradient for its norm", stream, "temporaries")
        self.norms.append(self._new((), "fp64", "norm of a gradient", stream, "temporaries"))
        del wide

    def _key(self, p: Parameter) -> Key:
        return p.name, p.layer

    def _new(self, dims: tuple[int, ...], dtype: str, op: str, stream: int, category: Category = "communication") -> Tensor:
        return on_stream(self.f, dims, dtype, op, stream, category)
