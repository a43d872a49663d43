"""Calls of a Python program, read from its syntax tree."""

from __future__ import annotations

import ast
import contextlib

from peftplan.job.configs.bindings import MUTATORS
from peftplan.job.configs.classes import EVERY
from peftplan.job.configs.documents import Call, Values
from peftplan.job.configs.doubts import Doubts
from peftplan.job.configs.expressions import text_of
from peftplan.job.configs.functions import (
    bound_elsewhere,
    constructors_of,
    default_values,
    functions_of,
    overwritten_in,
    parameters,
    passed,
    unmentioned,
)
from peftplan.job.configs.instances import UNKNOWN, Instance, plain
from peftplan.job.configs.objects import COPIES
from peftplan.job.configs.order import trains, used_through
from peftplan.job.configs.parsers import PARSERS, PARSING
from peftplan.job.configs.reader_functions import ReaderFunctions

WANTED = (
    "Config",
    "Trainer",
    "from_pretrained",
    "get_peft_model",
    "Arguments",
    "prepare_model_for_kbit_training",
    "prepare_model_for_int8_training",
)
"""Ends of the names of calls that matter."""
OF_MODELS = ("gradient_checkpointing_enable", "resize_token_embeddings", "setup_chat_format")
"""Methods of a model, and a function for one, that matter whatever its name."""
OF_EMBEDDINGS = (
    *("AdaptiveLayerLoss", "AnglELoss", "BatchAllTripletLoss", "BatchHardSoftMarginTripletLoss", "BatchHardTripletLoss"),
    *("BatchSemiHardTripletLoss", "CachedGISTEmbedLoss", "CachedMultipleNegativesRankingLoss", "CoSENTLoss", "ContrastiveLoss"),
    *("CachedMultipleNegativesSymmetricRankingLoss", "ContrastiveTensionLoss", "ContrastiveTensionLossInBatchNegatives"),
    *("CosineSimilarityLoss", "DenoisingAutoEncoderLoss", "DistillKLDivLoss", "GISTEmbedLoss", "MSELoss", "MarginMSELoss"),
    *("Matryoshka2dLoss", "MatryoshkaLoss", "MegaBatchMarginLoss", "MultipleNegativesRankingLoss", "OnlineContrastiveLoss"),
    *("MultipleNegativesSymmetricRankingLoss", "SoftmaxLoss", "TripletLoss"),
)
"""Losses of sentence-transformers (sentence_transformer/losses/__init__.py)."""
OF_TRAINING = ("0", "1", "model", "args", "peft_config")
"""Arguments of a trainer: the model that it trains, its settings and its adapter."""
DEFAULT = ("<default>", set[str]())
"""What a call gives a parameter that it leaves out."""
Arguments = dict[str, dict[str, list[tuple[object, set[str]]]]]
"""Function → parameter → what each call gives it, and the options of the command line whose defaults that holds."""


class Calls(ReaderFunctions):
    """The calls in the order of the text, with the values of their arguments.

    `environment`: variables of packages that the program sets, by their names. `command`: options of the command that runs the
    program, None where it is not known. `earlier`: an earlier reading, which found what
    functions are called with, and all values of attributes.
    """

    def __init__(
        self,
        statements: list[ast.stmt],
        environment: Values,
        earlier: Calls | None = None,
        command: Values | None = None,
    ) -> None:
        super().__init__()
        self.statements = statements
        self.command = command
        self.untaken: list[Call] = []
        """Calls in ways that the program does not take."""
        self.unused: list[Call] = []
        """Calls in functions that nothing calls."""
        self.used_by: dict[ast.Call, set[ast.Call]] = {}
        """Call → those that made what it is called with: of a trainer its model, its arguments and its adapter."""
        self.trained: set[ast.Call] = set()
        """Calls that made the models that trainers train."""
        self.doubts = Doubts()
        self.lengths: list[Call] = []
        """Calls that cut texts: of a tokenizer, whatever its name."""
        self.environment = dict(environment)
        nodes = [] if earlier else [*ast.walk(ast.Module(statements, []))]
        self.overwritten: set[ast.AST] = earlier.overwritten if earlier else overwritten_in(statements)
        """Functions that another one takes the place of."""
        self.functions = earlier.functions if earlier else functions_of(nodes, self.overwritten)
        self.constructors = earlier.constructors if earlier else constructors_of(nodes)
        self.passed: set[str] = earlier.passed if earlier else passed(nodes, self.functions)
        self.ran_before: dict[str, bool] = earlier.ran if earlier else {}
        self.ran: dict[str, bool] = {}
        """Function that is called → whether the program takes a way to such a call."""
        self.unmentioned: set[str] = earlier.unmentioned if earlier else unmentioned(nodes, statements)
        self.elsewhere = earlier.elsewhere if earlier else bound_elsewhere(nodes)
        self.arguments_of: Arguments = earlier.called_with if earlier else {}
        self.called_with: Arguments = {}
        self.end: tuple[object, ...] = ()
        """What the next reading begins with, once this one is done."""
        self.named: dict[ast.AST, frozenset[str]] = earlier.named if earlier else {}
        """Part of the program → all names in it."""
        self.at_the_end: Values | None = None
        """What names of the module hold at its end; None in the first reading."""
        if earlier:
            self.attributes, self.owners = dict(earlier.attributes), dict(earlier.owners)
            self.arguments, self.variables = dict(earlier.arguments), set(earlier.variables)
            self.values_of, self.fields = earlier.values_of, dict(earlier.fields)
            self.at_the_end, self.bound, self.aliases = earlier.names, earlier.bound, earlier.aliases
            self.of_parser, self.keys_unseen = earlier.of_parser, frozenset(earlier.set_elsewhere)
            self.frozen_before, self.adapting_before, self.parts_before = earlier.frozen, earlier.adapting, earlier.parts
            self.overrides, self.returns_before, self.file = earlier.overrides, earlier.returns, earlier.file
            self.trained_before = earlier.trained | used_through(earlier.trained, earlier.used_by)

    def read(self) -> None:
        """Read all statements; of one that nests too deep, what was read so far."""
        for statement in self.statements:
            with contextlib.suppress(RecursionError):
                self.visit(statement)
        self.end = self._end()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """A function: its parameters are what its calls give them, else their defaults; its names end with it."""
        for each in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(each)
        defaults = {name: (self.fresh(value), self.by_default) for name, value in default_values(node).items()}
        names = {name for name in self._bound(node) if not name.startswith(".")}
        if not self.function:
            names |= self._named(node)
        before = self._values_of(names)
        if not self.function and self.at_the_end is not None:
            for name in before:
                if self.at_the_end.get(name) != self.names[name]:
                    self.names.pop(name)
        of_calls = self.arguments_of.get(node.name, {})
        for name in parameters(node):
            self.names.pop(name, None)
            values = [
                defaults.get(name, (f"<{name}>", set())) if each is DEFAULT else each for each in of_calls.get(name, [DEFAULT])
            ]
            if self.functions.get(node.name) is node and all(value == values[0][0] for value, _ in values):
                self._keep(name, values[0][0], set().union(*(options for _, options in values)))
        outer, self.function = self.function, f"{self.function}.{node.name}"
        is_taken = self.taken
        runs = node.name in self.passed or self.ran_before.get(node.name, True)
        self.taken = is_taken and node not in self.overwritten and runs
        for statement in node.body:
            self.visit(statement)
        self.function, self.taken = outer, is_taken
        self._restore(names, before)
        self.names.pop(node.name, None)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """A function without a name, called some time later."""
        before = self._values_of(self._named(node))
        if self.at_the_end is not None and not self.function:
            for name in before:
                if self.at_the_end.get(name) != self.names[name]:
                    self.names.pop(name)
        super().visit_Lambda(node)
        self._restore(before, before)
        self._changed_in(node.body)

    def visit_Call(self, node: ast.Call) -> None:
        """A call, if its name is one of those that matter; what it is called with stands before it."""
        self.generic_visit(node)
        name = self.name_of(node.func)
        last = name.rpartition(".")[2]
        if last == "setdefault" and len(node.args) > 1 and isinstance(node.func, ast.Attribute):
            self._set(node.func.value, *node.args[:2], absent=True)
        elif last in MUTATORS and isinstance(node.func, ast.Attribute) and self.value_of_object(node.func.value) is None:
            self._mutate(node.func.value, last, node)
        if last == "add_argument":
            self.note_argument(node)
        if last in PARSERS:
            self.note_parser(node)
        if name == "fire.Fire" and node.args and self.command is not None:
            keywords = [ast.keyword(key, ast.Constant(value)) for key, value in self.command.items()]  # type: ignore[arg-type]
            called = self.functions.get(ast.unparse(node.args[0]))
            self.words_taken.update(self.command if called is None or called.args.kwarg else parameters(called))
            self._note_arguments(ast.unparse(node.args[0]), ast.Call(node.args[0], [], keywords))
        self._note_changes(name, node)
        self._note_weights(name, node)
        if (
            last in ("parse_args", "parse_known_args")
            and node.args
            and isinstance(words := self.value(node.args[0]), list)
            and words
        ):
            for option in self.arguments:
                self._field(option, f"<{option}>", name)
        if last == "set_defaults":
            for keyword in node.keywords:
                self._field(str(keyword.arg), self.value(keyword.value), name)
        if last == "partial" and node.args:
            self._note_arguments(ast.unparse(node.args[0]), ast.Call(node.args[0], node.args[1:], node.keywords))
        self._note_arguments(name, node)
        if name in self.fields or last in ("Namespace", "SimpleNamespace"):
            for field, value in self._instance(name, node).items():
                self._field(field, value, name)
        if name.endswith(WANTED) and name not in self.fields:
            call = self._called(name, node)
            of_every = self.overrides.get(EVERY, set()) if trains(name) else set()
            if own := self.overrides.get(ast.unparse(node.func), set()) | of_every:
                call["kwargs"]["overrides"] = sorted(own)
            self._call_list().append(call)
            self.nodes[id(call)] = node
            if self.undecided:
                self.doubts.undecided.add(node)
            if self.function[1:].partition(".")[0] in self.unmentioned:
                self.unused.append(call)
        elif last in OF_MODELS or last in OF_EMBEDDINGS:
            self._call_list().append(call := self._called(last, node))
            self.nodes[id(call)] = node
        elif self.taken and {"truncation", "max_length"} <= {keyword.arg for keyword in node.keywords}:
            self.lengths.append(self._called("tokenizer", node))

    def same_as(self, earlier: Calls) -> bool:
        """Whether this reading ended as the earlier one, so that one more would begin where this one did."""
        return self.end == earlier.end

    def _end(self) -> tuple[object, ...]:
        """What the next reading begins with. All readings share `values_of`, whose sets only grow."""
        values = sum(map(len, self.values_of.values()))
        return (
            self.called_with,
            self.ran,
            self.names,
            self.attributes,
            self.owners,
            self.arguments,
            self.fields,
            values,
            (self.frozen, self.parts, self.returns),
        )

    def _named(self, node: ast.AST) -> frozenset[str]:
        """All names in a part of the program."""
        if node not in self.named:
            self.named[node] = frozenset(each.id for each in ast.walk(node) if isinstance(each, ast.Name))
        return self.named[node]

    def _call_list(self) -> list[Call]:
        return self.calls if self.taken else self.untaken

    def _called(self, name: str, node: ast.Call) -> Call:
        arguments: Values = {}
        defaults: dict[str, list[str]] = {}
        spread = next((index for index, each in enumerate(node.args) if isinstance(each, ast.Starred)), len(node.args))
        by_index = [(str(index), each) for index, each in enumerate(node.args[:spread])]
        for key, expression in [*by_index, *((keyword.arg, keyword.value) for keyword in node.keywords)]:
            value = self.fresh(expression)
            if not trains(name) or key in OF_TRAINING:
                self.used_by.setdefault(node, set()).update(value.made_by if isinstance(value, Instance) else ())
                self.doubts.note(node, key, value)
            if trains(name) and key in ("0", "model") and isinstance(value, Instance):
                self.trained.update(value.made_by)
            if key is None:
                arguments |= (
                    self._spread(value)
                    if isinstance(value, dict) and not isinstance(value, Instance)
                    else {"**": "<keyword arguments>"}
                )
                continue
            arguments[key] = text_of(expression) if isinstance(value, dict) and not plain(value) else value
            if options := self.by_default | self.chosen_by:
                defaults[key] = sorted(options)
        by_place = [arguments.pop(key) for key, _ in by_index]
        if spread < len(node.args):
            arguments["*"] = "<arguments>"
        call: Call = {"call": name, "args": by_place, "kwargs": arguments}
        return {**call, "defaults": defaults} if defaults else call

    def _call(self, node: ast.Call) -> object:
        """An object of a class, else as any call."""
        name = self.name_of(node.func)
        if name.rpartition(".")[2] in PARSING and (objects := self.of_command(node)) is not None:
            return objects
        if name in self.fields or name.rpartition(".")[2] in ("Namespace", "SimpleNamespace"):
            return self._instance(name, node)
        if name in COPIES and node.args and (of := self.value_of_object(node.args[0])) is not None:
            return Instance(of, made_by=of.made_by, is_copy=True, may_be_none=of.may_be_none)
        if name.endswith(WANTED):
            return Instance(made_by=[node])
        called = self.functions.get(name.removeprefix("self."))
        if called is not None:
            for returned in (self.of_one_call(called, node), self.returned(called)):
                if returned is not UNKNOWN:
                    return returned
        of = self.itself(node)
        return super()._call(node) if of is None else of

    def _instance(self, name: str, node: ast.Call) -> Instance:
        """An object of a class of the program: fields that it is made with, and defaults of the others."""
        fields = Instance(self.fields.get(name, {}))
        spread = [self._vars(keyword.value) for keyword in node.keywords if keyword.arg is None]
        for each in spread:
            fields |= each or {}
        if node.args or None in spread:
            fields = Instance({field: f"<{field}>" for field in fields})
        return Instance({**fields, **{keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}})

    def _vars(self, node: ast.expr) -> Instance | None:
        """The object in `**vars(args)`, or the dictionary in `**settings`."""
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "vars" and len(node.args) == 1:
            return self.value_of_object(node.args[0])
        value = self.value(node)
        return Instance(self._spread(value)) if isinstance(value, dict) and not isinstance(value, Instance) else None

    def _note_arguments(self, name: str, node: ast.Call) -> None:
        """What a call gives the parameters of a function of the program."""
        function = name.rpartition(".")[2]
        called = self.functions.get(function)
        if called is None:
            if self.taken and (constructor := self.constructors.get(function)) is not None:
                self._note_changed(constructor, node)
            return
        self.ran[function] = self.ran.get(function, False) or self.taken
        if not self.taken:
            return
        positional, named = self._note_changed(called, node)
        if named == positional and "." in name and called in self.statements:
            return
        unknown = any(isinstance(each, ast.Starred) for each in node.args) or any(each.arg is None for each in node.keywords)
        by_parameter = {
            **dict(zip(named, node.args, strict=False)),
            **{each.arg: each.value for each in node.keywords if each.arg},
        }
        for parameter in parameters(called):
            values = self.called_with.setdefault(function, {}).setdefault(parameter, [])
            if unknown:
                values.append((f"<{parameter}>", set()))
            elif parameter in by_parameter:
                values.append((self.fresh(by_parameter[parameter]), self.by_default | self.chosen_by))
            else:
                values.append(DEFAULT)
