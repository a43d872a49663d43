"""What a program does to the weights of a model after loading it: which ones it freezes, casts or replaces."""

from __future__ import annotations

import ast
from collections.abc import Collection

from peftplan.arch import catalogue
from peftplan.job.configs.documents import Values
from peftplan.job.configs.expressions import dotted
from peftplan.job.configs.instances import Instance, plain
from peftplan.job.configs.objects import Objects
from peftplan.job.configs.order import loads_model, trains
from peftplan.job.sources import checkpoint_dtype

CASTS = {
    "half": "<torch.float16>", "bfloat16": "<torch.bfloat16>", "float": "<torch.float32>", "double": "<torch.float64>",
}  # fmt: skip
"""Methods of a module that cast its weights → the dtype."""
DTYPES = {f"<torch.{name}>": dtype for name, dtype in CASTS.items()} | {dtype: dtype for dtype in CASTS.values()}
"""Names of a dtype → the one that the tables know."""
TORCH = {"bf16": "<torch.bfloat16>", "fp16": "<torch.float16>", "fp32": "<torch.float32>"}
"""Dtypes of checkpoints as torch names them."""
ITSELF = ("to", "type", "cuda", "cpu", "train", "eval", "requires_grad_", *CASTS)
"""Methods of a module that return the module."""
PLACED = ("device_map", "quantization_config", "load_in_4bit", "load_in_8bit")
"""Arguments that load a model on the device or quantize it, so that a cast has a peak of its own."""


MODULES = ("modules", "named_modules", "children", "named_children")
MEMBERS = ("parameters", "named_parameters", *MODULES)
"""Methods of a module that go through its parts; of them those whose parts a cast changes in place."""


class Weights(Objects):
    """Records whether weights are frozen other than by an adapter, and casts of a model that was loaded, or of its parts."""

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
        self.parts: set[str] = set()
        """Functions that cast or replace parts of a model."""
        self.parts_before: set[str] = set()
        """Likewise, as an earlier reading found."""
        self.trained_before: set[ast.Call] = set()
        """Calls that made the models of trainers, as an earlier reading found."""
        self.members: dict[str, Instance | None] = {}
        """Name of a loop over the parts of a model → the model."""
        self.modules: frozenset[str] = frozenset()
        """Of them, names of a loop over modules."""

    def freezes(self, called_elsewhere: Collection[str]) -> bool:
        """Whether the program freezes weights of what it trains itself. `called_elsewhere`: functions that others may call."""
        return any(frozen for name, frozen in self.frozen.items() if name in ("", "__init__") or name in called_elsewhere)

    def changes_parts(self, called_elsewhere: Collection[str]) -> bool:
        """Likewise, whether it casts or replaces parts of a model."""
        return not self.parts.isdisjoint({"", "__init__", *called_elsewhere})

    def visit_Assign(self, node: ast.Assign) -> None:
        """`parameter.requires_grad = False`, `parameter.data = parameter.data.float()`, `model.lm_head = Head()`."""
        super().visit_Assign(node)
        if self._casts(node.value) and isinstance(node.value, ast.Call) and dotted(node.value.func).split(".")[0] in self.modules:
            self._note_part()  # module = module.to(torch.float32)
        for item in (each for each in node.targets if isinstance(each, ast.Subscript)):
            self._note_inside(item.value)
        for target in (each for each in node.targets if isinstance(each, ast.Attribute)):
            if target.attr == "requires_grad":
                self._note_frozen(self.value(node.value), target)
            elif (target.attr == "data" and self._casts(node.value)) or self._replaces(target, node.value):
                self._note_part()

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """`parameter.requires_grad ^= True`."""
        super().visit_AugAssign(node)
        if isinstance(node.target, ast.Attribute) and node.target.attr == "requires_grad":
            self._note_frozen(None, node.target)

    def visit_Delete(self, node: ast.Delete) -> None:
        """`del model.model.layers[12:]`."""
        self.generic_visit(node)
        if any(not isinstance(target, ast.Name) and self._is_of_model(target) for target in node.targets):
            self._note_part()

    def visit_Expr(self, node: ast.Expr) -> None:
        """`model.lm_head.float()`: a cast whose result nobody takes is one in place, of a module."""
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and self._casts(node.value) and self.itself(node.value) is None:
            self._note_part()

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        """`for parameter in model.parameters()`."""
        through = node.iter
        while isinstance(through, ast.Call) and not (isinstance(through.func, ast.Attribute) and through.func.attr in MEMBERS):
            through = through.args[0] if through.args else through.func
        outer = self.members, self.modules
        if isinstance(through, ast.Call) and isinstance(through.func, ast.Attribute):
            names = [each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)]
            self.members = {**self.members, **dict.fromkeys(names, self._model_of(through))}
            self.modules |= frozenset(names if through.func.attr in MODULES else ())
        super().visit_For(node)
        self.members, self.modules = outer

    def _model_of(self, part: ast.expr) -> Instance | None:
        """The model whose part an expression is."""
        while isinstance(part, (ast.Attribute, ast.Subscript, ast.Call)):
            part = part.func if isinstance(part, ast.Call) else part.value
        if isinstance(part, ast.Name) and part.id in self.members:
            return self.members[part.id]
        return self.value_of_object(part)

    def _casts(self, value: ast.expr) -> bool:
        """Whether an expression is a cast to a dtype."""
        return (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Attribute)
            and self._cast_to(value.func.attr, value) is not None
        )

    def _replaces(self, target: ast.Attribute, value: ast.expr) -> bool:
        """Whether an assignment puts another module in the place of a model's."""
        is_new = isinstance(value, (ast.Call, ast.Subscript, ast.ListComp))
        return is_new and "config" not in ast.unparse(target) and self._is_of_model(target)

    def _is_of_model(self, part: ast.expr) -> bool:
        of = self._model_of(part)
        return of is not None and any(loads_model(self.name_of(each.func)) for each in of.made_by)

    def _note_part(self) -> None:
        if self.taken and self._here() not in self.done:
            self.parts.add(self._here())

    def _note_frozen(self, value: object, part: ast.expr) -> None:
        """Weights are frozen; or they are unfrozen, which changes something where an adapter has frozen the others.

        Those of another model than a trainer's, such as a reference, do not train anyway.
        """
        of = self._model_of(part)
        beside = of is not None and not of.is_copy and self.trained_before and self.trained_before.isdisjoint(of.made_by)
        if not beside and (value is not True or self._here() in self.adapting):
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
            self._note_frozen(self.value(values[0]) if values else True, node.func)
        elif last == "setattr" and len(node.args) == 3 and self.value(node.args[1]) == "requires_grad":
            self._note_frozen(self.value(node.args[2]), node.args[0])
        elif last == "get_peft_model" or (trains(name) and any(each.arg == "peft_config" for each in node.keywords)):
            self._set_frozen(frozen=False)
            self.adapting.add(self._here())
        elif last == "train" and isinstance(node.func, ast.Attribute):
            of = self.value_of_object(node.func.value)
            if self.taken and of is not None and any(trains(self.name_of(each.func)) for each in of.made_by):
                self.done.add(self._here())
        elif last == "evaluate" and isinstance(node.func, ast.Attribute):
            of = self.value_of_object(node.func.value)
            makers = of.made_by if self.taken and of is not None else ()
            for call in self.calls:
                if trains(call["call"]) and self.nodes[id(call)] in makers and call["kwargs"].get("evaluate") is not True:
                    call["kwargs"]["evaluate"] = True if self._here() in self.done else "before"
        elif last in self.frozen_before:
            self._set_frozen(frozen=self.frozen_before[last])
            if last in self.adapting_before:
                self.adapting.add(self._here())
        compiled = node.args[0] if node.args else node.func
        loaded = isinstance(compiled, ast.Call) and loads_model(self.name_of(compiled.func))
        compiles = last == "compile" and (loaded or self._is_of_model(compiled))
        if last in self.parts_before or compiles or last.startswith("apply_liger_kernel"):
            self._note_part()
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
            if self.nodes[id(call)] not in of.made_by or not (loads_model(call["call"]) or "model" in call["call"].lower()):
                continue
            arguments: Values = call["kwargs"]
            if arguments.get("dtype", arguments.get("torch_dtype")) == dtype and call["call"].endswith("from_pretrained"):
                continue
            if self.unsure or not call["call"].endswith("from_pretrained") or not arguments.keys().isdisjoint(PLACED):
                arguments["cast"] = dtype
            else:
                arguments.pop("torch_dtype", None)
                arguments["dtype"] = dtype

    def _attribute(self, node: ast.Attribute) -> object:
        """`model.dtype` of a model that is loaded with one; else as any attribute."""
        owner = self.value_of_object(node.value) if node.attr == "dtype" else None
        loads = [call for call in self.calls if owner is not None and self.nodes.get(id(call)) in owner.made_by]
        if len(loads) == 1 and loads_model(loads[0]["call"]) and set(PLACED[1:]).isdisjoint(arguments := loads[0]["kwargs"]):
            names = [*loads[0]["args"], arguments.get("pretrained_model_name_or_path")]
            dtype = arguments.get("dtype", arguments.get("torch_dtype"))
            if dtype == "auto" and isinstance(name := names[0], str) and (entry := catalogue.find(name)) is not None:
                stored = checkpoint_dtype(name, {"dtype": catalogue.config_dtype(entry)})
                dtype = TORCH.get(stored or "", dtype)
            if isinstance(dtype, str) and dtype != "auto" and plain(dtype):
                return DTYPES.get(dtype, dtype)
        return super()._attribute(node)

    def itself(self, node: ast.Call) -> Instance | None:
        """The object that a chain of methods which return their module begins with."""
        owner: ast.expr = node
        while isinstance(owner, ast.Call) and isinstance(owner.func, ast.Attribute) and owner.func.attr in ITSELF:
            owner = owner.func.value
        of = None if owner is node else self.value_of_object(owner)
        return of if of is not None and of.made_by else None
