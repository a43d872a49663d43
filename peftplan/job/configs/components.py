"""Arguments of the components that a file names, such as `dataset._component_` of torchtune; fields of a method of peft."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from peftplan.errors import nearest
from peftplan.job.configs.documents import Values
from peftplan.job.configs.facts import Facts

NAMED_BY = ("_component_", "_target_", "peft_type")
"""Keys of a mapping whose value names a component; the mapping's others are its arguments."""
ANY = "*"
"""The end of a list of a function that takes further arguments, or of a section."""
OF_ANOTHER = "**"
"""What stands before the name of a component whose arguments count too."""


def unknown_names(values: Values, tool: Facts) -> dict[str, str]:
    """Keys that are not arguments of the components or sections that they are in → why."""
    keys = values if tool.components else ()
    why = {key: _unknown_name(key, values, tool) for key in keys if "." in key or values[key] not in (None, False)}
    return {key: text for key, text in why.items() if text is not None}


def _unknown_name(key: str, values: Values, tool: Facts) -> str | None:
    """Why a key is not an argument of the component or section that it is in, or does not name a component of the tool.

    None where it is one, or where nobody knows: arguments of a function of the user.
    """
    parts = key.split(".")
    for depth, name in enumerate(parts):
        section = ".".join(parts[:depth])
        named_by = (".".join(filter(None, (section, by))) for by in NAMED_BY)
        component = next((str(values[of]) for of in named_by if of in values), "")
        if name in NAMED_BY or (component and component not in tool.components):
            continue
        own = [row for of, row in tool.sections.items() if depth == 1 and fnmatchcase(section, of)]
        rows = [*([tool.components[component]] if component else ()), *own]
        arguments = {argument for row in rows for argument in _arguments(row[1], tool)}
        is_own = not component and key in tool.rows  # of a component that the mapping leaves out
        if rows and not is_own and ANY not in arguments and name not in arguments:
            return f"not an argument of {component or section} ({rows[0][0]}){_near(name, arguments)}"
    last = str(values[key]) if parts[-1] in NAMED_BY else ""
    if last and last not in tool.components and _is_of_tool(last, tool):
        return f"not a component of {tool.tool}{_near(last, tool.components)}"
    return None


def _arguments(text: str, tool: Facts) -> set[str]:
    names = set(text.split())
    others = {name for name in names if name.startswith(OF_ANOTHER)}
    return (names - others).union(*(_arguments(tool.components[name[len(OF_ANOTHER) :]][1], tool) for name in others))


def _is_of_tool(component: str, tool: Facts) -> bool:
    """Whether a path is in a module whose components are known."""
    module = component.rpartition(".")[0]
    return any(name.rpartition(".")[0] == module for name in tool.components)


def _near(name: str, known: Iterable[str]) -> str:
    near = nearest(name, sorted(known))
    return f"; did you mean {' or '.join(near)}?" if near else ""
