"""A rehearsal as text: the verdict first, then the peak, then the lines that made what was alive."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from peftplan.report.bar import Segment, bar, legend, unit_of
from peftplan.report.cards import card_name
from peftplan.report.screen import Colour, Part, Row, Screen, flowing, wrapped
from peftplan.results.rehearsal import Alive, OutOfMemory, Rank, Rehearsal
from peftplan.results.verdict import Verdict
from peftplan.units import GIB, MIB, format_bytes

MOST_LINES = 6
"""Lines of a program that are named."""
SMALLEST_HOST = 64 * MIB
"""Host memory that is worth a line."""
BLANK: Row = ()
LOOKS: dict[str, Colour] = {"fits": "green", "tight": "yellow", "does_not_fit": "red"}
CHANGES = {
    "activations": "a smaller batch or a shorter sequence, gradient checkpointing, or a fused attention",
    "weights": "4-bit weights (QLoRA), a smaller model, or sharding over more cards",
    "gradients": "an adapter in place of full fine-tuning, or sharding over more cards",
    "optimizer_states": "an 8-bit or paged optimizer, an adapter in place of full fine-tuning, or sharding",
    "temporaries": "a smaller batch or a shorter sequence, or a loss that does not materialize all logits (Liger, chunked)",
}
"""Category → what makes it smaller."""


def rows(result: Rehearsal, screen: Screen) -> list[Row]:
    """The whole answer."""
    dot = screen.glyphs.dot
    steps = f"{result.steps} step{'' if result.steps == 1 else 's'}"
    lines = wrapped(dot.join((" ".join(result.command), "rehearsed", steps)), screen.columns, colour="bold")
    for verdict in result.gpus:
        lines += _verdict(verdict, result, screen)
    if result.ended == "timeout":
        lines += wrapped(f"{screen.glyphs.fails} time ran out before the steps were done", screen.columns, colour="red")
    if result.ended == "host_memory":
        text = f"stopped: it took {format_bytes(result.host_bytes)} of host memory; --max-host allows more"
        lines += wrapped(f"{screen.glyphs.fails} {text}", screen.columns, colour="red")
    if result.oom is not None:
        lines += _out_of_memory(result.oom, screen)
    if (rank := result.largest_rank) is not None:
        lines += [BLANK, *_peak(rank, result, screen)]
    lines.append(BLANK)
    for note in result.notes:
        lines += wrapped(f"note: {note}", screen.columns, colour="yellow")
    return lines + [row for text in result.replaced for row in wrapped(f"replaced: {text}", screen.columns)]


def _verdict(verdict: Verdict, result: Rehearsal, screen: Screen) -> list[Row]:
    glyphs = screen.glyphs
    marks = {"fits": glyphs.fits, "tight": glyphs.tight, "does_not_fit": glyphs.fails}
    size = f"{verdict.usable_bytes / GIB:.1f}"
    if verdict.verdict == "does_not_fit":
        words = f"out of memory; the card has {size} GiB"
    elif verdict.verdict == "unknown":
        words = f"unknown, since no optimizer step was completed; it used {format_bytes(verdict.needed_bytes)} of {size} GiB"
    else:
        released = ", after releasing cached memory" if verdict.runs_by_releasing_cache else ""
        words = f"{verdict.verdict}, {format_bytes(verdict.headroom_bytes)} left of {size} GiB{released}"
    assumed = f" (context {verdict.context_bytes / 2**20:,.0f} MiB assumed)" if verdict.context_assumed else ""
    mark = marks.get(verdict.verdict, glyphs.unknown)
    return wrapped(f"{mark} {card_name(verdict.gpu)}: {words}{assumed}", screen.columns, colour=LOOKS.get(verdict.verdict))


def _out_of_memory(oom: OutOfMemory, screen: Screen) -> list[Row]:
    where = f"{_short(oom.file)}:{oom.line}" + (f": {oom.code}" if oom.code else "") if oom.file else "no line of the program"
    request = f"the program requested {format_bytes(oom.requested_bytes)} more in {oom.phase}, step {oom.step}, rank {oom.rank}"
    lines = wrapped(request, screen.columns) + wrapped(f"at {where}", screen.columns)
    if not oom.alive:
        return [*lines, (Part("nothing was alive then"),)]
    return [*lines, BLANK, (Part("alive then, by the line that allocated it:"),), *_lines(oom.alive, screen)]


def _peak(rank: Rank, result: Rehearsal, screen: Screen) -> list[Row]:
    dot = screen.glyphs.dot
    unit, name = unit_of(rank.peak_allocated)
    phases = dict(rank.peak_by_phase)
    highest = max(phases, key=lambda phase: phases[phase])
    others = dot.join(f"{phase} {size / unit:.2f}" for phase, size in phases.items() if phase != highest)
    of_rank = f" on rank {rank.rank}, device {rank.device}" if len(result.ranks) > 1 else ""
    peak, reserved = f"peak {rank.peak_allocated / unit:.2f} {name}", f"reserved {rank.peak_reserved / unit:.2f}"
    text = "; ".join(part for part in (f"{peak} in {highest}{of_rank}", others, reserved) if part)
    sizes = sorted(rank.by_category.items(), key=lambda item: -item[1])
    parts = [Segment(category.replace("_", " "), size) for category, size in sizes if size >= 0.005 * rank.peak_allocated]
    lines = wrapped(text, screen.columns)
    if parts:
        lines += [bar(parts, None, screen.glyphs), *flowing(legend(parts, screen.glyphs), screen.columns, between=dot)]
    largest_category = sizes[0][0] if sizes else ""
    lines += _host(rank, screen)
    largest = list(_lines(rank.largest, screen))
    if largest and (result.oom is None or list(_lines(result.oom.alive, screen)) != largest):  # else they stand above
        lines += [BLANK, (Part("largest at the peak, by the line that allocated it:"),), *largest]
    if largest_category in CHANGES:
        lines += [BLANK, *wrapped(f"what would help most: {CHANGES[largest_category]}", screen.columns)]
    return lines


def _host(rank: Rank, screen: Screen) -> list[Row]:
    """What the rank's tensors take of the host, where that is more than a batch."""
    parts = [f"{kind} {format_bytes(size)}" for kind, size in rank.host.items() if size >= SMALLEST_HOST]
    return wrapped(f"host memory of its tensors: {screen.glyphs.dot.join(parts)}", screen.columns) if parts else []


def _lines(alive: Iterable[Alive], screen: Screen) -> Iterator[Row]:
    for number, one in enumerate(alive):
        if number == MOST_LINES:
            return
        where = f"{_short(one.file)}:{one.line} in {one.function}" if one.file else "no line of Python (autograd)"
        category = f"{one.category.replace('_', ' '):<16}  " if one.category else ""
        text = f"{format_bytes(one.bytes):>12}  {category}"
        room = screen.columns - len(text)
        yield (Part(text + (where if len(where) <= room else f"...{where[3 - room :]}")),)


def _short(file: str | None) -> str:
    """A file from its package on, or from here."""
    path = file or ""
    for part in ("site-packages/", "dist-packages/"):
        if part in path:
            return path.partition(part)[2]
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def facts(result: Rehearsal) -> list[dict[str, object]]:
    """One record per rank and device, for CSV and Markdown; what a rank has not is null."""
    return [
        {
            "rank": rank.rank,
            "device": rank.device,
            "peak_allocated": rank.peak_allocated,
            "peak_reserved": rank.peak_reserved,
            "device_total": rank.device_total,
            **{f"host_{kind}": rank.host.get(kind) for kind in ("pinned", "pageable")},
            **{f"peak_{phase}": rank.peak_by_phase.get(phase) for phase in ("load", "forward", "backward", "step")},
        }
        for rank in result.ranks
    ]
