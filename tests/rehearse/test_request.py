"""What a rehearsal may be asked: bad input is one line that names the option, and nothing starts."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import PeftplanError
from peftplan.rehearse.request import read

DEFAULTS: dict[str, Any] = {"gpu": None, "steps": 3, "world_size": None, "rank": 0, "timeout": None, "max_host": None}


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"steps": -1}, "steps"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": 10**9}, "world_size"),
        ({"rank": 8, "world_size": 8}, "rank"),
        ({"rank": "first"}, "rank"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_host": "much"}, "much"),
        ({"max_host": "a100-80gb"}, "max_host"),
        ({"gpu": "0xh100"}, "gpu"),
        ({"gpu": "l4,t4"}, "gpu"),
        ({"gpu": "mi300x"}, "gpu"),
        ({"gpu": "8xnothing"}, "nothing"),
    ],
)
def test_a_wrong_option_is_named(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(PeftplanError, match=field):
        read(("python", "train.py"), **(DEFAULTS | changed))


@pytest.mark.parametrize("command", [(), ("no-such-program", "x"), "python train.py"])
def test_a_command_is_a_program_that_is_there(command: Any) -> None:
    with pytest.raises(PeftplanError, match="COMMAND"):
        read(command, **DEFAULTS)


def test_several_cards_and_every_rank() -> None:
    request = read(("python", "-c", "pass"), **(DEFAULTS | {"gpu": "8xh100", "world_size": 4, "rank": "all", "max_host": "2GiB"}))
    assert (request.cards, request.world_size, request.ranks, request.max_host) == (8, 4, (0, 1, 2, 3), 2 * 2**30)
    assert request.card is not None
    assert request.card.compute_capability == "9.0"
