"""Every command of README.md and docs/ runs, on tiny data."""

import re
import shlex
import shutil

import common

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, few_digits, run
from test_vgg_transfer import first_blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = ["--epochs", "1", "--limit-batches", "1", "--batch-size", "8", "--quiet"]


def commands():
    """The indented lines that start a script of this repository, without comments, each once."""
    found = {}
    for page in PAGES:
        for line in re.findall(r"^    (?:pip \S.*&& )?(python .*)$", page.read_text(), re.MULTILINE):
            found[line.split("#")[0].split("&&")[0].strip()] = page.name
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, folder):
    """A folder with what the commands name: photos, a copy of a recipe, and a run of LeNet."""
    place = tmp_path_factory.mktemp("docs")
    shutil.copytree(folder, place / "my_photos")
    shutil.copytree(folder / "test/ball", place / "holiday")
    cv2.imwrite(str(place / "dog.png"), np.zeros((40, 40, 3), np.uint8))
    shutil.copy(ROOT / "lenet_cifar.py", place / "my_net.py")
    shutil.copy(ROOT / "common.py", place)
    for script in (ROOT / "lenet_cifar.py", place / "my_net.py"):
        run(script, "--data", "drawn", *TINY, cwd=place)
    return place


@pytest.mark.parametrize("command", [line for line in commands() if "unpack" not in line])
def test_every_command_of_the_pages_runs(place, command):
    script, *args = shlex.split(command)[1:]
    if script == "bench.py":
        pytest.skip("bench.py is measured by hand")
    if script == "vgg_transfer.py":
        args += ["--weights", "none", "--size", "32"]
    if "--resume" in args:  # a run of two epochs at least
        run(script, "--data", "drawn", *TINY, cwd=place)
        args = ["--resume", "--epochs", "2", "--quiet"]
    elif script not in ("predict.py", "multi_gpu.py") or ("--recipe" in args and script == "multi_gpu.py"):
        args += ["--data", "drawn"] * ("--data" not in args) + TINY
    args = ["auto" if arg == "cuda" else arg for arg in args]
    script = place / script if script == "my_net.py" else script
    run(script, *args, cwd=place, before=first_blocks, figures="--figure" in args)


def run_cell(page):
    (cell,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    names = {}
    exec(compile(cell, page, "exec"), names)
    return names


def test_the_notebook_of_the_pages_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(common, "draw_digits", few_digits)
    run_cell("change.md")
    accuracy, name = capsys.readouterr().out.splitlines()[-1].split()
    assert 0 <= float(accuracy) <= 1 and name in "0123456789"


def test_a_network_is_exported_as_the_pages_say_and_gives_the_same(place, monkeypatch):
    monkeypatch.chdir(place)
    model = run_cell("images.md")["model"]
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(torch.export.load("model.pt2").module()(images), model(images))


def test_the_pages_name_only_files_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^):]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_what_can_be_relied_on_is_held_by_the_tests_that_are_named():
    named = re.findall(r"`(test_\w+)` \|", (ROOT / "docs/numbers.md").read_text())
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named)
