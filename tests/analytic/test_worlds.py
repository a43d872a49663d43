"""A step recorded for one rank of one world, read for others: what it says there is what a step of their own says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

np = pytest.importorskip("numpy")

import peftplan  # noqa: E402
from peftplan.analytic import sized, worlds  # noqa: E402
from peftplan.analytic.compiled import COMPILED  # noqa: E402
from peftplan.analytic.sized import Points, Sized  # noqa: E402
from peftplan.arrays import larger, smaller  # noqa: E402
from peftplan.distributed.any_world import Worlds, place_of  # noqa: E402
from peftplan.distributed.names import StrategyName  # noqa: E402
from peftplan.planning.sweep_grid import counted  # noqa: E402
from peftplan.units import ceil_div, round512  # noqa: E402
from tests.memory.engines import shallow  # noqa: E402

MODEL = shallow("qwen2.5-0.5b", 6)
POINTS = Points(np.array([1, 2, 4, 3]), np.array([512, 512, 1000, 8]))
JOBS: dict[str, dict[str, object]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp1": {"strategy": "fsdp1"},
    "fsdp1, full": {"strategy": "fsdp1", "method": "full"},
    "fsdp1, full, states in 8 bits": {"strategy": "fsdp1", "method": "full", "optim": "adamw_bnb_8bit"},
    "fsdp1, full, temporaries of each tensor": {"strategy": "fsdp1", "method": "full", "optim": "adamw_torch"},
    "fsdp1, states made at once": {"strategy": "fsdp1", "optim": "adagrad"},
    "fsdp1, one parameter a unit": {"strategy": "fsdp1", "use_orig_params": False},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2, full": {"strategy": "fsdp2", "method": "full"},
    "fsdp2, qlora on the host": {"strategy": "fsdp2", "method": "qlora", "offload_params": "cpu"},
    "fsdp2, hybrid": {"strategy": "fsdp2", "dp_shard_size": 2},
    "zero1": {"strategy": "zero1", "gradient_accumulation_steps": 2},
    "zero1, full, tensors larger than the bucket": {"strategy": "zero1", "method": "full", "reduce_bucket_size": 10**7},
    "zero1, full, all-reduced whole": {"strategy": "zero1", "method": "full", "reduce_scatter": False},
    "zero2, full, accumulated": {"strategy": "zero2", "method": "full", "gradient_accumulation_steps": 4},
    "zero2, full, overlapping": {"strategy": "zero2", "method": "full", "overlap_comm": True, "reduce_bucket_size": 10**8},
    "zero2": {"strategy": "zero2"},
    "zero2, full, in small buckets": {"strategy": "zero2", "method": "full", "reduce_bucket_size": 10**7},
    "zero2, dealt out in turn": {"strategy": "zero2", "round_robin_gradients": True},
    "zero2, optimizer on the host": {"strategy": "zero2", "offload_optimizer": "cpu"},
    "zero1, full, optimizer on the host": {"strategy": "zero1", "method": "full", "offload_optimizer": "cpu"},
    "zero2, full, in small buckets, optimizer on the host": {
        "strategy": "zero2",
        "method": "full",
        "offload_optimizer": "cpu",
        "reduce_bucket_size": 10**7,
        "gradient_accumulation_steps": 2,
    },
    "zero3": {"strategy": "zero3"},
    "zero3, full": {"strategy": "zero3", "method": "full"},
}


def at(world: int, options: Mapping[str, object]) -> Sized:
    """A job over so many GPUs."""
    job = {"method": "lora", **options, "gpus": world}
    return Sized(lambda rank: counted(MODEL, **job), [], compute_capability="8.0")


@pytest.mark.parametrize("options", JOBS.values(), ids=JOBS)
def test_a_world_needs_what_it_needs_by_itself(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds that divide the shapes, worlds that do not, and more ranks than a LoRA matrix has rows."""
    COMPILED.clear()
    of_all = {world: at(world, options).requested(POINTS) for world in (2, 4, 6, 64)}
    most = {world: at(world, options).most_requested(POINTS).tolist() for world in of_all}
    monkeypatch.setattr(sized, "SHARED", ())
    COMPILED.clear()
    for world in (4, 6, 64):  # the record is the first world's own
        alone = at(world, options).requested(POINTS)
        assert {phase: values.tolist() for phase, values in of_all[world].items()} == {
            phase: values.tolist() for phase, values in alone.items()
        }
        assert most[world] == np.maximum.reduce(list(alone.values())).tolist()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"])
def test_points_equal_single_estimates(strategy: StrategyName) -> None:
    """At world × batch × sequence."""
    for world in (2, 8):
        by_phase = at(world, {"strategy": strategy}).requested(POINTS)
        most = np.maximum.reduce(list(by_phase.values())).tolist()
        sizes = zip(POINTS.batch_size.tolist(), POINTS.seq_len.tolist(), most, strict=True)
        for batch_size, seq_len, nbytes in sizes:
            single = peftplan.estimate(
                MODEL, method="lora", strategy=strategy, gpus=world, batch_size=batch_size, seq_len=seq_len
            )
            assert single.peaks is not None
            assert nbytes == single.peaks.at_least


@pytest.mark.parametrize(
    "name", ["fsdp1", "fsdp2", "zero1, full, tensors larger than the bucket", "zero1, full, optimizer on the host"]
)
def test_worlds_share_a_record(name: str) -> None:
    """FSDP over 2 to 1,024 GPUs is recorded once at each batch size; so is ZeRO-1, each of whose ranks keeps other gradients."""
    COMPILED.clear()
    worlds._RECORDS.clear()
    for world in (2, 16, 1024):
        at(world, JOBS[name]).requested(POINTS.take(np.array([1])))
    assert {len(records) for records in worlds._RECORDS.values()} == {1}


@pytest.mark.parametrize("name", ["zero3", "zero1, full, tensors larger than the bucket", "fsdp2, qlora on the host"])
def test_batch_sizes_share_a_record_where_no_operation_goes_by_them(name: str) -> None:
    """One sequence and two run the same operations of Qwen 2, whose heads are not copied."""
    COMPILED.clear()
    worlds._RECORDS.clear()
    at(4, JOBS[name]).requested(Points(np.array([1, 2, 3]), np.array([1000, 1000, 2000])))
    assert [len(records) for records in worlds._RECORDS.values()] == [1]


def test_numbers_follow_from_the_batch_size_too() -> None:
    """Two rows of 8 tokens in a world of 8 are 16; in the same world three are 24, and a batch of one row runs another step."""
    of = Worlds(8, 3, 2)
    tokens = of.batch_size * 8
    assert of.batch_size > 1
    place = place_of(tokens) or 0
    assert [(of.at(8, 3, rows) or {place: None})[place] for rows in (2, 3, 1)] == [16, 24, None]


def test_numbers_follow_from_the_world_size() -> None:
    """In a world of 8, rank 3 of 10 rows: ⌈10/8⌉ = 2 rows of 300 elements of 2 bytes; in one of 4 there are 3 rows."""
    of = Worlds(8, 3)
    rows = ceil_div(10, of.world)
    nbytes = round512(2 * 300 * rows)
    share = smaller(larger(of.rank * 2, 1), 5)
    in_world = {world: dict(enumerate(of.at(world, rank) or ())) for world, rank in ((8, 3), (4, 0))}
    places = [place_of(number) or 0 for number in (rows, nbytes, share)]
    assert [in_world[8][place] for place in places] == [2, 1536, 5]
    assert [in_world[4][place] for place in places] == [3, 2048, 1]


def test_an_answer_holds_elsewhere_or_the_record_does_not() -> None:
    """Code that asks whether a rank has more than one row runs otherwise in a world that says no."""
    of = Worlds(2)
    rows = ceil_div(8, of.world)
    assert rows > 1
    assert list(range(of.rank)) == []  # a loop goes by the value: rank 0 alone
    assert of.at(4, 0) is not None
    assert of.at(8, 0) is None
    assert of.at(4, 1) is None


def test_nothing_is_read_behind_the_record() -> None:
    """A number that differs between worlds is no number of all of them."""
    of = Worlds(2)
    rows = ceil_div(8, of.world)
    of.at(4, 0)
    with pytest.raises(AssertionError, match="differs between worlds"):
        int(rows)
    with pytest.raises(AssertionError, match="has ended"):
        rows + 1


def test_numbers_of_two_records_never_meet() -> None:
    """A table that outlives a record does not take the number of the next one for its own."""
    one, other = Worlds(2), Worlds(2)
    assert one.world != other.world
    assert {one.world: "kept"}.get(other.world) is None
    with pytest.raises(AssertionError, match="two records"):
        one.world + other.world


def test_points_that_are_kept_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones may be more: they are read later."""
    monkeypatch.setattr(worlds, "NAMED_BYTES", 10**6)
    grid = Points(np.repeat(np.arange(1, 101), 1000), np.tile(np.arange(8, 8008, 8), 100))
    for world in (4, 8):
        options = {"method": "full", "gpus": world, "strategy": "zero3"}
        over = Sized(lambda _, options=options: counted(MODEL, **options), (), compute_capability="8.0")
        over.requested(grid)
        *before, _ = (kept.num_bytes for *_, kept in worlds._NAMED)
        assert sum(before) <= 10**6
