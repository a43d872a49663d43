"""Calls that may or may not run, depending on values that only the program knows: what all alternatives agree on counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING

from peftplan.job.configs.documents import Call
from peftplan.job.configs.instances import Instance, plain
from peftplan.job.configs.order import trains, used_through

if TYPE_CHECKING:
    import ast

ADAPTER = "LoraConfig"
CHOSEN = "only the program knows whether it makes this call; it is assumed to"
FIRST = "only the program knows which of several calls it makes; the first is assumed"
SEVERAL = "the program trains several times; the first training is assumed"
NOTHING = object()


class Doubts:
    """What is uncertain about the calls of a program."""

    def __init__(self) -> None:
        self.undecided: set[ast.Call] = set()
        """Calls in branches that the program may not take."""
        self.alternatives: dict[ast.Call, list[frozenset[ast.Call]]] = {}
        """Call → sets of calls; one call of each set made an argument."""
        self.optional: dict[ast.Call, set[ast.Call]] = {}
        """Call → calls that made an argument, which may be None instead."""
        self.unknown: dict[ast.Call, set[str]] = {}
        """Call → arguments of unknown origin."""

    def note(self, node: ast.Call, key: str | None, value: object) -> None:
        """Record what made an argument."""
        if isinstance(value, Instance) and value.made_by:
            if len(value.made_by) > 1:
                self.alternatives.setdefault(node, []).append(value.made_by)
            if value.may_be_none:
                self.optional.setdefault(node, set()).update(value.made_by)
        elif key is not None and not plain(value):
            self.unknown.setdefault(node, set()).add(key)

    def settle(
        self, calls: list[Call], nodes: Mapping[int, ast.Call], used_by: Mapping[ast.Call, Collection[ast.Call]]
    ) -> list[Call]:
        """The calls in order. Alternatives for an argument of the only trainer are merged into one call with what they agree on.

        `nodes`: identity of a call → its syntax node. `used_by`: call → the calls that made its arguments.
        """
        trainers = [call for call in calls if trains(call["call"])]
        if len(trainers) > 1:
            trainers[0]["doubt"] = FIRST if nodes[id(trainers[0])] in self.undecided else SEVERAL
        if len(trainers) != 1:
            return calls
        by_node = {nodes[id(call)]: call for call in calls}
        for node in [nodes[id(trainers[0])], *used_through([nodes[id(trainers[0])]], used_by)]:
            for group in self.alternatives.get(node, ()):
                calls = _united(calls, [by_node[each] for each in by_node if each in group])
                first, *others = (each for each in by_node if each in group)
                needed = {first, *used_through([first], used_by)}
                for each in {*others, *used_through(others, used_by)} - needed:
                    if _kind(by_node[each]) != _kind(by_node[first]):
                        by_node[each]["doubt"] = CHOSEN
            for each in self.optional.get(node, ()):
                by_node[each]["doubt"] = CHOSEN
            for key in self.unknown.get(node, ()):
                calls = _united(calls, [call for call in calls if _may_be(key, by_node[node]["call"], call["call"])])
        loads = [call for call in calls if "Model" in call["call"] and call["call"].endswith("from_pretrained")]
        of_trainer = self.unknown.get(nodes[id(trainers[0])], set())
        if of_trainer & {"0", "model"} and any(_of(each) != _of(loads[0]) for each in loads):
            loads[0]["doubt"] = FIRST
        return calls


def _may_be(key: str, of: str, name: str) -> bool:
    """Whether a call may have made an argument of unknown origin, of the trainer or of `get_peft_model`."""
    last = name.rpartition(".")[2]
    if key == "peft_config" or (key == "1" and not trains(of)):
        return last == ADAPTER
    own = of.rpartition(".")[2].removesuffix("Trainer") + "Config"
    return key in ("1", "args") and (last == own or last.endswith("Arguments"))


def _kind(call: Call) -> str:
    """The kind of a call. Calls of one kind are alternatives."""
    last = call["call"].rpartition(".")[2]
    return last if last == ADAPTER or not last.endswith(("Config", "Arguments")) else "settings"


def _of(call: Call) -> object:
    return call["args"][:1] or call["kwargs"].get("pretrained_model_name_or_path")


def _united(calls: list[Call], several: list[Call]) -> list[Call]:
    """The calls, with alternatives of one kind merged into the first; what they differ in is unknown."""
    for kind in {_kind(call) for call in several}:
        first, *others = (call for call in several if _kind(call) == kind)
        for other in others:
            _weaken(first, other)
        calls = [call for call in calls if not any(call is other for other in others)]
    return calls


def _weaken(call: Call, other: Call) -> None:
    """Mark what a call and an alternative differ in as unknown."""
    if call["call"].rpartition(".")[2] != other["call"].rpartition(".")[2]:
        call["kwargs"]["**"] = _either(call["call"], other["call"])
    call["args"] = [_either(*pair) for pair in zip_longest(call["args"], other["args"], fillvalue=NOTHING)]
    call["kwargs"] |= {
        key: _either(call["kwargs"].get(key, NOTHING), other["kwargs"].get(key, NOTHING))
        for key in {**call["kwargs"], **other["kwargs"]}
    }
    call["defaults"] = {**other.get("defaults", {}), **call.get("defaults", {})}


def _either(value: object, other: object) -> object:
    """A value, or unknown if the other differs."""
    texts = ["its default" if each is NOTHING else str(each).strip("<>")[:40] for each in (value, other)]
    return value if value == other else f"<either {' or '.join(texts)}>"
