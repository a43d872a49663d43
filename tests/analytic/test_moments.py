"""Which moments of a timeline can be its peak, at sizes that are not known yet."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")

from peftplan.analytic.moments import _extreme, _undominated  # noqa: E402


def test_a_layer_between_the_first_and_the_last_holds_least() -> None:
    """Five layers give activations back and make gradients; a sixth moment holds one tensor more than the line between."""
    layers = [(80 - layer, layer, 3) for layer in range(5)]
    above = (79, 2, 3)
    kept = _extreme(np.array([*layers, above]))
    assert sorted(map(tuple, kept.tolist())) == sorted([layers[0], layers[-1], above])


def test_what_is_left_out_is_never_the_most() -> None:
    """Rows of few different numbers, so that many dominate or lie midway; at sizes of all magnitudes, zero too."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        rows = np.unique(draw.integers(0, 5, (draw.integers(1, 60), draw.integers(1, 5))), axis=0)
        sizes = draw.integers(0, 10 ** draw.integers(1, 9), (rows.shape[1], 50))
        kept = _extreme(_undominated(rows))
        assert {tuple(row) for row in kept.tolist()} <= {tuple(row) for row in rows.tolist()}
        assert ((kept @ sizes).max(axis=0) == (rows @ sizes).max(axis=0)).all()
