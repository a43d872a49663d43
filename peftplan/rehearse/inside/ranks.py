"""One process plays one rank of a world: `torch.distributed` over its fake backend, which leaves collectives out.

Launchers start the workers of a node through `torch.distributed.launcher`; here they start one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport
from peftplan.rehearse.settings import VARIABLE, Settings, environment


def start(settings: Settings) -> None:
    """Replace what needs the other ranks, once the program imports it."""
    import torch.distributed as dist

    _replace_process_groups(dist)
    import torch.nn.parallel.distributed as ddp

    _watch_ddp(ddp)
    sys.meta_path.insert(0, AfterImport({"torch.distributed.launcher.api": lambda module: _launch_one(module, settings)}))


def _replace_process_groups(dist: Any) -> None:
    init = dist.init_process_group

    def init_fake(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        kept = {name: value for name, value in kwargs.items() if name in ("timeout", "group_name", "pg_options")}
        init("fake", store=FakeStore(), rank=rank, world_size=world_size, **kept)

    group = dist.distributed_c10d
    replaced: dict[str, Callable[..., Any]] = {
        "init_process_group": init_fake,
        "all_gather_object": _all_gather_object,
        "gather_object": _gather_object,
        "broadcast_object_list": _nothing,
        "barrier": _nothing,
        "monitored_barrier": _nothing,
        "_verify_params_across_processes": _nothing,
    }
    for name, function in replaced.items():
        setattr(dist, name, function)
        setattr(group, name, function)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = [obj] * len(object_list)


def _gather_object(obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
    if object_gather_list is not None:
        object_gather_list[:] = [obj] * len(object_gather_list)


def _watch_ddp(module: Any) -> None:
    """DistributedDataParallel waits for reduced buckets, which the fake backend does not return: a hook gives them back."""
    init = module.DistributedDataParallel.__init__

    def with_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_comm_hook(None, lambda state, bucket: _as_it_is(bucket))  # torch refuses other annotations than its own

    module.DistributedDataParallel.__init__ = with_hook


def _as_it_is(bucket: Any) -> Any:
    import torch

    buffer = bucket.buffer()
    done: Any = torch.futures.Future(devices=[buffer.device])
    done.set_result(buffer)
    return done


def _launch_one(module: Any, settings: Settings) -> None:
    """`torchrun` and what is built on it: one worker instead of a node's, in this process' place."""

    def launch(config: Any, entrypoint: Callable[..., Any] | str | None, args: Sequence[Any], **_: Any) -> dict[int, Any]:
        local, world_size = config.nproc_per_node, config.nproc_per_node * config.max_nodes
        worker = settings._replace(world_size=world_size)
        os.environ |= {
            VARIABLE: worker.to_text(),
            "EMULATED_COUNT": str(local),
            **environment(settings.rank, world_size=world_size, local=local),
        }
        if callable(entrypoint):
            return {0: entrypoint(*args)}
        done = subprocess.run([str(entrypoint), *map(str, args)], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return {0: None}

    module.launch_agent = launch
