"""The largest model of a family, or of a list, that fits a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from peftplan.arch.catalogue import models
from peftplan.errors import InputError, PeftplanError, RefusedError
from peftplan.job.prepare import prepare
from peftplan.job.setup import Engine
from peftplan.planning.estimate import estimate
from peftplan.planning.fit_result import Binding, Plan
from peftplan.planning.for_method import job_options, without_formula
from peftplan.planning.largest import Largest
from peftplan.results.estimate import Estimate


def members(family: str) -> list[tuple[str, int]]:
    """(name, parameters) of the built-in models whose name is the family's and a size, or that match a pattern; largest first.

    Of models whose numbers of parameters have the same three leading digits (some have a few added tokens), the one with the
    shortest name comes first.
    """
    pattern = family.lower() if any(character in family for character in "*?[") else f"{family.lower()}-[0-9]*"
    sized = [(entry.name, entry.num_parameters) for entry in models() if fnmatchcase(entry.name, pattern)]
    return sorted(sized, key=lambda member: (-float(f"{member[1]:.2e}"), len(member[0]), -member[1]))


def candidates(model: object) -> list[object]:
    """The models of a family or of a list, largest first, or the only one. Raises what `estimate` raises for an unknown name."""
    if isinstance(model, str) and "," not in model:
        return [name for name, _ in members(model)] or [model]
    names = [name.strip() for name in model.split(",")] if isinstance(model, str) else model
    if not isinstance(names, Sequence) or not names or not all(names):
        return [model] if isinstance(model, Mapping) else [_no_model(model)]
    return sorted(names, key=lambda name: -prepare(name).architecture.num_parameters)


def _no_model(model: object) -> object:
    raise InputError("model", model, "accepted: a family such as qwen3, a pattern of built-in names, or a list of models")


def model_plan(
    model: object,
    gpu: str,
    options: Mapping[str, object],
    changes: Mapping[str, object],
    accepted: tuple[str, ...],
    engine: Engine = "analytic",
    progress: Callable[[str, float], None] | None = None,
) -> Plan:
    """The plan with the largest model of one job; of size 0, with the numbers of the smallest model, where none fits.

    Models that the options refuse, or that have no formula, are passed over; a warning names the latter. Raises where no model is
    left.
    """
    beyond: Estimate | None = None
    skipped: list[str] = []
    refused: PeftplanError | None = None
    for name in candidates(model):
        try:
            result = estimate(name, gpu=gpu, engine=engine, progress=progress, **job_options(options))
        except PeftplanError as error:
            refused = refused or error
            continue
        if result.peaks is None:
            skipped.append(f"{result.model['name']} is left out: {without_formula(result)}")
            continue
        if result.gpus[0].verdict in accepted:
            return _plan(result, beyond, changes, skipped, fits=True)
        beyond = result
    if beyond is None:
        raise RefusedError(f"fit: {skipped[0]}") if skipped else refused or RefusedError(f"fit: no model of {model!r}")
    return _plan(beyond, beyond, changes, skipped, fits=False)


def _plan(
    result: Estimate, beyond: Estimate | None, changes: Mapping[str, object], skipped: Sequence[str], *, fits: bool
) -> Plan:
    """The plan of a model; `beyond` is the next larger one, which does not fit."""
    size = result.model["num_parameters"] if fits else 0
    edge = Largest(size, result.model["num_parameters"], bounded=beyond is None)
    binding = None if beyond is None else Binding.of(result, beyond)
    plan = Plan.of(result, edge, size="model", changes=changes, binding=binding)
    next_larger = beyond.model["name"] if fits and beyond is not None else None
    return plan._replace(warnings=(*plan.warnings, *skipped), next_larger=next_larger)
