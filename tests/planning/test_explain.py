"""`explain` and what an `Estimate` says of itself."""

from __future__ import annotations

import re

import pytest

from peftplan import estimate, explain
from tests.cli.run import run


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama-2-7b", {"method": "qlora"}),
        ("llama-2-7b", {"method": "prefix-tuning", "num_virtual_tokens": 10}),
        ("mixtral-8x7b", {"trainer": "trl"}),
        ("llama-2-7b", {"optim": "paged_adamw_32bit"}),
        ("bloom-560m", {"quant": "fp8"}),
    ],
)
def test_the_lines_add_up(model: str, options: dict[str, object]) -> None:
    result = estimate(model, **options)  # type: ignore[arg-type]
    text = explain(result)
    lines = sum(int(n.replace(",", "")) for n in re.findall(r"= ([\d,]+)  \[", text))
    categories = sum(int(n.replace(",", "")) for n in re.findall(r"^\w+: ([\d,]+)$", text, re.M))
    assert lines == categories == result.ledger.bytes()
    assert f": {lines:,}" in text
    assert ("not counted yet" in text) == (result.peaks is None)


def test_a_named_card_is_explained_as_it_is_judged() -> None:
    job = ("estimate", "llama-2-7b", "--method", "qlora", "--gpu", "a100-80gb")
    (total,) = re.findall(r"^sum, the peak +([\d,]+)", run(*job, "-v").out, re.M)
    assert run(*job, "--explain").out.endswith(f": {total}\n")


def test_an_estimate_reads_as_one_line() -> None:
    assert repr(estimate("llama-2-7b", method="qlora", gpu="24GiB")) == (
        "<Estimate llama-2-7b · qlora · analytic: 19,988,480 trainable, peak 6.35 GiB in backward, 24GiB: fits>"
    )


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("mixtral-8x7b", {"method": "qlora"}, "fused experts (45,097,156,608 parameters, 97% of the model) unquantized, and"),
        ("mixtral-8x7b", {"method": "qlora", "trainer": "trl"}, "97% of the model) unquantized"),
        ("mixtral-8x7b", {"method": "qlora", "trainer": "axolotl", "quant_experts": True}, None),
        ("mixtral-8x7b", {"quant": "fp8"}, None),
        # 32 layers of 4544·4672 + 4544·4544 + 2·4·4544²; transformers 5.24 converts what is exactly nn.Linear
        (
            "falcon-7b",
            {"method": "qlora"},
            "nn.Linear (6,625,951,744 parameters, 96% of the model) unquantized, and",
        ),
        ("llama-2-7b", {"method": "qlora"}, None),
    ],
)
def test_what_a_format_leaves_is_said(model: str, options: dict[str, object], expected: str | None) -> None:
    notes = [note for note in estimate(model, **options).assumptions.get("notes", ()) if "unquantized" in note]  # type: ignore[arg-type]
    assert bool(notes) == (expected is not None)
    today = [note.partition("; not so before")[0] for note in notes]
    assert expected is None or (expected in today[0] and today[0].endswith("unquantized") == (not expected.endswith(", and")))
