"""Damaged and hostile files, a few hundred of those that tests/fuzz.py makes."""

import pytest
from conftest import ENVIRONMENT, slow, start

pytest.importorskip("fcntl", reason="fuzz.py forks, and makes pipes")


@slow
def damaged_and_hostile_files_are_refused_in_one_line_or_work(cwd):
    args = ("--count", 100, "--seed", 0, "--seconds", 60)  # a slow machine is no failure
    process = start("tests/fuzz.py", *args, cwd=cwd, env=ENVIRONMENT)
    return process, *process.communicate(timeout=600)


def test_damaged_and_hostile_files_are_refused_in_one_line_or_work(done):
    process, out, err = done
    assert process.returncode == 0, out + err
