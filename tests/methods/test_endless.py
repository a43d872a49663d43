"""A regular expression of the user that would never end is refused in bounded time; those that people write are not."""

from __future__ import annotations

import time
from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError
from peftplan.methods import endless
from peftplan.methods.endless import may_backtrack
from tests.cli.run import run

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
)
"""What Unsloth's `get_peft_regex` makes of four names."""


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("target_modules", {"target_modules": r"([a-z_.0-9]+)+!"}),
        ("target_modules", {"target_modules": r".*.*.*.*.*.*.*.*.*!"}),
        ("rank_pattern", {"rank_pattern": {r"(\w+)+!": 4}}),
        ("modules_to_save", {"modules_to_save": [r"(\w+.?)+!"]}),
        ("quant_skip_modules", {"quant": "int8", "quant_skip_modules": [r"(\w|.)*!"]}),
        ("target_modules", {"peft_config": {"peft_type": "DELORA", "r": 4, "target_modules": r"(\w+.?)+!"}}),
    ],
)
def test_an_endless_pattern_is_refused(field: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "peft_config" in options:
        pytest.importorskip("peft")
    monkeypatch.setattr(endless, "SECONDS", 0.3)
    start = time.process_time()
    with pytest.raises(InputError, match=f"^{field}: .* without repeats inside repeats"):
        peftplan.estimate("llama-2-7b", **options)
    assert time.process_time() - start < 5


def test_the_command_line_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endless, "SECONDS", 0.3)
    done = run("inspect", "llama-2-7b", "--match", "(.*)*x!")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("peftplan: --match: '(.*)*x!' is not valid; it takes more than ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("pattern", [UNSLOTH, r"(?:[a-z_0-9]+\.)*[qv]_proj", r".*\.(1|2)\..*(q|v)_proj"])
def test_patterns_that_people_write_match(pattern: str) -> None:
    assert peftplan.estimate("llama-2-7b", target_modules=pattern).trainable_parameters > 0


def test_plain_patterns_start_no_process() -> None:
    assert not any(
        map(may_backtrack, ("q_proj", "all-linear", r".*\.self_attn\.(q|v)_proj", r"(?:q|k)_proj", r".*layers\.\d+\..*"))
    )
    assert all(map(may_backtrack, (UNSLOTH, "(a+)+$", "(a|a)*", "a?a?a?a?", "(a?){9}")))
