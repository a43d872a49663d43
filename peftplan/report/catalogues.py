"""What peftplan knows, as lists on stdout: models, cards, methods, schemas and published advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftplan.report.tabular import Column
from peftplan.report.writing import fields, plain, rows
from peftplan.units import MIB

if TYPE_CHECKING:
    from peftplan.arch.catalogue import ModelEntry
    from peftplan.hardware.gpus import Gpu
    from peftplan.planning.practice import Practice

REQUIRED = object()
"""Stands for the default of a field that has none."""


def models(entries: Sequence[ModelEntry], *, fmt: str) -> None:
    """The catalogue: name, parameters, model type, id."""
    columns = (Column("model"), Column("parameters", right=True), Column("model type"), Column("id", wide=True))
    cells = [(e.name, e.num_parameters, e.model_type, e.repo_id) for e in entries]
    rows(columns, cells, [fields(e) for e in entries], fmt=fmt, below=f"{len(entries)} model{'' if len(entries) == 1 else 's'}")


def methods(*, fmt: str) -> None:
    """The registry of methods."""
    from peftplan.methods import METHODS, OTHER_PEFT_TYPES

    columns = (Column("method"), Column("what trains"), Column("source", wide=True))
    cells = [(m.name, m.summary, m.source) for m in METHODS.values()]
    keys = ("name", "peft_type", "summary", "source", "quant")
    others = ", ".join(other.lower().replace("_", "-") for other in OTHER_PEFT_TYPES)
    below = f"counted by the installed peft (extra trace): {others}"
    rows(columns, cells, [{key: getattr(m, key) for key in keys} for m in METHODS.values()], fmt=fmt, below=below)


def method(name: str, *, fmt: str) -> None:
    """One method's fields with their defaults, those of a method without formulas as the installed peft has them."""
    from peftplan.methods import BOOKKEEPING, config_class, method_named, other_peft_type

    defaults: dict[str, object]
    if peft_type := other_peft_type(name):
        from peftplan.libraries.count import field_defaults

        defaults = {key: value for key, value in field_defaults(peft_type).items() if key not in BOOKKEEPING}
        title, ignored = f"{peft_type.lower().replace('_', '-')}: counted by the installed peft", None
    else:
        entry = method_named(name, "name")
        config = config_class(entry)
        defaults = {
            key: REQUIRED if field.is_required() else entry.defaults.get(key, field.get_default(call_default_factory=True))
            for key, field in config.model_fields.items()
        }
        title = f"{entry.name}: {entry.summary} ({entry.source})"
        ignored = f"accepted, without effect on memory: {', '.join(sorted(config.no_effect))}" if config.no_effect else None
    cells, facts = [], []
    for key, value in defaults.items():
        required = value is REQUIRED
        default = None if required else plain(value)
        cells.append((key, "required" if required else None if default in (None, {}, []) else str(default)))
        facts.append({"field": key, "required": required, "default": default})
    rows((Column("field"), Column("default")), cells, facts, fmt=fmt, above=title, below=ignored)


def schemas(*, fmt: str) -> None:
    """What has a JSON Schema, and which command prints it."""
    from peftplan.report.documents import DOCUMENTS

    columns = (Column("schema"), Column("printed by"), Column("what it holds", wide=True))
    cells = [(name, f"{document.command} --format json", document.text) for name, document in DOCUMENTS.items()]
    facts = [{"name": name, "command": document.command, "text": document.text} for name, document in DOCUMENTS.items()]
    rows(columns, cells, facts, fmt=fmt)


def practices(advice: Sequence[Practice], *, fmt: str) -> None:
    """Advice from practice, each row with its source."""
    from peftplan.report import practice, screen

    if fmt == "table":
        screen.show(practice.lines(advice, screen.width()))
        return
    columns = (Column("topic"), Column("methods"), Column("advice"), Column("source"), Column("url"))
    cells = [(row.topic, ", ".join(row.methods), row.advice, row.source, row.url) for row in advice]
    rows(columns, cells, practice.facts(advice), fmt=fmt)


def gpus(cards: Sequence[Gpu], *, fmt: str) -> None:
    """The cards: the marketed size, what nvidia-smi shows, what a program can use, and why."""
    from peftplan.hardware.gpus import OF_A_REQUEST
    from peftplan.hardware.usable import usable_bytes

    columns = (
        Column("gpu"),
        Column("marketed", right=True),
        Column("nvidia-smi", right=True),
        Column("usable", right=True),
        Column("compute capability"),
        Column("name", wide=True),
    )
    cells, facts = [], []
    for gpu in cards:
        usable = usable_bytes(gpu)
        marketed = f"{gpu.marketed_gb} GB" if gpu.marketed_gb else None
        total = f"{gpu.total_mib:,} MiB" if gpu.total_mib else None
        cells.append((gpu.id, marketed, total, f"{usable.bytes // MIB:,} MiB", gpu.compute_capability, gpu.name))
        of_card = {name: value for name, value in fields(gpu).items() if name not in OF_A_REQUEST}
        facts.append({**of_card, "usable_bytes": usable.bytes, "usable_source": usable.why})
    below = None if cards else "0 cards"
    rows(columns, cells, facts, fmt=fmt, below=below)
