"""Which layers of a stack run on the tape, and of which one every other layer is a copy.

Layers of one kind do the same. The first and the last of each kind run; the others are copies of the last. Where only every n-th
layer is checkpointed, those that are not are of another kind.

Source: transformers, modeling_utils.py (`_set_gradient_checkpointing`): layers are numbered through the whole model, an
encoder's before its decoder's, and those whose number n divides are checkpointed.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby, pairwise


def kinds(block_of: Mapping[int, int], partial: Sequence[Collection[int]]) -> tuple[int, ...]:
    """The kind of each layer of a stack: its block, and which tensors it has that other layers lack.

    `block_of`: layer → its block. `partial`: the layers of each tensor that not all layers have.
    """
    every = len(block_of)
    if any(_interleaved(layers, every) for layers in partial):
        return tuple(range(every))
    seen: dict[tuple[int, ...], int] = {}
    return tuple(
        seen.setdefault((block_of[layer], *(layer in layers for layers in partial)), len(seen)) for layer in sorted(block_of)
    )


def seconds_apart(kinds: tuple[int, ...]) -> tuple[int, ...]:
    """The second layer of each kind as a kind of its own: where a layer's outputs live until the next layer returns, it frees
    those of the first, which nothing keeps for backward if nothing before it trains."""
    return tuple(-1 - kind if kinds[:layer].count(kind) == 1 else kind for layer, kind in enumerate(kinds))


def _interleaved(layers: Collection[int], every: int) -> bool:
    """Whether layers with and without a tensor alternate, so that no layer can be a copy of a distant one."""
    return sum((layer in layers) != (layer - 1 in layers) for layer in range(1, every)) > 1


def checkpointed_layers(layers: int, *, before: int, every: int) -> tuple[bool, ...]:
    """Whether each layer of a stack is checkpointed; `before`: how many layers of the model come before the stack."""
    return tuple((before + layer) % every == 0 for layer in range(layers))


def paired(kinds: tuple[int, ...], flags: tuple[bool, ...]) -> tuple[int, ...]:
    """The kind of each layer, where a layer that is checkpointed is of another kind than one that is not."""
    numbers: dict[tuple[int, bool], int] = {}
    return tuple(numbers.setdefault(pair, len(numbers)) for pair in zip(kinds, flags, strict=True))


def sections_of_periods(kinds: tuple[int, ...], *, summing: bool) -> tuple[list[int], dict[int, list[int]]]:
    """The layers that run, of kinds that alternate; section → the layers that are copies of it.

    The first of each kind runs, and the whole last period, since its backward finds everything else still kept; of equal layers
    in a row there only the first and the last. `summing`: all layers add to one gradient, which the last layer makes; the last
    layer then has no copies.
    """
    first = {kind: layer for layer, kind in reversed([*enumerate(kinds)])}
    last = {kind: layer for layer, kind in enumerate(kinds[: len(kinds) - summing])}
    tail = min((layer for kind, layer in last.items() if layer != first[kind]), default=len(kinds) - 2 * summing)
    sections = sorted(layer for layer in first.values() if layer < tail)
    copies: dict[int, list[int]] = {}
    opening: dict[int, int] = {}
    for kind, group in groupby(range(tail, len(kinds)), key=kinds.__getitem__):
        run = [*group]
        ends = run[-2:] if summing else run[-1:]
        samples = [run[0], *(layer for layer in ends if layer != run[0])]
        opening.setdefault(kind, len(sections))
        if len(run) > len(samples):
            copies[len(sections) + 1] = [layer for layer in run if layer not in samples]
        sections += samples
    for kind, section in opening.items():
        between = [layer for layer in range(tail) if kinds[layer] == kind and layer != first[kind]]
        if between:
            copies[section] = between
    return sections, copies


Copied = dict[int, dict[int, list[int]]]
"""Section → the section before which copies of it go → the layers that these are."""


def placed(kinds: tuple[int, ...], *, summing: bool, mixed: bool) -> tuple[list[int], Copied]:
    """The layers that run, and the copies of each.

    Copies go where their layers run, so those of a kind may stand in several places. `mixed`: some layers are checkpointed and
    some are not. `summing`: all layers add to one gradient; copies of kinds that alternate then go behind the first of each kind.
    """
    alternating = not _in_runs(kinds)
    sections, copies = (sections_of_periods if alternating and mixed else sections_of)(kinds, summing=summing)
    if summing and alternating and not mixed:
        return sections, {section: {len(set(kinds)): layers} for section, layers in copies.items()}
    by_place: Copied = {}
    for section, layers in copies.items():
        for layer in layers:
            by_place.setdefault(section, {}).setdefault(bisect(sections, layer), []).append(layer)
    return sections, by_place


def sections_of(kinds: tuple[int, ...], *, summing: bool = False) -> tuple[list[int], dict[int, list[int]]]:
    """The layers that run, first and last of each kind, in order; section → the layers that are copies of it.

    `summing`: the layer before the last as well, where all add to one gradient. Where kinds alternate then, the first of each
    kind come first, and the last of each at the end.
    """
    first = {kind: layer for layer, kind in reversed([*enumerate(kinds)])}
    last = {kind: layer for layer, kind in enumerate(kinds) if layer != first[kind]}
    before = _second_last(kinds, first, last) if summing else {}
    sections = [*sorted(first.values()), *sorted(before.values()), *sorted(last.values())]
    if not summing or _in_runs(kinds):
        sections.sort()
    copied = [layer for layer in range(len(kinds)) if layer not in sections]
    return sections, {
        sections.index(before.get(kind, layer)): [n for n in copied if kinds[n] == kind] for kind, layer in last.items()
    }


def _in_runs(kinds: tuple[int, ...]) -> bool:
    """Whether all layers of a kind follow each other."""
    return 1 + sum(a != b for a, b in pairwise(kinds)) == len(set(kinds))


def _second_last(kinds: tuple[int, ...], first: dict[int, int], last: dict[int, int]) -> dict[int, int]:
    """The layer before the last of each kind: in backward the first that adds to a sum, above everything still kept."""
    layers_of_kind: dict[int, int] = {}
    for layer, kind in enumerate(kinds):
        if kind in last and first[kind] < layer < last[kind]:
            layers_of_kind[kind] = layer
    return layers_of_kind
