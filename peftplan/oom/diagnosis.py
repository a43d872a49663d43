"""`explain_oom`: from a message, a log or a snapshot to what was alive, why memory ran out, and what the job should need."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple, cast

from peftplan import files
from peftplan.allocator.pickles import MAGIC
from peftplan.errors import InputError, UnreadableError
from peftplan.job.options import JobOptions
from peftplan.oom import message as messages
from peftplan.oom.causes import Cause, causes
from peftplan.oom.message import Message
from peftplan.oom.snapshot import Alive, alive_in
from peftplan.oom.wordless import cause_in
from peftplan.planning.estimate import estimate
from peftplan.results.estimate import SCHEMA_VERSION, Estimate
from peftplan.units import format_bytes

MOST_BYTES = 256 * 2**20
"""Of a log."""
MORE = 1.02
"""What the run wanted beyond the estimate by more than this is a difference to explain."""
LONGEST = 2**20
"""Tokens up to which a longer batch is looked for."""


ACCEPTED = "a file, torch's message in quotes, or - for standard input"
WITHOUT_FIGURES = "it says that memory ran out, but gives no figures; accepted: all of torch's message (Tried to allocate …)"


class Expected(NamedTuple):
    """What the estimate of the job says beside what the run reached, in bytes.

    `reached` is what was allocated plus the request that failed. `explained_by_seq_len`: the tokens per sequence from which on
    the estimate is as large, where the run reached more than it.
    """

    model: str
    peak_allocated: int
    peak_phase: str
    reached: int | None
    explained_by_seq_len: int | None
    text: str


class Diagnosis(NamedTuple):
    """Why memory ran out. `message` is None if there is none with numbers; `alive` is empty without a snapshot."""

    message: Message | None
    causes: tuple[Cause, ...]
    alive: tuple[Alive, ...] = ()
    expected: Expected | None = None

    def to_dict(self) -> dict[str, object]:
        """The JSON, bytes as integers."""
        facts = None if self.message is None else self.message._asdict()
        if facts is not None:
            facts["frames"] = [frame._asdict() for frame in facts["frames"][-8:]]
        return {
            "schema_version": SCHEMA_VERSION,
            "message": facts,
            "causes": [cause._asdict() for cause in self.causes],
            "alive": [alive._asdict() for alive in self.alive],
            "expected": None if self.expected is None else self.expected._asdict(),
        }


def explain_oom(source: str | PathLike[str], *, model: object = None, options: Mapping[str, object] | None = None) -> Diagnosis:
    """Why a program ran out of memory.

    `source`: a log that contains torch's message, a memory snapshot (`torch.cuda.memory._dump_snapshot`; nothing in it is
    executed), `-` for standard input, or the message itself. `model` and `options`, as for `estimate`, describe the job that ran;
    the answer then compares it with the estimate. Raises InputError if there is no such message, and what `estimate` raises.
    """
    if not isinstance(source, (str, PathLike)):
        raise InputError("source", source, "accepted: a path, or - for standard input")
    source = fspath(source)
    if not source.strip():
        raise InputError("source", source, f"accepted: {ACCEPTED}")
    content = _content(source)
    if content.startswith(MAGIC):
        message, alive, earlier = alive_in(source)
        told = causes(message, earlier) if message else ()
    else:
        message, told = _in_log(content.decode("utf-8", errors="replace"), source)
        alive = ()
    expected = None if model is None else _expected(estimate(model, **cast("JobOptions", options or {})), message)
    return Diagnosis(message, told, alive, expected)


def _in_log(log: str, source: str) -> tuple[Message | None, tuple[Cause, ...]]:
    """Torch's message in a log, and the causes. Raises InputError where no line says that memory ran out."""
    if (message := messages.find(log)) is not None:
        return message, causes(message)
    if (cause := cause_in(log)) is not None:
        return None, (cause,)
    if messages.BEGINNING.search(log):
        raise InputError("source", source, f"{WITHOUT_FIGURES}, a log with it, or a memory snapshot")
    raise InputError(
        "source", source, "it contains no out-of-memory message; accepted: torch's message, a log with one, or a memory snapshot"
    )


def _content(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read(MOST_BYTES)
    try:
        return files.content(Path(source), field="source", most=MOST_BYTES)
    except UnreadableError as error:
        if messages.find(source) is not None or cause_in(source) is not None:
            return source.encode("utf-8", errors="replace")
        if messages.BEGINNING.search(source):
            raise InputError("source", source, f"{WITHOUT_FIGURES}, a file, or - for standard input") from None
        error.accepted += f"; accepted: {ACCEPTED}"
        raise error.named("source") from None


def _context(capacity: int) -> int:
    """Bytes of a CUDA context as verdicts assume it for a card of which only the size is known."""
    from peftplan.hardware.context import context_for_verdict
    from peftplan.hardware.gpus import find_gpu

    return context_for_verdict(find_gpu(f"{capacity >> 20}MiB")).bytes


def _expected(result: Estimate, message: Message | None) -> Expected | None:
    if result.peaks is None:
        return None
    peak, reached = result.peaks.allocated, None
    if message is not None and message.allocated is not None:
        reached = message.allocated + message.requested
    tokens = None
    if reached is None:
        text = f"the job is expected to peak at {format_bytes(peak)} in {result.peaks.phase}"
    elif reached <= MORE * peak:
        capacity = message.capacity if message is not None else None
        has_room = capacity is not None and (result.peaks.reserved or peak) + _context(capacity) <= capacity
        text = (
            f"the job was expected to need {format_bytes(peak)} (in {result.peaks.phase}) and had reached "
            f"{format_bytes(reached)}: it behaves as expected, and the card "
            + ("has room for it, unless something else uses the card" if has_room else "is too small for it")
        )
    else:
        tokens = _tokens(result, reached)
        longer = f", as with sequences of {tokens:,} tokens" if tokens else ""
        text = (
            f"the job was expected to need {format_bytes(peak)}; it had reached {format_bytes(reached)}, "
            f"{format_bytes(reached - peak)} more{longer}. Look for a batch longer than --seq-len, an evaluation, "
            "outputs that the loop keeps, or a second copy of the model"
        )
    return Expected(result.model["name"], peak, result.peaks.phase, reached, tokens, text)


def _tokens(result: Estimate, reached: int) -> int | None:
    """The tokens per sequence from which on the job needs as much: by bisection, as allocated bytes grow with them."""
    low = result.assumptions.get("seq_len", 0)
    if not result.resizes or not low:
        return None

    def needs(tokens: int) -> int:
        peaks = result.at(seq_len=tokens).peaks
        assert peaks is not None
        return peaks.allocated

    high = low
    try:
        while needs(high) < reached:
            low, high = high, 2 * high
            if high > LONGEST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needs(middle) < reached else (low, middle)
    except InputError:  # longer than the model's table of positions
        return None
    return high
