"""Names in one string: commas part them, and spaces around them say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate


@pytest.mark.parametrize(
    ("option", "others"),
    [
        ("target_modules", {}),
        ("exclude_modules", {}),
        ("modules_to_save", {}),
        ("quant_skip_modules", {"quant": "nf4"}),
    ],
)
def test_spaces_around_names_say_nothing(option: str, others: dict[str, Any]) -> None:
    names = ("lm_head", "embed_tokens") if option == "modules_to_save" else ("q_proj", "v_proj")
    expected = estimate("llama-3.2-1b", **{option: names}, **others)
    assert expected.trainable_parameters != estimate("llama-3.2-1b").trainable_parameters or others
    for text in (",".join(names), ", ".join(names), f" {names[0]} , {names[1]} "):
        result = estimate("llama-3.2-1b", **{option: text}, **others)
        assert result.trainable_parameters == expected.trainable_parameters
        assert result.ledger.by_category() == expected.ledger.by_category()
