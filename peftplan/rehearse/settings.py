"""What the program's side is told: written into one variable of its environment as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

VARIABLE = "PEFTPLAN_REHEARSAL"
BALANCED, WORST = ROUTINGS = ("balanced", "worst")
"""Experts of a mixture have the same number of tokens each, or all tokens go to as few as one has."""


class Settings(NamedTuple):
    """`folder`: where reports go. `steps`: after so many optimizer steps the program ends; 0 lets it end itself.

    `stand_ins`: whether what is missing may be written where libraries look for it. `record`: whether every allocation is kept.
    `data`: column → kind of the rows that answer for missing data sets, of `seq_len` tokens. `network`: whether it is reached.
    `routing`: which experts the tokens of a mixture go to.
    """

    folder: str
    steps: int
    rank: int
    world_size: int
    snapshot: bool = False
    stand_ins: bool = True
    record: bool = False
    data: Mapping[str, str] | None = None
    seq_len: int = 0
    network: bool = False
    routing: str = BALANCED

    def to_text(self) -> str:
        """As the environment holds it."""
        return json.dumps(self._asdict())


def read() -> Settings:
    """The settings of this process."""
    return Settings(**json.loads(os.environ[VARIABLE]))


def environment(rank: int, *, world_size: int, local: int) -> dict[str, str]:
    """What a launcher tells one rank of a world, on nodes of `local` cards."""
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank % local,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": rank // local,
    }
    return {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
