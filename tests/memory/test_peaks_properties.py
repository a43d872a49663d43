"""What is true of every peak: it grows with batch, sequence and rank, and its lines are all of it.

Growth with the sequence has one exception, which is torch's: where a sliding window begins to hide something, a mask appears, and
with it another kernel.
"""

from __future__ import annotations

import re
from math import ceil
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import peftplan
from peftplan.analytic import compiled as analytic
from peftplan.errors import InputError, PeftplanError
from peftplan.ledger import CATEGORIES
from peftplan.results.estimate import Estimate
from tests.memory.families import LLAMA, MODELS

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
WINDOW = 64
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
MODERNBERT = {
    **{key: MODELS["bert"][0][key] for key in ("hidden_size", "num_attention_heads", "vocab_size")},
    "model_type": "modernbert",
    "architectures": ["ModernBertForMaskedLM"],
    "intermediate_size": 464,
    "num_hidden_layers": 4,
    "local_attention": WINDOW,
    "max_position_embeddings": 8192,
}
POSITIONS = {"gpt2": "n_positions", "bert": "max_position_embeddings"}
CONFIGS = [{**config, **({POSITIONS[name]: 8192} if name in POSITIONS else {})} for name, (config, _) in MODELS.items()]
METHODS = ("full", "lora", "qlora", "dora", "ia3")
BATCHES, SEQUENCES, RANKS = st.integers(1, 40), st.integers(1, 2100), st.integers(1, 80)
EDGES = st.sampled_from([1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1024, 1535, 1536, 1537, 4096, 4097])
"""Where kernels round, and chunks of a loss begin."""


@st.composite
def jobs(draw: st.DrawFn, *, configs: list[dict[str, Any]] = CONFIGS, methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """The arguments of an estimate that some trainer runs."""
    layers = draw(st.integers(1, 4))
    config = draw(st.sampled_from(configs))
    depth = {key: layers for key in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers") if key in config}
    return {
        "model": {**config, **depth},
        "method": draw(st.sampled_from(methods)),
        "trainer": draw(st.sampled_from(["plain", "transformers", "trl"])),
        "dtype": draw(st.sampled_from(["bf16", "fp32", "fp16"])),
        "attn_implementation": draw(st.sampled_from(["sdpa", "eager"])),
        "gradient_checkpointing": draw(st.booleans()),
        "gradient_accumulation_steps": draw(st.sampled_from([1, 3])),
        "padding": draw(st.booleans()),
        "gpu": draw(st.sampled_from([None, "t4"])),
    }


def estimated(job: dict[str, Any], **sizes: Any) -> Estimate:
    """Its estimate, compiled anew; what no trainer runs, or only the trace engine knows, is no example."""
    analytic.COMPILED.clear()
    try:
        result = peftplan.estimate(**job, **sizes)
    except PeftplanError:
        result = None
    assume(result is not None and result.peaks is not None)
    assert result is not None
    return result


def phases(result: Any) -> dict[str, int]:
    """What its tensors request at their peaks: the tails of blocks, which are chance, need not grow."""
    assert result.peaks is not None
    return dict(result.peaks.requested)


def shrunk(small: dict[str, int], large: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The phases whose peak is less, with both peaks."""
    return {phase: (small[phase], large[phase]) for phase in small if small[phase] > large[phase]}


@QUICK
@given(job=jobs(), batch=BATCHES, more=st.integers(1, 8), seq=SEQUENCES | EDGES)
def test_more_sequences_never_take_less(job: dict[str, Any], batch: int, more: int, seq: int) -> None:
    small, large = (estimated(job, batch_size=size, seq_len=seq) for size in (batch, batch + more))
    assert shrunk(phases(small), phases(large)) == {}


@QUICK
@given(job=jobs(), batch=BATCHES, seq=SEQUENCES | EDGES, more=st.integers(1, 130))
def test_longer_sequences_never_take_less(job: dict[str, Any], batch: int, seq: int, more: int) -> None:
    small, large = (estimated(job, batch_size=batch, seq_len=length) for length in (seq, seq + more))
    assert shrunk(phases(small), phases(large)) == {}


@QUICK
@given(job=jobs(methods=("lora", "qlora", "dora")), batch=BATCHES, seq=SEQUENCES | EDGES, r=RANKS, more=st.integers(1, 60))
def test_more_rank_never_takes_less(job: dict[str, Any], batch: int, seq: int, r: int, more: int) -> None:
    small, large = (estimated(job, batch_size=batch, seq_len=seq, r=rank) for rank in (r, r + more))
    assert shrunk(phases(small), phases(large)) == {}


def test_a_window_that_begins_to_hide_takes_a_mask_and_with_it_another_kernel() -> None:
    """The exception. In fp32 torch's only kernel for grouped queries is plain operations, whose scores are b·a·s·s fp32 numbers;
    with a mask, transformers repeats keys and values, and the memory-efficient kernel takes them (torch 2.13, sdp_utils.cpp).
    """
    options: dict[str, Any] = {"method": "lora", "trainer": "plain", "dtype": "fp32", "batch_size": 4}
    shorter, longer = (peftplan.estimate(MISTRAL, seq_len=seq, **options).peaks for seq in (WINDOW - 1, WINDOW))
    assert shorter is not None
    assert longer is not None
    scores = [
        any(line.dims[-2:] == ("s", "s") and line.dims[1] == 10 and line.dtype == "fp32" for line in peaks.ledgers["forward"])
        for peaks in (shorter, longer)
    ]
    assert scores == [True, False]
    assert shorter.allocated > longer.allocated


def test_a_grid_refuses_what_it_cannot_count() -> None:
    """Eager scores of 2³¹ tokens are 2⁶² numbers a head."""
    np = pytest.importorskip("numpy")
    result = peftplan.estimate(LLAMA, attn_implementation="eager")
    with pytest.raises(InputError, match="8 PiB"):
        result.at(seq_len=np.array([1024, 2**31]))
    with pytest.raises(InputError, match="from 1 to"):
        result.at(batch_size=np.array([1, 2**63], dtype=np.uint64))


@QUICK
@given(
    job=jobs(configs=[*CONFIGS, MISTRAL, MODERNBERT]),
    points=st.lists(st.tuples(BATCHES, SEQUENCES | EDGES), min_size=1, max_size=4),
)
def test_a_grid_has_the_peaks_of_its_points(job: dict[str, Any], points: list[tuple[int, int]]) -> None:
    """Each point as if it were asked for alone: nothing of another size is taken over."""
    np = pytest.importorskip("numpy")
    first = estimated(job)
    batches, sequences = (np.array(values) for values in zip(*points, strict=True))
    grid = first.at(batch_size=batches, seq_len=sequences)
    for index, (batch, seq) in enumerate(points):
        alone = estimated(job, batch_size=batch, seq_len=seq)
        assert phases(alone) == {phase: values[index] for phase, values in grid.requested_by_phase.items()}
        assert alone.peaks is not None
        assert grid.peak_requested_bytes[index] == alone.peaks.at_least
        assert phases(first.at(batch_size=batch, seq_len=seq)) == phases(alone)


@QUICK
@given(job=jobs(configs=[*CONFIGS, MISTRAL, MODERNBERT]), batch=BATCHES, seq=SEQUENCES | EDGES)
def test_lines_are_all_of_a_peak(job: dict[str, Any], batch: int, seq: int) -> None:
    result = estimated(job, batch_size=batch, seq_len=seq)
    assert result.peaks is not None
    for phase, ledger in result.peaks.ledgers.items():
        assert sum(line.bytes() for line in ledger if line.place == "device") == result.peaks.by_phase[phase]
        assert all(line.copies > 0 and line.bytes() > 0 for line in ledger)
    memory = result.to_dict()["memory"]
    on_device = [line for line in memory["lines"] if line["place"] == "device"]
    assert sum(line["bytes"] for line in on_device) == memory["peak_allocated"] == max(memory["peak_by_phase"].values())
    assert sum(memory["by_category"].values()) == memory["peak_allocated"]
    assert set(memory["by_category"]) == set(CATEGORIES)
    for phase, peak in memory["peak_by_phase"].items():
        listed = sum(line["bytes_by_phase"].get(phase, 0) for line in on_device)
        assert listed == peak if phase == memory["peak_phase"] else listed <= peak


SIZE = re.compile(r"(?:^|, )([^=(]+?) = (\d+)(?: \(.*?\))?")
ROW = re.compile(
    r"  .+: (?P<formula>\d+ × round512\(.*?\))(?: = (?P<numbers>\d+ × round512\([\d × ]+\)))? = (?P<bytes>[\d,]+)  \["
)


def value(formula: str) -> int:
    """A formula that `explain` printed, evaluated."""
    numbers = formula.replace("×", "*")
    assert re.fullmatch(r"\d+ \* round512\([\d *]+\)", numbers)
    return int(eval(numbers, {"round512": lambda nbytes: 512 * ceil(nbytes / 512)}))


@QUICK
@given(job=jobs(), batch=BATCHES, seq=SEQUENCES | EDGES)
def test_explanations_evaluate_to_the_bytes_that_they_print(job: dict[str, Any], batch: int, seq: int) -> None:
    result = estimated(job, batch_size=batch, seq_len=seq)
    assert result.peaks is not None
    text = peftplan.explain(result)
    sizes = dict(SIZE.findall(text.splitlines()[1]))
    total = 0
    rows = [ROW.match(line) for line in text.splitlines() if line.startswith("  ")]
    assert rows
    for row in rows:
        assert row is not None
        printed = int(row["bytes"].replace(",", ""))
        copies, dims = row["formula"].removesuffix(")").split("round512(")
        named = f"{copies}round512({' × '.join(sizes.get(dim, dim) for dim in dims.split(' × '))})"
        assert value(named) == value(row["numbers"] or row["formula"]) == printed
        total += printed
    assert total == result.peaks.allocated
    assert text.splitlines()[-1] == f"sum, in {result.peaks.phase}: {total:,}"
