"""What the shell is offered for a value: the names of a catalogue, the choices of a metavar, or files."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from click.shell_completion import CompletionItem


def _models() -> Iterable[str]:
    from peftplan.arch import catalogue

    return (entry.name for entry in catalogue.models())


def _cards() -> Iterable[str]:
    from peftplan.hardware.gpus import gpus

    return (card.id for card in gpus())


def _methods() -> Iterable[str]:
    from peftplan.methods import METHODS, OTHER_PEFT_TYPES

    return (*METHODS, *(name.lower().replace("_", "-") for name in OTHER_PEFT_TYPES))


def _optimizers() -> Iterable[str]:
    from peftplan.optim.names import OPTIMIZERS

    return OPTIMIZERS


def _tasks() -> Iterable[str]:
    from peftplan.arch.heads import TASK_TYPES

    return TASK_TYPES


def _target_words() -> Iterable[str]:
    from peftplan.methods.targets import WORDS

    return WORDS


def _documents() -> Iterable[str]:
    from peftplan.report.documents import DOCUMENTS

    return DOCUMENTS


CATALOGUES: dict[str, Callable[[], Iterable[str]]] = {
    **dict.fromkeys(
        (
            "estimate model",
            "fit model",
            "compare model",
            "sweep model",
            "serve model",
            "inspect model",
            "measure model",
            "models pattern",
        ),
        _models,
    ),
    **dict.fromkeys(("--gpu", "--capacity", "gpus pattern"), _cards),
    **dict.fromkeys(("--method", "methods name"), _methods),
    "schema name": _documents,
    "completion shell": lambda: ("bash", "zsh", "fish"),
    "--optim": _optimizers,
    "--task-type": _tasks,
    "--target-modules": _target_words,
    "--match": _target_words,
}
"""Option, or command and argument → its names."""
FILES = ("FILE", "replay file", "check files", "explain-oom file")
"""Metavars and arguments whose value is a file."""
OR_A_FILE = ("estimate model", "fit model", "compare model", "sweep model", "serve model", "inspect model", "measure model")
"""Arguments that are a name or a path: what looks like a path is completed as one."""


def values(what: str, metavar: str, incomplete: str) -> list[CompletionItem]:
    """What completes `incomplete`: `what` is an option, or a command with its argument."""
    if metavar in FILES or what in FILES or (what in OR_A_FILE and incomplete.startswith((".", "/", "~"))):
        return [CompletionItem(incomplete, type="file")]
    choices = metavar.strip("[]").split("|") if metavar.startswith("[") else CATALOGUES.get(what, tuple)()
    return [CompletionItem(name) for name in choices if name.startswith(incomplete)]
