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


@pytest.mark.parametrize(("kept", "code"), [("1", 7), ("0", FAILED)])
def test_a_program_whose_writes_and_network_are_kept_needs_no_namespace(kept: str, code: int, tmp_path: Path) -> None:
    """A namespace in which no further one can be made stands for a system that allows none."""
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces && ! unshare -U true 2> /dev/null || exit 77"
    layer = f"{sys.executable} -m peftplan.rehearse.scratch {tmp_path} 200 {kept} {kept} sh -c 'exit 7'"
    try:
        done = subprocess.run(["unshare", "-Ur", "sh", "-c", f"{forbid}; {layer}"], capture_output=True, check=False)
    except OSError:
        pytest.skip("needs unshare")
    if done.returncode in (1, 77):
        pytest.skip("users may not make namespaces here, or cannot forbid them")
    assert done.returncode == code


def test_a_full_layer_is_the_programs_own_error(tmp_path: Path) -> None:
    done = in_layer(tmp_path, f"head -c 300M /dev/zero > {tmp_path.parent}/large")
    assert done.returncode != 0
    assert not (tmp_path.parent / "large").exists()
