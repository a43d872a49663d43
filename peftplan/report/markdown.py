"""The same tables as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peftplan.errors import one_line
from peftplan.report import configs, peak
from peftplan.report.tabular import (
    LineFacts,
    assumption_rows,
    beside_card,
    category_rows,
    context,
    incomplete,
    largest_line,
    line_facts,
    needs,
    not_counted,
    texts,
)
from peftplan.results.estimate import Estimate
from peftplan.units import format_bytes


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One Markdown table. Links, HTML and pipes in its cells are text; emphasis and code are left as they are."""
    lines = ["| " + " | ".join(map(plain, columns)) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    return "\n".join(lines)


_MARKUP = re.compile(r"[\\<>\[\]|]")


def plain(text: str) -> str:
    """Text that may come from a file or a path, on one line, without links, HTML, or the end of a cell."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text, most=len(text) + 1))


def estimate(result: Estimate, *, verbose: bool, explain_peak: bool = False) -> str:
    """An estimate as a Markdown section."""
    peaks, total = result.peaks, result.ledger.bytes()
    parts = [
        f"## {plain(result.model['name'])} · {plain(result.method['name'])}",
        *([plain(configs.summary(result.config))] if result.config else []),
        *(f"**Warning:** {plain(warning)}" for warning in result.warnings),
        table(
            ("parameters", "count"),
            (("trainable", f"{result.trainable_parameters:,}"), ("total", f"{result.total_parameters:,}")),
        ),
        table(
            (f"memory at the peak, in {peaks.phase}" if peaks else "memory that is counted", "bytes", ""),
            (*category_rows(result), ("**sum**", f"{total:,}", format_bytes(total))),
        ),
    ]
    if peaks:
        rows = [(phase, f"{num_bytes:,}", format_bytes(num_bytes)) for phase, num_bytes in peaks.by_phase.items()]
        reserved_bytes = peaks.reserved
        reserved = [] if reserved_bytes is None else [("reserved", f"{reserved_bytes:,}", format_bytes(reserved_bytes))]
        if peaks.by_pace and (most := peaks.reserved_at_most) is not None:
            reserved.append(("reserved at most, by how late the GPU is", f"{most:,}", format_bytes(most)))
        parts.append(table(("peak of each phase", "bytes", ""), (*rows, *reserved)))
        parts += [f"**Incomplete:** {what}" for what in incomplete(peaks)]
    if explain_peak:
        parts.append(_largest(result, everything=verbose))
    parts += [f"And {beside}." for beside in beside_card(result)]
    if result.gpus:
        verdicts = [
            texts((v.gpu, v.usable_bytes, v.needed_bytes, context(v), v.headroom_bytes, v.words, v.why)) for v in result.gpus
        ]
        parts.append(
            table(("gpu", "usable bytes", "needed", "context in it", "left over", "verdict", "usable because"), verdicts)
        )
        parts += [
            *(f"{v.gpu}: {v.reason}" for v in result.gpus if v.reason),
            *needs(result),
            f"Largest line: {largest_line(result)}.",
        ]
        for gpu, advised in result.advice.items():
            from peftplan.report import advice

            columns = (advice.title(gpu, result.engine), *advice.COLUMNS[1:])
            parts += [table(columns, advice.rows(result, gpu, shown))] if (shown := advised.rows()) else []
            parts += [sentence] if (sentence := advice.without_help(gpu, advised, strategy=advice.kept_strategy(result))) else []
    if verbose:
        parts.append(table(LineFacts._fields, [texts(line) for line in line_facts(result)]))
    parts.append(table(("assumption", "value"), assumption_rows(result.assumptions)))
    parts += [f"Note: {plain(note)}" for note in result.assumptions.get("notes", ())]
    if result.config:
        parts += [
            plain(line)
            for line in (*configs.unsupported(result.config, has_peak=bool(peaks), most=None), *configs.assumed(result.config))
        ]
    parts.append(not_counted(result))
    return "\n\n".join(parts)


def _largest(result: Estimate, *, everything: bool) -> str:
    """The largest groups of tensors at the peak."""
    groups = peak.rows(result)
    largest, rest = peak.split(groups, everything=everything)
    total = sum(row.bytes for row in groups)
    cells = [
        (f"`{peak.kind(row.name)}`", row.category, peak.tensor(row), peak.operation(row), f"{row.copies:,}", f"{row.bytes:,}",
         f"{row.share:.1%}")
        for row in largest
    ]  # fmt: skip
    if rest:
        copies, num_bytes = sum(row.copies for row in rest), sum(row.bytes for row in rest)
        cells.append((f"… and {len(rest):,} more lines", "", "", "", f"{copies:,}", f"{num_bytes:,}", f"{num_bytes / total:.1%}"))
    cells.append(("**sum, the peak**", "", "", "", f"{sum(row.copies for row in groups):,}", f"{total:,}", "100.0%"))
    title = f"largest at the peak, in {peak.peaks_of(result).phase}"
    return table((title, "what", "tensor", "made by", "copies", "bytes", "share"), cells)
