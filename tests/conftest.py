"""Which tests are `quick`, and how tests are spread over processes.

A test is quick if it needs none of the libraries of the extra `trace` and its function takes less than 50 ms of processor time
a case, shared fixtures included. `tests/slow.json` names the functions that take longer, as `pytest --learn-quick` measured them;
a test that it does not know counts as quick, and `pytest -m quick` names those that turn out to be slow.
"""

from __future__ import annotations

import ast
import gc
import inspect
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from peftplan import scans

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's tensors are small here: a second thread only waits
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of the commands that tests start would compile its modules again

HERE = Path(__file__).parent
NEED_STACK = {HERE / room for room in ("libraries", "trace")}
STACK = r"(?:torch|transformers|peft|bitsandbytes|accelerate|trl)\b"
NEEDS_STACK = re.compile(rf"importorskip\((?:[\"']{STACK}|[A-Za-z])|^\s*(?:import|from) {STACK}", re.M)
"""Code that imports torch or a library on top of it, or skips without; a name instead of a string stands for one of them."""
OF_TESTS = re.compile(r"^from (tests\.[\w.]+) import", re.M)
"""Another file of tests that one imports."""
STACK_FIXTURES = frozenset({"real_states"})
"""Fixtures that need these libraries; the tests that use them do not say so themselves."""

WITHOUT_STACK = ("quick", "slow", "quick or slow")
"""What `-m` says where no test needs these libraries."""
SLOW_FILE = HERE / "slow.json"
SLOW: Mapping[str, float] = json.loads(SLOW_FILE.read_text(encoding="utf-8"))
"""Function → seconds of processor time that one of its cases takes on average."""
SECONDS = 0.05
"""A quick function takes less. The summary allows four times as much before it names one: the first test pays for imports."""
SELDOM = 50
"""How many times as long the garbage collector leaves old objects alone: those of torch, of the libraries, and of all tests. One
scan takes a second or two. With 20, scans were a twentieth of all processor time; 100 would add 0.7 GB to a process."""
scans.MOST_LEFT *= 16  # objects, 100 MB or so: beside those of all tests one scan took as long as 15 estimates
PROPERTY = "processor seconds"
START = pytest.StashKey[float]()
SHARED: dict[tuple[str, str], float] = {}
"""File and name of a fixture that tests share → seconds that it took. Each of them may be the first or the only one to run."""


@cache
def names_stack(path: Path) -> bool:
    """Whether a file imports one of these libraries anywhere, or skips without."""
    return bool(NEEDS_STACK.search(path.read_text(encoding="utf-8")))


@cache
def module_needs_stack(path: Path) -> bool:
    """Whether all of a file needs these libraries: it lies in their rooms, or code outside functions and classes says so, there
    or in another file of tests that it imports."""
    if not NEED_STACK.isdisjoint(path.parents):
        return True
    source = path.read_text(encoding="utf-8")
    others = (HERE.parent / f"{name.replace('.', '/')}.py" for name in OF_TESTS.findall(source))
    if any(module_needs_stack(other) for other in others if other.exists()):
        return True
    if not names_stack(path):
        return False
    statements = [node for node in ast.parse(source).body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    lines = source.splitlines()
    return any(NEEDS_STACK.search("\n".join(lines[node.lineno - 1 : node.end_lineno])) for node in statements)


def needs_stack(item: pytest.Function) -> bool:
    """Whether a test needs these libraries."""
    if module_needs_stack(item.path) or not STACK_FIXTURES.isdisjoint(item.fixturenames):
        return True
    return names_stack(item.path) and function_needs_stack(item.function)


@cache
def function_needs_stack(function: Callable[..., object]) -> bool:
    """Whether a function itself says so. To find its source takes a millisecond, and it may have a thousand cases."""
    return bool(NEEDS_STACK.search(inspect.getsource(function)))


def function_of(nodeid: str) -> str:
    """The function that a test is a case of."""
    return nodeid.partition("[")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--learn-quick", action="store_true", help="time the tests that need no torch, and write tests/slow.json")
    parser.addoption(
        "--full-matrix", action="store_true", help="run all combinations of a matrix, not those that are drawn of it"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What selects tests without these libraries does not even import a file that needs them: torch alone takes seconds."""
    without_stack = config.option.markexpr in WITHOUT_STACK or config.option.learn_quick
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if without_stack and is_test and module_needs_stack(collection_path) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays, and so nothing of it is garbage: the collector is off meanwhile, and scans it seldom
    afterwards. It took a sixth of the first and a tenth of tests that trace."""
    gc.disable()
    try:
        return (yield)
    finally:
        young, middle, old = gc.get_threshold()
        gc.set_threshold(young, middle, SELDOM * old)
        gc.freeze()  # and back: so all of it is old without a scan
        gc.unfreeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """Nothing is freed any more, so pytest's five last scans and the end of the process need not look for it: seconds each."""
    gc.freeze()


def is_drawn(item: pytest.Item) -> bool:
    """Whether a case runs beside all tests: of a function marked `one_in` some do, drawn by their names."""
    mark = item.get_closest_marker("one_in")
    return mark is None or crc32(item.nodeid.encode()) % mark.args[0] == 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test that needs no torch, before `-m` selects. Rehearsals take long: they run where `-m` names them."""
    named = config.option.keyword or any(".py" in argument for argument in config.args)
    if not (config.option.full_matrix or config.option.learn_quick or named):
        config.hook.pytest_deselected(items=[item for item in items if not is_drawn(item)])
        items[:] = filter(is_drawn, items)
    for item in items if "rehearse" not in config.option.markexpr else ():
        if item.get_closest_marker("rehearse"):
            item.add_marker(pytest.mark.skip(reason="`pytest -m rehearse` runs it, with the CUDA build of torch"))
    without_stack = [item for item in items if isinstance(item, pytest.Function) and not needs_stack(item)]
    for item in without_stack:
        item.add_marker(pytest.mark.slow if function_of(item.nodeid) in SLOW else pytest.mark.quick)
    if config.option.learn_quick:
        items[:] = without_stack


def processor_seconds() -> float:
    """What this process and the processes that it started have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The clock of a test starts before its fixtures do. Jobs of a test that changes formulas share no step with others."""
    item.stash[START] = processor_seconds()
    changes = "monkeypatch" in getattr(item, "fixturenames", ())
    try:
        forget_architectures(changes)
        return (yield)
    finally:
        forget_architectures(changes)


def forget_architectures(changes: bool) -> None:
    """Let no job have the architecture of an earlier one, by which its step would be found."""
    if changes and (sources := sys.modules.get("peftplan.job.sources")) is not None:
        sources._KEPT.clear()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """What a shared fixture takes is told apart from the test that happens to need it first."""
    start = processor_seconds()
    value = yield
    if fixturedef.scope != "function":
        SHARED[fixturedef.baseid, fixturedef.argname] = processor_seconds() - start
    return value


def shared_seconds(item: pytest.Item) -> float:
    """What the most expensive of a test's shared fixtures took."""
    named: Sequence[str] = getattr(item, "fixturenames", ())
    return max((seconds for (file, name), seconds in SHARED.items() if name in named and item.nodeid.startswith(file)), default=0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Each report says what the test has used so far, or its shared fixtures; it does so across processes."""
    report = yield
    report.user_properties.append((PROPERTY, max(processor_seconds() - item.stash[START], shared_seconds(item))))
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process gets its share of the tests in order, so that a file's caches are filled once; who is done takes over some."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write what was measured, or name the quick functions that are slow."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, ()) if report.when == "call"]
    seconds = averages(reports)
    if config.option.learn_quick:
        SLOW_FILE.write_text(json.dumps(learned(SLOW, seconds), indent=1) + "\n", encoding="utf-8")
    elif config.option.markexpr == "quick":
        slow = {name: round(mean, 2) for name, mean in seconds.items() if mean > 4 * SECONDS}
        if slow:
            terminalreporter.section("not so quick: add to tests/slow.json, or run pytest --learn-quick")
            terminalreporter.write_line(json.dumps(slow, indent=1))


def averages(reports: list[pytest.TestReport]) -> dict[str, float]:
    """Function → seconds of an average case."""
    cases = defaultdict(list)
    for report in reports:
        cases[function_of(report.nodeid)].append(dict(report.user_properties)[PROPERTY])
    return {name: sum(seconds) / len(seconds) for name, seconds in cases.items()}


def learned(before: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """The slow functions: of files that ran as measured, of other files as before."""
    files_run = {name.partition("::")[0] for name in seconds}
    kept = {name: mean for name, mean in before.items() if name.partition("::")[0] not in files_run}
    slow = {name: round(mean, 2) for name, mean in seconds.items() if mean >= SECONDS}
    return dict(sorted((kept | slow).items()))
