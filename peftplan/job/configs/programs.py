"""Python scripts and notebooks as documents: the calls that their text makes; nothing is imported and nothing runs."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator

from peftplan import files
from peftplan.errors import InputError
from peftplan.job.configs import saved_notebooks
from peftplan.job.configs.assignments import SETTINGS
from peftplan.job.configs.bindings import own_names
from peftplan.job.configs.calls import Calls
from peftplan.job.configs.data_files import MOST_ABOVE
from peftplan.job.configs.documents import CELL, MOST_BYTES, BrokenFileError, Call, Document, Values
from peftplan.job.configs.launch_files import in_tree
from peftplan.job.configs.objects import OF_MODEL
from peftplan.job.configs.order import UNTAKEN, in_order, of_training_first

MAGIC = re.compile(rf"^\s*%(?:set_)?env[ \t]+((?:{'|'.join(SETTINGS)})\w*)(?:[ \t]*=[ \t]*|[ \t]+)(.*?)[ \t]*$", re.MULTILINE)
"""A notebook's line that sets one of them. As in IPython, the value is the rest of the line, with what looks like a comment."""
DATABRICKS = "# Databricks notebook source"
"""The first line of a notebook that Databricks saves as a script."""
MOST_PARTS = 20_000
"""Statements, calls and deep expressions of the longest program that is read."""
REQUIREMENT = re.compile(r"(\w[\w-]*)(?:\[[\w,-]*\])?((?:[<>=~!]=?=?[\w.*]+,?)*)")
"""A package, and the releases that are accepted of it."""
REPOSITORY = re.compile(r"git\+https://[\w./-]*/([\w-]+?)(?:\.git)?")
AT_MOST = re.compile(r"(~=|<=|<)(\d[\w.]*)")
LAST_BEFORE = {("transformers", 5): "4.57", ("trl", 1): "0.29"}
"""Package and major release → the last minor release before it."""
READINGS, MOST_READINGS = 3, 6
"""Most times that a program is read, and one that opens a file of settings, which its functions hand on."""
DEEP = 10
"""Levels from which on an expression inside others counts too: its text is taken anew at each level."""
WITHOUT_BYTES = {
    *("use_cache", "rope_scaling", "pad_token_id", "bos_token_id", "eos_token_id", "num_labels", "id2label", "label2id"),
    *("cache_dir", "revision", "token", "use_auth_token", "trust_remote_code", "local_files_only", "finetuning_task"),
}
"""Fields of a model's config, and arguments that find it, with which a step holds what it holds without them; `num_labels` is
handed on to the model."""
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.ImportFrom, ast.Import)
"""Statements of a module that a program takes names from."""
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def of_notebook(text: str, *, file: str) -> Document:
    """The calls of a notebook's code cells. Lines for the shell and magics are left out, and cells that are no Python."""
    try:
        cells = json.loads(text)["cells"]
        sources = {at: "".join(cell["source"]) for at, cell in enumerate(cells, 1) if cell["cell_type"] == "code"}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BrokenFileError(file, None, "not a notebook; accepted: JSON with cells") from None
    trees = []
    for number, source in sources.items():
        trees += [ast.increment_lineno(each, number * CELL) for each in _cell(source)]
    source = "\n".join(sources.values())
    return _document(_read(trees, _settings(source), file), file)._replace(installs=" ".join(_installed(_commands(source))))


def _cell(source: str) -> list[ast.stmt]:
    """The statements of a cell; none if it is not Python."""
    with contextlib.suppress(*UNREADABLE):
        return ast.parse(_without_magics(source)).body
    return []


def _settings(source: str) -> dict[str, object]:
    """What a notebook's lines set in the environment."""
    return dict(MAGIC.findall(source))


def _commands(source: str) -> Iterator[str]:
    """A notebook's lines for the shell."""
    lines = source.replace("\\\n", " ").splitlines()
    return (line for line in lines if line.lstrip().startswith(("!", "%pip")))


def _installed(lines: Iterable[str]) -> Iterator[str]:
    """Releases that commands install, one after the other: `transformers==4.46.3`, and the last one below a bound. A later
    upgrade without a release installs today's."""
    installed: dict[str, str] = {}
    for line in lines:
        words = [word.strip("\"'") for word in line.partition(" #")[0].split()]
        for word in words:
            if (repository := REPOSITORY.fullmatch(word)) is not None:
                installed.pop(repository[1], None)
            if (match := REQUIREMENT.fullmatch(word)) is None:
                continue
            package, accepted = match.groups()
            if release := _release(package, accepted):
                installed[package] = release
            elif not accepted and {"-U", "--upgrade"} & set(words):
                installed.pop(package, None)
    yield from (f"{package}=={release}" for package, release in installed.items())


def _release(package: str, accepted: str) -> str | None:
    """The release of a requirement; None where today's is accepted."""
    if exact := re.search(r"==([\w.]+)", accepted):
        return exact[1]
    if (bound := AT_MOST.search(accepted)) is None:
        return None
    sign, release = bound.groups()
    numbers = [int(number) for number in re.findall(r"\d+", release)]
    if sign == "<=":
        return release
    if sign == "~=" and len(numbers) > 2:
        return ".".join(map(str, numbers[:2]))
    major = numbers[0] + (sign == "~=")
    if sign == "<" and len(numbers) > 1 and numbers[1]:
        return f"{numbers[0]}.{numbers[1] - (not any(numbers[2:]))}"
    return LAST_BEFORE.get((package, major))


def of_script(text: str, *, file: str, command: Values | None = None, variables: Collection[str] = ()) -> Document:
    """The calls of a Python script. `command`: words of the command that runs it, in place of its command line's defaults;
    `variables`: names of the environment that the command sets, whose defaults the program does not take."""
    try:
        tree = ast.parse(_without_magics(text) if text.startswith(DATABRICKS) else text)
    except UNREADABLE as error:
        why = str(error) or "expressions are nested too deeply"
        raise BrokenFileError(file, getattr(error, "lineno", None), f"not Python: {why}") from None
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    inside, cells = saved_notebooks.without_cells(tree.body), saved_notebooks.magics_of(text)
    magics = "\n".join(cells)
    statements = [*(each for cell in cells for each in _cell(cell)), *_with_modules(inside, file)]
    document = _document(_read(statements, _settings(magics), file, command, variables), file)
    installs = " ".join(_installed([*saved_notebooks.dependencies(text), *_commands(magics)]))
    saved_from = ".marimo" if len(inside) > len(tree.body) else ".ipynb" if cells else ""
    return document._replace(comments=comments, installs=installs, saved_from=saved_from)


def _with_modules(statements: list[ast.stmt], file: str) -> list[ast.stmt]:
    """The statements, with those of the program's own modules in place of `from module import name`."""
    joined: list[ast.stmt] = []
    for each in statements:
        joined += _of_module(each, file) if isinstance(each, ast.ImportFrom) and each.module else [each]
    return joined


def _of_module(node: ast.ImportFrom, file: str) -> list[ast.stmt]:
    """What a module in the program's tree defines: its classes, functions and values; the import itself for any other."""
    above = range(node.level - 1, node.level) if node.level else range(MOST_ABOVE)
    name = os.path.join(*str(node.module).split(".")) + ".py"
    paths = (os.path.join(os.path.dirname(file), *[os.pardir] * each, name) for each in above)
    path = next((each for each in paths if in_tree(each, file) and os.path.isfile(each)), None)
    if path is None:
        return [node]
    try:
        tree = ast.parse(files.text(path, field="config", most=MOST_BYTES))
    except (*UNREADABLE, InputError):
        return [node]
    renamed = [alias for alias in node.names if alias.asname]
    for each in ast.walk(tree):
        vars(each).pop("lineno", None)  # of another file
    bound = [ast.Assign([ast.Name(str(each.asname), ast.Store())], ast.Name(each.name, ast.Load())) for each in renamed]
    return [*_needed([each for each in tree.body if isinstance(each, DEFINITIONS)], {each.name for each in node.names}), *bound]


def _needed(definitions: list[ast.stmt], names: set[str]) -> list[ast.stmt]:
    """Of a module's definitions those that an import of some names needs: a function of the same name as one of the program,
    which the program does not import, is none of its own."""
    bound = [{name for node in _targets(each) for name in own_names(node)} for each in definitions]
    if "*" in names or not names:
        return definitions
    mentioned = [{node.id for node in ast.walk(each) if isinstance(node, ast.Name)} for each in definitions]
    always = [not own or any(name.startswith(".") for name in own) for own in bound]
    kept = [False] * len(definitions)
    while more := [at for at, own in enumerate(bound) if not kept[at] and (always[at] or own & names)]:
        for at in more:
            kept[at] = True
            names = names | mentioned[at]
    return [each for at, each in enumerate(definitions) if kept[at] or isinstance(each, (ast.Import, ast.ImportFrom))]


def _targets(node: ast.stmt) -> Iterator[ast.AST]:
    """The parts of a definition that bind names."""
    if isinstance(node, ast.Assign):
        yield from (each for target in node.targets for each in ast.walk(target))
    elif isinstance(node, ast.AnnAssign):
        yield from ast.walk(node.target)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from node.names
    else:
        yield node


def _without_magics(source: str) -> str:
    """The text without lines for the shell and for IPython."""
    return "\n".join("pass" if line.lstrip().startswith(("!", "%")) else line for line in source.splitlines())


def _read(
    statements: list[ast.stmt],
    environment: Values,
    file: str,
    command: Values | None = None,
    variables: Collection[str] = (),
) -> Calls:
    """The calls of a program, read anew as long as what functions are called with and return, and what attributes hold, grows."""
    parts = _parts(statements)
    if parts > MOST_PARTS:
        what = "statements, calls and deep expressions"
        raise BrokenFileError(file, None, f"{parts:,} {what}; accepted: a program of at most {MOST_PARTS:,}")
    reader = Calls(statements, environment, command=command)
    reader.variables.update(variables)
    reader.file = file
    reader.read()
    for times in range(1, MOST_READINGS):
        if times >= READINGS and not reader.reads_files:
            break
        earlier, reader = reader, Calls(statements, environment, earlier=reader, command=command)
        reader.variables.update(variables)
        reader.read()
        if reader.same_as(earlier):
            break
    return reader


def _parts(statements: list[ast.stmt]) -> int:
    """The statements, calls and deep expressions."""
    parts = 0
    todo: list[tuple[ast.AST, int]] = [(each, 0) for each in statements]
    while todo:
        node, depth = todo.pop()
        parts += isinstance(node, (ast.stmt, ast.Call)) or (depth >= DEEP and isinstance(node, ast.expr))
        todo += [(each, 0 if isinstance(each, ast.stmt) else depth + 1) for each in ast.iter_child_nodes(node)]
    return parts


def _lengths(tokenized: list[Call]) -> list[Call]:
    """Where texts are cut, and the most that another call of a tokenizer cuts at: a program may cut targets elsewhere."""
    cuts = [cut for each in tokenized if isinstance(cut := each["kwargs"].get("max_length"), int)]
    others = [cut for cut in cuts if cut != cuts[0]]
    if others:
        tokenized[0]["kwargs"]["other_max_length"] = max(others)
    return tokenized


def _document(reader: Calls, file: str) -> Document:
    counting, rest = in_order(reader.calls, reader.untaken, reader.unused)
    calls = reader.doubts.settle(of_training_first(counting, reader.nodes, reader.used_by), reader.nodes, reader.used_by)
    calls += [Call(call=UNTAKEN + call["call"], args=[], kwargs={}) for call in rest]
    for call in calls:
        _take_config(call, reader, calls)
    if not calls:
        raise BrokenFileError(file, None, "accepted: a program that calls from_pretrained, get_peft_model or a Trainer")
    settings = [Call(call="os.environ", args=[], kwargs=reader.environment)] if reader.environment else []
    others = reader.passed | reader.unmentioned
    freezes = reader.freezes(others)
    weights = [Call(call="requires_grad", args=[], kwargs={})] if freezes else []
    weights += [Call(call="parts", args=[], kwargs={})] if reader.changes_parts(others) else []
    lines: dict[str, int] = {}
    for call in calls:
        node = reader.nodes.get(id(call))
        nodes = {each.arg: each.value for each in node.keywords} if node is not None else {}
        of_call = {call["call"]: node, **{f"{call['call']}.{name}": value for name, value in nodes.items()}}
        numbers = {name: getattr(each, "lineno", None) for name, each in of_call.items()}
        lines |= {name: number for name, number in numbers.items() if number is not None and name not in lines}
    return Document(
        {"calls": calls + _lengths(reader.lengths) + settings + weights}, lines, "calls", unread=reader.unread()
    )._replace(environment=reader.of_allocator)


def _take_config(call: Call, reader: Calls, calls: list[Call]) -> None:
    """`config=config` in a call that loads a model: nothing where it is the model's own, changed in nothing that takes bytes."""
    keywords = call["kwargs"]
    if not isinstance(keywords.get("config"), str):
        return
    makers = reader.used_by.get(reader.nodes[id(call)], set()) if id(call) in reader.nodes else set()
    configs = [each for each in calls if each["call"].endswith(OF_MODEL) and reader.nodes.get(id(each)) in makers]
    if len(configs) != 1 or _loaded_name(configs[0]) != _loaded_name(call):
        return
    own = configs[0]["kwargs"]
    rope = own.get("rope_scaling")
    if isinstance(rope, dict) and "rope_theta" not in rope:  # transformers 5 raises TypeError
        return
    if own.keys() - {"pretrained_model_name_or_path"} <= WITHOUT_BYTES and own.get("use_cache", False) is False:
        del keywords["config"]
        if "num_labels" in own:
            keywords.setdefault("num_labels", own["num_labels"])


def _loaded_name(call: Call) -> object:
    """The name of what a call loads."""
    return call["args"][0] if call["args"] else call["kwargs"].get("pretrained_model_name_or_path")
