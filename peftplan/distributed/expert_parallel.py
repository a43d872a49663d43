"""Experts that ranks divide beside FSDP2: a rank owns whole experts, whose columns the ranks share that own the same.

W ranks, of which E own the experts once: each has 1/E of the experts, and W/E ranks share these. Source: nemo_automodel 0.7.0,
components/moe/parallelizer.py (`ExpertParallel`, `apply_fsdp`, `_moe_shard_placement`), components/distributed/mesh_utils.py,
where the ranks of one copy are neighbours. Its matrices are (expert, in, out); of transformers' the last dim is divided.
"""

from __future__ import annotations

import re

from peftplan.distributed.holding import Holding
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.towers import is_whole
from peftplan.parameters import Parameter
from peftplan.units import ceil_div

OF_EXPERTS = re.compile(r"\.experts(\.base_layer)*(\.lora_[AB]|)\.\w+$")


def owners(distributed: Distributed) -> int:
    """The number of ranks that own the experts once."""
    return (distributed.ep_size or 1) if distributed.strategy == "fsdp2" else 1


def sharing(p: Parameter, distributed: Distributed) -> tuple[int, int]:
    """The dim of a parameter that FSDP2 divides, and over how many ranks."""
    if is_whole(p, distributed):
        return 0, 1
    if is_divided(p, distributed):
        return len(p.shape) - 1, distributed.shards // owners(distributed)
    return 0, distributed.shards


def is_divided(p: Parameter, distributed: Distributed) -> bool:
    """Whether it is of experts that ranks divide, or of an adapter of these."""
    return owners(distributed) > 1 and OF_EXPERTS.search(p.name) is not None


def owned(p: Parameter, distributed: Distributed) -> Parameter:
    """What a rank owns of a parameter."""
    if not is_divided(p, distributed):
        return p
    return reshaped(p, (ceil_div(p.shape[0], owners(distributed)), *p.shape[1:]))


def each_apart(own: Holding) -> Holding:
    """What a rank holds where Transformer Engine's experts are one tensor each."""
    on_rank, stepped = [], []
    for p in own.parameters.all:
        if len(p.shape) == 3 and p.name.rpartition(".")[0].endswith(".experts"):
            one = reshaped(p, p.shape[1:])
            on_rank.append(p._replace(allocations=one.allocations * p.shape[0]))
            stepped.append(one._replace(copies=p.copies * p.shape[0]))
        else:
            on_rank.append(p)
            stepped.append(p)
    parameters = own.parameters._replace(all=tuple(on_rank))
    return own._replace(parameters=parameters, states_of=parameters._replace(all=tuple(stepped)))


def reshaped(p: Parameter, shape: tuple[int, ...]) -> Parameter:
    """A parameter of another shape."""
    allocations = tuple(a._replace(dims=shape) if a.dims == p.shape else a for a in p.allocations)
    return p._replace(shape=shape, allocations=allocations)
