"""The same tables as GitHub-flavoured Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftplan.planning.result import Estimate
from peftplan.report.tabular import LINE_COLUMNS, assumption_rows, category_rows, line_facts, texts
from peftplan.units import format_bytes


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """One Markdown table; pipes in cells are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def estimate(result: Estimate, *, verbose: bool) -> str:
    """An estimate as a Markdown section."""
    parts = [
        f"## {result.model['name']} · {result.method['name']}",
        table(
            ("parameters", "count"),
            (("trainable", f"{result.trainable_parameters:,}"), ("total", f"{result.total_parameters:,}")),
        ),
        table(
            ("memory that is counted", "bytes", ""),
            (*category_rows(result), ("**sum**", f"{result.persistent_bytes:,}", format_bytes(result.persistent_bytes))),
        ),
    ]
    if result.managed_bytes:
        parts.append(f"And {format_bytes(result.managed_bytes)} of paged optimizer states in CUDA managed memory.")
    if result.gpus:
        rows = [texts((v.gpu, v.usable_bytes, v.headroom_bytes, v.verdict, v.why)) for v in result.gpus]
        parts.append(table(("gpu", "usable bytes", "left over", "verdict", "usable because"), rows))
    if verbose:
        parts.append(table(LINE_COLUMNS, [texts(line.values()) for line in line_facts(result)]))
    parts.append(table(("assumption", "value"), assumption_rows(result.assumptions)))
    parts += [f"Note: {note}" for note in result.assumptions.get("notes", ())]
    parts.append(f"Not counted yet, so no peak is stated: {', '.join(result.not_modelled)}.")
    return "\n\n".join(parts)
