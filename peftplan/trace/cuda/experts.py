"""Mixtures of experts on fake tensors, as transformers runs them on CUDA: one grouped product over all experts' tokens.

torch's shape rule of `_grouped_mm` takes bf16 alone, but the kernels take fp32 and fp16 too (`_grouped_mm_validate_inputs`, ATen
native/GroupedMMUtils.h, torch; what is not bf16 on sm90 runs expert by expert into the same output). So kbit preparation,
which casts the fused experts to fp32, trains. Below sm80 transformers takes its own loop (`_can_use_grouped_mm`, 5.24), whose
backward makes a gradient of all experts even where they are frozen. Left out: the kernel's own few KiB of offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peftplan.libraries.replacing import replaced
from peftplan.trace.cuda.attention import Capability

GROUPED_CAPABILITY = (8, 0)
ALIGNMENT_BYTES = 16
"""Rows of the operands must be, and rows of the output are, multiples of it."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@contextmanager
def experts_on(capability: Capability) -> Iterator[None]:
    """Run transformers' experts as on a card of this compute capability."""
    stand_ins = {
        "torch._meta_registrations._meta_grouped_mm_common": _grouped_mm,
        "transformers.integrations.moe._can_use_grouped_mm": lambda *args: capability >= GROUPED_CAPABILITY,
    }
    with replaced(stand_ins):
        yield


def _grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: torch.Tensor | None, **rest: Any) -> torch.Tensor:
    """The output of `_grouped_mm_cuda`: rows padded to 16 bytes (`create_grouped_gemm_output_tensor`)."""
    for name, operand in (("mat_a", mat_a), ("mat_b", mat_b)):
        if operand.dtype not in FLOATS or not _aligned(operand):
            raise RuntimeError(
                f"grouped_mm: {name} {tuple(operand.shape)} of {operand.dtype}; rows must be multiples of 16 bytes"
            )
    groups = [] if offs is None else [offs.shape[0]]
    if mat_a.dim() == mat_b.dim() == len(("rows", "columns")):
        shape = [*groups, mat_a.shape[0], mat_b.shape[1]]
    elif offs is None:
        shape = [mat_a.shape[0], mat_a.shape[1], mat_b.shape[-1]]
    else:
        shape = [mat_a.shape[-2], mat_b.shape[-1]]
    step = ALIGNMENT_BYTES // mat_a.element_size()
    row = -(-shape[-1] // step) * step
    strides = [row, 1] if len(shape) == len(("rows", "columns")) else [shape[1] * row, row, 1]
    return torch.empty_strided(shape, strides, dtype=mat_a.dtype, device=mat_a.device)


def _aligned(operand: torch.Tensor) -> bool:
    """Whether the stride of its rows (or columns, if transposed) is a multiple of 16 bytes."""
    stride = max(operand.stride()[-2:])
    return stride * operand.element_size() % ALIGNMENT_BYTES == 0
