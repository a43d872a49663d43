"""Write what a compiled layer allocates, from two rehearsals of one program at different numbers of tokens.

    python -m tools.compiled_layers FIRST.pickle ROWSxLENGTH SECOND.pickle ROWSxLENGTH [14,14,8,14 15,15,8,15]

The snapshots are those of `peftplan rehearse --snapshot`; the program is Unsloth's, with reentrant checkpoints, its own or those
of torch. A size that both have is constant, one in the ratio of the tokens is per token, one in the ratio of the tokens up to a
multiple is per such token, one in that of a mask of all pairs of tokens is per pair, a smaller one is taken as constant and said
so, and any other is an error. Choose batches in which these ratios differ. The last arguments say how many allocations the
forward of each layer makes in each rehearsal, where layers are of several kinds and run in several graphs. Prints the events of a
layer in the last step's first micro batch, whose sizes are given, as `peftplan.job.compiled_layers` reads them; all layers must
have the same ones. Add model, rank, modules and source by hand, and put the record into `data/compiled_layers.json`.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CHECKPOINTS = "unsloth_zoo/gradient_checkpointing.py", "torch/utils/checkpoint.py"
LAYER = "gpt_oss/modeling_gpt_oss.py"
BLOCKS = "_block_compile.py", LAYER
"""Where layers run: whole, or line by line of their own `forward`, of which torch compiles parts."""
GRAPH, INDUCTOR = "call", "torchinductor"
"""The function and the folder of what inductor writes."""
DOCUMENTS = "_block_varlen_prepare"
"""Writes the lengths of a row's documents, and checks the mask, once a forward, in the first layer that asks."""
WORKSPACE_BYTES = 8_519_680
"""cuBLAS takes it within the first layer, on the A100 of the rehearsals."""
FLUSHED_BYTES = 256 * 2**20
FLUSHED, CLONED = ("benchmark_gpu", "get_empty_cache_for_benchmark"), "maybe_clone_args"
"""Who times kernels: inductor and triton; and who copies what a kernel writes over."""
BLOCK, CHUNK = 128, 256
MULTIPLES = 32, BLOCK
"""Inductor sums gradients of norms by 32 tokens; flash attention's backward allocates for tokens up to a multiple of 128, of each
row where rows stay apart (`r%128`), and Mamba 2 for whole chunks of each row (`r%256`)."""
ALIGNED = 8
"""torch pads the last dim of a mask to the next multiple, of aligned ones too (`pad_last_dim`)."""
MOST_PARTIAL = 4 * 2**20
"""Bytes of inductor's partial sums at most, whose number it chooses by the length: those of the first snapshot are taken."""
MOST_PADDING = 1024
"""Bytes by which inductor pads the rows of a tensor at most, to multiples of 32 elements (`pad_strides`)."""
FORWARD, RECOMPUTED, BACKWARD, OTHER = "forward", "recomputed", "backward", "other"


class Event(NamedTuple):
    """An allocation of `size` bytes, or the end of the one with this number. `tunes`: while kernels are timed. `line`: of the
    layer's own `forward` or, where it runs whole, of its graph, the file that inductor wrote; 0 outside of both."""

    number: int
    size: int
    place: str
    tunes: bool
    ends: bool = False
    line: int = 0
    graph: str = ""


def events_of(snapshot: Path) -> list[Event]:
    """The events of a snapshot, each with the part of the step that made it."""
    allocated: dict[int, Event] = {}
    events: list[Event] = []
    for number, entry in enumerate(pickle.loads(snapshot.read_bytes())["device_traces"][0]):
        if entry["action"] == "alloc":
            tunes = any(frame["name"] in (*FLUSHED, CLONED) for frame in entry["frames"])
            graph, line = _line(entry["frames"])
            allocated[entry["addr"]] = Event(number, entry["size"], _place(entry["frames"]), tunes, line=line, graph=graph)
            events.append(allocated[entry["addr"]])
        elif entry["action"] == "free_completed" and entry["addr"] in allocated:
            events.append(allocated.pop(entry["addr"])._replace(ends=True))
    return events


def _line(frames: Sequence[dict[str, Any]]) -> tuple[str, int]:
    """Where a layer runs: the line of its own `forward`, or that of its graph and the graph's file."""
    own = next((frame["line"] for frame in frames if frame["filename"].endswith(LAYER)), 0)
    of_graph = next((frame for frame in reversed(frames) if frame["name"] == GRAPH and INDUCTOR in frame["filename"]), None)
    return ("", own) if own or of_graph is None else (of_graph["filename"], of_graph["line"])


def _place(frames: Sequence[dict[str, Any]]) -> str:
    if any(frame["name"] == DOCUMENTS for frame in frames):
        return OTHER
    own = [frame for frame in frames if frame["filename"].endswith(CHECKPOINTS)]
    of_layer = any(frame["filename"].endswith(BLOCKS) for frame in frames)
    if any(frame["name"] == FORWARD for frame in own):
        return FORWARD if of_layer else OTHER
    lines = {frame["line"] for frame in own if frame["name"] == BACKWARD}
    if not lines:
        return OTHER
    text = Path(own[0]["filename"]).read_text(encoding="utf-8").splitlines()
    if any("autograd.backward" in text[line - 1] for line in lines):
        return BACKWARD
    return RECOMPUTED if of_layer else OTHER  # an input that comes back from the host in fp32 is the checkpoint's


class Layer(NamedTuple):
    """The events of one layer: its forward without a graph, and its forward with one and backward."""

    forward: list[Event]
    training: list[Event]


def layers_of(runs: Sequence[tuple[str, list[Event]]], each: Sequence[int] = ()) -> list[Layer]:
    """The layers of the last step's first micro batch, in forward order: later ones add to gradients that are there already.

    `each`: the allocations of each layer's forward, where they are said.
    """
    begins: list[int] = []
    trained = True
    for index, (place, _) in enumerate(runs):
        if place == FORWARD and trained:
            begins.append(index)
        trained = place == RECOMPUTED or (trained and place != FORWARD)
    batches = [_of_batch(runs[begin:end], each) for begin, end in zip(begins, [*begins[1:], None], strict=True)]
    batches = [batch for batch in batches if batch]
    return max(reversed(batches[1:] or batches), key=lambda layers: sum(_left(layer.training) for layer in layers))


def _of_batch(runs: Sequence[tuple[str, list[Event]]], each: Sequence[int]) -> list[Layer]:
    """The layers of a micro batch; none of one that tries layers, or times kernels."""
    trained = [part for place, part in runs if place == RECOMPUTED]
    forward = [event for place, part in runs if place == FORWARD for event in part]
    alike = max(sum(not event.ends for event in forward) // max(len(trained), 1), 1)
    parts = list(_parts_of(forward, each) if each else _parts(forward, alike))
    return [] if len(parts) != len(trained) else [Layer(*both) for both in zip(parts, reversed(trained), strict=True)]


def _left(part: Sequence[Event]) -> int:
    """How many of its own tensors a part leaves."""
    return sum(-1 if event.ends else 1 for event in _own(part))


def _runs(events: Sequence[Event]) -> Iterator[tuple[str, list[Event]]]:
    """Runs of events of one place; recomputation and the backward behind it are one run."""
    place, run = OTHER, list[Event]()
    for event in events:
        goes_on = event.ends or event.place == place or (event.place == BACKWARD and place == RECOMPUTED)
        begins = event.place == RECOMPUTED and any(earlier.place == BACKWARD for earlier in run if not earlier.ends)
        if (not goes_on or (begins and not event.ends)) and run:
            yield place, run
            run = []
        if not event.ends:
            place = RECOMPUTED if event.place == BACKWARD and place == RECOMPUTED else event.place
        run.append(event)
    yield place, run


def _parts(forward: Sequence[Event], each: int) -> Iterator[list[Event]]:
    """Layers of as many allocations each, or each up to where the next begins its `forward` or its graph."""
    part: list[Event] = []
    line, graph = 0, ""
    for event in forward:
        begins = event.line < line or event.graph != graph if line else sum(not e.ends and not e.tunes for e in part) == each
        if not event.ends and not event.tunes and begins and part:
            yield part
            part = []
        part.append(event)
        if not event.ends and not event.tunes:
            line, graph = event.line, event.graph
    yield part


def _parts_of(forward: Sequence[Event], each: Sequence[int]) -> Iterator[list[Event]]:
    """Layers of so many allocations each."""
    part: list[Event] = []
    left = list(each)
    for event in forward:
        if not event.ends and not event.tunes and left and not left[0]:
            yield part
            part, left = [], left[1:]
        part.append(event)
        if not event.ends and not event.tunes and left:
            left[0] -= 1
    yield part


class Batch(NamedTuple):
    """Rows of so many tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> dict[str, int]:
        """What stands behind a size → by how many tokens it is multiplied."""
        tokens = self.rows * self.length
        rounded = {f"t%{multiple}": -(-tokens // multiple) * multiple for multiple in MULTIPLES}
        by_row = {f"r%{multiple}": self.rows * -(-self.length // multiple) * multiple for multiple in (BLOCK, CHUNK)}
        second, of_row = ((n // ALIGNED + 1) * ALIGNED for n in (tokens, self.length))
        pairs = {"q": tokens * second, "m": tokens * of_row, "p": tokens * self.length}
        return {"t": tokens, **rounded, **by_row, **pairs, "a": tokens + (tokens - 1) * -(-tokens // ALIGNED) * ALIGNED}


def text_of(first: Sequence[Event], second: Sequence[Event], batches: tuple[Batch, Batch]) -> str:
    """The events of tensors that the first part makes: `8t` bytes per token, `8t%128` per token up to a multiple of 128, `2q` per
    pair of tokens, the second ones up to the next multiple of 8, `2a` up to a multiple of 8, `2p` per pair of a row, `2m` as `2q`
    but of a row, `8t^100` per token of 100 at least, a constant, `-n` the end of the n-th, `|` before backward."""
    number, words = dict[int, int](), list[str]()
    own, sizes = ([event.size for event in _own(part) if not event.ends] for part in (first, second))
    pairs = _in_order(own, sizes, batches)
    seen: Counter[int] = Counter()
    for event in _own(first):
        if event.ends:
            words.append(f"-{number[event.number]}")
            continue
        if event.place == BACKWARD and "|" not in words:
            words.append("|")
        number[event.number] = len(number) + 1
        place = len(number) - 1
        word = pairs.get(place) or (_at_least(event.size, sizes[place], batches) if len(own) == len(sizes) else None)
        words.append(word or _size(event.size, seen[event.size], sizes, batches))
        seen[event.size] += 1
    return " ".join(words)


def _in_order(first: Sequence[int], second: Sequence[int], batches: tuple[Batch, Batch]) -> dict[int, str]:
    """The places of the first sizes that stand in the same order in the second, as many as can, and what they are."""
    most = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, size in enumerate(first):
        for j, other in enumerate(second):
            paired = most[i][j] + 1 if _word(size, other, batches) else 0
            most[i + 1][j + 1] = max(paired, most[i][j + 1], most[i + 1][j])
    words: dict[int, str] = {}
    i, j = len(first), len(second)
    while i and j:
        if most[i][j] == most[i - 1][j]:
            i -= 1
        elif most[i][j] == most[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            words[i] = _word(first[i], second[j], batches) or ""
    return words


def _own(part: Sequence[Event]) -> list[Event]:
    allocated = {event.number for event in part if not event.ends and not event.tunes}
    return [event for event in part if event.number in allocated]


def _size(size: int, before: int, others: Sequence[int], batches: tuple[Batch, Batch]) -> str:
    """The size in words where the two parts differ in order, by what the other has of it and of one in the ratio of the tokens.

    `before`: how many of it the part has allocated.
    """
    words = [word for other in others if (word := _word(size, other, batches))]
    if not words and size <= MOST_PARTIAL:
        print(f"{size} bytes are taken as constant", file=sys.stderr)
        return str(size)
    if not words:
        raise ValueError(f"{size} bytes are neither constant nor per token: {sorted(others)}")
    return words[min(before, len(words) - 1)]


def _word(size: int, other: int, batches: tuple[Batch, Batch]) -> str | None:
    """What two sizes are, if they may be of one tensor."""
    ratios = (_ratio(size, other, batches, unit) for unit in batches[0].tokens)
    return str(size) if other == size else next((ratio for ratio in ratios if ratio), None)


def _at_least(size: int, other: int, batches: tuple[Batch, Batch]) -> str | None:
    """The first size as bytes per token, where the second is of more tokens than there are: a place that inductor shares."""
    each, left = divmod(size, batches[0].tokens["t"])
    shared = size > MOST_PARTIAL and left < MOST_PADDING and each * batches[1].tokens["t"] < other < size
    return f"{each}t^{-(-other // each)}" if shared else None


def _ratio(size: int, other: int, batches: tuple[Batch, Batch], unit: str) -> str | None:
    """Both sizes as bytes per token, with less than `MOST_PADDING` left over."""
    first, second = (batch.tokens[unit] for batch in batches)
    each = size // first
    fits = each > 0 and size - each * first < MOST_PADDING and 0 <= other - each * second < MOST_PADDING
    return f"{each}{unit}" if fits else None


def tuned(part: Sequence[Event], most: int, tokens: int) -> list[int | str]:
    """After how many of a part's own allocations kernels are timed, in the first step; of the first `most`. `3:8t`: the third,
    over a copy of 8 bytes per token, which a kernel that writes over its input gets."""
    own = 0
    places: dict[int, int] = {}
    for event in part:
        own += not event.ends and not event.tunes and event.size != WORKSPACE_BYTES
        if event.tunes and not event.ends and own <= most:
            copied = event.size if event.size != FLUSHED_BYTES and event.size > MOST_PARTIAL else 0
            places[own] = max(places.get(own, 0), copied)
    return [f"{own}:{copied // tokens}t" if copied else own for own, copied in places.items()]


def record_of(
    runs: Sequence[Sequence[tuple[str, list[Event]]]], batches: tuple[Batch, Batch], each: Sequence[Sequence[int]] = ((), ())
) -> dict[str, object]:
    """What all layers do, and the first one if it does something else. The gradient of the input outlives a layer's backward, but
    for that of the first one, which ends behind the output; the checkpoint frees the output last."""
    layers = list(zip(*map(layers_of, runs, each), strict=True))
    own = [(_forward_of(a, b, batches), *_training_of(a, b, batches)) for a, b in layers]
    most = Counter(own[1:]).most_common(1)[0][0]
    forward, training, output = most
    first = [next(part for place, part in runs[0] if place == name) for name in (FORWARD, RECOMPUTED)]
    allocated = len(training.partition("|")[0].split())
    record: dict[str, object] = {
        "forward": forward,
        "training": training,
        "output": output,
        "tuned": [
            n
            for part, most in zip(first, (allocated, 10 * allocated), strict=True)
            for n in tuned(part, most, batches[0].tokens["t"])
        ],
    }
    kinds: dict[tuple[str, str, int], list[int]] = {}
    for number, events in enumerate(own[1:], 1):
        kinds.setdefault(events, []).append(number)
    alike = next((events for events in kinds if events[0] == own[0][0]), None)
    if alike is None:
        record["first"] = own[0]
    elif alike != most:
        kinds[alike].insert(0, 0)
    if others := [(numbers, *events) for events, numbers in kinds.items() if events != most]:
        record["others"] = others
    return record


def _forward_of(a: Layer, b: Layer, batches: tuple[Batch, Batch]) -> str:
    """A forward without a graph. The router's logits, which last until the loss, are taken to end with their layer."""
    words = text_of(a.forward, b.forward, batches)
    last = _own(a.forward)[-1]
    routed = last.line > 0 and not last.graph
    numbers = range(1, len(_allocated(words)))  # but for the result
    return " ".join([words, *(f"-{n}" for n in numbers if routed and f"-{n}" not in words.split())])


def _training_of(a: Layer, b: Layer, batches: tuple[Batch, Batch]) -> tuple[str, int]:
    """A forward with a graph and backward up to where the output ends, and which allocation the output is."""
    words = text_of(a.training, b.training, batches).split()
    output = next(int(word[1:]) for word in reversed(words) if word[0] == "-" and int(word[1:]) <= _before_backward(words))
    return " ".join(words[: words.index(f"-{output}")]), output


def _before_backward(words: Sequence[str]) -> int:
    return len(_allocated(" ".join(words[: words.index("|")])))


def _allocated(words: str) -> list[str]:
    return [word for word in words.split() if word[0] not in "-|"]


def main() -> None:
    """Print the record."""
    files, sizes = sys.argv[1:5:2], sys.argv[2:5:2]
    each = [list(map(int, numbers.split(","))) for numbers in sys.argv[5:]] or [[], []]
    first, second = (Batch(*map(int, size.split("x"))) for size in sizes)
    runs = [list(_runs(events_of(Path(file)))) for file in files]
    print(json.dumps(record_of(runs, (first, second), each), indent=1))


if __name__ == "__main__":
    main()
