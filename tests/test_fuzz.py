"""Damaged and hostile files: 100 of each kind that tests/fuzz.py makes."""

import pytest
from conftest import run

pytest.importorskip("fcntl", reason="fuzz.py forks, and makes pipes")


def test_damaged_and_hostile_files_work_or_are_refused_in_one_line(tmp_path):
    # A slow machine is no failure. run() fails where a case does, and shows which.
    out, _ = run("tests/fuzz.py", "--count", 100, "--seconds", 60, cwd=tmp_path)
    for kind in ("images", "tables", "checkpoints"):
        assert f"100 {kind}: " in out
