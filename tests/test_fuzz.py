"""Damaged and hostile files, a few hundred of those that tests/fuzz.py makes."""

import pytest
from conftest import start

pytest.importorskip("fcntl", reason="fuzz.py forks, and makes pipes")


def test_damaged_and_hostile_files_are_refused_in_one_line_or_work(tmp_path):
    process = start("tests/fuzz.py", "--count", 100, "--seed", 0, cwd=tmp_path)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
