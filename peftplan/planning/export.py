"""`export`: a job as the config of another training tool, with its estimate in comments."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from peftplan import files
from peftplan.distributed.strategy import Distributed, parse_distributed
from peftplan.errors import InputError, RefusedError, UnknownNameError
from peftplan.job.configs.documents import Values
from peftplan.job.configs.facts import facts
from peftplan.job.configs.plan import ConfigPlan, ExportTool, Read
from peftplan.job.configs.read import read_text
from peftplan.job.configs.texts import Parts, text_of
from peftplan.job.configs.tool_file import Write
from peftplan.job.configs.with_file import of_releases
from peftplan.job.configs.writing import Written, written
from peftplan.job.inventory import inventory
from peftplan.job.job import Job
from peftplan.job.launch import accelerate, deepspeed
from peftplan.job.launch.writing import accelerate_file, deepspeed_file, stated
from peftplan.job.prepare import prepare
from peftplan.job.script import Script
from peftplan.planning.fit_result import Plan
from peftplan.planning.question import Question, analytic
from peftplan.results.estimate import Estimate
from peftplan.units import format_bytes

TOOLS: tuple[str, ...] = get_args(ExportTool)
ENDINGS = {
    "yaml": (".yml", ".yaml"), "shell": (".sh", ".bash"), "python": (".py",), "json": (".json",), "notebook": (".ipynb",),
}  # fmt: skip
"""Format → the ends of names by which a file is read as one; another name is that of YAML, JSON or a shell script."""
SOURCE = re.compile(r" \([^()]*\)")
NOTHING = Read(None, "")


class Exported(NamedTuple):
    """A config of another tool. `str()` of it is its text."""

    to: str
    text: str
    estimate: Estimate | None
    """What the file says, read back and estimated; None for a launch file, which trains nothing."""
    changed: Mapping[str, tuple[object, object]]
    """Option that was not set and that the tool sets differently → its value in the job, and in the tool."""
    left_out: tuple[str, ...]
    """Options that were set, change no byte, and have no key in the tool."""

    def __str__(self) -> str:
        return self.text

    def notes(self) -> Iterator[str]:
        """What differs from the job that was exported, a line each."""
        with_values = {name: pair for name, pair in self.changed.items() if pair[0] is not None}  # the others follow from these
        if with_values:
            values = ", ".join(
                f"{name} {_shown(theirs)} (instead of {_shown(ours)})" for name, (ours, theirs) in with_values.items()
            )
            yield f"{self.to}'s defaults for what you did not set: {values}"
        if self.left_out:
            yield f"not in the file, and without effect on memory: {', '.join(self.left_out)}"

    def write(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the text to a file. Raises InputError if the file exists, unless `force`, or if it cannot be written."""
        check_output(path, force=force)
        with files.replacing(Path(path), field="output") as file:
            file.write(self.text.encode())


def check_output(path: str | os.PathLike[str], *, force: bool) -> None:
    """Raise InputError for a file that is there."""
    if not force and os.path.lexists(path):
        raise InputError("output", os.fspath(path), "the file exists; accepted: another name, or force (--force)")


def check_tool(to: str) -> None:
    """Raise UnknownNameError for a tool that no config is written for."""
    if to not in TOOLS:
        raise UnknownNameError("to", to, TOOLS)


def check_ending(file: str | os.PathLike[str], to: ExportTool) -> None:
    """Raise InputError for a name by whose ending the file would be read as one of another kind."""
    form = facts("swift" if to == "ms-swift" else to).write.get("format", "yaml")
    ending = os.path.splitext(file)[1]
    others = (each for name, endings in ENDINGS.items() for each in endings if name != form)
    if ending in others or (form == "python" and ending not in ENDINGS[form]):
        names = " or ".join(ENDINGS[form])
        raise InputError("output", os.fspath(file), f"it would not be read as {form}; accepted: a name that ends in {names}")


def export(job: Estimate | Plan, *, to: ExportTool, file: str | os.PathLike[str] | None = None) -> Exported:
    """The config of another training tool for an estimate, or for a plan that `fit` found.

    `to`: axolotl, llamafactory, trl (YAML for `trl sft`), trl-script (a Python script), torchtune or ms-swift; accelerate and
    deepspeed write the launch file of a job on several GPUs. `file`: the name that the comments use.

    Every option that was set is written to the file; if the tool has no such option, export refuses and names it. An option that
    was not set and that the tool has no key for keeps the tool's default (`Exported.changed`). What peftplan does not know, such
    as the dataset or the learning rate, is marked as a placeholder. Raises UnknownNameError for an unknown tool and RefusedError
    for a job that the tool cannot run or express, one line each.
    """
    check_tool(to)
    if file is not None:
        check_ending(file, to)
    question = job.origin
    if not isinstance(question, Question):
        raise RefusedError("job: its inputs are not known; accepted: a result of estimate, or a plan of fit")
    exporting = question.inventory.job
    chosen = exporting.chosen - (question.config["defaults"].keys() if question.config else set())
    if to in ("accelerate", "deepspeed"):
        return _launch_file(exporting, to)
    tool = facts("swift" if to == "ms-swift" else to)
    parts = written(exporting, tool, chosen=chosen)
    name = os.fspath(file or f"{to}{ENDINGS[tool.write.get('format', 'yaml')][0]}")
    run, environment = _run(exporting, tool.write, name), _environment(exporting.distributed)
    values, comments = _completed(parts, tool.write)
    plan = read_text(text_of(Parts((run,), values, comments), tool, environment=environment), file=name)
    script = question.inventory.job.request.script
    of_tool = of_releases(plan.tool, plan.options)
    same = isinstance(job, Estimate) and not parts.changed and question.config is None and not of_tool
    script = script.model_copy(update=of_tool)
    result = job if isinstance(job, Estimate) and same else _estimated(plan, question, script)
    exported = Exported(to, "", result, parts.changed, parts.left_out)
    header = [
        *_header(result, f"{to} {tool.version}"),
        *exported.notes(),
        run,
        *_unsupported(question),
        f"check: peftplan estimate --config {name}{''.join(f' --gpu {verdict.gpu}' for verdict in result.gpus)}",
        f"placeholders, for you to fill in: {', '.join(map(tool.bare, tool.write['placeholders']))}",
    ]
    return exported._replace(text=text_of(Parts(header, values, comments), tool, environment=environment))


def _estimated(plan: ConfigPlan, question: Question, script: Script) -> Estimate:
    """What the file says, on the cards of the question."""
    job = prepare(plan.model, script=script, **plan.options)
    return analytic(Question(inventory(job), question.cards, question.search, plan.to_dict()))


def _completed(parts: Written, write: Write) -> tuple[Values, dict[str, str]]:
    """Values and comments: what decides the bytes, then the launch, what the tool requires, and the placeholders."""
    rest = {key: value for key, value in write["placeholders"].items() if key not in parts.values}
    required = {key: value for key, value in write.get("required", {}).items() if key not in parts.values}
    launch = {key: value for key, value in parts.values.items() if parts.plan.read.get(key, NOTHING).option == "launch"}
    values = {key: value for key, value in parts.values.items() if key not in launch}
    comments = {key: f"off, as estimated: {SOURCE.sub('', why)}" for key, why in parts.off.items()}
    return {**values, **launch, **required, **rest}, comments | dict.fromkeys(rest, "placeholder")


def _environment(distributed: Distributed | None) -> dict[str, int]:
    if distributed is None:
        return {}
    several = {"NNODES": distributed.nodes} if distributed.nodes > 1 else {}
    return {**several, "NPROC_PER_NODE": distributed.gpus or 1}


def _run(job: Job, write: Write, name: str) -> str:
    """The command that runs the file; the reader takes the number of processes from it."""
    method = "full" if job.method_name == "full" else "*"
    filled = {"file": name, "recipe": write.get("recipes", {}).get(method, "")}
    if job.distributed is None:
        return f"run: {write['run'].format(**filled)}"
    ranks = job.distributed
    return f"run: {write['launch'].format(**filled, gpus=ranks.gpus, nodes=ranks.nodes, world=ranks.world_size)}"


def _header(result: Estimate, tool: str) -> Iterator[str]:
    from importlib.metadata import version

    rank = result.method["config"].get("r")
    job = f"{result.model['name']}, {result.method['name']}{'' if rank is None else f' r={rank}'}"
    over = "" if result.distributed is None else f", {result.distributed.strategy.called}"
    yield f"{job}{over}: written by peftplan {version('peftplan')} for {tool}"
    counts = f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters train"
    if result.peaks is None:
        yield f"{counts}; no peak is stated: {result.not_modelled[0]}"
    else:
        reserved = "" if result.peaks.reserved is None else f", {format_bytes(result.peaks.reserved)} reserved"
        per = " per GPU" if result.distributed is not None else ""
        yield f"{counts}; peak {format_bytes(result.peaks.allocated)} in {result.peaks.phase}{reserved}{per}"
    for verdict in result.gpus:
        usable, needed = format_bytes(verdict.usable_bytes), format_bytes(verdict.needed_bytes)
        yield f"{verdict.gpu}: {verdict.words}; it needs {'at least ' if verdict.lower_bound else ''}{needed} of {usable}"


def _unsupported(question: Question) -> Iterator[str]:
    """Keys of the file that the job came from, if one did, that are not supported."""
    if question.config and (keys := question.config["unsupported"]):
        yield f"not carried over from {question.config['files'][0]}: {', '.join(keys)}"


def _shown(value: object) -> str:
    return (
        {True: "on", False: "off", None: "unset"}.get(value, str(value)) if isinstance(value, (bool, type(None))) else str(value)
    )


def _launch_file(job: Job, to: str) -> Exported:
    """accelerate's YAML or DeepSpeed's JSON, read back by `job.launch`."""
    distributed, autocast = job.distributed, str(job.setup.autocast)
    if distributed is not None and distributed.strategy in ("tp", "device-map"):
        raise RefusedError(
            f"strategy: {to}'s file has no setting for {distributed.strategy}; accepted: ddp, fsdp1, fsdp2, zero0 to zero3"
        )
    if to == "deepspeed" and (distributed is None or not distributed.strategy.startswith("zero")):
        strategy = "one GPU" if distributed is None else distributed.strategy
        raise RefusedError(f"strategy: DeepSpeed's file says a stage of ZeRO, not {strategy}; accepted: zero0 to zero3")
    if to == "deepspeed":
        assert distributed is not None
        values = deepspeed_file(distributed)
        options = {"gpus": distributed.gpus, "nodes": distributed.nodes, **deepspeed.options(values)}
    else:
        values = accelerate_file(distributed, autocast)
        options = accelerate.options(values)
    if distributed is not None:
        read = parse_distributed({name: value for name, value in options.items() if name in Distributed.model_fields})
        theirs = {} if read is None else stated(read)
        lost = {name: value for name, value in stated(distributed).items() if theirs.get(name) != value}
        if lost:
            name, value = next(iter(lost.items()))
            accepted = "" if theirs.get(name) is None else f"; accepted: {theirs[name]}"
            raise RefusedError(f"{name}: a file of {to} has no setting for {value!r}{accepted}")
    tool = facts("accelerate" if to == "accelerate" else "deepspeed")
    from importlib.metadata import version

    over = "one GPU" if distributed is None else distributed.called
    header = (
        f"{over}: written by peftplan {version('peftplan')} for {to} {tool.version}",
        "peaks: peftplan estimate --accelerate-config FILE",
    )
    return Exported(to, text_of(Parts(header, values, {}), tool), None, {}, ())
