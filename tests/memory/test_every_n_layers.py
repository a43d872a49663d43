"""Checkpointing of every n-th layer in the analytic engine: against the trace, and what it must be at both ends."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.analytic.writer import period_of
from peftplan.depth.sections import sections_of, sections_of_periods
from tests.memory.engines import LLAMA, TOLERANCE, phases, shallow
from tests.memory.families import T5


def peaks(config: dict[str, Any], **options: Any) -> dict[str, int]:
    return phases(config, "analytic", batch_size=2, seq_len=128, **options)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_layer_is_today_s_checkpointing(method: str) -> None:
    assert peaks(LLAMA, method=method, every_n_layers=1) == peaks(LLAMA, method=method)


def test_no_more_than_the_first_layer_is_checkpointed_by_a_large_number() -> None:
    """A second layer, which is not checkpointed, adds what it adds without checkpointing."""
    two = peaks({**LLAMA, "num_hidden_layers": 2}, every_n_layers=2)
    assert two == peaks({**LLAMA, "num_hidden_layers": 2}, every_n_layers=50)
    three = peaks({**LLAMA, "num_hidden_layers": 3}, every_n_layers=3)
    off = [peaks({**LLAMA, "num_hidden_layers": layers}, gradient_checkpointing=False) for layers in (2, 3)]
    assert three["forward"] - two["forward"] == off[1]["forward"] - off[0]["forward"]
    assert three["backward"] < off[1]["backward"]


def test_more_layers_between_need_more() -> None:
    by_interval = [peaks({**LLAMA, "num_hidden_layers": 12}, every_n_layers=n)["backward"] for n in (1, 2, 3, 4, 6, 12)]
    assert by_interval == sorted(set(by_interval))


def test_every_layer_is_run_or_stands_as_a_copy() -> None:
    """c n n c n n c n, of which the last period is run: 1 + 1 at the front, 2 + 1 between, 6 and 7 at the end."""
    kinds = (0, 1, 1, 0, 1, 1, 0, 1)
    assert sections_of_periods(kinds, summing=False) == ([0, 1, 6, 7], {2: [3], 3: [2, 4, 5]})
    for summing in (False, True):
        for every in (2, 3, 4, 5):
            for layers in range(every + 1, 30):
                kinds = tuple(int(layer % every > 0) for layer in range(layers))
                sections, copies = sections_of_periods(kinds, summing=summing)
                assert sorted([*sections, *(layer for copied in copies.values() for layer in copied)]) == [*range(layers)]
                assert sections == sorted(set(sections))
                assert sections[-1] == layers - 1
                stand = sum(len(copies.get(at, ())) + 1 for at, layer in enumerate(sections) if kinds[layer] == 0)
                assert stand == kinds.count(0)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (LLAMA, {"method": "full", "every_n_layers": 2}),
        (LLAMA, {"method": "qlora", "every_n_layers": 3, "trainer": "trl"}),
        ("gpt2", {"method": "lora", "every_n_layers": 2, "trainer": "plain", "gradient_checkpointing": True}),
        ({**T5, "num_layers": 5, "num_decoder_layers": 4}, {"method": "lora", "every_n_layers": 2}),
        ("gemma-3-270m", {"method": "lora", "every_n_layers": 3}),
        ("bloom-560m", {"method": "lora", "every_n_layers": 2, "attn_implementation": "eager"}),  # hands its weights out
        ("deberta-v3-base", {"method": "lora", "every_n_layers": 2, "task_type": "SEQ_CLS", "num_labels": 3}),
    ],
)
def test_both_engines_agree(model: Any, options: dict[str, Any]) -> None:
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    config = shallow(model, 6) if isinstance(model, str) else model
    analytic, traced = (phases(config, engine, batch_size=2, **options) for engine in ("analytic", "trace"))
    for phase, expected in traced.items():
        assert analytic[phase] == pytest.approx(expected, rel=TOLERANCE), phase


@pytest.mark.parametrize("layers", [12, 14])
def test_no_hidden_state_lives_through_the_step(layers: int) -> None:
    """The first copied layer reads what a layer of its own left behind: c n | n c n n … | n."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    config = {**LLAMA, "num_hidden_layers": layers, "hidden_size": 1024, "num_attention_heads": 8}
    options = {"method": "lora", "every_n_layers": 3, "batch_size": 8, "seq_len": 1024, "trainer": "plain"}
    ours, theirs = (
        estimate(config, engine=engine, gradient_checkpointing=True, **options).peaks  # type: ignore[arg-type]
        for engine in ("analytic", "trace")
    )
    assert ours is not None
    assert theirs is not None
    assert ours.by_phase == {phase: pytest.approx(nbytes, rel=0.001) for phase, nbytes in theirs.by_phase.items()}
    assert ours.reserved == pytest.approx(theirs.reserved, rel=0.001)


def test_a_peak_between_copies_of_two_kinds_has_what_both_have_freed() -> None:
    """The copies of checkpointed layers make gradients, those of the others free more than they make; they take turns."""
    pytest.importorskip("torch")
    options = {"method": "full", "every_n_layers": 3, "dtype": "fp16", "autocast": "none", "batch_size": 2, "seq_len": 512}
    options |= {"task_type": "SEQ_CLS", "num_labels": 3, "gradient_checkpointing": True}
    config = shallow("modernbert-base", 22)
    analytic, traced = (phases(config, engine, **options) for engine in ("analytic", "trace"))
    assert analytic["backward"] == pytest.approx(traced["backward"], rel=0.001)


def test_the_assumptions_say_so() -> None:
    assert estimate(LLAMA, every_n_layers=2).assumptions["every_n_layers"] == 2
    assert "every_n_layers" not in estimate(LLAMA).assumptions


def test_copies_of_two_kinds_run_in_the_order_of_their_layers() -> None:
    """w w w f w w w f w w w f, of which 0 and 3, 10 and 11 run: between them three, one, then three again and one less."""
    kinds = (0, 0, 0, 1) * 3
    sections, copies = sections_of(kinds)
    assert (sections, copies) == ([0, 3, 10, 11], {2: [1, 2, 4, 5, 6, 8, 9], 3: [7]})
    order = [kind for layer in range(12) for kind, section in enumerate((2, 3)) if layer in copies[section]]
    assert order == [0, 0, 0, 0, 0, 1, 0, 0]
    assert [period_of(each) for each in (order, [0] * 5, [0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 1, 0])] == [6, 1, 2, 3]
