"""Process groups of a rehearsal: one process is one rank, whatever backend a program asks for."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")

PROGRAM = """
from peftplan.rehearse.inside import ranks
import torch.distributed as dist
ranks.start(print)
dist.init_process_group("nccl", rank=0, world_size=8)
others = dist.new_group(backend="gloo")
print(dist.get_backend(), dist.get_world_size(others), dist.device_mesh.new_group is dist.new_group)
"""


def test_groups_of_another_backend_wait_for_nobody() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["nccl", "8", "True"]
