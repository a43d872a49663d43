"""Which experts a token goes to: in turn, so that all have the same load, or, at worst, the same few for every token.

A router takes the highest of a few scores per token (`topk`, or `argmax` for one expert). The card has no scores, so the places
are made up here. What a loop over the experts does with them, such as counting the tokens of each, follows as from a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from peftplan.rehearse.inside import known
from peftplan.rehearse.inside.known import MOST_EXPERTS, scripted
from peftplan.rehearse.settings import BALANCED, WORST

NOTES = {
    BALANCED: "MoE routing: every expert gets the same number of tokens; --routing worst sends all tokens to the same experts",
    WORST: "MoE routing: all tokens go to the same experts",
}
"""What the report says of each routing."""


def start(routing: str, say: Callable[[str], None]) -> None:
    """Give `topk` and `argmax` of a few scores places. `say` is told once that experts were chosen by them.

    Not each of them chooses experts: `argmax` also finds a class. It does so where a length follows from the places of `topk`, or
    a mask of experts from either.
    """
    once = partial(cache(say), NOTES[routing])
    known.ROUTED.append(once)
    places: dict[str, Callable[[Any], torch.Tensor]] = {"topk": lambda result: result.indices, "argmax": lambda result: result}
    for owner in (torch.Tensor, torch):
        for name, places_of in places.items():
            choose = getattr(owner, name)
            setattr(owner, name, scripted(choose, _chosen(choose, routing, places_of)))
    one_hot = torch.nn.functional.one_hot
    torch.nn.functional.one_hot = scripted(one_hot, _one_hot(one_hot, once))


def _chosen(choose: Callable[..., Any], routing: str, places_of: Callable[[Any], torch.Tensor]) -> Callable[..., Any]:
    def chosen(scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = choose(scores, *args, **kwargs)
        if _are_of_experts(scores):
            places, rows = places_of(result), scores.shape[:-1]
            if places.shape[: len(rows)] == rows:  # the highest of each row
                places.known = _places(places.shape, rows.numel(), scores.shape[-1], routing)  # type: ignore[attr-defined]
                if choose.__name__ == "topk":
                    places.routed = True  # type: ignore[attr-defined]
        return result

    return chosen


def _are_of_experts(scores: torch.Tensor) -> bool:
    on_card = scores.device.type == "cuda" and scores.is_floating_point()
    return on_card and scores.dim() > 1 and scores.shape[-1] <= MOST_EXPERTS


def _places(shape: torch.Size, rows: int, experts: int, routing: str) -> torch.Tensor:
    """Places of each row: those that follow the row's before, or the first ones."""
    each = shape.numel() // max(1, rows)
    numbers = torch.arange(rows * each) if routing == BALANCED else torch.arange(each).repeat(rows)
    return (numbers % experts).reshape(shape)


def _one_hot(one_hot: Callable[..., Any], once: Callable[[], None]) -> Callable[..., Any]:
    """The mask of experts, of any size: what follows from it is small again."""

    def masked(tensor: torch.Tensor, num_classes: int = -1) -> Any:
        places = known.of(tensor)
        if places is None:
            return one_hot(tensor, num_classes)
        classes = num_classes if num_classes > 0 else int(places.max()) + 1
        result = one_hot(tensor, classes)
        result.known = (places.unsqueeze(-1) == torch.arange(classes)).to(torch.int8)
        once()
        return result

    return masked
