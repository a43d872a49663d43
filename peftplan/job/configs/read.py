"""`read_config`: the file of another training tool as a `ConfigPlan`. Nothing in a file is executed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from peftplan import files
from peftplan.errors import RefusedError
from peftplan.job.configs.detect import check, names_program, tool_of
from peftplan.job.configs.documents import MOST_BYTES, BrokenFileError, Document, Values, Written, read_json, read_yaml
from peftplan.job.configs.facts import Facts, facts, launcher_words
from peftplan.job.configs.launch_files import in_tree, path_of
from peftplan.job.configs.launching import before_script
from peftplan.job.configs.plan import LAUNCHERS, ConfigPlan, Tool, Unsupported
from peftplan.job.configs.planned import by_launch, plan_of
from peftplan.validation import paths as listed_paths

NOTEBOOK_BYTES = 32 * 2**20
"""The largest notebook that is read. Its outputs may hold images."""
MODEL_KEYS = frozenset({"model", "model_name_or_path", "base_model", "model_id_or_path"})
"""Options of commands that name a model."""
OF_SETTINGS = (".yaml", ".yml", ".json")
"""Ends of names of files of settings, which count beside a model that the command names."""
NODES = "NNODES"
PROCESSES = {
    "nproc_per_node": "NPROC_PER_NODE", "num_gpus": "NPROC_PER_NODE", "num_processes": "NPROC_PER_NODE",
    "nnodes": NODES, "num_nodes": NODES, "num_machines": NODES,
}  # fmt: skip
"""Words of launchers for numbers of processes → the variables that say the same."""
OF_A_MODEL = "the config of a model, not of its training; name it as MODEL"
TRAINERS = ("Trainer", "Seq2SeqTrainer")
BY_COMMAND = "the program has its settings from its command line; name the shell script that launches it"
RUNNING = ("accelerate", "torchrun", "deepspeed", "python")
"""Programs that run a script of any tool."""
SUPERVISED = "trl"
OTHER_TRAINER = re.compile("dpo|kto|orpo|cpo|bco|grpo|rloo|ppo|gkd|reward|prm|distil", re.I)
"""What names of programs that run another trainer of TRL hold."""
BY_NAME = "its name is that of another trainer than SFTTrainer; name it, such as --trainer trl-dpo"
NOT_READ = "an option of the command that the program is not seen to read"
LAUNCH_FILES = ("config_file", "deepspeed_config_file")
OF_ACCELERATE = (*LAUNCH_FILES, "accelerate_config")
"""Words of a command that name a launch file of accelerate, TRL's own among them."""
OF_LAUNCH = ("deepspeed", "fsdp_config")
"""Words of a command that name a launch file, or hold what is in it."""
NO_LAUNCH_FILE = "the launch file is not among the files; add it with another --config"
OWN_PROGRAM = "a program with options of its own; name the program itself, or its tool with --tool"


def read_config(path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, tool: str | None = None) -> ConfigPlan:
    """What a training tool's file says: model, options, launch, and how each of its keys is treated.

    `path`: a YAML or JSON file, a shell script with a training command, or a Python script or notebook that trains; in a list,
    the later files are launch files (accelerate YAML, DeepSpeed JSON). `tool`: the name of the tool, if the file does not show
    it. Raises InputError, UnknownNameError or RefusedError, one line with file, line and key.
    """
    return read_beside(path, {}, tool=tool)


def read_beside(
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], chosen: Mapping[str, object], *, tool: str | None = None
) -> ConfigPlan:
    """The same beside options of the user, some of which decide what keys of the file mean."""
    paths = listed_paths(path, field="config")
    if not paths:
        raise RefusedError("config: name at least one file")
    own = read_document(Path(paths[0]))._replace(chosen=chosen)
    first = _of_document(own, str(Path(paths[0])), None if tool is None else check(tool))
    plans = [first, *(_plan(Path(each)) for each in paths[1:])]
    plan = joined(plans)
    if len(plans) > 1:  # they are what was not found
        plan = replace(plan, unsupported={key: row for key, row in plan.unsupported.items() if row.why != NO_LAUNCH_FILE})
    return plan


def read_values(
    values: Mapping[str, object],
    *,
    file: str,
    tool: str | None = None,
    kind: str = "values",
    program: str = "",
    tool_version: str | None = None,
    **environment: object,
) -> ConfigPlan:
    """The plan of values that were parsed already: of a file, of a `command`, or the `calls` of a script."""
    variables = {str(name): str(value) for name, value in environment.items()}
    chosen = {} if tool_version is None else {"tool_version": tool_version}
    document = Document(dict(values), kind=kind, program=program, environment=variables, chosen=chosen)
    return _of_document(document, file, None if tool is None else check(tool))


def _plan(path: Path) -> ConfigPlan:
    return _of_document(read_document(path), str(path), None)


def _of_document(document: Document, file: str, tool: Tool | None) -> ConfigPlan:
    if document.written:
        document, launch_files = _written_launch(document, file)
        if launch_files:
            return joined([_of_document(document, file, tool), *launch_files])
    if document.settings.endswith(OF_SETTINGS) or (document.settings and not MODEL_KEYS & document.values.keys()):
        return _with_settings(document, file, tool)
    tool = tool or tool_of(document, file=file)
    if tool == "other" and document.kind == "command" and (plan := _of_program(document, file)) is not None:
        return plan
    if tool == "other":
        own = {"program": Unsupported(document.program, OWN_PROGRAM)} if document.kind == "command" else {}
        if document.kind == "calls" and any(call["call"].rpartition(".")[2] in TRAINERS for call in document.calls):
            own = {"program": Unsupported("Trainer", BY_COMMAND)}
        if document.kind == "values" and isinstance(document.values.get("model_type"), str):
            own = {"model_type": Unsupported(document.values["model_type"], OF_A_MODEL)}
        return ConfigPlan("other", "", (file,), None, {}, unsupported=own, kind="other")
    return plan_of(document, facts(tool), file=file)


def _with_settings(command: Document, file: str, tool: Tool | None) -> ConfigPlan:
    """The plan of the file that a command names, with the command's own words, which win, and how it launches processes."""
    path = _path_of(command.settings, command, file)
    document = _written(command.settings, command, file)
    if document is not None:
        path = file
        document, _ = _written_launch(document._replace(written=command.written, folder=command.folder), file)
    elif not (os.path.isfile(path) and in_tree(path, file)):
        raise RefusedError(f"{file}: its command takes its settings from {command.settings}; name that file")
    else:
        document = read_document(Path(path))
    of_command = tool_of(command, file=file) if not command.program.startswith(RUNNING) else "other"
    tool = tool or (of_command if of_command != "other" else tool_of(document, file=path))
    if tool == "other" or document.kind != "values":
        raise RefusedError(f"{file}: {command.settings}, from which its command takes its settings, is no training config")
    words, environment, launch_files = _launch_of(command, facts(tool), file)
    own = command.program if of_command == tool or names_program(command.program, tool) else ""
    document = document._replace(
        values=_overridden(document.values, words),
        lines={key: line for key, line in document.lines.items() if key not in words},
        program=own,
        environment={**environment, **command.environment},
        assumed={**document.assumed, **command.assumed},
        chosen=command.chosen,
    )
    plan = joined([plan_of(document, facts(tool), file=path), *launch_files])
    if not own and plan.options.get("trainer") == SUPERVISED and OTHER_TRAINER.search(command.program.rpartition("/")[2]):
        plan = replace(
            plan, unsupported={**plan.unsupported, "program": Unsupported(command.program, BY_NAME, "unknown", "trainer")}
        )
    return replace(plan, files=tuple(dict.fromkeys((file, *plan.files))))


def _written(name: str, command: Document, file: str) -> Document | None:
    """The values of a file that the script writes before the command; None of another file."""
    text, line, by = command.written.get(os.path.normpath(os.path.join(command.folder, name)), Written("", 0, ""))
    if by:
        raise RefusedError(f"{file}:{line}: {by} changes {name} before the command reads it; name the changed file in its place")
    if not line:
        return None
    return (read_json if name.endswith(".json") else read_yaml)(text, file=file)


def _written_launch(command: Document, file: str) -> tuple[Document, list[ConfigPlan]]:
    """The command with the values of launch files that the script writes; and the plans of accelerate's."""
    named = {key: str(before_script(command.values[key])) for key in (*OF_ACCELERATE, *OF_LAUNCH) if key in command.values}
    written = {key: own for key, name in named.items() if (own := _written(name, command, file)) is not None}
    values = {key: value for key, value in command.values.items() if key not in written}
    values |= {key: own.values for key, own in written.items() if key in OF_LAUNCH}
    plans = [replace(_of_document(own, file, None), files=()) for key, own in written.items() if key in OF_ACCELERATE]
    return command._replace(values=values), plans


def _path_of(path: str, command: Document, file: str) -> str:
    """Where a file is that a command names: from the folder where it runs, if it is there."""
    inside = path_of(os.path.join(command.folder, path), file)
    return inside if os.path.isfile(inside) else path_of(path, file)


def _of_program(command: Document, file: str) -> ConfigPlan | None:
    """The plan of the Python program that a command runs, with the command's words; None where it is not there."""
    script = command.program.rpartition(" ")[2]
    path = _path_of(script, command, file)
    if not script.endswith(".py") or not (os.path.isfile(path) and in_tree(path, file)):
        return None
    from peftplan.job.configs import programs

    words, environment, launch_files = _launch_of(command, None, file)
    try:
        text = files.text(path, field="config", most=MOST_BYTES)
        document = programs.of_script(text, file=path, command=words, variables=command.environment.keys())
    except BrokenFileError:  # it trains in another file
        return None
    tool = tool_of(document, file=path)
    if tool == "other":
        return None
    environment = {**environment, **command.environment}
    environment = {**environment, **document.environment}
    document = document._replace(environment=environment, assumed={**document.assumed, **command.assumed})
    plan = joined([plan_of(document, facts(tool), file=path), *launch_files])
    unread = {word: Unsupported(words[word], NOT_READ, "unknown") for word in document.unread}
    return replace(plan, files=(file, *plan.files), unsupported={**plan.unsupported, **unread})


def _launch_of(command: Document, tool: Facts | None, file: str) -> tuple[Values, dict[str, str], list[ConfigPlan]]:
    """The words of a command; and what its launcher's say where the tool does not know them: as variables, and launch files."""
    words = {key: value for key, value in command.values.items() if key != "config"}
    if "config_file" in words:
        words["config_file"] = _path_of(str(before_script(words["config_file"])), command, file)
    launcher = launcher_words(words)
    if tool is not None:
        launcher = [key for key in launcher if not tool.known(key)]
    own = {key: words.pop(key) for key in launcher}
    stated = {name: before_script(own[name]) for name in PROCESSES if name in own}
    numbers = {name: int(str(number)) for name, number in stated.items() if str(number).isdecimal()}
    nodes = next((number for name, number in numbers.items() if PROCESSES[name] == NODES), 1)
    environment = {PROCESSES[name]: str(number) for name, number in stated.items() if name not in numbers}
    environment |= {
        PROCESSES[name]: str(number // nodes if name == "num_processes" else number) for name, number in numbers.items()
    }
    launch_files = [_launch_file(key, str(before_script(own[key])), command, file) for key in LAUNCH_FILES if key in own]
    if "mixed_precision" in own:
        precision = plan_of(Document({"mixed_precision": before_script(own["mixed_precision"])}), facts("accelerate"), file=file)
        launch_files.append(replace(precision, files=()))
    return words, environment, launch_files


def _launch_file(key: str, name: str, command: Document, file: str) -> ConfigPlan:
    """The plan of a launch file that a command names; without options, and unsupported, where it is not read."""
    path = _path_of(name, command, file)
    if os.path.isfile(path) and in_tree(path, file):
        return _plan(Path(path))
    return ConfigPlan("accelerate", "", (), None, {}, unsupported={key: Unsupported(name, NO_LAUNCH_FILE, "unknown", "strategy")})


def _overridden(values: Mapping[str, object], words: Mapping[str, object]) -> dict[str, object]:
    """The values of a file with those of a command, `model.lora_rank=8` in the mapping `model`."""
    result = dict(values)
    for key, value in words.items():
        first, _, rest = key.partition(".")
        inner = result.get(first)
        result[first if rest else key] = _overridden(inner, {rest: value}) if rest and isinstance(inner, Mapping) else value
    return result


def read_document(path: Path) -> Document:
    """The values of a file, by its kind."""
    notebook = path.suffix == ".ipynb"
    return document_of_text(files.text(path, field="config", most=NOTEBOOK_BYTES if notebook else MOST_BYTES), file=str(path))


def document_of_text(text: str, *, file: str) -> Document:
    """The values of a text, by the ending of its file's name."""
    suffix, text = Path(file).suffix, text.removeprefix("\ufeff")
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
    """One plan of a training file and the launch files behind it. Ranks of DDP may shard by a later file.

    Raises RefusedError if two launch files shard in different ways.
    """
    first, *others = plans
    if first.tool == "other":  # it trains nothing that could be launched
        return first
    named: tuple[str, object] | None = None
    for other in others:
        if other.tool not in LAUNCHERS:
            raise RefusedError(f"config: {other.files[0]} is a file of {other.tool}; accepted after the first: launch files")
        shares = "strategy" in other.options or other.options.get("gpus", 1) != 1
        if shares and first.options.get("device_map") == facts(first.tool).device_map:  # the tool's, for one process
            first = replace(first, options={k: v for k, v in first.options.items() if k != "device_map"})
        firm = {k: v for k, v in first.options.items() if k not in first.assumed}
        if other.tool == "accelerate" and facts(first.tool).launched_precision and firm.get("autocast") == "none":
            del firm["autocast"]
        strategy, whose = other.options.get("strategy"), (*other.files, "the command")[0]
        if named is not None and strategy not in (None, "ddp", named[1]):
            if named[1] != "ddp":
                raise RefusedError(f"config: {named[0]} names {named[1]}, {whose} {strategy}; accepted: one strategy")
            if firm.get("strategy") == "ddp":
                del firm["strategy"]
        if strategy is not None and (named is None or named[1] == "ddp"):
            named = (whose, strategy)
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
            places={**first.places, **{f"{other.tool}: {key}": at for key, at in other.places.items()}},
        )
    return first
