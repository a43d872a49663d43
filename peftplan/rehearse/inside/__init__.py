"""What runs inside the program: it watches torch and answers for what is not there. It starts with the standard library alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from peftplan.rehearse.inside import rows, standins, stopping, uploads, workers
from peftplan.rehearse.inside.after_import import AfterImport
from peftplan.rehearse.settings import read


def begin() -> None:
    """Called once when Python starts, before the program's first line."""
    settings = read()

    def into(name: str) -> Callable[[str], None]:
        def say(text: str) -> None:
            with open(Path(settings.folder, name), "a", encoding="utf-8") as file:
                file.write(f"{text}\n")

        return say

    def torch_is_there(torch: object) -> None:
        from peftplan.rehearse.inside import generation, holes, pools, ranks, routing, values, watch

        watch.start(settings)
        values.start(lambda: routing.start(settings.routing, into("stand-ins.txt")))
        generation.start()
        ranks.start(into("notes.txt"))
        pools.start(into("notes.txt"))
        if settings.stand_ins:
            holes.start()

    if settings.stand_ins:
        standins.start(into("stand-ins.txt"))
    if not settings.network:
        uploads.start(into("notes.txt"))
    stopping.start(into("notes.txt"))
    workers.start(settings)
    rows.start(settings.data, settings.seq_len, into("stand-ins.txt"), into("notes.txt"))
    sys.meta_path.insert(0, AfterImport({"torch": torch_is_there}))
