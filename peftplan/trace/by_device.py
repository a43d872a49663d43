"""The traces of the GPUs of one process, from the one log of all of them.

They are of the whole depth: clipping brings the norms of all gradients to the first GPU, whose log grows with all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from peftplan.trace.events.peaks import peaks, windows

if TYPE_CHECKING:
    from peftplan.trace.result import Traced


def by_device(traced: Traced, devices: int) -> Traced:
    """The trace of the GPU that needs most, with those of all as its `devices`."""
    each = tuple(_seen_on(traced, devices))
    most = max(each, key=lambda of_device: max(peak.bytes for peak in of_device.peaks.values()))
    return replace(most, devices=each)


def _seen_on(traced: Traced, devices: int) -> Iterator[Traced]:
    """What each GPU sees of a log."""
    for device in range(devices):
        places, log = [0], []
        for moment in traced.log:
            if traced.device_of[moment.storage.id] == device:
                log.append(moment)
            places.append(len(log))
        began = tuple((places[start], phase) for start, phase in traced.began)
        counted = windows(began, length=len(log), started=traced.started)
        yield replace(traced, log=tuple(log), began=began, windows=counted, peaks=peaks(log, counted), device_of={})
