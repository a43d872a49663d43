"""The same tables as GitHub-flavoured Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftplan.planning.result import Estimate
from peftplan.report.tabular import LINE_COLUMNS, assumption_rows, category_rows, line_facts, not_counted, texts
from peftplan.units import format_bytes


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One Markdown table; pipes in cells are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def estimate(result: Estimate, *, verbose: bool) -> str:
    """An estimate as a Markdown section."""
    peaks, total = result.peaks, result.ledger.bytes()
    parts = [
        f"## {result.model['name']} · {result.method['name']}",
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
        reserved = [] if peaks.reserved is None else [("reserved", f"{peaks.reserved:,}", format_bytes(peaks.reserved))]
        parts.append(table(("peak of each phase", "bytes", ""), (*rows, *reserved)))
        parts += [f"Incomplete: {what}" for what in peaks.incomplete]
    if result.managed_bytes:
        parts.append(f"And {format_bytes(result.managed_bytes)} of paged optimizer states in CUDA managed memory.")
    if result.gpus:
        verdicts = [texts((v.gpu, v.usable_bytes, v.headroom_bytes, v.verdict, v.why)) for v in result.gpus]
        parts.append(table(("gpu", "usable bytes", "left over", "verdict", "usable because"), verdicts))
    if verbose:
        parts.append(table(LINE_COLUMNS, [texts(line.values()) for line in line_facts(result)]))
    parts.append(table(("assumption", "value"), assumption_rows(result.assumptions)))
    parts += [f"Note: {note}" for note in result.assumptions.get("notes", ())]
    parts.append(not_counted(result))
    return "\n\n".join(parts)
