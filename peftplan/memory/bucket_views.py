"""Gradients that become views of DDP's buckets (`gradient_as_bucket_view`).

Source: torch, csrc/distributed/c10d/reducer.cpp (`mark_variable_ready_dense`): a gradient that is ready is copied into its
bucket, and the parameter's gradient is the view from then on.
"""

from __future__ import annotations

from peftplan.memory.units import OneGpu
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter


class BucketViews(OneGpu):
    """Frees each gradient when it is complete, in the backward that reduces. The optimizer steps over the views."""

    every_layer = True

    def __init__(self, f: Tape) -> None:
        self.syncs = True
        self.ready: set[str] = set()
        f.accumulated = self.copied

    def begin_backward(self, *, syncs: bool) -> None:
        """Backward begins; `syncs`: gradients are reduced."""
        self.syncs = syncs

    def copied(self, p: Parameter) -> None:
        """A gradient is complete: the bucket has a copy, and it is a view of that."""
        if self.syncs:
            self.ready.add(p.name)
            p.grad = None

    def idle(self, families: set[str]) -> set[str]:
        """Those that no gradient has reached."""
        return families - self.ready
