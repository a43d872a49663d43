"""Tensors without memory, which torch.compile keeps of what it traced, are no memory of the program."""

from __future__ import annotations

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
