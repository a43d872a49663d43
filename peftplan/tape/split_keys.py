"""What FlashAttention-2's forward allocates where a batch has too few blocks of queries to fill a card: it splits the keys, each
part of which writes a result and a logsumexp of its own in fp32.

Letters: b batch, a query heads, s queries, k keys, d head size.
Source: torch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (`set_params_splitkv`, `num_splits_heuristic`),
without dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftplan.arrays import Derived, Size, dim_at, larger
from peftplan.hardware.processors import Processors
from peftplan.ledger import Dim
from peftplan.units import ceil_div

QUERIES = 64
"""Queries of a block."""
KEYS = ((64, 256), (128, 128), (256, 64))
"""Largest head size → keys of a block."""
BLOCKS_AT_ONCE = 2
"""Of 128 threads, on each multiprocessor."""
FULL = 80
"""Percent of the blocks at once from which on keys are not split."""
GOOD = 85
"""Percent of the best filling from which on fewer parts do."""
FINE = 10**9
"""What a filling is a whole number of parts of."""
MOST_PARTS = 128
SMALL_HEAD = 128
HEAD_STEPS = (32, 64)
"""What heads up to `SMALL_HEAD`, and larger ones, are rounded up to in fp32 (`head_size_rounded`)."""


def rounded_head(head: int) -> int:
    """Head size of an fp32 result of parts, and of the accumulator of dQ."""
    step = HEAD_STEPS[head > SMALL_HEAD]
    return ceil_div(head, step) * step


def block_of_keys(head: int) -> int:
    """Keys of a block."""
    return next(keys for most, keys in KEYS if head <= most)


def most_tokens(heads: Iterable[tuple[int, int]], card: Processors, *, virtual_tokens: int) -> int:
    """Tokens of a batch, virtual ones included, above which keys are never split, by numbers of heads and their sizes."""
    mosts = [0]
    for number, size in heads:
        blocks = ceil_div(ceil_div(FULL * BLOCKS_AT_ONCE * card.number, 100), number) - 1
        if blocks * QUERIES + virtual_tokens > block_of_keys(size):
            mosts.append(blocks * (QUERIES + virtual_tokens))
    return max(mosts)


def num_parts(*, blocks: Size, of_keys: Size, card: Processors) -> Size:
    """Into how many parts keys are split; 0 where they are not. `blocks` of queries and heads, `of_keys`: of keys; both may be
    arrays."""
    at_once = BLOCKS_AT_ONCE * card.number
    most = min(MOST_PARTS, at_once, of_keys if isinstance(of_keys, int) else int(of_keys.max()))
    best: Size = blocks * 0
    filled: list[Size] = []
    for n in range(1, most + 1):
        unlike = 1 if n == 1 else (-(-of_keys // n) != -(-of_keys // (n - 1)))
        waves = larger(-(-blocks * n // at_once), 1)
        filled.append((n <= of_keys) * unlike * (blocks * n * FINE // (at_once * waves)))
        best = larger(best, filled[-1])
    parts: Size = blocks * 0
    for n in range(most, 0, -1):
        does = (filled[n - 1] > 0) * (filled[n - 1] * 100 >= best * GOOD)
        parts = does * n + (does == 0) * parts
    split: Size = parts * (parts > 1) * (blocks * 100 < FULL * at_once)
    return split


def parts_of(heads: Size, queries: Size, keys: Size, head: int, card: Processors) -> Size:
    """The same for so many heads of all rows, each with so many queries and keys of a size."""
    return num_parts(blocks=heads * -(-queries // QUERIES), of_keys=-(-keys // block_of_keys(head)), card=card)


class SplitKeys(Derived):
    """Parts of the keys, of which each has a result of all queries; 0 where they are not split."""

    queries: tuple[Dim, ...]
    """b, a and s."""
    keys: Dim
    head: int
    card: Processors

    def __new__(cls, queries: tuple[Dim, ...], keys: Dim, head: int, card: Processors) -> SplitKeys:
        """The size called by what it counts."""
        self = super().__new__(cls, f"parts of {keys} keys of {head} for {'·'.join(map(str, queries))}")
        self.queries, self.keys, self.head, self.card = queries, keys, head, card
        return self

    def __getnewargs__(self) -> tuple[tuple[Dim, ...], Dim, int, Processors]:  # type: ignore[override]
        """What a copy is made of."""
        return self.queries, self.keys, self.head, self.card

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The parts at these sizes, which may be arrays as well as integers."""
        b, a, s = (dim_at(dim, sizes) for dim in self.queries)
        return parts_of(b * a, s, dim_at(self.keys, sizes), self.head, self.card)
