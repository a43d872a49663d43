"""What an answer says where it has no number, or where another strategy has more room."""

from __future__ import annotations

import pytest

from tests.cli.run import run

FULL = ("llama-3.1-8b", "--method", "full", "--gpu", "8xa100-80gb")
DIVIDES = "DDP keeps the whole model on each GPU; --strategy fsdp2 or zero3 divides it among them"


def words(*args: str) -> str:
    return " ".join(run(*args).out.split())


def test_a_job_without_a_peak_leads_to_a_rehearsal() -> None:
    shown = words(
        "estimate", "llama-3.1-70b", "--method", "lora", "--quant", "int8", "--gpu", "2xrtx-4090", "--strategy", "device-map"
    )
    assert "(no formula yet); the counted part takes 39.84 GiB; `peftplan rehearse` runs your own program" in shown


def test_a_job_that_is_tight_under_ddp_names_what_divides_the_model() -> None:
    """8.0 B parameters in bf16 with gradients, buckets and two states: 10 B each, 74.8 GiB on every GPU; FSDP2 needs 25."""
    assert DIVIDES in words("estimate", *FULL)
    assert DIVIDES not in words("estimate", *FULL, "--strategy", "fsdp2")
    assert DIVIDES in words("fit", *FULL, "--strategy", "ddp")


def test_a_plan_that_divides_the_model_needs_no_advice_to_do_so() -> None:
    shown = words("fit", *FULL)
    assert "--strategy fsdp2" in shown
    assert DIVIDES not in shown


@pytest.mark.parametrize(
    ("options", "strategies"),
    [(("--method", "full", "--optim", "adamw_8bit"), "zero3"), (("--method", "qlora", "--quant", "int8"), None)],
)
def test_only_strategies_are_named_that_run_the_job(options: tuple[str, ...], strategies: str | None) -> None:
    """FSDP2 runs neither an optimizer of bitsandbytes nor int8, for which ZeRO-3 has no formula."""
    shown = words("fit", "llama-3.1-8b", *options, "--gpu", "2x8GiB")
    assert "does not fit at any batch size" in shown
    assert ("divides it among them" in shown) is (strategies is not None)
    assert strategies is None or f"--strategy {strategies} divides" in shown


def test_no_change_helps_under_a_strategy_that_was_chosen() -> None:
    job = ("estimate", "llama-3.2-3b", "--method", "qlora", "--gpu", "2x4GiB")
    assert "no change that peftplan knows makes it fit with --strategy zero3" in words(*job, "--strategy", "zero3")
    assert "fits, " in words(*job)


def test_no_word_of_the_help_is_broken_in_a_terminal_of_80_columns() -> None:
    """`llamafactory[-asft|…]` was longer than its column: the line before ended with its first letter."""
    lines = [line.strip() for line in run("estimate", "--help", columns=80).out.splitlines()]
    assert [line for line in lines if line.startswith("llamafactory[-")]
