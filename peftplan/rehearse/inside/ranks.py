"""One process plays one rank of a world: `torch.distributed` over its fake backend, which leaves collectives out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport

NAMED = ("nccl", "gloo")
"""Backends under whose name a program finds the fake one."""
GATHERS = ("all_gather_into_tensor", "all_gather_single")
"""One function, under its older name and its newer one."""
IN_ORDER = (*GATHERS, "reduce_scatter_tensor", "reduce_scatter_single", "all_reduce")
"""Collectives of FSDP1."""
groups: list[int] = []
"""World size of each time that the program initialised its process group."""


def start(say: Callable[[str], None]) -> None:
    """Replace what needs the other ranks. `say`: is told of a model that is spread over cards without ranks."""
    import torch.distributed as dist

    _replace_process_groups(dist)
    import torch.nn.parallel as parallel

    _watch_ddp(parallel.distributed)
    _watch_dp(parallel, say)
    with_others = {
        "torch.distributed.checkpoint.utils": _plan_alone,
        "torch.distributed.fsdp._optim_utils": _save_for_others,
        "torch.distributed.pipelining.schedules": _vote_alone,
    }
    sys.meta_path.insert(0, AfterImport(with_others))


def _plan_alone(module: Any) -> None:
    """A sharded checkpoint is planned, written and read again by this rank as if there were no other."""
    init = module._DistWrapper.__init__

    def alone(self: Any, group: Any, use_dist: bool, coordinator_rank: int) -> None:
        init(self, group, False, coordinator_rank)

    module._DistWrapper.__init__ = alone


def _vote_alone(module: Any) -> None:
    """Stages of a pipeline vote on whether the shapes between them are known: the other ranks vote as this one does.

    Source: torch, torch/distributed/pipelining/schedules.py (`_warmup_p2p`), stage.py (`_warmup_forward_vote`).
    """
    warm_up = module._PipelineSchedule._warmup_p2p

    @wraps(warm_up)
    def vote(self: Any, stages: Any, has_backward: bool, p2p_done: bool) -> None:
        from torch.distributed.pipelining._utils import InferenceMode

        if any(InferenceMode.needs_dynamic(stage._user_meta, has_backward) for stage in stages):
            warm_up(self, stages, has_backward, p2p_done)
            return
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    module._PipelineSchedule._warmup_p2p = vote


def _save_for_others(module: Any) -> None:
    """FSDP1 also saves the states of parameters that lie on other ranks alone: they are taken to have what this rank's own have.

    Source: torch, torch/distributed/fsdp/_optim_utils.py (`_optim_state_dict`).
    """
    map_keys, gather = module._map_param_key_to_optim_keys, module._allgather_state_info

    @wraps(map_keys)
    def all_keys(states: Any, group: Any, params: Any, names: Any, managed: Mapping[str, Any], merge_keys: bool = False) -> Any:
        keys, own = map_keys(states, group, params, names, managed, merge_keys)
        known = {name for key in keys for name in key.unflat_param_names}
        trained = (name for name, of in managed.items() if merge_keys and of.param_requires_grad[of.param_indices[name]])
        return sorted([*keys, *(module._OptimStateKey((name,), True) for name in trained if name not in known)]), own

    @wraps(gather)
    def of_every_rank(fsdp_state: Any, input_states: Any) -> Any:
        gathered = gather(fsdp_state, input_states)
        some = next((state for state in gathered[fsdp_state.rank].values() if state.tensors), None)
        others = {name: state if state.tensors or some is None else some for name, state in gathered[fsdp_state.rank].items()}
        gathered[fsdp_state.rank - 1] = others
        return gathered

    module._map_param_key_to_optim_keys, module._allgather_state_info = all_keys, of_every_rank


def _replace_process_groups(dist: Any) -> None:
    init = dist.init_process_group

    @wraps(init)
    def init_fake(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        rank = _stated(kwargs.get("rank"), "RANK", 0)
        world_size = _stated(kwargs.get("world_size"), "WORLD_SIZE", 1)
        passed_on = {name: value for name, value in kwargs.items() if name in ("timeout", "group_name", "pg_options")}
        init("fake", store=FakeStore(), rank=rank, world_size=world_size, **passed_on)
        groups.append(world_size)
        if backend in NAMED:  # programs choose a device by it; torch's own modules ask `distributed_c10d`
            dist.get_backend = lambda group=None: backend

    group = dist.distributed_c10d
    replaced: dict[str, Callable[..., Any]] = {
        "init_process_group": init_fake,
        "new_group": _of_the_same_backend(dist.new_group),
        **{name: _by_number(getattr(dist, name)) for name in GATHERS if hasattr(dist, name)},
        "all_gather": _of_alike(dist.all_gather),
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
    if os.environ.get("EMULATED_LATE") == "1":
        _run_in_order(dist)
    for name in ("init_process_group", "new_group"):  # imported by name
        setattr(dist.device_mesh, name, replaced[name])


def _run_in_order(dist: Any) -> None:
    """NCCL runs the collectives of a communicator one after the other, on whichever streams a program calls them (nccl,
    src/enqueue.cc, `ncclLaunchPrepare` and `ncclLaunchFinish`: each waits for the communicator's `deviceStream`).

    The fake backend does nothing, so that a card that is late would never know that it has gone on.
    """
    last: dict[int, Any] = {}

    def in_order(collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def run(*args: Any, **kwargs: Any) -> Any:
            import torch

            group = id(next((each for each in (*args, *kwargs.values()) if isinstance(each, dist.ProcessGroup)), None))
            if group in last:
                torch.cuda.current_stream().wait_event(last[group])
            result = collective(*args, **kwargs)
            last[group] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            last[group].record()
            return result

        return run

    for name in IN_ORDER:
        if hasattr(dist, name):
            ordered = in_order(getattr(dist, name))
            setattr(dist, name, ordered)
            setattr(dist.distributed_c10d, name, ordered)


def _stated(argument: int | None, variable: str, otherwise: int) -> int:
    """A number that a program says itself, else its environment's."""
    return argument if argument is not None and argument >= 0 else int(os.environ.get(variable, otherwise))


def _of_the_same_backend(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """`new_group` on the fake backend, whichever is asked for: one of gloo beside NCCL would wait for the other ranks.

    `pg_options` are those of the backend that was asked for.
    """

    def new_fake_group(
        ranks: object = None,
        timeout: object = None,
        backend: object = None,
        pg_options: object = None,
        *more: object,
        **named: object,
    ) -> object:
        return new_group(ranks, timeout, None, None, *more, **named)

    return new_fake_group


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _by_number(gather: Callable[..., Any]) -> Callable[..., Any]:
    """The backends of cards compare numbers of elements, the fake one shapes: both go flat, as rows that follow each other."""

    def gather_flat(output_tensor: Any, input_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return gather(output_tensor.view(-1), input_tensor.reshape(-1), *args, **kwargs)

    return gather_flat


def _of_alike(gather: Callable[..., Any]) -> Callable[..., Any]:
    """`all_gather`: the other ranks send what this one does, as far as the host knows it, such as the length of a batch."""
    from peftplan.rehearse.inside import known

    @wraps(gather)
    def gather_alike(tensor_list: list[Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
        result = gather(tensor_list, tensor, *args, **kwargs)
        if (values := known.of(tensor)) is not None:
            for each in tensor_list:
                each.known = values.clone()
        return result

    return gather_alike


def _all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = [obj] * len(object_list)


def _gather_object(obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
    if object_gather_list is not None:
        object_gather_list[:] = [obj] * len(object_gather_list)


def _watch_ddp(module: Any) -> None:
    """DistributedDataParallel waits for reduced buckets, which the fake backend does not return: a hook gives them back."""
    init = module.DistributedDataParallel.__init__

    @wraps(init)
    def with_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_comm_hook(None, lambda state, bucket: _as_it_is(bucket))  # torch refuses other annotations than its own

    module.DistributedDataParallel.__init__ = with_hook


def _watch_dp(module: Any, say: Callable[[str], None]) -> None:
    init = module.DataParallel.__init__

    def saying(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if len(getattr(self, "device_ids", ())) > 1:
            cards = len(self.device_ids)
            say(f"torch.nn.DataParallel spreads each batch over {cards} cards; a launcher starts one rank per card instead")

    module.DataParallel.__init__ = saying


def _as_it_is(bucket: Any) -> Any:
    import torch

    buffer = bucket.buffer()
    future: Any = torch.futures.Future(devices=[buffer.device])
    future.set_result(buffer)
    return future
