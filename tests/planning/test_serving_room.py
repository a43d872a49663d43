"""`serve --gpu`: what is said to fit fits, and one more does not, by asking again."""

from __future__ import annotations

import random
from typing import Any

import pytest

import peftplan
from tests.cli.run import run

SIZES = ("adapters", "context", "batch_size")
MODELS = ("llama-2-7b", "llama-3.2-1b", "gemma-2-2b", "mistral-7b-v0.1", "gpt2", "t5-small", "deepseek-v2-lite")
CARDS = ("rtx-4090", "l4", "t4", "a100-80gb", "6GiB")


def test_tokens_of_llama_2_7b_by_hand() -> None:
    """A token of the cache takes 2 · 32 layers · 32 heads · 128 · 2 B = 524,288 B, and while one is appended its layer's keys
    are there twice, 32 · 128 · 2 B = 8,192 B more per token: all that depends on the number of tokens. Each of 16 sequences also
    holds 32,000 scores and probabilities in fp32, and 2 · 4096 + 3 · 11008 numbers of 2 B in a layer; cuBLAS has 8,519,680 B.
    """
    result = peftplan.serving("llama-2-7b", r=8, batch_size=16, gpu="24GiB")
    (card,) = result.gpus
    room = 24 * 2**30 * 95 // 100 - card.context_bytes - result.loaded.base - result.loaded.all_adapters
    room -= 16 * (2 * 32_000 * 4 + 2 * (2 * 4096 + 3 * 11_008)) + 8_519_680
    assert card.most.context == room // (16 * (524_288 + 8_192))


def job(seed: int) -> tuple[str, dict[str, Any]]:
    draw = random.Random(seed)
    sizes = {"adapters": draw.choice((1, 2, 7)), "context": draw.choice((1, 128, 500)), "batch_size": draw.choice((1, 3, 16))}
    return draw.choice(MODELS), {"r": draw.choice((1, 8, 33)), "gpu": draw.choice(CARDS), **sizes}


@pytest.mark.parametrize("seed", range(30))
def test_the_largest_sizes_fit_and_no_larger_one(seed: int) -> None:
    model, options = job(seed)
    (card,) = peftplan.serving(model, **options).gpus
    for size in SIZES:
        for limits, accepted in ((card.most, ("fits",)), (card.most_tight, ("fits", "tight"))):
            most = getattr(limits, size)
            if most is None or (size == "context" and model == "t5-small"):  # cross-attention reads as many positions
                continue

            def verdict(n: int, size: str = size) -> str:
                return peftplan.serving(model, **{**options, size: n}).gpus[0].verdict

            if most:
                assert verdict(most) in accepted, (size, most)
            if size not in limits.bounded:
                assert verdict(most + 1) not in accepted, (size, most)


def test_a_method_that_trains_the_base_serves_one() -> None:
    (card,) = peftplan.serving("gpt2", method="full", gpu="t4").gpus
    assert card.most.adapters is None
    assert card.most.context == 1024
    assert card.most.bounded == ("context",)


def test_a_model_without_a_cache_has_adapters_only() -> None:
    (card,) = peftplan.serving("bert-base-uncased", gpu="t4").gpus
    assert card.most.adapters
    assert (card.most.context, card.most.batch_size) == (None, None)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("gpt2 --gpu t4 --require-fit", 0),
        ("llama-2-7b --gpu 8GiB --require-fit", 1),
        ("llama-2-7b --gpu 8GiB", 0),
        ("llama-2-7b --require-fit", 2),
        ("llama-2-7b --gpu t4 --allow-tight", 2),
        ("llama-2-7b --gpu no-such-card", 2),
    ],
)
def test_exit_codes(line: str, code: int) -> None:
    assert run("serve", *line.split()).code == code


def test_allow_tight_accepts_less_room() -> None:
    sizes = peftplan.serving("llama-2-7b", gpu="l4").gpus[0]
    beyond = str((sizes.most.adapters or 0) + 1)
    assert run("serve", "llama-2-7b", "--gpu", "l4", "--adapters", beyond, "--require-fit").code == 1
    assert run("serve", "llama-2-7b", "--gpu", "l4", "--adapters", beyond, "--require-fit", "--allow-tight").code == 0


def test_the_verdict_stands_first() -> None:
    lines = run("serve", "llama-3.1-8b", "--gpu", "rtx-4090,4GiB", columns=200).out.splitlines()
    assert lines[1].startswith("✓ RTX 4090: fits, needs 15.68 GiB of 23.52 GiB, 7.84 GiB left")
    assert "adapters, or" in lines[2]
    assert lines[3].startswith("✗ 4GiB: does not fit")
    assert lines[4] == "  fewer adapters, tokens or sequences do not make it fit"
