"""What runs inside the program: it watches torch and answers for what is not there. It starts with the standard library alone."""

from __future__ import annotations

import sys
from pathlib import Path

from peftplan.rehearse.inside import standins, workers
from peftplan.rehearse.inside.after_import import AfterImport
from peftplan.rehearse.settings import read


def begin() -> None:
    """Called once when Python starts, before the program's first line."""
    settings = read()

    def say(text: str) -> None:
        with open(Path(settings.folder, "stand-ins.txt"), "a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def torch_is_there(torch: object) -> None:
        from peftplan.rehearse.inside import generation, holes, ranks, values, watch

        watch.start(settings)
        values.start()
        generation.start()
        ranks.start()
        if settings.stand_ins:
            holes.start()

    if settings.stand_ins:
        standins.start(say)
    workers.start(settings)
    sys.meta_path.insert(0, AfterImport({"torch": torch_is_there}))
