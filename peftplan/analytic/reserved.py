"""Reserved bytes of an analytic estimate: its events, written as a program and replayed through a model of torch's allocator.

A run is loading and two optimizer steps, as in the trace engine: the first step creates the optimizer's states, the second is the
steady one. A script may name other steps (`job.script`). The timeline only counts the layers between the first and the last of a
kind; here each of them repeats the events of the last one.
"""

from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from peftplan.allocator.program import Program, Replayed, replay
from peftplan.analytic.compile_job import Compiled, Steps, Written
from peftplan.analytic.writer import Writer, is_gradient, makes_gradients
from peftplan.job.inventory import REPLACED
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.ledger import Line
from peftplan.memory.loaded import Loader
from peftplan.scans import no_scans

if TYPE_CHECKING:
    from peftplan.analytic.generation import Generation

SOURCE = "modelled: replay of the analytic events through a model of torch's CUDA caching allocator, {options}"

Requested = dict[tuple[int, int], Sequence[int]]
"""The ids of a timeline and of its sizes → the bytes of its kinds of tensors."""


class Run(NamedTuple):
    """The steps of a run after loading. The last one is reported, and so are those from the second on that repeat it."""

    steps: Steps
    script: Script = NO_SCRIPT
    generations: "tuple[Generation, ...]" = ()
    """What the policy writes before each step, and what reads it."""
    evaluations: "tuple[Generation, ...]" = ()
    """What follows the last step. Where one followed each step, full fine-tuning would reserve up to 17 % less."""

    def fits(self, capacity_bytes: int) -> bool:
        """Whether it runs if the allocator may reserve at most `capacity_bytes`. It releases cached segments before it fails."""
        ways = (False, True) if self.steps[-1][0].load_if_full is not None else (False,)
        for when_full in ways:
            try:
                self.peaks(capacity_bytes=capacity_bytes, when_full=when_full)
            except MemoryError:
                continue
            return True
        return False

    def peaks(self, *, capacity_bytes: int | None = None, when_full: bool = False) -> Replayed:
        """Allocated bytes of each phase, tails of blocks included, and reserved bytes. `when_full`: loaded as a full card is.

        Raises MemoryError if `capacity_bytes` are not enough.
        """
        program, sizes = self.program(when_full=when_full)
        ties, expandable = self.script.ties_by_address, self.steps[-1][0].expandable
        return replay(program, sizes, ties_by_address=ties, expandable=expandable, capacity=capacity_bytes)

    def program(self, *, when_full: bool = False, known: "Requested | None" = None) -> tuple[Program, Sequence[int]]:
        """The events and the table of sizes. All sizes that run the same operations share the events. `known`: what other runs
        of the job request.
        """
        compiled, _ = self.steps[-1]
        reported = sum(step is self.steps[-1] for step in self.steps[max(1, compiled.divided_after) :])
        beside = (id(each.timeline) for each in (*self.generations, *self.evaluations))
        key = (when_full, *beside, reported, *(id(of_step) for of_step, _ in self.steps))
        if key not in compiled.programs:
            load = compiled.load_if_full if when_full and compiled.load_if_full is not None else compiled.load
            with no_scans():
                steps = [of_step for of_step, _ in self.steps]
                compiled.programs[key] = _write(steps, reported, self.script, load, self.generations, self.evaluations)
        written = compiled.programs[key]
        requested: Requested = {} if known is None else known
        for of_step, sizes in self.steps:  # most runs repeat one step
            if (id(of_step.timeline), id(sizes)) not in requested:
                requested[id(of_step.timeline), id(sizes)] = of_step.timeline.requested(sizes)
        of_steps = [requested[id(of_step.timeline), id(sizes)] for of_step, sizes in self.steps]
        generated = [each.timeline.requested(each.sizes) for each in (*self.generations, *self.evaluations)]
        parts = (*generated, *of_steps, written.sizes)
        table = array("q")
        try:
            for part in parts:
                table.extend(part)
        except OverflowError:  # more than 64 bits hold
            return written.program, [*chain.from_iterable(parts)]
        return written.program, table


def peaks_of_each(runs: Sequence[Run]) -> list[Replayed]:
    """`Run.peaks` of runs of one job on several ranks."""
    from peftplan.allocator.alike import replay_all  # which jobs on one GPU do not need

    known: Requested = {}
    programs = [run.program(known=known) for run in runs]
    ties, expandable = runs[0].script.ties_by_address, runs[0].steps[-1][0].expandable
    return replay_all(programs, ties_by_address=ties, expandable=expandable)


def _write(
    steps: list[Compiled],
    reported: int,
    script: Script,
    load: Loader,
    generations: "tuple[Generation, ...]",
    evaluations: "tuple[Generation, ...]",
) -> Written:
    generated, of_evaluations = (sum(len(each.timeline.kinds) for each in beside) for beside in (generations, evaluations))
    compiled = steps[-1]
    num_kinds = generated + of_evaluations + sum(len(of_step.timeline.kinds) for of_step in steps)
    if compiled.empties_after:
        script = script.model_copy(update={"empties_cache": True})
    writer = Writer(script, num_kinds, empties=compiled.empties_cache)
    writer.begin("load")
    load(writer)
    if compiled.leaves_shards:
        writer.loaded()
    writer.take(compiled.early)
    if compiled.buckets and not compiled.divided_after:
        writer.keep(compiled.buckets)
    elif compiled.buckets:
        undivided = writer.allocate(sum(compiled.buckets))
    else:
        writer.take(line for line in compiled.standing if line.category == "communication" and line not in compiled.built)
    writer.begin("warmup")
    if compiled.first_run is not None:
        compiled.first_run(writer)
    there = (*compiled.early, *compiled.built)
    states = [line for line in compiled.standing if line.category == "optimizer_states" and line not in there]
    keeps_gradients = any(makes_gradients(compiled.timeline, at) for at in range(compiled.timeline.windows[0][1]))
    kinds = generated + of_evaluations
    for number, of_step in enumerate(steps, start=1):
        of_generation = 0
        for each in generations:
            if compiled.empties_around:
                writer.empty_cache()
            writer.step(each.timeline, of_generation, {}, phases=number > len(steps) - reported)
            writer.end()
            of_generation += len(each.timeline.kinds)
        if compiled.empties_around:
            writer.empty_cache()
        if number == 1:
            writer.take(line for line in compiled.standing if line.source == REPLACED)
        lasting = _lasting(states, of_step) if number == 1 else {}
        empties_before = compiled.empties_before or (compiled.empties_first and number == 1)
        writer.passing = of_step.timed if number == 1 else {}
        writer.step(of_step.timeline, kinds, lasting, phases=number > len(steps) - reported, empties_before=empties_before)
        if keeps_gradients:
            writer.leave(n for n, kind in enumerate(of_step.timeline.kind_of) if is_gradient(of_step.timeline, kind))
        writer.end()
        if number == compiled.divided_after and compiled.buckets:
            writer.release(undivided)
            writer.keep(compiled.buckets)
        kinds += len(of_step.timeline.kinds)
        at = generated
        for each in evaluations if number == len(steps) else ():
            writer.step(each.timeline, at, {}, phases=number > len(steps) - reported)
            writer.end()
            at += len(each.timeline.kinds)
    last_sizes: Sequence[int] = [*writer.sizes]
    with suppress(OverflowError):  # more than 64 bits hold
        last_sizes = array("q", last_sizes)
    return Written(writer.program(), last_sizes, steps, (*generations, *evaluations))


def _lasting(states: list[Line], compiled: Compiled) -> dict[int, list[Line]]:
    """What the first step allocates for good: optimizer states and workspaces, by the event that they precede."""
    by_event = _by_group(states, compiled.timeline.states)
    for at, line in compiled.workspaces:
        by_event.setdefault(at, []).append(line)
    return by_event


def _by_group(states: list[Line], at: tuple[int, ...]) -> dict[int, list[Line]]:
    """Event → the states that are made before it: those of each group of parameters, which have as many each."""
    each = len(states) // max(len(at), 1)
    if len(set(at)) < 2 or each * len(at) != len(states):
        return dict.fromkeys(at[:1], states)
    return {place: states[number * each : (number + 1) * each] for number, place in enumerate(at)}
