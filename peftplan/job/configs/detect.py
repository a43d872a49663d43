"""Detect which tool a file belongs to, by its content."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftplan.errors import RefusedError, UnknownNameError
from peftplan.job.configs.documents import Document, flat
from peftplan.job.configs.facts import facts
from peftplan.job.configs.plan import TOOLS, Tool
from peftplan.job.configs.tool_file import Case

KNOWN: tuple[Tool, ...] = tuple(tool for tool in TOOLS if tool != "other")


def check(tool: str) -> Tool:
    """The tool of this name. Raises UnknownNameError."""
    if tool not in KNOWN:
        raise UnknownNameError("tool", tool, KNOWN)
    return tool


def tool_of(document: Document, *, file: str) -> Tool:
    """The tool of a file; `other` if none matches. Raises RefusedError if two match."""
    keys = flat(document.values) if document.kind != "calls" else {call["call"]: True for call in document.calls}
    program = document.program
    matching = [
        tool
        for tool in KNOWN
        if any(_matches(case, document.kind, program, keys, document.values, tool) for case in facts(tool).detect)
    ]
    if len(matching) > 1:
        raise RefusedError(f"{file}: keys of {' and '.join(matching)} in one file; name its tool with --tool")
    return matching[0] if matching else "other"


def trains(document: Document, tool: Tool) -> bool:
    """Whether a command is one of a tool, and none of those that infer, export or evaluate."""
    rules = facts(tool).rules if tool != "other" else ()
    others = (rule.get("when", {}).get("program", ()) for rule in rules if rule.get("kind") == "other")
    return tool != "other" and not any(runs(document.program, map(str, names)) for names in others if isinstance(names, list))


def runs(program: str, names: Iterable[str]) -> bool:
    """Whether a command line begins with one of the names, or contains one that is written with `~`."""
    return any(name[1:] in program if name.startswith("~") else program.startswith(name) for name in names)


def names_program(program: str, tool: Tool) -> bool:
    """Whether a rule of a tool names a program."""
    named = (rule.get("when", {}).get("program", ()) for rule in facts(tool).rules)
    return any(runs(program, map(str, names)) for names in named if isinstance(names, list))


def _matches(case: Case, kind: str, program: str, keys: Mapping[str, object], values: Mapping[str, object], tool: Tool) -> bool:
    """Whether a case holds: its `kind`, `program` and `not_program`, `all` of its keys, `any` of others, `none` of the rest."""

    def there(key: str) -> bool:
        name, _, value = key.partition("=")
        if name.endswith("*"):
            return any(each.startswith(name[:-1]) for each in keys)
        return (name in keys or name in values) and (not value or value in str(keys.get(name)))

    def own() -> bool:
        return any(map(there, case.get("own", ()))) or program.rpartition("/")[2].rpartition(" ")[2] in case.get("names", ())

    return (
        case.get("kind", "values") == kind
        and runs(program, case.get("program", [""]))
        and not runs(program, case.get("not_program", ()))
        and all(map(there, case.get("all", ())))
        and (not case.get("any") or any(map(there, case["any"])))
        and not any(map(there, case.get("none", ())))
        and not (case.get("half") and 2 * sum(facts(tool).known(key) is not None for key in values) < len(values))
        and ("scripts" not in case or runs(program, case["scripts"]) or (own() and all(map(facts(tool).known, keys))))
    )
