"""Tensors without memory, which torch.compile keeps of what it traced, are no memory of the program."""

from __future__ import annotations

import threading

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


def test_a_program_on_the_command_line_is_where_memory_was_asked_for() -> None:
    """Not the line of ours that looks: no file of `python -c` is outside installed packages."""
    pytest.importorskip("torch")
    from peftplan.rehearse.inside.watch import asking_line

    ours = compile("import sys\nframe = sys._getframe()", "/venv/peftplan/rehearse/inside/watch.py", "exec")
    seen: dict[str, object] = {"ours": ours}
    text = compile("import torch\nexec(ours)", "<string>", "exec")
    thread = threading.Thread(target=exec, args=(text, seen))
    thread.start()
    thread.join()
    found = asking_line(seen["frame"])  # type: ignore[arg-type]
    assert (found["file"], found["line"]) == ("<string>", 2)
