"""`read_config`: the file of another training tool as a `ConfigPlan`. Nothing in a file is executed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from peftplan import files
from peftplan.errors import RefusedError
from peftplan.job.configs.detect import check, tool_of
from peftplan.job.configs.documents import MOST_BYTES, Document, read_json, read_yaml
from peftplan.job.configs.facts import facts
from peftplan.job.configs.plan import LAUNCHERS, ConfigPlan, Tool, Unsupported
from peftplan.job.configs.planned import by_launch, plan_of
from peftplan.validation import paths as listed_paths

NOTEBOOK_BYTES = 32 * 2**20
"""The largest notebook that is read. Its outputs may hold images."""
MODEL_KEYS = frozenset({"model", "model_name_or_path", "base_model", "model_id_or_path"})
"""Options of commands that name a model."""
OF_A_MODEL = "the config of a model, not of its training; name it as MODEL"
OWN_PROGRAM = "a program with options of its own; name the program itself, or its tool with --tool"


def read_config(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, tool: str | None = None) -> ConfigPlan:
    """What a training tool's file says: model, options, launch, and how each of its keys is treated.

    `path`: a YAML or JSON file, a shell script with a training command, or a Python script or notebook that trains; in a list,
    the later files are launch files (accelerate YAML, DeepSpeed JSON). `tool`: the name of the tool, if the file does not show
    it. Raises InputError, UnknownNameError or RefusedError, one line with file, line and key.
    """
    paths = listed_paths(path, field="config")
    if not paths:
        raise RefusedError("config: name at least one file")
    chosen_tool = None if tool is None else check(tool)
    plans = [_plan(Path(each), chosen_tool if index == 0 else None) for index, each in enumerate(paths)]
    return joined(plans)


def read_values(
    values: Mapping[str, object],
    *,
    file: str,
    tool: str | None = None,
    kind: str = "values",
    program: str = "",
    **environment: object,
) -> ConfigPlan:
    """The plan of values that were parsed already: of a file, of a `command`, or the `calls` of a script."""
    variables = {str(name): str(value) for name, value in environment.items()}
    document = Document(dict(values), kind=kind, program=program, environment=variables)
    return _of_document(document, file, None if tool is None else check(tool))


def _plan(path: Path, tool: Tool | None) -> ConfigPlan:
    return _of_document(read_document(path), str(path), tool)


def _of_document(document: Document, file: str, tool: Tool | None) -> ConfigPlan:
    tool = tool or tool_of(document, file=file)
    if document.settings and not MODEL_KEYS & document.values.keys():
        raise RefusedError(f"{file}: its command takes its settings from {document.settings}; name that file")
    if tool == "other":
        own = {"program": Unsupported(document.program, OWN_PROGRAM)} if document.kind == "command" else {}
        if "model_type" in document.values:
            own = {"model_type": Unsupported(document.values["model_type"], OF_A_MODEL)}
        return ConfigPlan("other", "", (file,), None, {}, unsupported=own, kind="other")
    return plan_of(document, facts(tool), file=file)


def read_document(path: Path) -> Document:
    """The values of a file, by its kind."""
    notebook = path.suffix == ".ipynb"
    return document_of_text(files.text(path, field="config", most=NOTEBOOK_BYTES if notebook else MOST_BYTES), file=str(path))


def document_of_text(text: str, *, file: str) -> Document:
    """The values of a text, by the ending of its file's name."""
    suffix = Path(file).suffix
    if suffix in (".ipynb", ".py"):
        from peftplan.job.configs import programs

        return programs.of_notebook(text, file=file) if suffix == ".ipynb" else programs.of_script(text, file=file)
    if suffix in (".sh", ".bash") or text.startswith("#!"):
        from peftplan.job.configs.shell import of_shell

        return of_shell(text, file=file)
    return read_json(text, file=file) if suffix == ".json" else read_yaml(text, file=file)


def read_text(text: str, *, file: str) -> ConfigPlan:
    """The plan of a text, as the file of this name would hold it."""
    return _of_document(document_of_text(text, file=file), file, None)


def joined(plans: list[ConfigPlan]) -> ConfigPlan:
    """One plan of a training file and the launch files behind it."""
    first, *others = plans
    for other in others:
        if other.tool not in LAUNCHERS:
            raise RefusedError(f"config: {other.files[0]} is a file of {other.tool}; accepted after the first: launch files")
        shares = "strategy" in other.options or other.options.get("gpus", 1) != 1
        if shares and first.options.get("device_map") == facts(first.tool).device_map:  # the tool's, for one process
            first = replace(first, options={k: v for k, v in first.options.items() if k != "device_map"})
        firm = {k: v for k, v in first.options.items() if k not in first.assumed}
        if other.tool == "accelerate" and facts(first.tool).launched_precision and firm.get("autocast") == "none":
            del firm["autocast"]
        first = replace(
            first,
            files=first.files + other.files,
            options={**first.options, **other.options, **firm, **by_launch(other.options)},
            launch={**first.launch, **other.launch},
            assumed={**other.assumed, **{k: why for k, why in first.assumed.items() if k not in other.options}},
            read={**first.read, **{f"{other.tool}: {key}": row for key, row in other.read.items()}},
            ignored={**first.ignored, **{f"{other.tool}: {key}": row for key, row in other.ignored.items()}},
            unsupported={**first.unsupported, **{f"{other.tool}: {key}": row for key, row in other.unsupported.items()}},
            refused={**first.refused, **{f"{other.tool}: {key}": row for key, row in other.refused.items()}},
        )
    return first
