"""What the memory-efficient attention kernel's backward allocates for heads above 128, beside torch's own allocation."""

from __future__ import annotations

import pickle

import pytest

from peftplan.tape.efficient_backward import Workspace, workspace

ALLOCATED = [
    ((1, 2, 256, 256, 256, 256), 1573120),
    ((2, 8, 300, 300, 256, 256), 16780288),
    ((1, 4, 1024, 1024, 512, 512), 25169920),
    ((3, 16, 250, 250, 512, 512), 75509760),  # 48 heads share 200 parts: 4 each, as many as there are blocks of keys
    ((1, 8, 512, 512, 320, 320), 17828352),
    ((1, 150, 512, 512, 256, 256), 98342400),  # one part each
    ((2, 16, 300, 300, 192, 128), 25170432),
    ((2, 3, 300, 700, 200, 136), 11011200),
]
"""b, a, s, k, d and dv → bytes: backward of `scaled_dot_product_attention` in bf16 on the emulated card, torch 2.13."""


@pytest.mark.parametrize(("shape", "num_bytes"), ALLOCATED)
def test_size_is_what_torch_allocates(shape: tuple[int, int, int, int, int, int], num_bytes: int) -> None:
    b, a, s, k, d, dv = shape
    assert 4 * b * a * workspace(b * a, s, k, d, dv) == num_bytes


def test_arrays_give_what_whole_numbers_do() -> None:
    np = pytest.importorskip("numpy")
    b, s = (values.ravel() for values in np.meshgrid(np.arange(1, 30), np.arange(64, 2048, 61)))
    size = pickle.loads(pickle.dumps(Workspace(("b", 8, "s", 256), ("s", 256))))
    at_all = size.at({"b": b, "s": s}).tolist()
    points = list(zip(b.tolist(), s.tolist(), strict=True))
    assert at_all == [workspace(8 * rows, tokens, tokens, 256, 256) for rows, tokens in points]
    assert at_all == [size.at({"b": rows, "s": tokens}) for rows, tokens in points]
