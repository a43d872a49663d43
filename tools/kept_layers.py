"""Write what a layer without checkpoints allocates, of which torch compiles parts, from two rehearsals of one program.

    python -m tools.kept_layers FIRST.pickle ROWSxLENGTH SECOND.pickle ROWSxLENGTH

As `tools.compiled_layers`, whose words are those of the record; forward and backward of a layer lie apart here, and Mamba 2 runs
between two graphs. A layer's backward begins where the first kernel of the last layer's comes again. In the first rehearsal no
tensor of the batch may be as large as a weight, whose place inductor would give it. Prints the second layer's events; others that
differ are numbered. What the record has for a forward without a graph is not among them.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tools.compiled_layers import BACKWARD, CLONED, FLUSHED, FORWARD, OTHER, Batch, Event, text_of

MOST_BATCHES = 4
"""Micro batches that are looked at, from the last on."""
BLOCKS, BACKWARD_OF_GRAPH = "_block_compile.py", "_backward_impl"


def events_of(snapshot: Path) -> list[tuple[Event, str]]:
    """The events of a snapshot, each with the kernel that it comes from: the file and line of a graph."""
    allocated: dict[int, tuple[Event, str]] = {}
    events: list[tuple[Event, str]] = []
    for number, entry in enumerate(pickle.loads(snapshot.read_bytes())["device_traces"][0]):
        if entry["action"] == "alloc":
            names = {frame["name"] for frame in entry["frames"]}
            event = Event(number, entry["size"], _place(entry["frames"]), bool(names & {*FLUSHED, CLONED}))
            top = entry["frames"][0] if entry["frames"] else {"filename": "", "line": 0}
            allocated[entry["addr"]] = event, f"{top['filename']}:{top['line']}"
            events.append(allocated[entry["addr"]])
        elif entry["action"] == "free_completed" and entry["addr"] in allocated:
            event, kernel = allocated.pop(entry["addr"])
            events.append((event._replace(ends=True), kernel))
    return events


def _place(frames: Sequence[dict[str, Any]]) -> str:
    names = {frame["name"] for frame in frames}
    if BACKWARD_OF_GRAPH in names:
        return BACKWARD
    return FORWARD if any(frame["filename"].endswith(BLOCKS) and frame["name"] == "run" for frame in frames) else OTHER


class Layer(NamedTuple):
    """Events of a layer's forward and backward, and the numbers of the allocations that ended before its backward."""

    forward: list[Event]
    backward: list[Event]
    ended: set[int]


def layers_of(events: Sequence[tuple[Event, str]]) -> list[Layer]:
    """The layers of the last step's first micro batch, in forward order: later ones add to gradients that are there already."""
    firsts: list[int] = []
    trained = True
    for at, (event, _) in enumerate(events):
        if event.place == FORWARD and not event.ends and trained:
            firsts.append(at)
        if not event.ends:
            trained = event.place == BACKWARD or (trained and event.place != FORWARD)
    batches = [_of_batch(events[first:end]) for first, end in list(pairwise([*firsts, len(events)]))[-MOST_BATCHES:]]
    return max(reversed(batches), key=lambda layers: sum(_left(layer.backward) for layer in layers))


def _left(part: Sequence[Event]) -> int:
    """How many of its own tensors a part leaves."""
    own = {event.number for event in part if not event.ends}
    return len(own - {event.number for event in part if event.ends})


def _of_batch(events: Sequence[tuple[Event, str]]) -> list[Layer]:
    last = max(at for at, (event, _) in enumerate(events) if event.place == FORWARD and not event.ends)
    forward = list(_parts(events[: last + 1], events[0][1]))
    rest = list(events[last + 1 :])
    loss = next(at for at, (event, _) in enumerate(rest) if event.place == OTHER and not event.ends)
    forward[-1] += [event for event, _ in rest[:loss]]
    backward = [at for at, (event, _) in enumerate(rest) if event.place == BACKWARD and not event.ends][1:]  # but the last norm's
    ended = {event.number for event, _ in rest[: backward[0]] if event.ends}
    layers = []
    for part, own in zip(_parts(rest[backward[0] :], rest[backward[0]][1]), reversed(forward), strict=True):
        layers.append(Layer(own, part, set(ended)))
        ended |= {event.number for event in part if event.ends}
    return layers[::-1]


def _parts(events: Sequence[tuple[Event, str]], kernel: str) -> Iterator[list[Event]]:
    """Parts that begin with this kernel."""
    part: list[Event] = []
    for event, own in events:
        if own == kernel and not event.ends and part:
            yield part
            part = []
        part.append(event)
    yield part


def training_of(layer: Layer) -> tuple[list[Event], int]:
    """The events of a layer that its record has, and which allocation its result is: the one that ends between both parts."""
    own = {event.number: at for at, event in enumerate((e for e in layer.forward if not e.ends and not e.tunes), 1)}
    within = {event.number for event in layer.forward if event.ends}
    (result,) = (number for number in own if number in layer.ended and number not in within)
    return [*layer.forward, *(event._replace(place=BACKWARD) for event in layer.backward)], own[result]


def record_of(runs: Sequence[Sequence[tuple[Event, str]]], batches: tuple[Batch, Batch]) -> dict[str, object]:
    """What all layers but the last do."""
    texts = []
    for a, b in zip(*(layers_of(events) for events in runs), strict=True):
        (first, output), (second, _) = training_of(a), training_of(b)
        texts.append((text_of(first, second, batches), output))
    return {"training": texts[1][0], "output": texts[1][1], "others": [n for n, text in enumerate(texts) if text != texts[1]]}


def main() -> None:
    """Print the record."""
    files, sizes = sys.argv[1::2], sys.argv[2::2]
    first, second = (Batch(*map(int, size.split("x"))) for size in sizes)
    print(json.dumps(record_of([events_of(Path(file)) for file in files], (first, second)), indent=1))


if __name__ == "__main__":
    main()
