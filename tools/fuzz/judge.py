"""What an input ended in: an answer, a refusal of one line, or a fault."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

from peftplan.cli import main
from peftplan.errors import PeftplanError
from tools.fuzz.cases import Case, draw

CPU_SECONDS = 20
MOST_BYTES = 3 * 2**30
MOST_OF_A_LINE = 1000
MOST_OF_A_MESSAGE = 1500
EXTRAS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "numpy", "huggingface_hub", "matplotlib")
"""What the base install lacks."""


class Outcome(NamedTuple):
    """`kind`: answer, refusal or fault."""

    number: int
    kind: str
    why: str
    text: str
    seconds: float


def work(pipe: Connection, seed: str, folder: Path, trace: bool) -> None:
    """Judge the inputs whose numbers come through the pipe, until None comes."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HOME": str(folder), "COLUMNS": "100", "HF_HOME": str(folder / "hf")}
    warnings.simplefilter("ignore")
    if trace:
        import peftplan.trace.engine  # noqa: F401
    else:
        sys.modules.update(dict.fromkeys(EXTRAS))  # type: ignore[arg-type]
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    own = folder / str(os.getpid())
    while (number := pipe.recv()) is not None:
        own.mkdir()
        os.chdir(own)
        try:
            pipe.send(_judged(number, f"{seed}:{'trace' if trace else ''}{number}", own, trace=trace))
        finally:
            os.chdir(folder)
            shutil.rmtree(own, ignore_errors=True)


def _judged(number: int, seed: str, folder: Path, *, trace: bool) -> Outcome:
    case = draw(seed, folder, trace=trace)
    started = time.process_time()
    # Beyond the soft limit the kernel ends the process, in a regular expression or a long sum too.
    resource.setrlimit(resource.RLIMIT_CPU, (int(started) + CPU_SECONDS + 2, resource.RLIM_INFINITY))
    kind, why = _run(case, folder) if case.args is not None else judged_call(case.call)
    seconds = time.process_time() - started
    if seconds > CPU_SECONDS and not trace:
        kind, why = "fault", f"{seconds:.0f} CPU-seconds"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MOST_BYTES:
        kind, why = "fault", "more than 3 GiB"
    return Outcome(number, kind, why, case.text, seconds)


@contextlib.contextmanager
def _streams(folder: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Stdout and stderr as files of this process, as a shell would redirect them."""
    with (folder / ".out").open("w+b") as out, (folder / ".err").open("w+b") as err:
        texts = [
            io.TextIOWrapper(file, encoding="utf-8", errors=how) for file, how in ((out, "strict"), (err, "backslashreplace"))
        ]
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = texts
        try:
            yield out, err
        finally:
            sys.stdout, sys.stderr = before
            for text in texts:
                text.detach()


def _run(case: Case, folder: Path) -> tuple[str, str]:
    assert case.args is not None
    code: object = "no exit"
    raised = None
    with _streams(folder) as (out, err):
        try:
            main(list(case.args))
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:
            raised = _where(error)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        stdout, stderr = (file.seek(0) or file.read().decode(errors="replace") for file in (out, err))
    if raised:
        return "fault", raised
    return judged_command(code, stdout, stderr, strict=case.strict)


def judged_command(code: object, stdout: str, stderr: str, *, strict: bool = False) -> tuple[str, str]:
    """What a command is by its exit code, its stdout and its stderr; `strict`: where it answers, stdout is JSON."""
    return _answer(stdout, stderr, strict=strict) if code in (0, 1) else _refusal(code, stdout, stderr)


def _answer(stdout: str, stderr: str, *, strict: bool) -> tuple[str, str]:
    if "Traceback" in stderr:
        return "fault", f"a traceback: {stderr[-300:]}"
    if strict and (why := _not_strict(stdout)):
        return "fault", f"no strict JSON: {why}"
    odd = next((line for line in stdout.split("\n") if not line.isprintable()), None)
    return ("answer", "") if odd is None else ("fault", f"control characters on stdout: {odd[:200]!r}")


def _refusal(code: object, stdout: str, stderr: str) -> tuple[str, str]:
    if code != 2:
        return "fault", f"exit code {code}: {stderr[-300:]!r}"
    line = stderr.removesuffix("\n")
    if stdout or not stderr.endswith("\n") or not line.startswith("peftplan: "):
        return "fault", f"not one line on stderr alone: {stdout[:200]!r} {stderr[:300]!r}"
    return _message(line, MOST_OF_A_LINE - 1)


def _message(line: str, most: int) -> tuple[str, str]:
    if not line.isprintable() or len(line) > most:
        return "fault", f"{len(line)} characters, or some that control: {line[:300]!r}"
    if "out of memory" in line:
        return "fault", "more memory than is there"
    return "refusal", line


def judged_call(call: Callable[[], Any] | None) -> tuple[str, str]:
    """What a Python call is: what it returns can be written as JSON, or its error is ours and one line."""
    assert call is not None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            answer = call()
    except PeftplanError as error:
        return _message(str(error) or "\n", MOST_OF_A_MESSAGE)
    except BaseException as error:
        return "fault", _where(error)
    try:
        json.dumps(answer, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return "fault", f"no strict JSON: {error}"
    return "answer", ""


def _not_strict(text: str) -> str:
    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return str(error)
    return ""


def _where(error: BaseException) -> str:
    """The last lines of a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    try:
        text = f"{type(error).__name__}: {str(error)[:300]}"
    except Exception:
        text = type(error).__name__
    return f"{text} at {' < '.join(f'{Path(frame.filename).name}:{frame.lineno}' for frame in frames[::-1][:4])}"
