"""Attention of ranks that share each row of tokens: torch's `context_parallel`, as accelerate runs it, allocates and saves this.

Letters: b batch, a query heads, g key/value heads, s queries of a rank, d head size. A rank of c holds two of 2c parts of a row,
the early one r and its counterpart from the end. It attends to its own keys, then to those of each other rank: ranks before it in
the ring have keys that its first half does not see, so only half of the queries, or half of the keys, take part.

Source: torch, distributed/tensor/experimental/_context_parallel/_attention.py (`_templated_ring_attention`,
`_templated_ring_attention_backward`). Left out: the communication library keeps the keys and values that a rank sends until it
waits for the others', in forward through the first kernel; backward holds more.
"""

from collections.abc import Sequence
from typing import NamedTuple

from peftplan.ledger import Dim
from peftplan.memory.fused_attention import FLASH_BLOCK, number, padded
from peftplan.tape.split_keys import rounded_head
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor


class Ring(NamedTuple):
    """The ranks that share a row, and the place of one among them."""

    ranks: int
    place: int

    @property
    def joins(self) -> bool:
        """Whether some of its results are of half the queries, which `cat` joins to the others, head by head."""
        return self.place < self.ranks - 1

    def halves_queries(self, turn: int) -> bool:
        """Whether half of its queries take part in a turn; else all, with half of the keys after the first turn."""
        return turn > self.place


def half(dim: Dim) -> Dim:
    """Half of a sequence: a number, or a named size."""
    return dim // 2 if isinstance(dim, int) else f"{dim}/2"


def ring_flash(f: Tape, ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 in turns; q is (b, a, s, d), k and v are (b, g, s, d). Keeps q, k, v, the result and an fp32 logsumexp."""
    node = f.record(_ring_backward, (q, k, v), q.detach(), k.detach(), v.detach(), ring)
    b, a, s, d = q.dims
    own: tuple[Tensor, ...] = (_by_head(f, k), _by_head(f, v))
    gathered: Tensor | None = None
    so_far: list[Tensor] = []
    for turn in range(ring.ranks):
        if turn < ring.ranks - 1:
            sent = f.new((2, *k.dims), k.dtype, "keys and values")
            gathered = f.new((ring.ranks, 2, *k.dims), k.dtype, "all keys and values") if gathered is None else gathered
            del sent
        if turn:
            own = ()
        queries = half(s) if ring.halves_queries(turn) else s
        out, block_lse, *rest = (
            f.new((b, queries, a, d), q.dtype, "flash attention"),
            f.new((b, a, queries), "fp32", "logsumexp"),
            f.new((2,), "int64", "rng state"),
            f.new((), "int64", "unused"),
        )
        block = f.new(out.dims, "fp32", "to")
        if turn:
            _merge(f, so_far, block, block_lse, joins=ring.halves_queries(turn))
        else:
            so_far += (block, block_lse)
        del block
    result = f.new((b, s, a, d), q.dtype, "to", node)
    f.keep(node, result.detach(), so_far[1], *rest)
    del gathered, own, out, block_lse, so_far
    return result.view((b, a, s, d))


def _by_head(f: Tape, x: Tensor) -> Tensor:
    """`contiguous` of keys or values that lie token by token."""
    return x if x.dims[1] == 1 else f.new(x.dims, x.dtype, "contiguous")


def _merge(f: Tape, so_far: list[Tensor], block: Tensor, block_lse: Tensor, *, joins: bool) -> None:
    """`_SDPAMerger._merge_one`: add a turn's result to that so far, the output and its logsumexp. `joins`: the turn has half of
    the queries."""
    difference = f.new(block_lse.dims, "fp32", "sub")
    weight = f.new(block_lse.dims, "fp32", "sigmoid")
    del difference
    apart = f.new(block.dims, "fp32", "sub")
    weighed = f.new(block.dims, "fp32", "mul")
    del weight, apart
    out = f.new(block.dims, "fp32", "sub")
    del weighed
    difference = f.new(block_lse.dims, "fp32", "sub")
    weight = f.new(block_lse.dims, "fp32", "logsigmoid")
    del difference
    lse = f.new(block_lse.dims, "fp32", "sub")
    del weight
    so_far[1] = f.new(so_far[1].dims, "fp32", "cat") if joins else lse
    so_far[0] = f.new(so_far[0].dims, "fp32", "cat") if joins else out


def _ring_backward(f: Tape, node: Node, saved: Sequence[object], g: Tensor) -> Gradients:
    """dQ in fp32 on the rank; dK and dV in fp32 go around the ring with the keys and values that they are of."""
    q, k, v, ring = saved[:4]
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    assert isinstance(ring, Ring)
    b, a, s, d = q.dims
    dq = f.new(q.dims, "fp32", "zeros_like")
    summed: tuple[Tensor, ...] = (f.new(k.dims, "fp32", "zeros_like"), f.new(v.dims, "fp32", "zeros_like"))
    own: tuple[Tensor, ...] = (_by_head(f, k), _by_head(f, v))
    used = own
    of_turn: tuple[Tensor, ...] = ()
    gathered = sent = passed = received = viewed = lse = None
    for turn in range(ring.ranks):
        if turn:
            own = ()
        if turn < ring.ranks - 1:
            sent = f.new((2, *k.dims), k.dtype, "keys and values")
            gathered = f.new((ring.ranks, 2, *k.dims), k.dtype, "all keys and values") if gathered is None else gathered
        used = own
        halves = ring.halves_queries(turn)
        rows, keys = half(s) if halves else s, half(s) if turn and not halves else s
        lse = f.new((b, a, rows), "fp32", "contiguous") if halves else None
        of_turn = _flash_backward(f, (b, rows, a, d), (b, keys, k.dims[1], d), q.dtype, ring, halves=halves)
        if turn:
            passed, viewed, summed = received, None, ()
            if not halves:
                summed = f.new(k.dims, "fp32", "cat"), f.new(v.dims, "fp32", "cat")
        flat = () if turn or k.dims[1] == 1 else (f.new(k.dims, "fp32", "flatten"), f.new(v.dims, "fp32", "flatten"))
        passed = f.new((2, *k.dims), "fp32", "gradients of keys and values")
        del flat
        viewed = received if halves else None
        received = f.new((2, *k.dims), "fp32", "received gradients")
        if halves:
            dq = f.new(q.dims, "fp32", "cat")
    narrow = f.new(q.dims, q.dtype, "to")
    del dq
    both = f.view_of(f.new((2, *k.dims), k.dtype, "to"))
    del own, used, of_turn, gathered, sent, passed, received, viewed, lse, summed
    return narrow, Tensor(both.storage, k.dims, k.dtype), Tensor(both.storage, v.dims, v.dtype)


def _flash_backward(f: Tape, queries: Dims, keys: Dims, dtype: str, ring: Ring, *, halves: bool) -> tuple[Tensor, ...]:
    """The kernel's gradients of a turn; it copies a result that lies head by head, and parts of several rows."""
    b, s, a, d = queries
    grad = f.new(queries, dtype, "grad, copied") if halves and f.several else None
    out = f.new(queries, dtype, "out, copied") if ring.joins else None
    dq = f.new(queries, dtype, "dq")
    dk, dv = f.new(keys, dtype, "dk"), f.new(keys, dtype, "dv")
    rounded = padded(s, FLASH_BLOCK)
    delta = f.new((b, a, rounded), "fp32", "delta")
    accumulator = f.new((b, rounded, a, rounded_head(number(d))), "fp32", "dq accumulator")
    if keys[2] != a:
        expanded = [f.new((b, keys[1], a, d), dtype, "expanded dk, dv") for _ in "kv"]
        del expanded
    del grad, out, delta, accumulator
    return dq, dk, dv
