"""`python -m tools.fuzz [--inputs 20000] [--seed 0] [--workers 2] [--trace 0] [--only N]`.

Draws inputs from a seed and runs each in a worker process under limits of CPU time, wall time and address space. An answer ends
with exit code 0 or 1, and is strict JSON where JSON was asked for. A refusal is one line. All else is a fault, printed with its
number, which `--only` runs again. Exit code 1 where there are faults. Nightly: 20,000 inputs under the date as seed; the tests
run 1,000.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.fuzz.judge import Outcome, work

WAIT = 180.0
"""Seconds of wall time after which an input counts as hanging: CPU time ends after 20, a busy machine takes longer."""


class Worker:
    """A process that judges one input after the other."""

    def __init__(self, seed: str, folder: Path, *, trace: bool) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, seed, folder, trace), daemon=True)
        self.process.start()
        theirs.close()
        self.number, self.since = -1, time.monotonic()

    def ask(self, number: int) -> None:
        """Hand over the next input."""
        self.number, self.since = number, time.monotonic()
        self.pipe.send(number)

    def answer(self) -> Outcome:
        """The outcome; a process that died says which limit it met."""
        try:
            outcome: Outcome = self.pipe.recv()
            return outcome
        except EOFError:
            self.process.join()
            return Outcome(
                self.number, "fault", f"the process died with {self.process.exitcode} (-24: CPU time; -9: memory)", "", 0.0
            )

    def end(self) -> None:
        """Stop the process before its folder is removed."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join()


def fuzz(numbers: list[int], *, seed: str, workers: int, trace: bool) -> list[Outcome]:
    """Judge inputs in parallel, each fault printed as it comes."""
    outcomes, todo = [], list(reversed(numbers))
    with TemporaryDirectory(prefix="peftplan-fuzz-") as folder:

        def fresh() -> Worker:
            return Worker(seed, Path(folder), trace=trace)

        running = [fresh() for _ in range(min(workers, len(numbers)))]
        for worker in running:
            worker.ask(todo.pop())
        while running:
            ready = wait([worker.pipe for worker in running], timeout=5)
            for worker in list(running):
                late = time.monotonic() - worker.since > WAIT
                if worker.pipe not in ready and not late:
                    continue
                if late and worker.pipe not in ready:
                    worker.process.kill()
                outcomes.append(worker.answer())
                _tell(outcomes[-1])
                running.remove(worker)
                if todo:
                    alive = worker if worker.process.is_alive() else fresh()
                    running.append(alive)
                    alive.ask(todo.pop())
                else:
                    worker.end()
    return outcomes


def _tell(outcome: Outcome) -> None:
    if outcome.kind == "fault":
        print(f"{outcome.number}: {outcome.why}\n    {outcome.text[:1500]}", flush=True)


def main() -> int:
    """Run it; 1 where there are faults."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trace", type=int, default=0, help="and so many inputs of the trace engine (extra trace)")
    parser.add_argument("--only", type=int, default=None, metavar="N", help="only the input of that number")
    parser.add_argument("--reasons", type=int, default=0, metavar="N", help="print the N most frequent beginnings of refusals")
    options = parser.parse_args()
    numbers = list(range(options.inputs)) if options.only is None else [options.only]
    outcomes = fuzz(numbers, seed=options.seed, workers=options.workers, trace=False)
    if options.trace:
        outcomes += fuzz(list(range(options.trace)), seed=options.seed, workers=options.workers, trace=True)
    if options.only is not None:
        print(outcomes[0])
    if options.reasons:
        words = Counter(" ".join(outcome.why.split()[:4]) for outcome in outcomes if outcome.kind == "refusal")
        print(*(f"{times:6} {why}" for why, times in words.most_common(options.reasons)), sep="\n")
    kinds = Counter(outcome.kind for outcome in outcomes)
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(
        f"{len(outcomes):,} inputs under seed {options.seed}: {kinds['answer']:,} answered, {kinds['refusal']:,} refused in "
        f"one line, {kinds['fault']:,} faults; slowest: {slowest.number} with {slowest.seconds:.1f} CPU-seconds"
    )
    return 1 if kinds["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
