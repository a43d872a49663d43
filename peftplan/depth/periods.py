"""Stacks of which only every n-th layer is checkpointed: what kinds of layer they have, and which are run.

Source: transformers 5.24, modeling_utils.py (`_set_gradient_checkpointing`): layers are numbered through the whole model, an
encoder's before its decoder's, and those whose number n divides are checkpointed.
"""

from __future__ import annotations

from itertools import groupby


def checkpointed_layers(layers: int, *, before: int, every: int) -> tuple[bool, ...]:
    """Whether each layer of a stack is checkpointed; `before`: how many layers of the model come before the stack."""
    return tuple((before + layer) % every == 0 for layer in range(layers))


def paired(kinds: tuple[int, ...], flags: tuple[bool, ...]) -> tuple[int, ...]:
    """The kind of each layer, where a layer that is checkpointed is of another kind than one that is not."""
    numbers: dict[tuple[int, bool], int] = {}
    return tuple(numbers.setdefault(pair, len(numbers)) for pair in zip(kinds, flags, strict=True))


def sections_of_periods(kinds: tuple[int, ...], *, summing: bool) -> tuple[list[int], dict[int, list[int]], dict[int, int]]:
    """The layers that run, of kinds that alternate; section → the layers that are copies of it; section → where
    they go.

    The first of each kind runs, and the whole last period, since its backward finds everything else still kept; of equal layers
    in a row there only the first and the last. Copies go where the last period begins. `summing`: all layers add to one
    gradient, which the last layer makes; the last layer then has no copies.
    """
    first = {kind: layer for layer, kind in reversed([*enumerate(kinds)])}
    last = {kind: layer for layer, kind in enumerate(kinds[: len(kinds) - summing])}
    tail = min((layer for kind, layer in last.items() if layer != first[kind]), default=len(kinds) - 2 * summing)
    heads = sorted(layer for layer in first.values() if layer < tail)
    sections = [*heads]
    copies: dict[int, list[int]] = {}
    places: dict[int, int] = {}
    opening: dict[int, int] = {}
    for kind, group in groupby(range(tail, len(kinds)), key=kinds.__getitem__):
        run = [*group]
        ends = run[-2:] if summing else run[-1:]
        shown = [run[0], *(layer for layer in ends if layer != run[0])]
        opening.setdefault(kind, len(sections))
        if len(run) > len(shown):
            copies[len(sections) + 1] = [layer for layer in run if layer not in shown]
            places[len(sections) + 1] = len(sections) + 1
        sections += shown
    for kind, section in opening.items():
        between = [layer for layer in range(tail) if kinds[layer] == kind and layer != first[kind]]
        if between:
            copies[section], places[section] = between, len(heads)
    return sections, copies, places
