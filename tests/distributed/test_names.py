"""A job on one GPU reads the names of a strategy's options only, so they must be those of the strategy."""

from __future__ import annotations

from peftplan.distributed.names import OPTIONS
from peftplan.distributed.strategy import Distributed


def test_every_field_of_a_strategy_is_an_option() -> None:
    assert Distributed.model_fields.keys() == OPTIONS
