"""The trace engine's entry point: a job's peaks per phase, from a real step on fake tensors (extra `trace`)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import peftplan.methods as methods
from peftplan.allocator.config import AllocatorConfig
from peftplan.allocator.program import OPTIONS, of_log, replay, runs_within
from peftplan.arch.modules import Architecture
from peftplan.distributed.strategy import Distributed
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import MissingExtraError, PeftplanError, RefusedError
from peftplan.job.kernels import packages_of
from peftplan.job.requirements import pair
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.job.setup import Setup
from peftplan.ledger import Ledger, Line
from peftplan.methods.adaptation import Adaptation, MethodConfig
from peftplan.methods.experts import GATE_UP, fused_rank
from peftplan.methods.lora import LoraConfig
from peftplan.methods.targets import ALL_LINEAR, WORDS
from peftplan.results.peaks import Peaks
from peftplan.storage import QuantConfig
from peftplan.units import round512

if TYPE_CHECKING:
    from peftplan.trace.result import Traced

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of a layer in the name of a module."""


def trace_peaks(
    config: Mapping[str, Any],
    *,
    architecture: Architecture,
    peft_config: Mapping[str, Any] | Adaptation | None,
    quant: QuantConfig | None,
    setup: Setup,
    compute_capability: str,
    multiprocessors: int | None = None,
    script: Script = NO_SCRIPT,
    distributed: Distributed | None = None,
    ranks: tuple[int, ...] = (0,),
    record: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[Peaks, Callable[[int], bool]]:
    """Trace two optimizer steps: the second's peaks, and whether the run ends where the allocator can take so many bytes.

    `compute_capability` of the card, such as `8.9`, decides kernels and workspaces; with `multiprocessors` it decides which
    products with 4-bit weights are fused and the size of some buffers. `distributed`: the strategy, of whose `ranks` the
    one with the largest peak is returned; the run ends where that of all of them does.
    `record` keeps the event log (tens of MB for a large model); `progress` is told what runs and how much is done.
    Raises MissingExtraError without torch, RefusedError for what cannot be traced.
    """
    from peftplan.libraries.installed import require

    if setup.kernels:
        packages = packages_of(setup.kernels)
        raise RefusedError(f"kernels: the trace engine runs the model's own, not {packages}; leave out --engine trace")
    require("engine: trace")
    try:
        from peftplan.libraries.meta import quiet_transformers
        from peftplan.trace.engine import traces
        from peftplan.trace.scripted import masking_unpadded, repeating_kv
    except ImportError as error:
        raise MissingExtraError(f"engine: trace ({error.name or error})", "trace") from None
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs the error that is raised below
    try:
        masks = script.masks_unpadded(architecture.model_type, setup)
        repeats = script.repeats_before(str(setup.attn_implementation), architecture.model_type)
        with quiet_transformers(), repeating_kv(repeats), masking_unpadded(masks):
            of_ranks = list(
                traces(
                    config,
                    task_type=architecture.task_type,
                    peft_config=peft_config,
                    quant=quant,
                    setup=setup,
                    device=pair(compute_capability),
                    multiprocessors=multiprocessors,
                    script=script,
                    distributed=distributed,
                    ranks=ranks,
                    progress=progress,
                )
            )
    except PeftplanError:
        raise
    except Exception as error:  # the model's own code, which may not take these inputs
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"engine: the trace of {architecture.model_class} failed: {type(error).__name__}: {reason}") from error
    logs = [log for traced in of_ranks for log in traced.devices or (traced,)]
    each = [_replayed(log, script, setup, record=record) for log in logs]
    peaks, _ = max(each, key=lambda of_one: of_one[0].allocated)
    if any(traced.devices for traced in of_ranks):
        peaks = replace(peaks, devices=tuple(of_device for of_device, _ in each))
    elif ranks != (0,):
        without_log = (replace(own, recording=None) for own, _ in each)
        peaks = replace(peaks, of_ranks=tuple(zip(ranks, without_log, strict=True)))
    return peaks, lambda capacity_bytes: all(runs_within(capacity_bytes) for _, runs_within in each)


def _replayed(traced: Traced, script: Script, setup: Setup, *, record: bool) -> tuple[Peaks, Callable[[int], bool]]:
    """The peaks of a trace, and whether the run ends where the allocator can take so many bytes."""
    from peftplan.trace.recorded import Recorded
    from peftplan.trace.scripted import events_of

    events = events_of(traced, empties_cache=script.empties_cache)
    program, sizes = of_log(events)
    ties, expandable = script.ties_by_address, setup.segments_grow
    replayed = replay(program, sizes, ties_by_address=ties, expandable=expandable)
    peaks = Peaks(
        ledgers={
            phase: Ledger(tuple(map(_line, peak.alive))).with_tails(replayed.allocated.get(phase, 0))
            for phase, peak in traced.peaks.items()
        },
        reserved=replayed.reserved,
        reserved_source=f"replay of every allocation through a model of torch's CUDA caching allocator, {OPTIONS[expandable]}",
        incomplete=(*_unknown(traced.unknown_ops), *_not_traced(setup)),
        assumed={**traced.facts, **_without(traced.replaced), **_on_host(traced.host_bytes)},
        recording=Recorded(traced, events, AllocatorConfig(ties_by_address=ties, expandable_segments=expandable))
        if record
        else None,
    )
    return peaks, partial(runs_within, program, sizes, ties_by_address=ties, expandable=expandable)


def _on_host(nbytes: int) -> dict[str, int]:
    """The note on inputs of checkpointed layers that are offloaded to host memory."""
    return {"offloaded_bytes": nbytes} if nbytes else {}


def _without(packages: tuple[str, ...]) -> dict[str, str]:
    """Which optional packages the trace ran without: their kernels keep other tensors than the torch code in their place."""
    names = ", ".join(packages)
    return {"kernels": f"torch code in place of the kernels of {names}, which are not installed"} if packages else {}


def _unknown(unknown_ops: Mapping[str, int]) -> tuple[str, ...]:
    """What a trace could not follow, by module family. Counts depend on the traced depth and are left out."""
    families = dict.fromkeys(_INDEX.sub("*", module) or "the run" for module in unknown_ops)
    return tuple(f"{family} asked for a value that a fake tensor does not have" for family in families)


def _not_traced(setup: Setup) -> tuple[str, ...]:
    """What a run does beside its steps."""
    return () if setup.eval_batch_size is None else ("an evaluation is not traced",)


def as_peft_config(
    method: methods.Method | None, config: MethodConfig | None, adapter: Mapping[str, Any], adaptation: Adaptation
) -> dict[str, Any] | None:
    """The adapter config that peft itself is given; None trains everything. Raises RefusedError for methods that peft lacks."""
    if method is not None and method.peft_type is None and method.name != "full":
        raise RefusedError(f"peft has no {method.name}; accepted: engine analytic or trace")
    return _peft_config(method, config, adapter, adaptation)


def traced_config(
    method: methods.Method | None, config: MethodConfig | None, adapter: Mapping[str, Any], adaptation: Adaptation
) -> dict[str, Any] | Adaptation | None:
    """What the trace is given: peft's adapter config, None for full, or the adaptation itself for methods that peft lacks."""
    if method is not None and method.peft_type is None and method.name != "full":
        return adaptation
    return _peft_config(method, config, adapter, adaptation)


def _peft_config(
    method: methods.Method | None, config: MethodConfig | None, adapter: Mapping[str, Any], adaptation: Adaptation
) -> dict[str, Any] | None:
    if method is None or config is None:
        return dict(adapter)
    if method.name == "full":
        return None
    if method.peft_type is None:
        raise RefusedError(f"engine: trace runs peft's own methods, and {method.name} is not one of them; accepted: analytic")
    fields = {**adapter, **config.model_dump(exclude_none=True), "peft_type": method.peft_type}
    if method.peft_type == "ADALORA":
        from peftplan.methods.adalora import STEPS_TO_ALLOCATE

        fields.setdefault("total_step", fields["tinit"] + STEPS_TO_ALLOCATE + fields["tfinal"])
    targets = fields.get("target_modules")
    if targets is None and method.peft_type == "LORA":
        layered = any(fields.get(name) is not None for name in LoraConfig.refuses_layers)  # beside a list of names only
        fields["target_modules"] = sorted({m.leaf for m in adaptation.matched}) if layered else ALL_LINEAR
    elif targets in WORDS and targets != ALL_LINEAR:
        fields["target_modules"] = list(_names(adaptation.target_modules, adaptation))
        parameters = dict(adaptation.resolved).get("target_parameters")
        if isinstance(parameters, tuple) and parameters:
            fused = GATE_UP in parameters and GATE_UP not in (fields.get("target_parameters") or ())
            fields["rank_pattern"] = {**fields["rank_pattern"], **(fused_rank(fields["r"]) if fused else {})}
            fields["target_parameters"] = parameters
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def _names(targets: Iterable[str], adaptation: Adaptation) -> Iterator[str]:
    """Targets as peft reads them: a template such as BERT's `bert.encoder.layer.{}.output.dense` with every layer's number."""
    for target in targets:
        if "{}" in target:
            yield from (name for module in adaptation.matched if module.name == target for name in module.names())
        else:
            yield target


def _line(alive: Any) -> Line:
    """A group of equal storages as a line; storages that are not exactly their tensors (a slice keeps the whole) as bytes."""
    source = f"traced: {alive.op}"
    if alive.copies * round512(ITEMSIZE[alive.dtype] * prod(alive.shape)) == alive.bytes:
        return Line(alive.name, alive.category, alive.dtype, alive.shape, alive.copies, source)
    return Line(alive.name, alive.category, "uint8", (alive.bytes,), 1, f"{source}, {alive.copies} storages")
