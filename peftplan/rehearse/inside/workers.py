"""Launchers start the workers of a node; here they start one, which plays the rank that is wanted.

Three ways are known: torch's own launcher, its `start_processes`, and a process whose children's environment gives them a rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport
from peftplan.rehearse.settings import VARIABLE, Settings, environment

RANK_OF_NODE = "LOCAL_RANK"
RANKS_OF_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
"""Variables by which launchers say how many ranks a node has, the most exact first."""


def start(settings: Settings) -> None:
    """Replace what starts workers, once the program imports it."""
    actions: dict[str, Callable[[Any], None]] = {
        "torch.distributed.launcher.api": lambda module: _launch_one(module, settings),
        "torch.multiprocessing.spawn": lambda module: _spawn_one(module, settings),
    }
    _watch_children(subprocess)
    sys.meta_path.insert(0, AfterImport(actions))


def _launch_one(module: Any, settings: Settings) -> None:
    """`torchrun` and what is built on it: one worker instead of a node's, in this process' place."""

    def launch(config: Any, entrypoint: Callable[..., Any] | str | None, args: Sequence[Any], **_: Any) -> dict[int, Any]:
        local, world_size = config.nproc_per_node, config.nproc_per_node * config.max_nodes
        os.environ |= {"EMULATED_COUNT": str(local), **_played(settings, world_size, local)}
        if callable(entrypoint):
            return {0: entrypoint(*args)}
        process = subprocess.run([str(entrypoint), *map(str, args)], check=False)
        if process.returncode:
            sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
        return {0: None}

    module.launch_agent = launch


def _spawn_one(module: Any, settings: Settings) -> None:
    """Processes that are numbered by an argument: the one of the rank that is wanted, and no other."""
    start_all = module.start_processes

    def start_one(fn: Callable[..., Any], args: Sequence[Any] = (), nprocs: int = 1, *rest: Any, **kwargs: Any) -> Any:
        if nprocs == 1:
            return start_all(fn, args, nprocs, *rest, **kwargs)
        local_rank = settings.rank % nprocs
        return start_all(_Numbered(fn, local_rank), args, 1, *rest, **kwargs)

    module.start_processes = start_one


class _Numbered:
    """A function whose first argument, a process' number, is another one. It can be pickled."""

    def __init__(self, function: Callable[..., Any], number: int) -> None:
        self.function, self.number = function, number

    def __call__(self, _: int, *args: Any) -> Any:
        return self.function(self.number, *args)


def _watch_children(module: Any) -> None:
    """A child that is given another rank of the node than this process has is a worker."""
    init = module.Popen.__init__

    def start_wanted(self: Any, args: Any, *rest: Any, env: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        if env and VARIABLE in os.environ and env.get(RANK_OF_NODE, own := os.environ.get(RANK_OF_NODE)) != own:
            args, env = _worker(args, env)
        init(self, args, *rest, env=env, **kwargs)

    module.Popen.__init__ = start_wanted


def _worker(args: Any, env: Mapping[str, str]) -> tuple[Any, Mapping[str, str]]:
    """The command and environment of a worker that is wanted; one that does nothing in place of the others."""
    from peftplan.rehearse.settings import read

    settings = read()
    local = int(next((env[name] for name in RANKS_OF_NODE if name in env), "1"))
    if int(env[RANK_OF_NODE]) != settings.rank % local:
        return ["true"], env
    return args, {**env, **_played(settings, int(env.get("WORLD_SIZE", local)), local)}


def _played(settings: Settings, world_size: int, local: int) -> dict[str, str]:
    """What the process that plays the wanted rank is told."""
    worker = settings._replace(world_size=world_size)
    return {VARIABLE: worker.to_text(), **environment(settings.rank, world_size=world_size, local=local)}
