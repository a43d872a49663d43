"""What a program does to the weights of a model after loading it: which ones it freezes, and to what dtype it casts them."""

from __future__ import annotations

import ast
from collections.abc import Collection

from peftplan.job.configs.documents import Values
from peftplan.job.configs.instances import Instance
from peftplan.job.configs.objects import Objects
from peftplan.job.configs.order import trains

CASTS = {
    "half": "<torch.float16>", "bfloat16": "<torch.bfloat16>", "float": "<torch.float32>", "double": "<torch.float64>",
}  # fmt: skip
"""Methods of a module that cast its weights → the dtype."""
DTYPES = {f"<torch.{name}>": dtype for name, dtype in CASTS.items()} | {dtype: dtype for dtype in CASTS.values()}
"""Names of a dtype → the one that the tables know."""
ITSELF = ("to", "type", "cuda", "cpu", "train", "eval", "requires_grad_", *CASTS)
"""Methods of a module that return the module."""
PLACED = ("device_map", "quantization_config", "load_in_4bit", "load_in_8bit")
"""Arguments that load a model on the device or quantize it, so that a cast has a peak of its own."""


class Weights(Objects):
    """Records whether weights are frozen other than by an adapter, and casts of a model that was loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[str, bool] = {}
        """Function ("" for the module) → whether it leaves weights frozen, or unfrozen again; an adapter decides that anew."""
        self.frozen_before: dict[str, bool] = {}
        """Likewise, as an earlier reading found."""
        self.adapting: set[str] = set()
        """Functions that make an adapter."""
        self.adapting_before: set[str] = set()
        """Likewise, as an earlier reading found."""
        self.done: set[str] = set()
        """Functions that have run a trainer: later changes do not count."""

    def freezes(self, called_elsewhere: Collection[str]) -> bool:
        """Whether the program freezes weights of what it trains itself. `called_elsewhere`: functions that others may call."""
        return any(frozen for name, frozen in self.frozen.items() if name in ("", "__init__") or name in called_elsewhere)

    def visit_Assign(self, node: ast.Assign) -> None:
        """`parameter.requires_grad = False`."""
        super().visit_Assign(node)
        if any(isinstance(target, ast.Attribute) and target.attr == "requires_grad" for target in node.targets):
            self._note_frozen(self.value(node.value))

    def _note_frozen(self, value: object) -> None:
        """Weights are frozen; or they are unfrozen, which changes something where an adapter has frozen the others."""
        if value is not True or self._here() in self.adapting:
            self._set_frozen(frozen=True)

    def _set_frozen(self, *, frozen: bool) -> None:
        if self.taken and self._here() not in self.done:
            self.frozen[self._here()] = frozen

    def _here(self) -> str:
        return self.function.rpartition(".")[2]

    def _note_weights(self, name: str, node: ast.Call) -> None:
        """What a call does to weights."""
        last = name.rpartition(".")[2]
        if last == "requires_grad_":
            values = [*node.args, *(each.value for each in node.keywords)]
            self._note_frozen(self.value(values[0]) if values else True)
        elif last == "setattr" and len(node.args) == 3 and self.value(node.args[1]) == "requires_grad":
            self._note_frozen(self.value(node.args[2]))
        elif last == "get_peft_model" or (trains(name) and any(each.arg == "peft_config" for each in node.keywords)):
            self._set_frozen(frozen=False)
            self.adapting.add(self._here())
        elif last == "train" and isinstance(node.func, ast.Attribute):
            of = self.value_of_object(node.func.value)
            if self.taken and of is not None and any(trains(self.name_of(each.func)) for each in of.made_by):
                self.done.add(self._here())
        elif last in self.frozen_before:
            self._set_frozen(frozen=self.frozen_before[last])
            if last in self.adapting_before:
                self.adapting.add(self._here())
        if (dtype := self._cast_to(last, node)) is not None:
            self._note_cast(node, dtype)

    def _cast_to(self, method: str, node: ast.Call) -> str | None:
        """The dtype to which a method casts a module; None for other methods."""
        if method in CASTS and not node.args:
            return CASTS[method]
        if method not in ("to", "type"):
            return None
        values = [self.value(each) for each in (*node.args, *(each.value for each in node.keywords))]
        known = next((DTYPES[value] for value in values if isinstance(value, str) and value in DTYPES), None)
        return "<dtype>" if known is None and any(each.arg == "dtype" for each in node.keywords) else known

    def _note_cast(self, node: ast.Call, dtype: str) -> None:
        """A cast of a model that the program loaded in other words: its dtype from then on."""
        of = self.itself(node)
        if of is None or not self.taken or any(trains(call["call"]) for call in self.calls):
            return
        for call in self.calls:
            if self.nodes[id(call)] not in of.made_by or "model" not in call["call"].lower():
                continue
            arguments: Values = call["kwargs"]
            if arguments.get("dtype", arguments.get("torch_dtype")) == dtype and call["call"].endswith("from_pretrained"):
                continue
            if self.unsure or not call["call"].endswith("from_pretrained") or not arguments.keys().isdisjoint(PLACED):
                arguments["cast"] = dtype
            else:
                arguments.pop("torch_dtype", None)
                arguments["dtype"] = dtype

    def itself(self, node: ast.Call) -> Instance | None:
        """The object that a chain of methods which return their module begins with."""
        owner: ast.expr = node
        while isinstance(owner, ast.Call) and isinstance(owner.func, ast.Attribute) and owner.func.attr in ITSELF:
            owner = owner.func.value
        of = None if owner is node else self.value_of_object(owner)
        return of if of is not None and of.made_by else None
