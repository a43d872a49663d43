"""Where an estimate becomes text: one function per thing shown, one branch per format."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from peftplan.planning.result import Estimate
from peftplan.report import tabular
from peftplan.units import MIB

if TYPE_CHECKING:
    from peftplan.arch.catalogue import ModelEntry
    from peftplan.hardware.gpus import Gpu
    from peftplan.planning.inspection import Inspection


def estimate(result: Estimate, *, fmt: str, verbose: bool) -> None:
    """Write an estimate to stdout as a table, JSON, CSV (one row per line of the ledger) or Markdown."""
    if fmt == "json":
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    elif fmt == "csv":
        tabular.write_csv(tabular.LINE_COLUMNS, tabular.line_rows(result), sys.stdout)
    elif fmt == "markdown":
        from peftplan.report import markdown

        print(markdown.estimate(result, verbose=verbose))
    else:
        from peftplan.report import terminal

        terminal.estimate(result, verbose=verbose)


def models(entries: Sequence[ModelEntry], *, fmt: str) -> None:
    """The catalogue: name, parameters, model type, id; `verified` says whether the count equals a published one."""
    columns = (("name", "left"), ("parameters", "right"), ("model type", "left"), ("id", "left"))
    rows = [(e.name, f"{e.num_parameters:,}" + ("" if e.verified else " (unverified)"), e.model_type, e.repo_id) for e in entries]
    _rows(columns, rows, [_fields(e) for e in entries], fmt=fmt)


def methods(name: str | None, *, fmt: str) -> None:
    """The registry of methods, or one method's fields with their defaults."""
    from peftplan import methods as registry

    if name is None:
        columns = (("method", "left"), ("what trains", "left"), ("source", "left"))
        found = list(registry.METHODS.values())
        _rows(columns, [(m.name, m.summary, m.source) for m in found], [_fields(m) for m in found], fmt=fmt)
        return
    method = registry.method_named(name)
    known = registry.config_class(method).model_fields
    defaults = {key: method.defaults.get(key, f.get_default(call_default_factory=True)) for key, f in known.items()}
    if fmt == "table":
        print(f"{method.name}: {method.summary} ({method.source})\n")
    rows = [(key, "required" if known[key].is_required() else _value(value)) for key, value in defaults.items()]
    facts = [{"field": key, "required": known[key].is_required(), "default": _plain(value)} for key, value in defaults.items()]
    _rows((("field", "left"), ("default", "left")), rows, facts, fmt=fmt)


def gpus(found: Sequence[Gpu], *, fmt: str) -> None:
    """The cards: what is printed on the box, what nvidia-smi shows, what a program can get, and why."""
    from peftplan.hardware.usable import usable_bytes

    columns = (("gpu", "left"), ("marketed", "right"), ("nvidia-smi", "right"), ("usable", "right"), ("cc", "left"))
    rows, facts = [], []
    for gpu in found:
        usable = usable_bytes(gpu)
        rows.append(
            (
                gpu.id,
                f"{gpu.marketed_gb} GB" if gpu.marketed_gb else "-",
                f"{gpu.total_mib} MiB" if gpu.total_mib else "-",
                f"{usable.bytes / MIB:.0f} MiB",
                gpu.compute_capability or "-",
            )
        )
        facts.append({**_fields(gpu), "usable_bytes": usable.bytes, "usable_source": usable.why})
    _rows(columns, rows, facts, fmt=fmt)


def inspection(found: Inspection, *, fmt: str) -> None:
    """The modules of a model; with a pattern, how many of each family it matches."""
    arch = found.architecture
    matching = found.pattern is not None
    columns: tuple[tuple[str, str], ...] = (("module", "left"), ("class", "left"), ("shapes", "left"))
    columns += (("copies", "right"), ("parameters", "right"), ("bytes", "right"), *((("matched", "right"),) if matching else ()))
    rows = [
        (
            r.name.replace("{}", "*") or "(model)",
            r.kind,
            r.shapes,
            str(r.copies),
            f"{r.num_parameters:,}",
            f"{r.bytes:,}",
            *((str(r.matched) if r.matched else "",) if matching else ()),
        )
        for r in found.rows
    ]
    if fmt == "json":
        modules = [{**_fields(r), "name": r.name.replace("{}", "*")} for r in found.rows]
        facts = {"model_class": arch.model_class, "num_parameters": arch.num_parameters, "dtype": found.dtype}
        print(json.dumps({"name": arch.name, **facts, "targets": _plain(found.targets), "modules": modules}, indent=2))
        return
    if fmt == "table":
        print(f"{arch.name} · {arch.model_class} · {arch.num_parameters:,} parameters · {found.dtype}\n")
    _rows(columns, rows, [], fmt=fmt)
    if fmt == "table" and matching:
        print(f"\n{found.pattern!r} matches {sum(r.matched for r in found.rows)} modules")


def _rows(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], facts: Sequence[Mapping[str, Any]], *, fmt: str
) -> None:
    """One list of rows in the asked format; JSON has all facts of each row."""
    headers = [header for header, _ in columns]
    if fmt == "json":
        print(json.dumps(list(facts), indent=2, ensure_ascii=False))
    elif fmt == "csv":
        tabular.write_csv(headers, rows, sys.stdout)
    elif fmt == "markdown":
        from peftplan.report import markdown

        print(markdown.table(headers, rows))
    else:
        from peftplan.report import terminal

        shown = terminal.table(*columns)
        for row in rows:
            shown.add_row(*row)
        terminal.show(shown)


def _fields(item: Any) -> dict[str, Any]:
    """A dataclass as JSON-able values."""
    return {f.name: _plain(getattr(item, f.name)) for f in fields(item)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return _fields(value)
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return value


def _value(value: Any) -> str:
    return "-" if value in (None, {}, ()) else str(value)
