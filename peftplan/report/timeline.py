"""Memory over one optimizer step, or over a rehearsed program, as a file: a picture (png), a page (html) or a log (json)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from peftplan.errors import InputError, MissingExtraError, RefusedError, UnknownNameError
from peftplan.files import replacing
from peftplan.results.estimate import Estimate
from peftplan.results.rehearsal import Rehearsal
from peftplan.results.series import Recording

SUFFIXES = (".png", ".html", ".json")


def check(path: str) -> None:
    """Ask before any work is done. Raises InputError for what is no such file, MissingExtraError for a png without matplotlib."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise UnknownNameError("timeline", path, SUFFIXES)
    if not os.path.isdir(file.parent) or os.path.isdir(file):
        raise InputError("timeline", path, "accepted: a file in an existing folder")
    if file.suffix == ".png" and find_spec("matplotlib") is None:
        raise MissingExtraError("timeline: a png", "plot")


def write(result: Estimate | Rehearsal, path: str) -> None:
    """Write the timeline of a recorded result; the file appears whole or not at all."""
    recording, suffix = recording_of(result), Path(path).suffix
    if suffix == ".json":
        recording.save(path, title=title(result))
        return
    content = _page(result, recording) if suffix == ".html" else _picture(result, recording)
    with replacing(path, field="timeline") as file:
        file.write(content)


def recording_of(result: Estimate | Rehearsal) -> Recording:
    """The recording of a result that has one."""
    if isinstance(result, Rehearsal):
        if result.recording is None:
            raise RefusedError("timeline: the program allocated nothing on the card")
        return result.recording
    if result.peaks is None or result.peaks.recording is None:
        raise RefusedError(f"timeline: the {result.engine} engine keeps no event log; accepted: engine trace")
    return result.peaks.recording


def title(result: Estimate | Rehearsal) -> str:
    """`llama-2-7b · qlora r=8 · batch 1 × 2048 tokens · traced`, or the command of a rehearsal."""
    if isinstance(result, Rehearsal):
        return f"{' '.join(result.command)} · {result.steps} steps · rehearsed"
    config, assumed = result.method["config"], result.assumptions
    rank = f" r={config['r']}" if "r" in config else ""
    job = f"{result.model['name']} · {result.method['name']}{rank}"
    tokens = f" × {assumed['seq_len']} tokens" if "seq_len" in assumed else ""  # pictures have none
    return f"{job} · batch {assumed['batch_size']}{tokens} · {result.engine}"


def _page(result: Estimate | Rehearsal, recording: Recording) -> bytes:
    from peftplan.report import timeline_html

    return timeline_html.page(recording.series(), title=title(result), notes=_notes(result)).encode()


def _picture(result: Estimate | Rehearsal, recording: Recording) -> bytes:
    from peftplan.report import timeline_png

    return timeline_png.picture(recording.series(), title=title(result), notes=_notes(result))


def _notes(result: Estimate | Rehearsal) -> tuple[str, ...]:
    if isinstance(result, Rehearsal):
        return result.notes
    return tuple(f"incomplete: {what}" for what in (result.peaks.incomplete if result.peaks else ()))
