"""The grid of a sweep: every combination of its options, and the jobs that differ in more than sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from peftplan.errors import BoundError, InputError, PeftplanError, UnknownNameError
from peftplan.job.inventory import Inventory, inventory
from peftplan.job.prepare import check_rank_allocator, prepare
from peftplan.job.resolving import check_length
from peftplan.job.setup import MOST, Setup, parse_setup
from peftplan.planning.axes import Values
from peftplan.planning.for_method import options_for
from peftplan.planning.verdicts import placed_on

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu
    from peftplan.job.options import Options

SIZES = ("batch_size", "seq_len", "r")
"""Options that are evaluated as arrays."""
MOST_REFUSED = 200
"""Jobs that are asked for one that makes sense before any row is made."""
OF_RANKS = ("gpus", "nodes", "strategy")
"""Options that have a column wherever they are set: without them a row reads as one of a single GPU."""

Value = TypeVar("Value")


class Grid(NamedTuple):
    """The grid: every combination of models, methods and the values of each axis; `single` are options with one value."""

    models: Values
    methods: Sequence[str]
    axes: Mapping[str, Values]
    single: Mapping[str, object]

    def own(self, method: str, options: Mapping[str, Value]) -> dict[str, Value]:
        """The options that a method has; all of them where it is the only one, to be refused."""
        return options_for(method, options) if len(self.methods) > 1 else dict(options)

    def num_points(self) -> int:
        """Points."""
        per_model = sum(prod(len(values) for values in self.own(method, self.axes).values()) for method in self.methods)
        return len(self.models) * per_model

    def text(self) -> str:
        """The axes and how many values each has."""
        by_name: dict[str, Sequence[object]] = {"model": self.models, "method": self.methods, **self.axes}
        return " × ".join(f"{name.replace('_', ' ')} {len(values):,}" for name, values in by_name.items() if len(values) > 1)

    def of_jobs(self) -> list[str]:
        """The options that differ between jobs, and `OF_RANKS`."""
        return [name for name in (*self.axes, *self.of_ranks()) if name not in SIZES]

    def of_ranks(self) -> dict[str, object]:
        """Those of `OF_RANKS` that have one value."""
        return {name: self.single[name] for name in OF_RANKS if self.single.get(name) is not None}

    def check(self, name: str, values: Values) -> None:
        """Raise for a value that no job takes, so that a typing error is no row."""
        if name in SIZES:
            for value in (values[0], values[-1]) if isinstance(values, range) else values:
                whole(name, value)
            return
        for value in values[:MOST_REFUSED]:
            if name in Setup.model_fields:
                parse_setup({name: value})
            try:
                self._any_job({name: value})
            except UnknownNameError:
                raise
            except PeftplanError:
                continue

    def _any_job(self, changed: Mapping[str, object]) -> None:
        """Check a job of the first method that has these options, or that refuses them if none has."""
        method = next((method for method in self.methods if changed.keys() <= self.own(method, changed).keys()), self.methods[0])
        method_option = {"method": method} if method else {}
        counted(self.models[0], **{**self.own(method, self.single), **changed, **method_option})

    def jobs(self) -> Iterator[Job]:
        """One for each model, method, and combination of the options that are no sizes."""
        for model, method in product(self.models, self.methods):
            axes = self.own(method, self.axes)
            sizes = {name: axes.pop(name) for name in SIZES if name in axes}
            single = self.own(method, self.single) | ({"method": method} if method else {})
            for values in product(*axes.values()):
                point = dict(zip(axes, values, strict=True))
                yield Job(model, method, {**single, **point}, {**self.of_ranks(), **point}, sizes)


class Job(NamedTuple):
    """A job with the sizes that its points take. `shown`: the options of its columns."""

    model: object
    method: str
    options: Mapping[str, object]
    shown: Mapping[str, object]
    sizes: Mapping[str, Values]

    def __len__(self) -> int:
        return prod(len(values) for values in self.sizes.values())

    def counted(self, rank: int | None = None, *, card: Gpu | None = None) -> Inventory:
        """The job with its parameters on a card, at its own rank or another."""
        return placed_on(counted(self.model, **self.options, **({} if rank is None else {"r": rank})), card)


def counted(model: object, **options: object) -> Inventory:
    """A checked job with its parameters and what lasts. Raises what `estimate` raises."""
    job = prepare(model, **cast("Options", options))
    check_rank_allocator(job)
    return inventory(job)


def whole(name: str, value: object) -> int:
    """A size. Raises BoundError or InputError."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.lstrip("-").isdecimal():
        text = int(text)
    if isinstance(text, bool) or not (isinstance(text, int) or hasattr(text, "__index__")):
        raise InputError(name, value, "accepted: whole numbers")
    number = int(text)
    if number < 1:
        raise BoundError(name, number, "at least 1")
    if number > MOST:
        raise BoundError(name, number, f"at most {MOST:,}")
    return number


def first_of(jobs: Iterable[Job]) -> None:
    """Raise the error of the first job where no job makes sense."""
    first: PeftplanError | None = None
    for job in jobs:
        try:
            checked = job.counted(None if "r" not in job.sizes else whole("r", job.sizes["r"][0])).job
            if "seq_len" in job.sizes:
                values = job.sizes["seq_len"]
                shortest = values[0] if isinstance(values, range) else min(whole("seq_len", value) for value in values)
                check_length(shortest, checked.architecture.max_positions)
            return
        except PeftplanError as error:
            first = first or error
    assert first is not None
    raise first
