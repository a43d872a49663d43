"""Layers that are left out of a step under ZeRO-3: what gathers and reduces goes on behind them as if they had run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from peftplan.depth.skipped import NotAlikeError, Skipped, StandIns, alike_around, run_of
from peftplan.distributed.zero3 import Sharded
from peftplan.memory.zero3 import Zero3
from peftplan.units import ceil_div


def leaving_out(zero: Zero3, stack: str, layers: int) -> Skipped | None:
    """A stack without the layers between which the coordinator reaches neither end; None where there are none."""
    limits = zero.coordinator.limits
    of_layer = [p for (_, number), p in zero.sharded.items() if number == 1]
    numel = sum(p.numel for p in of_layer)
    trained = sum(p.numel for p in zero.sharded.values() if p.trainable)
    if not numel or trained > zero.bucket_size or zero.model.arch.encoder_layers:
        return None
    ahead = ceil_div(limits.prefetch_bucket + max(limits.max_live, limits.max_reuse), numel)
    counted = sum(p.numel for p in of_layer if p not in zero.of_leaves)  # as `_before` does, in forward and again in backward
    ends = run_of(layers, reach=max(ahead, ceil_div(limits.max_reuse, 2 * counted)))
    if ends is None:
        return None
    low, high = ends
    run = *range(low + 1), *range(high, layers)
    left_out = LeftOut(zero, {layer: place for place, layer in enumerate(run)}, alike_around(low, high))
    return Skipped(stack, run, low, high, left_out.state, left_out.forward, left_out.backward, {}, {}, {})


class LeftOut:
    """What a rank's state is around layers that are left out. `place`: layer → its place among those that run."""

    def __init__(self, zero: Zero3, place: dict[int, int], alike: tuple[int, ...]) -> None:
        self.zero, self.place, self.alike = zero, place, alike
        self.first = 0, 0
        """The first of the layers that do the same, and how much was gathered when it began."""
        self.growth = 0
        """How much more each leaves gathered."""
        self.of_layer: dict[int, dict[str, Sharded]] = {}
        self.layer_of: dict[Sharded, int | None] = {p: number for (_, number), p in zero.sharded.items()}
        for (family, number), p in zero.sharded.items():
            if number is not None:
                self.of_layer.setdefault(number, {})[family] = p

    def state(self, layer: int, forward: bool) -> Hashable:
        """What decides what is gathered and freed next, as seen from a layer. The room to gather ahead may shrink by as much with
        each: those between two that do the same with it do it too.
        """
        coordinator, here = self.zero.coordinator, self.place[layer]
        latest, step = coordinator._latest.get, coordinator.step

        def seen(p: Sharded) -> tuple[str, int | None]:
            number = self.layer_of[p]
            return p.name, None if number is None else self.place.get(number, -1) - here

        def is_reached(p: Sharded) -> bool:
            number = self.layer_of[p]
            return number is None or abs(self.place.get(number, -len(self.place)) - here) < self.alike[0]

        inflight = coordinator.inflight
        passing = (p for p in self.zero.sharded.values() if not p.persists and (p.whole is not None or p in inflight))
        there = [p for p in passing if is_reached(p)]
        gathered = [(seen(p), p in inflight, len(p.active), max(latest(p, -1) - step, 0)) for p in there]
        following = [(seen(p), place - step) for p, place in [*coordinator.queue][:1]]
        waits = bool(self.zero.running), len(self.zero.recomputed), len(self.zero.waiting), self.zero.large is None
        if layer == self.alike[0 if forward else -1]:
            self.first = layer, coordinator.live
        elif layer == self.alike[1 if forward else -2]:
            self.growth = coordinator.live - self.first[1]
        live = coordinator.live - abs(layer - self.first[0]) * (layer != self.first[0] and self.growth)
        return tuple(gathered), tuple(following), live if coordinator.order else None, waits

    def forward(self, layers: Sequence[int], like: int) -> StandIns:
        """Behind the layers in forward."""
        return self._stay(layers, like)

    def backward(self, layers: Sequence[int], like: int) -> StandIns:
        """The same in backward: their gradients are in the bucket, if it has room for all."""
        zero = self.zero
        families = [p.name for p in zero.bucketed if self.layer_of[p] == like]
        if sorted(families) != sorted(name for name, p in self.of_layer[like].items() if p.trainable):
            raise NotAlikeError("gradients wait for more layers")
        for layer in layers:
            for p in map(self.of_layer[layer].__getitem__, families):
                zero.bucketed.append(p)
                zero.num_bucketed += p.numel
        if zero.num_bucketed > zero.bucket_size:
            raise NotAlikeError("a bucket is full")
        return self._stay(layers, like)

    def _stay(self, layers: Sequence[int], like: int) -> StandIns:
        """Parameters that may stay gathered are, as those of the layer that these are like."""
        f, stand_ins = self.zero.f, StandIns()
        module = f.module
        self.zero.coordinator.live += len(layers) * self.growth
        far = self.of_layer[min(self.place) if like == self.alike[1] else max(self.place)]
        for family, of_like in self.of_layer[like].items():
            stays = of_like.whole is not None and (of_like.persists or far[family].whole is not None)
            for layer in layers:
                p = self.of_layer[layer][family]
                if stays == (p.whole is not None):
                    continue
                if not stays:
                    p.whole = None
                    continue
                p.whole, p.active = self.zero._new((p.numel,), p.dtype, "", 0), set(of_like.active)
                stand_ins[_number(p)] = layer, like, _number(of_like)
        f.module = module
        for layer in self.place:  # another one may have gathered it ahead, of those that run
            for p in self.of_layer[layer].values():
                if p.whole is not None and p.whole.storage is not None:
                    stand_ins[_number(p)] = layer, layer, _number(p)
        return stand_ins


def _number(p: Sharded) -> int:
    assert p.whole is not None
    assert p.whole.storage is not None
    return p.whole.storage.number
