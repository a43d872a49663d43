"""Host memory and disk as rows."""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.report.tabular import Column
from peftplan.results.host import SMALL_FILES, Host
from peftplan.units import format_bytes

COLUMNS = (Column("host memory and disk"), Column("bytes", right=True), Column("", right=True))


def cells(host: Host) -> list[tuple[str, str, str]]:
    """A row per number that is not nothing."""
    files = host.checkpoint
    rows = [
        ("loading the model", host.loading.bytes),
        ("its largest tensor", host.loading.largest_tensor),
        ("offloaded in a step", host.offloaded),
        (f"offloaded by the {host.ranks} ranks of a node", host.offloaded_per_node if host.ranks > 1 else 0),
        ("paged optimizer states, at most", host.paged),
        ("merging on the CPU", host.merging or 0),
        (f"checkpoint: {files.model_name}", files.model or 0),
        (f"checkpoint: optimizer.pt{'' if files.optimizer_exact else ', about'}", files.optimizer),
        ("checkpoint: scheduler.pt", files.scheduler),
        ("one checkpoint", files.total),
        (f"{host.save_total_limit} checkpoints, as kept", host.disk_kept or 0),
        ("the same while one more is written", host.disk_peak or 0),
    ]
    return [(name, f"{size:,}", format_bytes(size)) for name, size in rows if size]


def remarks(host: Host) -> Iterator[str]:
    """How the model is loaded, and what the sums leave out."""
    yield f"loading: {host.loading.how}"
    yield f"not in a checkpoint's sum: {SMALL_FILES}"
