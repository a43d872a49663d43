"""Workspaces of cuBLAS and cuBLASLt: allocations inside torch's allocator that no tensor shows.

Counted: one per library handle and stream, taken by the first matrix product that needs it, and kept. Handles belong to threads,
and autograd's backward runs in another thread than forward. Source: torch aten/src/ATen/cuda/CublasHandlePool.cpp; two match
measured peaks to the kibibyte (fitcheck-llm's T4 runs: 2 × 8,519,680 bytes). Products with a bias go to cuBLASLt, which takes
cuBLAS's workspace since `versions.ONE_WORKSPACE`; before, it had 1 MiB of its own (those runs with biases: 2 MiB more).
"""

from __future__ import annotations

from typing import Any

import torch

from peftplan.hardware.context import CUBLASLT_WORKSPACE_BYTES, cublas_workspace_bytes
from peftplan.trace.cuda.attention import Capability
from peftplan.trace.events.tracker import Tracker

_ATEN = torch.ops.aten
PRODUCTS = frozenset(
    {
        _ATEN.mm.default, _ATEN.mm.out, _ATEN.mm.dtype, _ATEN.mm.dtype_out, _ATEN.bmm.default,
        _ATEN.addmm.default, _ATEN.addmm.out, _ATEN.addmm.dtype_out, _ATEN.addmm_.default,
        _ATEN.baddbmm.default, _ATEN.addbmm.default,
    }
)  # fmt: skip
"""Matrix products that cuBLAS computes."""


class Workspaces:
    """Allocates each workspace when the first product of its thread runs.

    `apart`: cuBLASLt has workspaces of its own. `by_rotary`: a product makes angles of positions, whatever the installed
    transformers does (`job.script`).
    """

    def __init__(self, capability: Capability, *, apart: bool = False, by_rotary: bool = False) -> None:
        self._apart = apart
        self._by_rotary = by_rotary
        self._cublas = cublas_workspace_bytes(".".join(map(str, capability)))
        self._taken: set[tuple[str, str, int]] = set()

    def after(self, tracker: Tracker, func: Any, args: Any) -> None:
        """Called after every operation: a product's result is there before the library asks for its workspace. A product with a
        vector to add goes to cuBLASLt (`addmm` with a bias epilogue)."""
        angles = self._by_rotary and func is _ATEN.mul.Tensor and tracker.last_module.endswith("rotary_emb")
        if func not in PRODUCTS and not angles:
            return
        thread = "backward" if tracker.phase == "backward" else "forward"
        if self._apart and func is _ATEN.addmm.default and args[0].dim() == 1:
            self._take(tracker, "cuBLASLt", thread, CUBLASLT_WORKSPACE_BYTES)
        elif self._cublas.bytes is not None:
            self._take(tracker, "cuBLAS", thread, self._cublas.bytes)

    def _take(self, tracker: Tracker, library: str, thread: str, nbytes: int) -> None:
        if (of := (library, thread, tracker.device)) not in self._taken:
            self._taken.add(of)
            workspace = tracker.passing(nbytes=nbytes, shape=(nbytes,), dtype="uint8", op=library, category="workspaces")
            workspace.name = f"{library} workspace, {thread} thread"
