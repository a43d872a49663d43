"""Many training configs at once: what each trains, its peak, whether it fits, and the unsupported keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from peftplan.arch import catalogue, hub
from peftplan.errors import InputError, PeftplanError, RefusedError, UnknownNameError, UnreadableError
from peftplan.frames import Listing
from peftplan.job.configs.detect import check, tool_of
from peftplan.job.configs.models import is_folder
from peftplan.job.configs.plan import ConfigPlan, Tool, misspelled
from peftplan.job.configs.read import read_config, read_document
from peftplan.job.setup import ENGINES, Engine
from peftplan.planning.estimate import estimate
from peftplan.planning.verdicts import counted_cards, find_cards
from peftplan.results.verdict_documents import VerdictName
from peftplan.validation import paths as listed_paths

SUFFIXES = (".yml", ".yaml", ".json", ".sh", ".py", ".ipynb")
"""Files of a folder that are read."""
MOST_FILES = 10_000
FILES_OF_PROCESS = 16
"""Files for which another process is started, which takes as long as one or two of them."""


class ConfigEntry(NamedTuple):
    """What one file says: bytes are null where there is no peak, `bound` says what a peak is where keys are not supported."""

    file: str
    tool: Tool
    model: str | None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    engine: str | None = None
    verdict: VerdictName | None = None
    unsupported: tuple[str, ...] = ()
    """Keys that change memory, or may, and that peftplan does not model."""
    error: str | None = None
    """Why there is no estimate, or no peak."""
    bound: Literal["at_most", "at_least", "unknown"] | None = None
    refused: str | None = None
    """What the tool raises for the file as it is, and the change of which the numbers are."""
    scope: str | None = None
    """`text` if the peak is that of a vision-language model's text: images are not counted."""
    misspelled: tuple[str, ...] = ()
    """Keys that the tool leaves out and that are nearly one of its own, each with the nearest."""


def configs(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    gpu: str | None = None,
    engine: Engine = "analytic",
    tool: str | None = None,
    online: bool = False,
    processes: int = 1,
) -> Listing[ConfigEntry]:
    """An entry for each file in `paths`, and for each file in its folders that may contain a training config.

    `gpu`: a card, or several of one, for the verdicts. `tool`: the tool of all files. `online`: read the configs of models that
    are neither built in nor in the local cache from the Hub; without it nothing is downloaded. `processes`: how many read
    at once, of many files. Raises InputError for a path that does not exist, and for an unknown card, engine or tool.
    """
    _check(gpu, engine, tool)
    if not isinstance(processes, int) or processes < 1:
        raise InputError("processes", processes, "accepted: whole numbers from 1")
    files = [file for path in listed_paths(paths, field="paths") for file in _files(Path(path))]
    read = partial(entry, gpu=gpu, engine=engine, tool=tool, online=online)
    processes = min(processes, len(files) // FILES_OF_PROCESS)
    return Listing(map(read, files) if processes < 2 else _in_processes(read, files, processes))


def _in_processes(read: Callable[[Path], ConfigEntry], files: Sequence[Path], processes: int) -> list[ConfigEntry]:
    """The entries of `files`, in their order; read one after the other if a process is killed."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    context = get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(processes, context) as pool:
            return list(pool.map(read, files, chunksize=4))
    except BrokenProcessPool:
        return list(map(read, files))


def _check(gpu: str | None, engine: str, tool: str | None) -> None:
    """Raise for options that no file can be asked with."""
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if tool is not None:
        check(tool)
    groups = counted_cards(gpu)
    if len(groups) > 1 or len(find_cards(groups[0][1] if groups else None)) > 1:
        raise RefusedError("gpu: a file has one verdict; accepted: one card, or several of it as 8xh100-80gb")


def _files(path: Path) -> list[Path]:
    """A file, or those of a folder in the order of their names; hidden ones and links are left out.

    Files are counted before any is read.
    """
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that no file can have
        raise UnreadableError("paths", str(path), error.strerror or "no such file or folder") from None
    if not exists:
        raise UnreadableError("paths", str(path), "no such file or folder")
    files = list(islice(_walk(path), MOST_FILES + 1)) if is_folder else [path]
    if len(files) > MOST_FILES:
        raise InputError("paths", str(path), f"accepted: folders of at most {MOST_FILES:,} files")
    return files


def _walk(path: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if name.endswith(SUFFIXES) and not name.startswith(".") and not file.is_symlink():
                yield file


def entry(file: Path, *, gpu: str | None, engine: Engine, tool: str | None, online: bool) -> ConfigEntry:
    """What one file says; what is wrong with it is its `error`."""
    try:
        plan = read_config(file, tool=tool)
    except PeftplanError as error:
        return ConfigEntry(str(file), _tool(file, tool), None, error=str(error))
    return of_plan(plan, gpu=gpu, engine=engine, online=online)


def _tool(file: Path, tool: str | None) -> Tool:
    """The tool of a file that has no plan; `other` where nothing can be read."""
    try:
        return check(tool) if tool is not None else tool_of(read_document(file), file=str(file))
    except PeftplanError:
        return "other"


def of_plan(plan: ConfigPlan, *, gpu: str | None = None, engine: Engine = "analytic", online: bool = False) -> ConfigEntry:
    """The entry of a plan."""
    row = ConfigEntry(
        plan.files[0],
        plan.tool,
        plan.model,
        unsupported=tuple(plan.unsupported),
        refused="; ".join(plan.warnings()) or None,
        misspelled=tuple(misspelled(plan.assumed)),
    )
    if plan.kind != "training":
        own = [f"{key.value}: {key.why}" for key in plan.unsupported.values()]
        other = own[0] if own and plan.tool == "other" else "not a training config"
        return row._replace(error=other if plan.kind == "other" else "a launch file, without a model")
    if plan.model is None:
        return row._replace(error=f"it {plan.no_model}")
    if is_folder(plan.model) and not os.path.exists(plan.model):
        file = Path(plan.files[0]).name
        return row._replace(error=f"{plan.model} is not here; name its model: peftplan estimate MODEL --config {file}")
    if not online and not at_hand(plan.model):
        return row._replace(error=f"{plan.model} is neither built in nor in the local cache; --online asks the Hub")
    try:
        result = estimate(config=plan, gpu=gpu, engine=engine)
    except PeftplanError as error:
        return row._replace(error=str(error))
    peaks, read = result.peaks, result.config or plan.to_dict()
    return row._replace(
        trainable_parameters=result.trainable_parameters,
        total_parameters=result.total_parameters,
        peak_allocated=peaks.allocated if peaks else None,
        peak_reserved=peaks.reserved if peaks else None,
        engine=result.engine,
        verdict=result.gpus[0].verdict if result.gpus else None,  # type: ignore[arg-type]
        error=None if peaks else result.not_modelled[0],
        bound=read["bound"] if peaks or read["bound"] == "unknown" else None,
        scope=peaks.scope if peaks else None,
        unsupported=tuple(read["unsupported"]),
    )


def at_hand(model: str) -> bool:
    """Whether a model's config is known without a network: built in, a file, or in the local cache."""
    if catalogue.find(model) is not None or os.path.exists(model):
        return True
    return hub.is_repo_id(model) and hub.cached_config(model) is not None
