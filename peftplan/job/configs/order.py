"""Which of a program's calls count: those that it makes, and of several of a kind the one that makes what is trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING

from peftplan.arch import catalogue
from peftplan.job.configs.documents import Call, Values

if TYPE_CHECKING:
    import ast

UNTAKEN = "untaken "
"""What stands before the name of a call in a way that the program does not take."""


HEAD = re.compile("For[A-Z]|LMHead|Model")
"""Where the name of a model's class goes on with that of its head."""


def trains(name: str) -> bool:
    """Whether a call of this name makes a trainer."""
    return name.endswith("Trainer")


def in_order(taken: Sequence[Call], untaken: Sequence[Call], unused: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """Calls that the program makes, in the order of the text, and those that it does not make.

    Those of functions that nothing calls (`unused`) count where no other trains, and those of ways that are not taken likewise.
    """
    ids = {id(call) for call in unused}
    counting = [call for call in taken if id(call) not in ids]
    if not any(trains(call["call"]) for call in counting):
        counting = [*taken]
    counted = {id(call) for call in counting}
    others = [*untaken, *(call for call in taken if id(call) not in counted)]
    if any(trains(call["call"]) for call in others) and not any(trains(call["call"]) for call in counting):
        return counting + others, []
    return counting, others


def used_through(calls: Iterable[ast.Call], used_by: Mapping[ast.Call, Collection[ast.Call]]) -> set[ast.Call]:
    """All calls that made what some calls are called with, and what those are called with."""
    used: set[ast.Call] = set()
    todo = [*calls]
    while todo:
        new = {*used_by.get(todo.pop(), ())} - used
        used |= new
        todo += new
    return used


def of_training_first(
    calls: list[Call], nodes: Mapping[int, ast.Call], used_by: Mapping[ast.Call, Collection[ast.Call]]
) -> list[Call]:
    """The calls, but those behind all others that stand above one of their kind which makes what the only trainer trains.

    `nodes`: identity of a call → its place. `used_by`: call → those that made what it is called with.
    """
    trainers = [nodes[id(call)] for call in calls if trains(call["call"])]
    used = used_through(trainers if len(trainers) == 1 else [], used_by)
    last = {_kind(call): index for index, call in enumerate(calls) if nodes[id(call)] in used}
    above = [nodes[id(call)] not in used and index < last.get(_kind(call), -1) for index, call in enumerate(calls)]
    return [call for call, is_above in sorted(zip(calls, above, strict=True), key=lambda pair: pair[1])]


def arguments(
    calls: Iterable[Call], kinds: Mapping[str, str], last: Collection[str], positions: Mapping[str, Sequence[str]]
) -> tuple[Values, dict[str, list[str]], dict[str, str]]:
    """The arguments of the first call of each kind, `load.max_seq_length`; later ones count as calls after training.

    `kinds`: name of a call → what stands before its arguments. `last`: calls that stand in place of all others of their kind, as
    the second training of a program does that needs more than the first. `positions`: last part of a call's name → the names of
    its first arguments; others without a name are called by their place. Behind the arguments, those that hold a default of the
    program's command line or environment → its options; kind → what only the program knows of its call.
    """
    values: Values = {}
    defaults: dict[str, list[str]] = {}
    doubts: dict[str, str] = {}
    calls = list(calls)
    trained_last = {kinds[call["call"]] for call in calls if call["call"] in last}
    is_loaded = False
    for call in calls:
        kind = kinds.get(call["call"]) or _of_class(call["call"], kinds)
        is_after = is_loaded and loads_model(call["call"])
        is_loaded = is_loaded or _loads_by_name(call)
        if kind is None or kind in values or is_after or (kind in trained_last and call["call"] not in last):
            times = sum(key.startswith(f"later.{call['call']}") for key in values) + 1
            values[f"later.{call['call']}#{times}"] = "call"
            continue
        names = positions.get(call["call"].rpartition(".")[2], ())
        free = [str(at) if name in call["kwargs"] else name for at, name in enumerate(names)]  # a name twice raises in Python
        by_place = {free[at] if at < len(free) else str(at): value for at, value in enumerate(call["args"])}
        values[kind] = {"call": call["call"], **by_place, **call["kwargs"]}
        defaults |= {f"{kind}.{name}": options for name, options in call.get("defaults", {}).items()}
        if "doubt" in call:
            doubts[kind] = call["doubt"]
    return values, defaults, doubts


def loads_model(name: str) -> bool:
    """Whether a call of this name loads a model: `AutoModelForCausalLM.from_pretrained`, `LlamaForCausalLM.from_pretrained`."""
    return name.endswith("from_pretrained") and re.search("Model|For[A-Z]", name) is not None


def _loads_by_name(call: Call) -> bool:
    """Whether a trainer is called with the name of its model, which it loads itself: what is loaded below is another one."""
    model = call["kwargs"].get("model", next(iter(call["args"]), None))
    return trains(call["call"]) and isinstance(model, str) and not model.startswith("<")


def _of_class(name: str, kinds: Mapping[str, str]) -> str | None:
    """The kind of a call of a model's own class, which a table names by a pattern: `LlamaForCausalLM.from_pretrained`.

    Classes of other packages may end alike: `AutoPeftModelForCausalLM`, `AutoLigerKernelForCausalLM`.
    """
    if not loads_model(name) or HEAD.split(name.removeprefix("transformers."))[0] not in _families():
        return None
    return next((kind for pattern, kind in kinds.items() if "*" in pattern and fnmatchcase(name, pattern)), None)


@cache
def _families() -> frozenset[str]:
    """The beginnings of the class names of built-in models: `Llama`."""
    return frozenset(HEAD.split(entry.model_class)[0] for entry in catalogue.models())


def _kind(call: Call) -> str:
    """What calls have in common of which one takes the place of the other."""
    name = call["call"]
    if name.endswith("from_pretrained"):
        return "from_pretrained" if loads_model(name) else name
    return name.rpartition(".")[2]
