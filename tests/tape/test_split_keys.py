"""Into how many parts FlashAttention-2 splits keys where queries fill too little of a card."""

from __future__ import annotations

import pytest

from peftplan.hardware.processors import A100
from peftplan.tape.split_keys import SplitKeys, most_tokens, num_parts, parts_of, rounded_head


@pytest.mark.parametrize(
    ("blocks", "of_keys", "parts"),
    [
        (80, 3, 2),  # of 216 at once: 80, 160 and 240 blocks fill 37, 74 and 240 / 432 = 56 %
        (32, 8, 4),  # 15, 30, 44, 59 and (8) 59 % of two waves; 5, 6 and 7 parts have as many keys as 4 or 8
        (112, 2, 0),  # 52 % in one wave, 52 % in two
        (84, 2, 2),
        (173, 9, 0),  # more than 0.8 of the card
        (9, 1, 0),  # nothing to split
    ],
)
def test_parts_by_hand(blocks: int, of_keys: int, parts: int) -> None:
    """`num_splits_heuristic` on an A100, whose 108 multiprocessors run two blocks each."""
    assert num_parts(blocks=blocks, of_keys=of_keys, card=A100) == parts


def test_arrays_give_what_whole_numbers_do() -> None:
    np = pytest.importorskip("numpy")
    b, s = (values.ravel() for values in np.meshgrid(np.arange(1, 5), np.arange(64, 2048, 61)))
    at_all = SplitKeys(("b", 4, "s"), "s", 256, A100).at({"b": b, "s": s})
    assert at_all.tolist() == [
        parts_of(4 * rows, tokens, tokens, 256, A100) for rows, tokens in zip(b.tolist(), s.tolist(), strict=True)
    ]
    assert at_all.any()


@pytest.mark.parametrize("heads", [(4, 256), (14, 64), (32, 128), (64, 128)])
def test_keys_of_more_tokens_are_not_split(heads: tuple[int, int]) -> None:
    number, size = heads
    most = most_tokens([heads], A100, virtual_tokens=0)
    parts = {b * s: parts_of(number * b, s, s, size, A100) for b in range(1, 9) for s in range(1, 6000, 21)}
    assert not any(count for tokens, count in parts.items() if tokens > most)
    assert any(parts.values()) is (most > 0)


@pytest.mark.parametrize(("head", "rounded"), [(40, 64), (80, 96), (128, 128), (160, 192), (192, 192), (208, 256), (224, 256)])
def test_heads_of_parts_as_torch_allocates_them(head: int, rounded: int) -> None:
    """torch's allocator on the emulated card, torch 2.13: 3 parts of 1,410 queries of one head of 160 take 192 numbers each."""
    assert rounded_head(head) == rounded
