"""`serving` as a whole: sums, N adapters beside one base, what is refused, and the ways to call it."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import pytest

import peftplan
from peftplan.errors import InputError, PeftplanError, RefusedError, UnknownNameError
from peftplan.planning.serving_result import Serving
from tests.cli.run import run
from tests.planning.tiny import CONFIG


def serving(**options: Any) -> Serving:
    """Of the model that can be summed by hand."""
    return peftplan.serving(CONFIG, **options)


def test_n_adapters_beside_one_base() -> None:
    one, many = (serving(target_modules=["q_proj"], r=4, adapters=n) for n in (1, 9))
    # two layers, each with A (4, 64) and B (64, 4) in bf16: 512 B each
    assert one.loaded.adapter == 2 * 2 * 512
    assert many.loaded.all_adapters == 9 * one.loaded.all_adapters
    assert many.loaded.base == one.loaded.base
    assert many.total - one.total == 8 * one.loaded.adapter
    assert serving(target_modules=["q_proj"], r=4, serving_dtype="fp32").loaded.adapter == 2 * one.loaded.adapter


def test_the_file_does_not_depend_on_serving() -> None:
    files = {serving(r=4, adapters=n, batch_size=b, serving_dtype=d).file for n, b, d in ((1, 1, "bf16"), (5, 7, "fp32"))}
    assert len(files) == 1


def test_total_is_the_sum_of_its_parts() -> None:
    result = serving(method="vera", r=16, adapters=3, batch_size=2, context=100)
    assert result.cache is not None
    # keys and values of 2 heads × 100 tokens × 16, two sequences, two layers, in bf16: 12,800 B each
    assert result.cache.num_bytes == 2 * 2 * (2 * 2 * 100 * 16 * 2)
    assert result.total == result.loaded.base + 3 * result.loaded.adapter + result.cache.num_bytes


def test_adapters_of_boft_share_their_permutation() -> None:
    result = serving(method="boft", target_modules=["q_proj"], adapters=5)
    # P is 64 × 64 in fp32 per layer; R (1, 16, 4, 4) and s (64, 1) in bf16 take 512 B each, per layer and adapter
    assert (result.loaded.shared, result.loaded.adapter) == (2 * 64 * 64 * 4, 2 * 2 * 512)
    assert result.loaded.all_adapters == result.loaded.shared + 5 * result.loaded.adapter


def test_virtual_tokens_serve_what_was_saved() -> None:
    """p-tuning drops its encoder for inference: 3 × 64 numbers remain."""
    result = serving(method="p-tuning", num_virtual_tokens=3, serving_dtype="fp32")
    assert result.loaded.adapter == 2 * 512  # 768 B
    assert result.cache is not None
    assert result.cache.tokens == 2048 + 3


def test_a_quantized_base_is_served_as_it_is_stored() -> None:
    dense, stored = serving(), serving(quant="nf4")
    assert stored.loaded.base < dense.loaded.base
    assert stored.checkpoint == dense.checkpoint, "merged into the base in its own dtype"


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"adapters": 0}, InputError, "adapters must be at least 1 (got 0)"),
        ({"batch_size": 0}, InputError, "batch_size must be at least 1 (got 0)"),
        ({"context": -1}, InputError, "context must be at least 1 (got -1)"),
        ({"context": "many"}, InputError, "context must be a whole number"),
        ({"serving_dtype": "int8"}, UnknownNameError, "serving_dtype: 'int8'"),
        ({"method": "full", "adapters": 2}, RefusedError, "only one is served"),
        ({"method": "prompt-tuning", "num_virtual_tokens": 2, "merge": True}, RefusedError, "nothing to merge"),
        ({"no_such_option": 1}, UnknownNameError, "no_such_option"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[PeftplanError], expected: str) -> None:
    with pytest.raises(error) as raised:
        serving(**options)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_biases_of_the_base_belong_to_one_adapter() -> None:
    assert peftplan.serving("gpt2", bias="all").loaded.adapters == 1
    with pytest.raises(RefusedError, match="only one is served"):
        peftplan.serving("gpt2", bias="all", adapters=2)


def test_a_context_beyond_the_positions_of_the_model() -> None:
    with pytest.raises(InputError, match="context: 1025 is not valid; accepted: up to 1024"):
        peftplan.serving("gpt2", context=1025)
    assert peftplan.serving("gpt2").assumptions["context"] == 1024


def test_the_dictionary_is_json_and_says_what_is_missing() -> None:
    document = json.loads(json.dumps(serving(method="houlsby").to_dict()))
    assert (document["adapter_file"], document["merged_checkpoint"], document["merge_memory"]) == (None, None, None)
    assert set(document["refused"]) == {"adapter_file", "merged_checkpoint", "merge_memory"}
    assert (
        document["serving"]["total"]
        == document["serving"]["base"] + document["serving"]["all_adapters"] + document["kv_cache"]["bytes"]
    )


@pytest.mark.parametrize("fields", [{"r": 4}, {"adapters": 2}, {"context": 4096}, {"batch_size": 2}])
def test_more_of_it_takes_no_less(fields: dict[str, int]) -> None:
    less = serving(r=2, adapters=1, context=2048, batch_size=1)
    assert serving(**{"r": 2, **fields}).total > less.total


@pytest.mark.parametrize("model", ["paligemma-3b-pt-224", "gemma-3n-e2b-it"])
def test_without_the_extra_a_model_of_pictures_says_that_its_cache_is_missing(model: str) -> None:
    with patch.dict(sys.modules, dict.fromkeys(("torch", "transformers", "peft"))):
        result = peftplan.serving(model, r=8, context=4096)
        shown = run("serve", model, "--r", "8", "--context", "4096")
    assert result.cache is None
    assert result.refused["kv_cache"].startswith("the KV cache is not in the sum: ")
    assert result.not_modelled[0] == "the KV cache"
    assert f"sum without the KV cache  {result.total:,}" in shown.out
    assert "peftplan[trace]" in shown.out


def test_layers_that_attend_to_pictures_cache_nothing_of_text() -> None:
    with patch.dict(sys.modules, dict.fromkeys(("torch", "transformers", "peft"))):
        result = peftplan.serving("llama-3.2-11b-vision-instruct", r=8, context=4096)
    assert result.cache is not None, result.refused
    # 32 of its 40 layers, 8 key-value heads of 128, keys and values, 2 bytes each; a trace has the same
    assert result.cache.num_bytes == 32 * 2 * 4096 * 8 * 128 * 2


def test_with_the_extra_the_cache_of_a_model_of_pictures_is_in_the_sum() -> None:
    pytest.importorskip("transformers")
    result = peftplan.serving("qwen2-vl-7b-instruct", r=8, context=4096)
    assert result.cache is not None, result.refused
    # Qwen2-VL-7B: 28 layers, 4 key-value heads of 128, keys and values, 2 bytes each
    assert result.cache.num_bytes == 28 * 2 * 4096 * 4 * 128 * 2
    assert result.total == result.loaded.base + result.loaded.all_adapters + result.cache.num_bytes
    assert "the KV cache" not in result.not_modelled
