"""A pipeline: which layers each stage has, and in which order a rank runs micro batches through its stages.

Source: torch, distributed/pipelining/schedules.py (`Schedule1F1B`, `ScheduleInterleaved1F1B`, `_get_1f1b_rank_ops`,
`_add_unshard_reshard`, `_add_reduce_grad`); nemo_automodel, components/distributed/pipelining/functional.py
(`calculate_virtual_stages`, `generate_hf_model_fqn_per_model_part`, `stage_ids_this_rank`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from peftplan.arch.modules import Architecture
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.towers import of_tower
from peftplan.errors import InputError
from peftplan.parameters import Parameter, Parameters
from peftplan.units import ceil_div

INTERLEAVED = "interleaved1f1b"
FURTHER = "mtp."
"""How names of layers begin that predict further tokens."""
STAGES_OF_INTERLEAVED = 2
"""Stages of a rank where no number of layers is set."""
MORE, ROUNDS = 32, 12
"""Micro batches that are run beside the first forwards, and rounds of interleaved 1F1B. Left out: what later ones move."""
MOST_UNSHARDED = 3
"""Stages whose parameters are gathered ahead (`max_active_stages`)."""


class Stage(NamedTuple):
    """Layers that run one after the other. `first` also has the embedding, `last` the final norm and the head."""

    number: int
    layers: range
    first: bool
    last: bool


class Action(NamedTuple):
    """What a rank does to one of its stages, with a micro batch where it computes."""

    what: Literal["forward", "backward", "unshard", "reshard", "reduce"]
    stage: int
    micro_batch: int = 0


def num_layers(parameters: Iterable[Parameter]) -> int:
    """The layers of a decoder, beside a tower's."""
    return 1 + max((max(p.layers) for p in parameters if p.layers and not of_tower(p)), default=0)


def stages_of(distributed: Distributed, layers: int, rank: int) -> tuple[Stage, ...]:
    """The stages of a rank: every `pp_size`-th one. The first stages have a layer more where they do not divide.

    Raises InputError for layers per stage that give no whole number of stages to each rank.
    """
    ranks, place = distributed.pp_size or 1, distributed.stage(rank)
    count = _count(distributed, layers)
    if count > layers:
        raise InputError("pp_size", ranks, f"accepted: no more stages than the {layers} layers of the model; these are {count}")
    each, more = divmod(layers, count)
    starts = [number * each + min(number, more) for number in range(count + 1)]
    return tuple(Stage(n, range(starts[n], starts[n + 1]), n == 0, n == count - 1) for n in range(place, count, ranks))


def _count(distributed: Distributed, layers: int) -> int:
    """The stages of all ranks."""
    ranks, each = distributed.pp_size or 1, distributed.pp_layers_per_stage
    interleaved = distributed.pp_schedule == INTERLEAVED
    if each is None:
        return ranks * (STAGES_OF_INTERLEAVED if interleaved else 1)
    count = ceil_div(layers, each)
    if distributed.pp_round_stages is not None:
        count += -count % ranks if distributed.pp_round_stages == "up" else -(count % ranks)
    if count % ranks or (count > ranks) is not interleaved:
        wanted = f"a multiple of {ranks}, and more than one for each rank" if interleaved else str(ranks)
        why = f"it divides {layers} layers into {count} stage{'s' * (count > 1)}; accepted: a number that makes {wanted}"
        raise InputError("pp_layers_per_stage", each, why)
    return count


def on_stages(parameters: Iterable[Parameter], architecture: Architecture, stages: Iterable[Stage]) -> Iterator[Parameter]:
    """The parameters of stages: their layers, the embedding and towers on the first one, all else on the last one, which has a
    tied embedding too (transformers, distributed/pipeline_parallel.py, `apply_pipeline_parallelism`). No stage has layers that
    predict further tokens."""
    everything, stages = [*parameters], [*stages]
    here = frozenset(layer for stage in stages for layer in stage.layers)
    first, last = any(stage.first for stage in stages), any(stage.last for stage in stages)
    tied = all(p.name != f"{architecture.output_embedding}.weight" for p in everything)
    for p in everything:
        if p.name.startswith(FURTHER):
            continue
        if of_tower(p):
            if first:
                yield p
        elif p.layers is not None:
            if kept := p.layers & here:
                yield p._replace(layers=kept, copies=p.copies * len(kept) // len(p.layers))
        elif (first if p.in_embedding else last) or (tied and last):
            yield p


def as_model(parameters: Parameters, architecture: Architecture, stage: Stage) -> tuple[Architecture, Parameters]:
    """A stage as a model of its own, whose layers count from 0."""
    from dataclasses import replace

    of_stage = on_stages(parameters.all, architecture, (stage,))
    renumbered = (
        p if p.layers is None or of_tower(p) else p._replace(layers=frozenset(n - stage.layers[0] for n in p.layers))
        for p in of_stage
    )
    blocks = []
    for block in architecture.blocks:
        if kept := tuple(n - stage.layers[0] for n in block.layers if n in stage.layers):
            blocks.append(block._replace(layers=kept))
    if not any(block.attentions for block in blocks):  # each stage makes the tables of positions
        blocks += [block._replace(layers=()) for block in architecture.blocks if block.attentions][:1]
    return replace(architecture, blocks=tuple(blocks)), parameters._replace(all=tuple(renumbered))


def check_schedule(distributed: Distributed, layers: int) -> None:
    """Raise InputError for stages or micro batches that the schedule does not take."""
    ranks = distributed.pp_size or 1
    if distributed.chunks < ranks:  # nemo_automodel, recipes/llm/train_ft.py:675
        raise InputError("pp_microbatches", distributed.chunks, f"accepted: {ranks} or more, one for each rank of the pipeline")
    rounds = distributed.chunks // ranks
    if distributed.pp_schedule == INTERLEAVED and distributed.chunks % rounds:
        raise InputError("pp_microbatches", distributed.chunks, f"accepted: a multiple of {rounds} with interleaved1f1b")
    stages_of(distributed, layers, 0)


def actions_of(distributed: Distributed, stages: tuple[Stage, ...], rank: int) -> tuple[Action, ...]:
    """What a rank does in one run of the schedule, which `check_schedule` accepts. Of many micro batches those are left out that
    find what the ones before them found."""
    ranks, place = distributed.pp_size or 1, distributed.stage(rank)
    if distributed.pp_schedule != INTERLEAVED:
        ahead = min(distributed.chunks, ranks - place)
        return (*_1f1b(ahead, min(distributed.chunks, ahead + MORE)), Action("reduce", 0))
    rounds = distributed.chunks // ranks
    each = distributed.chunks // rounds
    micro_batches = each * min(rounds, ROUNDS)
    computed = [*_interleaved(len(stages), ranks, place, each, micro_batches)]
    return tuple(_reducing(_unsharding(computed), micro_batches))


def _1f1b(ahead: int, micro_batches: int) -> Iterator[Action]:
    """`ahead`: forwards before the first backward."""
    for number in range(micro_batches + ahead - 1):
        if number < micro_batches:
            yield Action("forward", 0, number)
        if number >= ahead - 1:
            yield Action("backward", 0, number - ahead + 1)


def _interleaved(stages: int, ranks: int, place: int, each: int, micro_batches: int) -> Iterator[Action]:
    """`each`: micro batches that run through a stage before the next one's turn."""
    total = micro_batches * stages
    warm_up = min((stages - 1) * each + 2 * (ranks - 1 - place), total)
    forwards, backwards = [0] * stages, [0] * stages
    for number in range(total + warm_up):
        if number < total:
            stage = number // each % stages
            yield Action("forward", stage, forwards[stage])
            forwards[stage] += 1
        if number >= warm_up:
            stage = stages - 1 - (number - warm_up) // each % stages
            yield Action("backward", stage, backwards[stage])
            backwards[stage] += 1


def _unsharding(computed: list[Action]) -> Iterator[Action]:
    """With the stages that FSDP gathers before they are needed, and lets go."""
    active: set[int] = set()
    for place, action in enumerate(computed):
        coming = [*dict.fromkeys(later.stage for later in computed[place:])][:MOST_UNSHARDED]
        for stage in [stage for stage in active if stage not in coming]:
            active.remove(stage)
            yield Action("reshard", stage)
        for stage in [stage for stage in coming if stage not in active]:
            active.add(stage)
            yield Action("unshard", stage)
        yield action
    yield from (Action("reshard", stage) for stage in active)


def _reducing(actions: Iterable[Action], micro_batches: int) -> Iterator[Action]:
    """With the reduction of a stage's gradients behind its last backward."""
    for action in actions:
        yield action
        if action.what == "backward" and action.micro_batch == micro_batches - 1:
            yield Action("reduce", action.stage)
