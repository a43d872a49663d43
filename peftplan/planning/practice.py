"""Advice from practice: what papers and documentation recommend, each row with its source. No number here is computed."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from peftplan.arch.catalogue import find
from peftplan.datafiles import load, record
from peftplan.errors import InputError, UnknownNameError
from peftplan.frames import Listing
from peftplan.methods import METHODS
from peftplan.validation import text

TOPICS = ("method", "targets", "rank", "alpha", "dropout", "learning rate", "batch size")
OPTIONS = {"r": "rank", "target_modules": "targets", "lora_alpha": "alpha", "lora_dropout": "dropout", "lr": "learning rate"}
"""Options and short words → the topic that they belong to."""


class Rows(TypedDict):
    """The file of the recommendations: a source's name → title, year, url; rows that name a source."""

    sources: dict[str, dict[str, object]]
    rows: list[dict[str, object]]


class Practice(NamedTuple):
    """One recommendation. `option` and `value` are what sets it here, where an option does.

    `where`: the place in the source; `says`: a few of its words there.
    """

    topic: str
    methods: tuple[str, ...]
    advice: str
    title: str
    year: int
    url: str
    where: str
    says: str
    option: str | None = None
    value: str | int | float | bool | None = None

    @property
    def source(self) -> str:
        """Title, year and place, as they are shown."""
        return f"{self.title} ({self.year}), {self.where}"


def practices(about: str | None = None) -> Listing[Practice]:
    """What practice recommends. `about`: a topic (`rank`, `learning-rate`), a method (`qlora`), or an option (`lora_alpha`).

    Raises UnknownNameError for anything else.
    """
    data = load("practice.json", Rows)
    rows: Listing[Practice] = Listing(
        record(Practice, {**{key: value for key, value in row.items() if key != "source"}, **data["sources"][str(row["source"])]})
        for row in data["rows"]
    )
    if about is None:
        return rows
    key = text(about, field="about").strip().lower().replace("_", "-")
    topic = OPTIONS.get(key.replace("-", "_"), key.replace("-", " "))
    if topic in TOPICS:
        return Listing(row for row in rows if row.topic == topic)
    if key in METHODS:
        return Listing(row for row in rows if key in row.methods)
    topics = [topic.replace(" ", "-") for topic in TOPICS]
    if find(about) is not None:
        accepted = f"it is a model, and this advice is the same for all models; accepted: {', '.join(topics)}, or a method's name"
        raise InputError("about", about, accepted)
    raise UnknownNameError("about", about, topics, beside=METHODS)
