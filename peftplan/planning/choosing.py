"""Which card, and which model of a family: the job as typed on every card, or for every size of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from peftplan.errors import InputError, PeftplanError
from peftplan.methods import config_class, method_named
from peftplan.planning.estimate import estimate
from peftplan.planning.fit_model import members as members_of
from peftplan.planning.for_method import job_options, known_methods, options_for, without_formula
from peftplan.planning.plans import QUALITY
from peftplan.planning.verdicts import find_cards
from peftplan.results.verdict import Verdict

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from peftplan.job.options import JobOptions
    from peftplan.job.setup import Engine


class Member(NamedTuple):
    """The largest model of a family that fits a card with a method; None if none fits."""

    method: str
    model: str | None
    num_parameters: int
    verdict: Verdict | None
    """Of the named model, or of the smallest one if none fits."""
    error: str | None = None
    """What is not known: members that have no formula, or why the method has no answer."""

    def to_dict(self) -> dict[str, object]:
        """One entry of `members` in the JSON."""
        return {**self._asdict(), "verdict": None if self.verdict is None else self.verdict.to_dict()}


def which_gpu(
    model: object,
    *,
    allow_tight: bool = False,
    engine: Engine = "analytic",
    progress: Callable[[str, float], None] | None = None,
    **options: Unpack[JobOptions],
) -> tuple[Verdict, ...]:
    """Every card of the catalogue that takes the job, the smallest (usable bytes) first; options as `estimate` takes them."""
    from peftplan.hardware.gpus import gpus

    accepted = ("fits", "tight") if allow_tight else ("fits",)
    result = estimate(model, gpu=[card.id for card in gpus()], engine=engine, progress=progress, **options)
    accepting = [verdict for verdict in result.gpus if verdict.verdict in accepted]
    return tuple(sorted(accepting, key=lambda verdict: (verdict.usable_bytes, verdict.gpu)))


def smallest_gpu(model: object, *, allow_tight: bool = False, **options: Unpack[JobOptions]) -> Verdict | None:
    """The first of `which_gpu`. Cards are asked from the smallest up, but not those that cannot hold what lasts."""
    from peftplan.hardware.gpus import gpus
    from peftplan.hardware.usable import usable_bytes

    accepted, lasting = ("fits", "tight") if allow_tight else ("fits",), 0
    for usable, card in sorted((usable_bytes(card).bytes, card.id) for card in gpus()):
        if usable < lasting:
            continue
        result = estimate(model, gpu=card, **options)
        (verdict,) = result.gpus
        if verdict.verdict in accepted:
            return verdict
        if result.distributed is None:
            lasting = sum(line.bytes() for line in result.lasting if line.place == "device")
    return None


def family(
    name: str, *, gpu: str, allow_tight: bool = False, methods: str | Sequence[str] | None = None, **options: object
) -> tuple[Member, ...]:
    """The largest member of a family of built-in models that one card takes, by method.

    `name`: the beginning of the members' names (`qwen3`), or a pattern (`qwen3-vl-*`). Members are asked from the largest down;
    those that a method refuses or that have no formula are passed over, and `error` names the latter. Without `methods`, those
    are left out that need an option which is not there, such as `num_virtual_tokens`.
    Raises InputError where no built-in model belongs to the family, and what `estimate` raises where every method is refused.
    """
    accepted = ("fits", "tight") if allow_tight else ("fits",)
    names = members_of(name)
    if not names:
        raise InputError("model_family", name, "accepted: the beginning of built-in names, such as qwen3 (`peftplan models`)")
    if len(find_cards(gpu)) != 1:
        raise InputError("gpu", gpu, "accepted: one card, such as rtx-4090, or a capacity such as 24GiB")
    known = known_methods(QUALITY if methods is None else methods, "methods")
    methods = [name for name in known if methods is not None or _is_complete(name, options)]
    members = tuple(_largest(names, gpu, method, accepted, options) for method in methods)
    if all(member.model is None and member.error is not None for member in members):
        estimate(names[0][0], gpu=gpu, **_job_options(methods[0], options))  # raises, where all do
    return members


def _job_options(method: str, options: Mapping[str, object]) -> JobOptions:
    """The options of a job by this method."""
    return job_options(options_for(method, {**options, "method": method}))


def _is_complete(method: str, options: Mapping[str, object]) -> bool:
    """Whether the options hold every field that the method has no default for."""
    fields = config_class(method_named(method)).model_fields
    return all(name in options for name, field in fields.items() if field.is_required())


def _largest(
    members: list[tuple[str, int]], gpu: str, method: str, accepted: tuple[str, ...], options: dict[str, object]
) -> Member:
    smallest: Verdict | None = None
    refused_by = ""
    passed_over: dict[str, list[str]] = {}
    for name, num_parameters in members:
        try:
            result = estimate(name, gpu=gpu, **_job_options(method, options))
        except PeftplanError as refused:
            refused_by = str(refused)
            continue
        (verdict,) = result.gpus
        if verdict.verdict in accepted:
            return Member(method, name, num_parameters, verdict, _unknown(passed_over))
        if verdict.verdict == "unknown":
            passed_over.setdefault(without_formula(result), []).append(name)
        else:
            smallest = verdict
    if passed_over:
        return Member(method, None, 0, None, _unknown(passed_over))
    return Member(method, None, 0, smallest, None if smallest else refused_by)


def _unknown(passed_over: Mapping[str, Sequence[str]]) -> str | None:
    """Members of which nothing is known, by the reason."""
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in passed_over.items()) or None
