"""Where a program loads, runs forward, backward and steps its optimizer, found by hooks of torch; what each phase held at most.

`load` ends with the first forward of a module in training mode with gradients, or the first step of a pipeline's schedule, after
an optimizer was made. A step goes from a forward until the first one after the optimizer has stepped, so that an optimizer that
is stepped in parts counts once. Optimizers that step inside backward (one per parameter) count once per backward.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import chain
from types import FrameType, ModuleType
from typing import Any

import torch

from peftplan.rehearse.figures import Figure, loading
from peftplan.rehearse.inside import alive, log, report
from peftplan.rehearse.inside.after_import import AfterImport
from peftplan.rehearse.inside.counters import Counters
from peftplan.rehearse.settings import Settings

NO_FILES = ("<string>", "<stdin>")
"""What Python calls the file of `python -c`, and that of a program that it reads from stdin."""


class Ended(SystemExit):
    """Ends the program after the last step that was wanted: its `finally` blocks and exit handlers run."""


class Watch:
    """The phases of one process. `figures` holds those that ended; its log has also what the one that runs held so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counters = Counters()
        self.phase, self.step = "load", 0
        self.figures: list[Figure] = []
        self.log = log.Log(settings.folder)
        self.lock = threading.RLock()
        self.ended = threading.Event()
        self.marks: list[tuple[int, int, str]] = [(time.time_ns() // 1000, 0, "load")]
        self.out_of_memory: list[dict[str, Any]] = []
        self.persistent = alive.Persistent()
        self.in_backward = 0
        self.stepped = False
        self.optimizers: list[Any] = []
        self.steps_done = 0
        self.program_exit: str | None = None
        self._forward_hook: Any = None
        self._process = os.getpid()
        self._done = False

    def begin(self, phase: str) -> None:
        """Close the phase that runs and begin another."""
        with self.lock:
            self.close()
            self.phase = phase
        self.marks.append((time.time_ns() // 1000, self.step, phase))

    def close(self) -> None:
        """Read what the phase that runs held at most."""
        with self.lock:
            self.figures += (ended := self._of_phase(self.counters.take()))
            self.log.add(ended, report.facts(self.settings, self.steps_done + self.stepped))

    def look(self) -> None:
        """Log what the phase that runs held so far."""
        with self.lock:
            self.log.add(self._of_phase(self.counters.now()), report.facts(self.settings, self.steps_done + self.stepped))

    def _of_phase(self, peaks: Mapping[int, tuple[int, int]]) -> list[Figure]:
        return [Figure(self.step, self.phase, device, *of_device) for device, of_device in peaks.items()]

    def await_forward(self) -> None:
        """Begin a forward with the next call of a module that trains."""
        if self._forward_hook is None:
            self._forward_hook = torch.nn.modules.module.register_module_forward_pre_hook(self._forward)

    def _forward(self, module: Any, args: Any) -> None:
        if module.training:
            self._begin_forward()

    def _begin_forward(self) -> None:
        if self._forward_hook is None or self.in_backward or not torch.is_grad_enabled():
            return
        self._forward_hook.remove()
        self._forward_hook = None
        if self.phase == "load":
            self.step = 1
            self.persistent.find_weights()
        self._end_step()
        if self.phase != "forward":
            self.begin("forward")

    def watch_schedules(self, schedules: ModuleType) -> None:
        """A step of a pipeline begins with buffers, and with weights that are gathered, before its first forward."""
        for kind in (schedules.PipelineScheduleSingle, schedules.PipelineScheduleMulti):
            kind.step = self._watched_schedule(kind.step)

    def _watched_schedule(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._begin_forward()
            return step(*args, **kwargs)

        return watched

    def wrap_optimizer(self, init: Callable[..., None]) -> Callable[..., None]:
        """torch.optim.Optimizer's constructor, watched: what ran before there was one is loading, such as a library's trials."""

        def watched(*args: Any, **kwargs: Any) -> None:
            init(*args, **kwargs)
            if self.phase != "load" and not self.stepped and not self.steps_done and not self.in_backward:
                self.begin("load")
                self.step = 0
                self.figures = loading(self.figures)
                self.log.was_loading()
                self.marks = [(moment, 0, "load") for moment, _, _ in self.marks]
                self.await_forward()

        return watched

    def wrap_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """torch.autograd.backward, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.in_backward and self.phase == "step":
                self._end_step()
            if not self.in_backward and self.phase != "backward":
                self.begin("backward")
            self.in_backward += 1
            try:
                return backward(*args, **kwargs)
            finally:
                self.in_backward -= 1
                if not self.in_backward:
                    self.await_forward()

        return watched

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""
        if not any(optimizer is known for known in self.optimizers):
            self.optimizers.append(optimizer)
        if self.in_backward:
            return
        self.persistent.find_gradients(optimizer)
        if self.phase != "step":
            self.begin("step")

    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer has stepped."""
        self.persistent.find_states(optimizer)
        if not self.stepped and optimizer is self.optimizers[0]:
            self.stepped = True
            self.look()

    def _end_step(self) -> None:
        if not self.stepped:
            return
        self.stepped = False
        self.steps_done += 1
        if self.settings.steps and self.steps_done >= self.settings.steps:
            self.finish()
            raise Ended(0)
        with self.lock:
            self.close()
            self.step += 1
            self.phase = "forward"
        self.marks.append((time.time_ns() // 1000, self.step, "forward"))

    def out_of(self, device: int, requested: int, total: int, free: int) -> None:
        """torch's allocator could not give the bytes: what was alive, and the line of the program that asked."""
        self._find_weights_in_time()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        self.out_of_memory.append(
            {
                "device": device,
                "phase": self.phase,
                "step": self.step,
                "requested_bytes": requested,
                "reserved_bytes": torch._C._cuda_memoryStats(device)["reserved_bytes"]["all"]["current"],
                **asking_line(frame),
                "alive": alive.now(device, self.persistent, self.marks),
            }
        )

    def _find_weights_in_time(self) -> None:
        """The program ends before its first step: what it has loaded are weights all the same."""
        if self.phase == "load":
            self.persistent.find_weights()

    def told_to_end(self, number: int, frame: FrameType | None) -> None:
        """The time is up: report what there is, then end by the signal as a program without a handler does."""
        self.finish()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def finish(self) -> None:
        """Write the report, once, and in no forked child."""
        if not self._done and os.getpid() == self._process:
            self._done = True
            self.ended.set()
            self.steps_done += self.stepped
            self._find_weights_in_time()
            self.close()
            for optimizer in self.optimizers:
                self.persistent.find_states(optimizer)
            watched = (self.settings, self.figures, self.marks, self.persistent, self.steps_done, self.program_exit)
            report.write(report.Watched(*watched, self.out_of_memory))


def asking_line(frame: FrameType | None) -> dict[str, Any]:
    """The innermost frame outside installed packages and the standard library, else that of a program without a file."""
    frames = []
    while frame is not None:
        if alive.OURS not in frame.f_code.co_filename:
            frames.append(frame)
        frame = frame.f_back
    of_program = (each for each in frames if not alive.of_library(each.f_code.co_filename))
    without_file = (each for each in frames if each.f_code.co_filename in NO_FILES and each.f_code.co_name == "<module>")
    asking = next(chain(of_program, without_file, frames), None)
    if asking is None:
        return {"file": None, "line": None, "code": None}
    import linecache

    file, line = asking.f_code.co_filename, asking.f_lineno
    return {
        "file": file if file in NO_FILES else os.path.abspath(file),
        "line": line,
        "code": linecache.getline(file, line).strip() or None,
    }


def start(settings: Settings) -> None:
    """Hook into the torch that the program imports."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    watch = Watch(settings)
    torch.autograd.backward = watch.wrap_backward(torch.autograd.backward)
    register_optimizer_step_pre_hook(watch.before_step)
    register_optimizer_step_post_hook(watch.after_step)
    torch.optim.Optimizer.__init__ = watch.wrap_optimizer(torch.optim.Optimizer.__init__)  # type: ignore[method-assign]
    watch.await_forward()
    sys.meta_path.insert(0, AfterImport({"torch.distributed.pipelining.schedules": watch.watch_schedules}))
    warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")  # the one above
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN brings its own way to the driver
    torch._C._set_cudnn_enabled(False)
    torch.cuda._lazy_call(lambda: _record(watch))  # type: ignore[no-untyped-call]
    atexit.register(watch.finish)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, watch.told_to_end)
    unhandled = sys.excepthook

    def ended_by(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        watch.program_exit = kind.__name__
        unhandled(kind, error, trace)

    sys.excepthook = ended_by


def _record(watch: Watch) -> None:
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=alive.MOST_EVENTS)
    torch._C._cuda_attach_out_of_memory_observer(watch.out_of)  # type: ignore[attr-defined]
    os.register_at_fork(before=watch.lock.acquire, after_in_parent=watch.lock.release, after_in_child=watch.lock.release)
    log.every_period(watch.look, watch.ended)
