"""Tensors without memory, which torch.compile keeps of what it traced, are no memory of the program."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_a_tensor_without_memory_counts_for_nothing() -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    from peftplan.rehearse.inside import alive, host

    before = host.host_bytes()["pageable"]
    real = torch.ones(1 << 20)
    with FakeTensorMode():
        fake = torch.ones(1 << 20)
    assert alive.address(real) == real.data_ptr()
    assert alive.address(fake) is None
    assert host.host_bytes()["pageable"] - before == real.nbytes


def test_buckets_are_communication_and_what_the_model_makes_inside_ddp_is_not() -> None:
    pytest.importorskip("torch")
    from peftplan.rehearse.inside import alive

    reducer, model = (
        {"filename": f"/venv/site-packages/torch/nn/{file}", "line": 1, "name": "forward"}
        for file in ("parallel/distributed.py", "modules/linear.py")
    )
    compiled = {"filename": "??", "line": 0, "name": "torch::autograd::Engine"}
    marks = [(0, 1, "forward")]
    of_reducer, of_model = (alive.Block(512, 512, 1, frames) for frames in ((compiled, reducer), (model, reducer)))
    assert alive.category(of_reducer, alive.Persistent(), marks) == "communication"
    assert alive.category(of_model, alive.Persistent(), marks) == "activations"


LIBRARY = "/venv/site-packages/torch/nn/modules/module.py"


@pytest.mark.parametrize(("runs", "file"), [("typed", "<string>"), ("library", LIBRARY)])
def test_a_program_without_a_file_is_where_memory_was_asked_for(runs: str, file: str) -> None:
    """That of `python -c` before the library that it calls; of `python -m`, the library. Never the line of ours that looks."""
    pytest.importorskip("torch")
    from peftplan.rehearse.inside.watch import asking_line

    code: dict[str, object] = {
        "ours": compile("import sys\nframe = sys._getframe()", "/venv/peftplan/rehearse/inside/watch.py", "exec"),
        "library": compile("import torch\nexec(ours)", LIBRARY, "exec"),
        "typed": compile("import torch\nexec(library)", "<string>", "exec"),
    }
    thread = threading.Thread(target=exec, args=(code[runs], code))
    thread.start()
    thread.join()
    asking = asking_line(code["frame"])  # type: ignore[arg-type]
    assert (asking["file"], asking["line"]) == (file, 2)


def test_a_step_of_a_pipeline_begins_with_its_schedule(tmp_path: Path) -> None:
    """torch's schedule makes buffers, and gathers stages, before the first of its forwards."""
    pytest.importorskip("torch")
    from torch.distributed.pipelining import schedules

    from peftplan.rehearse.inside.watch import Watch
    from peftplan.rehearse.settings import Settings

    watch, phases = Watch(Settings(str(tmp_path), steps=0, rank=0, world_size=1)), []
    module: Any = ModuleType(schedules.__name__)
    for name in ("PipelineScheduleSingle", "PipelineScheduleMulti"):
        assert "step" in vars(getattr(schedules, name))
        setattr(module, name, type(name, (), {"step": lambda self: phases.append(watch.phase)}))
    watch.watch_schedules(module)
    module.PipelineScheduleSingle().step()  # a trial, before there is an optimizer
    watch.await_forward()
    module.PipelineScheduleMulti().step()
    assert phases == ["load", "forward"]
