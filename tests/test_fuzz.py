"""Damaged and hostile files, a few hundred of those that tests/fuzz.py makes."""

import pytest

pytest.importorskip("fcntl", reason="fuzz.py forks, and makes pipes")


def test_damaged_and_hostile_files_are_refused_in_one_line_or_work(fuzzer):
    out, err = fuzzer.communicate(timeout=600)
    assert fuzzer.returncode == 0, out + err
