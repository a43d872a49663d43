"""Random models, methods and cards: what `fit` returns fits, one more does not, and neither do smaller sizes fail.

`python -m tools.fit_triples` asks 300 of them, and traces twenty (docs/fit-triples.md).
"""

from __future__ import annotations

import pytest

from tools.fit_triples import draw


@pytest.mark.parametrize("number", range(1000, 1006))
def test_direct_estimates_agree_with_fit(number: int) -> None:
    assert draw(1, number).against == ()
