"""What a rehearsal may be asked: bad input is one line that names the option, and nothing starts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from peftplan.errors import PeftplanError
from peftplan.rehearse.inside.rows import WORD, row_of
from peftplan.rehearse.request import free_host_bytes, read

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
        ({"max_host": "much"}, "max_host: 'much' is not valid; accepted: a size such as 8GiB"),
        ({"max_host": "a100-80gb"}, "max_host"),
        ({"data": "real"}, "data"),
        ({"data": "synthetic:text,=int"}, "data"),
        ({"data": "synthetic:label=number"}, "data"),
        ({"seq_len": 128}, "seq_len"),
        ({"routing": "random"}, "routing: 'random' is not valid; accepted: balanced, worst"),
        ({"seq_len": 0, "data": "synthetic"}, "seq_len"),
        ({"snapshot": "no/such/folder/x.pickle"}, "snapshot"),
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


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        ("synthetic", {"text": "text"}),
        ("synthetic:prompt,chosen,grade=int", {"prompt": "text", "chosen": "text", "grade": "int"}),
        ("synthetic:messages,images", {"messages": "messages", "images": "images"}),
    ],
)
def test_columns_of_synthetic_rows(data: str, columns: dict[str, str]) -> None:
    assert read(("python",), data=data).data == columns


def test_rows_have_as_many_tokens_as_asked() -> None:
    row = row_of({"prompt": "text", "chosen": "text", "rejected": "text", "label": "int"}, 101)
    assert {name: str(value).count(WORD) for name, value in row.items()} == {
        "prompt": 51,
        "chosen": 51,
        "rejected": 51,
        "label": 0,
    }
    turns = row_of({"conversations": "turns"}, 101)["conversations"]
    assert sum(turn["value"].count(WORD) for turn in turns) == 101


def test_most_of_the_free_host_memory_is_allowed_unless_told_otherwise() -> None:
    assert read(("python",)).max_host == pytest.approx(0.8 * free_host_bytes(), rel=0.2)


def test_several_cards_and_every_rank() -> None:
    request = read(("python", "-c", "pass"), **(DEFAULTS | {"gpu": "8xh100", "world_size": 4, "rank": "all", "max_host": "2GiB"}))
    assert (request.cards, request.world_size, request.ranks, request.max_host) == (8, 4, (0, 1, 2, 3), 2 * 2**30)
    assert request.every_rank
    assert request.card is not None
    assert request.card.compute_capability == "9.0"


def test_the_package_has_it_under_its_own_name() -> None:
    """Where nobody has imported the package before."""
    program = "import peftplan\ntry:\n    peftplan.rehearse([])\nexcept peftplan.PeftplanError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("COMMAND is missing")
