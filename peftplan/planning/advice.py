"""What to change when a job does not fit a card: the cheapest change or combination that suffices, and what others save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from peftplan.dtypes import ITEMSIZE
from peftplan.errors import PeftplanError
from peftplan.planning.attempts import judged, row_of, sizes_of, tried
from peftplan.planning.changes import OF_GPUS, SEQUENCE_STEP, Change, Sizes, combinations, micro_batches, single_changes
from peftplan.planning.fewest_gpus import fewest_gpus, several, spared
from peftplan.planning.together import together
from peftplan.planning.trials import Trials
from peftplan.results.advice import FITS, Advice, Advised

if TYPE_CHECKING:
    from peftplan.job.job import Job

LIKELY = 0.25
"""A change is tried first if it leaves room for this share of what the allocator holds beside the tensors without it, of fewer
tensors in proportion."""
SURE = 0.75
"""A method is taken to fit, and no further one is tried, where its tensors fill at most so much of the room: beside more,
reserved bytes decide, as of LoRA of Llama 3.1 8B over two T4, whose tensors fill 0.9 of it."""
WORTH = 0.02
"""Smaller savings, as a share of the peak, are not shown, unless they change the verdict."""
MOST_COMBINATIONS = 12
"""Combinations that are evaluated, the cheapest first."""
EVERY_LAYER = ("fsdp1", "fsdp2", "zero1", "zero2", "zero3")
"""Strategies under which no layer is a copy of another."""
OF_LOSS = frozenset({"loss", "trainer"})
"""Changes of the loss, of which TRL has one of its own."""
OF_TOKENS = OF_LOSS | {"attn_implementation"}
"""Changes of what grows with the tokens."""
WITHOUT_TOKENS = ("load", "step")
"""Phases in which nothing does."""
OF_STATES = ("optim", "adapter_dtype", "offload_optimizer")
"""Changes of what the optimizer holds."""
SAVED_OF_STATES = 2
"""They are taken to save at most so many times its states: these, and gradients and temporaries as large."""
SAVED_OF_LOGITS = 4
"""Changes of the loss are taken to save at most so many times the logits in fp32: these, their gradient, and temporaries as
large."""
OTHER_TRAINING = frozenset({"method", "target_modules", "seq_len"})
"""Changes of what is trained, or of its data: where only these help, several GPUs are tried too."""
MOST_REPLAYS = 3
"""Combinations, and single changes, that are replayed until one fits; nearly always the first one does. As many of the other
changes are replayed, those that save most."""


def advise(job: Job, trials: Trials, *, everything: bool = False) -> Advised:
    """What to change so that a job fits a card.

    Counted by formulas, whichever engine gave the verdict: nothing is said of a job without formulas. `everything`: all single
    changes are replayed, and all combinations whose savings add up to enough.
    """
    unchanged = sizes_of(trials, {})
    if unchanged is None:
        return Advised()
    possible = list(single_changes(job, runs_flash_attention=trials.runs_flash_attention))
    least = _least_weights(trials, [options for options, _ in possible])
    if least > trials.room:
        return Advised(weights_alone=least, smallest_card=trials.smallest_card(), several_gpus=several(job, trials, unchanged))
    saving = [change for change in _singles(job, trials, unchanged, possible) if max(change.saving.values()) > 0]
    refined = {str(change.options): change for change in (_refined(job, trials, unchanged, change) for change in saving)}
    singles = list(refined.values())
    enough = _enough(job, trials, unchanged, singles, everything=everything)
    replayed = list(_replayed(trials, unchanged, enough, everything=everything))
    fitting = _fitting(replayed, everything=everything)
    if not everything:
        fitting = fitting or _all_it_takes(job, trials, unchanged, singles)
        fitting = [spared(job, trials, unchanged, singles, row) for row in fitting]
    numbers = fewest_gpus(job, trials, unchanged, singles, fitting)
    fitting += numbers
    failed = {str(row.options): row.verdict for row in replayed if row.verdict not in FITS}

    def shortens_in_vain(change: Change) -> bool:
        return "seq_len" in change.options and (change.left(unchanged) > trials.room or str(change.options) in failed)

    changes = (change for change in singles if everything or not shortens_in_vain(change))
    rest = [row for change in changes if not _restates(row := row_of(trials, unchanged, change), fitting)]
    others = [row._replace(verdict=failed.get(str(row.options), row.verdict)) for row in rest]
    rows: list[Advice] = []
    for row in sorted(others, key=lambda row: -row.saving_bytes):
        worth = row.saving_bytes >= WORTH * max(unchanged.values())
        if not everything and any(other.verdict == "fits" and other.options.items() < row.options.items() for other in fitting):
            continue  # it does more than what fits
        if worth and (everything or not any(_alike(row.options, other.options) for other in (*rows, *numbers))):
            open_yet = row.verdict is None and not everything and len(rows) < MOST_REPLAYS
            cheaper = [change for change in singles if not any(change.options == other.options for other in fitting)]
            rows.append(_cheapest_alike(trials, unchanged, refined[str(row.options)], cheaper) if open_yet else row)
    as_wanted = any(not row.options.keys() & OTHER_TRAINING for row in fitting)
    return Advised(
        (*fitting, *rows),
        smallest_card=None if fitting else trials.smallest_card(),
        several_gpus=None if as_wanted else several(job, trials, unchanged),
        everything=everything,
    )


def _singles(job: Job, trials: Trials, before: Sizes, possible: Sequence[tuple[dict[str, object], int]]) -> list[Change]:
    """The single changes. Where a strategy has every layer run, which takes a tenth of a second for each change of 70B, those are
    left out that cannot save what is worth showing, those that do less than one that saves too little, and what does more of
    the same as one that surely suffices. Changes that save only what grows with the tokens come last. Where that is too little to
    be worth showing, they are tried only if another change leaves room for all but that.
    """
    if job.distributed is None or job.distributed.strategy not in EVERY_LAYER:
        return [change for options, price in possible if (change := tried(trials, before, options, price)) is not None]
    setup, peak = job.setup, max(before.values())
    most = WORTH * peak if peak > trials.room else 0
    logits = SAVED_OF_LOGITS * ITEMSIZE["fp32"] * setup.rows * setup.seq_len * (job.architecture.vocab_size or 0)
    little = {
        **dict.fromkeys(OF_STATES, SAVED_OF_STATES * trials.states < most),
        **dict.fromkeys(OF_LOSS, logits < most),
        "attn_implementation": setup.attn_implementation == "sdpa" and not setup.padding,  # it runs the same kernel
    }
    lengths = [change for change in reversed(possible) if "seq_len" in change[0]]  # the shortest first
    of_tokens = [change for change in possible if next(iter(change[0])) in OF_TOKENS]
    few_tokens = peak - _without_tokens(before) < most
    more = [options for options, _ in possible if options.keys() <= OF_GPUS]
    likely = [options for options in more if peak - trials.lasting() + trials.lasting(**options) <= trials.room] or more[-1:]
    decided: set[str] = set()
    changes: list[Change] = []
    others_first = (change for change in possible if change not in lengths and change not in of_tokens)
    for options, price in (*lengths, *others_first, *of_tokens):
        (name, *others) = options
        kind = "gpus" if options.keys() <= OF_GPUS else name
        if kind in decided or (little.get(kind) and not set(others) - OF_LOSS) or (kind == "gpus" and options not in likely):
            continue
        if any(change.options.items() < options.items() and change.left(before) <= SURE * trials.room for change in changes):
            continue
        if (
            few_tokens
            and kind in OF_TOKENS
            and not any(_lacks_room_for_tokens(change, before, trials.room) for change in changes)
        ):
            continue
        if (change := tried(trials, before, options, price)) is None:
            continue
        changes.append(change)
        left = change.left(before)
        suffices = kind in ("method", "gpus") and left <= SURE * trials.room
        if suffices or (kind == "seq_len" and left > trials.room) or kind == "optim":  # the first one holds no states
            decided.add(kind)
    in_order = [options for options, _ in possible]
    return sorted(changes, key=lambda change: in_order.index(dict(change.options)))


def _without_tokens(sizes: Sizes) -> int:
    return max((size for phase, size in sizes.items() if phase in WITHOUT_TOKENS), default=0)


def _lacks_room_for_tokens(change: Change, before: Sizes, room: int) -> bool:
    after = {phase: size - change.saving[phase] for phase, size in before.items()}
    return _without_tokens(after) <= room < max(after.values())


def _restates(row: Advice, shown: Iterable[Advice]) -> bool:
    """Whether a change is one that is shown, or adds to it what follows from it, such as a trainer's own loss."""
    return any(
        each.options == row.options or (each.options.items() < row.options.items() and each.saving_bytes == row.saving_bytes)
        for each in shown
    )


def _alike(options: Mapping[str, object], others: Mapping[str, object]) -> bool:
    """Whether two single changes set the same thing, one of them perhaps more."""
    return set(options) <= set(others) or set(others) <= set(options)


def _least_weights(trials: Trials, possible: Sequence[Mapping[str, object]]) -> int:
    """The fewest bytes that the base's weights can take: savings of a change of method and of another change add up."""
    weights = trials.weights()
    saved = {True: 0, False: 0}
    for options in possible:
        with suppress(PeftplanError):
            of_method = "method" in options
            saved[of_method] = max(saved[of_method], weights - trials.weights(**options))
    return weights - sum(saved.values())


def _refined(job: Job, trials: Trials, before: Sizes, change: Change) -> Change:
    """The largest batch whose tensors likely leave enough room, else that whose tensors find it, or the longest such sequence."""
    if change.left(before) > trials.room:
        return change
    if "batch_size" in change.options:
        likely = _largest(job, trials, before, change, within=_likely_room(trials, before))
        if likely.left(before) <= _likely_room(trials, before):
            return likely
        return _largest(job, trials, before, change, within=trials.room)
    if "seq_len" in change.options:
        return _longest(job, trials, before, change, within=trials.room)
    return change


def _likely_room(trials: Trials, before: Sizes) -> int:
    """Bytes of tensors with which the job likely fits."""
    peak = max(before.values())
    roomy = int(trials.roomy / (1 + LIKELY * max(trials.reserved / peak - 1, 0)))
    # where only what the allocator holds beside the tensors is too much, to save less than that rarely helps
    return roomy if peak > trials.room else min(roomy, peak - (trials.reserved - trials.room))


def _in_single_rows(job: Job, trials: Trials, before: Sizes, change: Change) -> Change:
    """The change beside micro batches of one row, which cost only time and leave room for longer sequences."""
    smaller = [] if "batch_size" in change.options else micro_batches(job)
    return (smaller and tried(trials, before, {**smaller[0], **change.options}, change.price)) or change


def _largest(job: Job, trials: Trials, before: Sizes, change: Change, *, within: int) -> Change:
    """The largest micro batches whose tensors take so many bytes, by bisection; those of the change where none do."""
    sizes = micro_batches(job)[1:]
    while sizes:
        middle = len(sizes) // 2
        alone = tried(trials, before, {"batch_size": sizes[middle]["batch_size"]}, change.price)
        too_large = alone is not None and alone.left(before) > within  # even without gradients that wait for others
        larger = None if too_large else tried(trials, before, sizes[middle], change.price)
        if larger is not None and larger.left(before) <= within:
            change, sizes = larger, sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return change


def _longest(job: Job, trials: Trials, before: Sizes, change: Change, *, within: int) -> Change:
    """The longest sequence whose tensors take so many bytes, by bisection: peaks grow with it."""
    shorter = change.options["seq_len"]
    assert isinstance(shorter, int)
    low, high = shorter // SEQUENCE_STEP, (job.setup.seq_len - 1) // SEQUENCE_STEP
    while low < high:
        middle = (low + high + 1) // 2
        longer = tried(trials, before, {**change.options, "seq_len": middle * SEQUENCE_STEP}, change.price)
        if longer is not None and longer.left(before) <= within:
            low, change = middle, longer
        else:
            high = middle - 1
    return change


def _enough(job: Job, trials: Trials, before: Sizes, singles: Sequence[Change], *, everything: bool) -> Iterator[Change]:
    """Single changes and combinations whose tensors leave enough room, the cheapest of those that most likely fit first.

    Of the shortest sequences they have longer ones, as far as there is room.
    """
    roomy = _likely_room(trials, before)
    together = combinations(singles, before, roomy) or combinations(singles, before, trials.room)
    evaluated = together if everything else together[:MOST_COMBINATIONS]
    alone = [change for change in singles if change.left(before) <= trials.room]

    def likely_and_cheap(change: Change) -> tuple[object, ...]:
        left = change.left(before)
        return left > roomy, change.price, len(change.options), left

    for change in sorted((*alone, *evaluated), key=likely_and_cheap):
        actual = change if change in alone else tried(trials, before, change.options, change.price)
        if actual is not None and actual.left(before) <= trials.room:
            shortens = change not in alone and "seq_len" in actual.options
            by_rows = _in_single_rows(job, trials, before, actual) if shortens else actual
            longer = by_rows is not actual or (shortens and actual.options["seq_len"] == SEQUENCE_STEP)
            within = trials.room if by_rows is actual else max(roomy, by_rows.left(before))
            yield _longest(job, trials, before, by_rows, within=within) if longer else actual


def _replayed(trials: Trials, before: Sizes, changes: Iterable[Change], *, everything: bool) -> Iterator[Advice]:
    """Changes with their verdicts: up to the first that fits, or all if everything is searched. Where none does, one whose
    sequences are made so short that it does: of these, that with the longest."""
    helps, too_long = False, []
    for change in changes if everything else islice(changes, MOST_REPLAYS):
        if (row := judged(trials, before, change)) is not None:
            yield row
            if row.verdict == "fits" and not everything:
                return
            helps = helps or row.verdict in FITS
            too_long += [change] * ("seq_len" in change.options)
    if not helps:
        shorter = (_proven(trials, before, change) for change in too_long)
        fitting = sorted((row for row in shorter if row.verdict in FITS), key=lambda row: -int(str(row.options["seq_len"])))
        yield from fitting[:1]


def _fitting(replayed: Iterable[Advice], *, everything: bool) -> list[Advice]:
    """The first change that fits, else the first that is tight; all of them if everything is searched."""
    rows = sorted((row for row in replayed if row.verdict in FITS), key=lambda row: FITS.index(str(row.verdict)))
    return rows if everything else rows[:1]


def _all_it_takes(job: Job, trials: Trials, before: Sizes, singles: Sequence[Change]) -> list[Advice]:
    """As many changes as it takes, where no combination of a few fits though their savings add up to enough."""
    likely = _likely_room(trials, before)
    saved = {phase: sum(max(change.saving[phase], 0) for change in singles) for phase in before}
    if any(size - saved[phase] > trials.room for phase, size in before.items()):
        return []
    change = together(trials, before, singles, likely=likely)
    if change is not None and "seq_len" in change.options:
        change = _longest(job, trials, before, change, within=max(likely, change.left(before)))
    rows = [] if change is None else [_proven(trials, before, change)]
    return [row for row in rows if row.verdict in FITS]


def _cheapest_alike(trials: Trials, before: Sizes, change: Change, singles: Sequence[Change]) -> Advice:
    """The cheapest change of what this one sets that fits, such as LoRA in place of QLoRA; else this one, replayed."""
    cheaper = [other for other in singles if other.price < change.price and other.left(before) <= trials.room]
    alike = sorted((other for other in cheaper if _alike(other.options, change.options)), key=lambda other: other.price)
    rows = (judged(trials, before, other) for other in alike[:MOST_REPLAYS])
    return next((row for row in rows if row is not None and row.verdict == "fits"), None) or _proven(trials, before, change)


def _proven(trials: Trials, before: Sizes, change: Change) -> Advice:
    """The row of a change whose tensors leave enough room, replayed; of sequences that do not fit, shorter ones that do."""
    row = judged(trials, before, change) or row_of(trials, before, change)
    length = change.options.get("seq_len")
    if row.verdict in FITS or not isinstance(length, int):
        return row
    low, high = 0, length // SEQUENCE_STEP
    while high - low > 1:
        middle = (low + high) // 2
        shorter = tried(trials, before, {**change.options, "seq_len": middle * SEQUENCE_STEP}, change.price)
        of_shorter = None if shorter is None else judged(trials, before, shorter)
        if of_shorter is not None and of_shorter.verdict in FITS:
            low, row = middle, of_shorter
        else:
            high = middle
    return row
