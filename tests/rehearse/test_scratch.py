"""The scratch layer: a program sees what is there, and changes nothing of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftplan.rehearse.scratch import FAILED


def in_layer(folder: Path, command: str, *, writes: bool = False, network: bool = False) -> subprocess.CompletedProcess[str]:
    arguments = [str(folder), "200", str(int(network)), str(int(writes)), "sh", "-c", command]
    done = subprocess.run(
        [sys.executable, "-m", "peftplan.rehearse.scratch", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode == FAILED and not (folder / "started").exists():
        pytest.skip("users may not make namespaces here")
    return done


def test_what_is_there_survives_and_reports_come_out(tmp_path: Path) -> None:
    reports, work = tmp_path / "reports", tmp_path / "work"
    reports.mkdir()
    (work / "out").mkdir(parents=True)
    checkpoint = work / "out" / "model.safetensors"
    checkpoint.write_bytes(b"precious")
    done = in_layer(
        reports,
        f"cd {work} && cat out/model.safetensors && echo zeros > out/model.safetensors && mv out/model.safetensors out/moved "
        f"&& rm -r out && mkdir out && echo new > out/new && cat out/new && echo report > {reports}/rank0.json",
    )
    assert done.stdout.split() == ["preciousnew"]
    assert checkpoint.read_bytes() == b"precious"
    assert sorted(path.name for path in (work / "out").iterdir()) == ["model.safetensors"]
    assert (reports / "rank0.json").read_text(encoding="utf-8") == "report\n"


def test_there_is_no_network_but_the_loopback(tmp_path: Path) -> None:
    done = in_layer(tmp_path, "cat /proc/net/dev")
    assert [line.split(":")[0].strip() for line in done.stdout.splitlines()[2:]] == ["lo"]


def test_writes_and_network_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = in_layer(tmp_path, f"echo kept > {target}; exit 7", writes=True, network=True)
    assert done.returncode == 7
    assert target.read_text(encoding="utf-8") == "kept\n"


def test_a_full_layer_is_the_programs_own_error(tmp_path: Path) -> None:
    done = in_layer(tmp_path, f"head -c 300M /dev/zero > {tmp_path.parent}/large")
    assert done.returncode != 0
    assert not (tmp_path.parent / "large").exists()
