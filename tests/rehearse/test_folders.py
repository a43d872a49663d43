"""Folders of rehearsals whose owner was killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftplan.rehearse import folders


def test_a_folder_is_removed_once_nobody_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner is killed, its keeper ends later; a folder without a lock is another program's."""
    monkeypatch.setattr(folders.tempfile, "tempdir", str(tmp_path))
    left, foreign = tmp_path / f"{folders.PREFIX}left", tmp_path / f"{folders.PREFIX}foreign"
    for folder in (left, foreign):
        (folder / "layer").mkdir(parents=True)
    (left / folders.LOCK).touch()
    keeper = folders.hold(left / folders.LOCK)
    with folders.scratch_folder() as own:
        assert left.exists()
        os.close(keeper)
        with folders.scratch_folder():
            assert own.exists()
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [foreign]
