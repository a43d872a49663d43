"""NeMo Automodel's load of gpt-oss: experts come in 4 bits, and are widened one projection at a time; on one GPU layer by layer.

r blocks of 32 numbers, each of 16 bytes and a scale of one byte. Source: nemo_automodel 0.7.0, components/models/gpt_oss/
state_dict_adapter.py (`iter_checkpoint_load_parts`, `_dequantize_block_scale_tensors`, `_convert_moe_packed_tensors`); torch,
`ldexp`.
"""

from __future__ import annotations

from peftplan.memory.loaded import Handle, Loader, Memory
from peftplan.parameters import Parameter, Parameters

NUMBERS = 32
"""Numbers of a block."""
PROJECTIONS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
SOURCE = "nemo_automodel 0.7.0: loading experts in 4 bits"


def load_widened(memory: Memory[Handle], *, load: Loader, parameters: Parameters, workspaces: tuple[int, ...] = ()) -> None:
    """Load the model, whose tensors are there before their values, and then widen the experts of each layer, beside `workspaces`
    of so many bytes."""
    load(memory)
    beside = [memory.allocate(nbytes) for nbytes in workspaces]
    experts = [p for p in parameters.all if p.name.endswith(PROJECTIONS)]
    for _ in range(experts[0].copies if experts else 0):
        packed = [memory.allocate(size * _blocks(p)) for p in experts for size in (NUMBERS // 2, 1)]
        for p in experts:
            memory.release(_widen(memory, _blocks(p)))
        for tensor in packed:
            memory.release(tensor)
    for tensor in beside:
        memory.release(tensor)
    memory.empty_cache()


def widen_all(memory: Memory[Handle], projections: list[int]) -> None:
    """The same of experts that ranks divide, whose `projections` have so many numbers on a rank: all come first, and what is
    widened stays until all is."""
    packed = [[memory.allocate(size * numbers // NUMBERS) for size in (NUMBERS // 2, 1)] for numbers in projections]
    wide = []
    for numbers, tensors in zip(projections, packed, strict=True):
        wide.append(_widen(memory, numbers // NUMBERS))
        for tensor in tensors:
            memory.release(tensor)
    for tensor in wide:
        memory.release(tensor)


def _blocks(p: Parameter) -> int:
    return p.numel // NUMBERS


def _widen(memory: Memory[Handle], r: int) -> Handle:
    """Places of both halves of each byte as int64, then the numbers in 16 bits, and these once more, transposed: the last are
    what it gives."""
    wide = memory.allocate(4 * r)
    scales = memory.allocate(4 * r)
    memory.release(wide)
    out = memory.allocate(2 * NUMBERS * r)
    places = []
    for _ in range(2):
        half = memory.allocate(NUMBERS // 2 * r)
        places.append(memory.allocate(8 * NUMBERS // 2 * r))
        memory.release(half)
    for size in (NUMBERS, NUMBERS, 4):  # the numbers of each half, and two to the power of the scales
        memory.release(memory.allocate(size * r))
    for tensor in (*places, scales):
        memory.release(tensor)
    transposed = memory.allocate(2 * NUMBERS * r)
    memory.release(out)
    return transposed
