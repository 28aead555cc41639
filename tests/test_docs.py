"""Each page runs from top to bottom, in an empty folder: its commands that start a script of this
repository, on few drawn digits in the place of downloads, and its blocks of Python."""

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import common
import figures
import readers

import pytest
import torch
import torch.distributed.run
import torchvision
from conftest import ROOT, few_digits, run
from test_vgg_transfer import SmallVGG
from torch import nn

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STEP = re.compile(r"^    ((?:cp|python|torchrun) [^\n]*)$|^```python\n(.*?)^```", re.M | re.S)
STAND_INS = {"cuda": "auto", "500": "20", "--nproc-per-node=4": "--nproc-per-node=1"}
TINY = ["--data", "my_photos", "--epochs", "1", "--batch-size", "4", "--limit-batches", "1"]
OPTIONAL = {"pandas", "onnxscript", "onnxruntime"}  # packages


def fewest_digits(name, size, channels):
    images, labels, classes = few_digits(size, channels)
    return images[:64], labels[:64], classes


@pytest.fixture(autouse=True)
def reader(folder, monkeypatch, tmp_path):
    """A folder with photos, few digits, a small VGG16, and of the figures those of predict.py."""
    shutil.copytree(folder, "my_photos")
    shutil.copytree(folder / "test/ball", "holiday")
    shutil.copy(folder / "test/ball/0.png", "dog.png")
    monkeypatch.setattr(readers, "draw_digits", fewest_digits)
    monkeypatch.setattr(torchvision.models, "vgg16", SmallVGG)
    monkeypatch.setattr(common, "import_figures", lambda: figures)
    monkeypatch.setattr(figures, "draw_samples", mock.Mock())
    monkeypatch.setattr(figures, "draw_results", mock.Mock())
    monkeypatch.syspath_prepend(tmp_path)  # for my_net.py
    monkeypatch.delitem(sys.modules, "my_net", raising=False)  # another test's


def run_line(line):
    """Run what stands on a line, in this process if one will do."""
    program, *words = shlex.split(line, comments=True)
    words = [STAND_INS.get(word, word) for word in words]
    if program == "cp":
        shutil.copy(ROOT / words[0], words[1])
    elif program == "torchrun" and "--nnodes=2" not in words:
        words[-1] = ROOT / words[-1]
        run(torch.distributed.run.__file__, "--standalone", *words, *TINY, cwd=".")
    elif program == "python" and words[0].endswith(".py") and words[0] != "bench.py":
        run_script(*words)


def run_script(script, *flags):
    flags = list(flags)
    name = Path(script).stem
    main = readers.unpack
    if name != "common":
        main = importlib.import_module(name).main
        if name != "predict":
            flags.append("--quiet")
            if {"--data", "--resume", "--test-only"}.isdisjoint(flags):
                flags += ["--data", "drawn"]
    if name == "vgg_transfer":
        flags += ["--size", "32"]
        if "--weights" not in flags:
            flags += ["--weights", "none"]
    try:
        with mock.patch("sys.argv", [script, *flags]):
            main()
    except SystemExit as stop:
        assert not stop.code


def run_page(page):
    """Run all of a page; returns the names in its Python, and the packages that it misses."""
    names = {}
    missing = []
    for line, block in STEP.findall(page.read_text()):
        if line:
            run_line(line)
            continue
        try:
            exec(compile(block, page.name, "exec"), names)
        except ModuleNotFoundError as error:
            missing.append(error.name)
    return names, missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page):
    _, missing = run_page(page)
    assert set(missing) <= OPTIONAL
    if missing:
        pytest.skip(f"all of it ran, but for what needs {missing}")


def test_the_recipes_give_what_their_page_says():
    names, _ = run_page(ROOT / "docs/recipes.md")
    train = names["train"]
    accumulated = train(train_one_epoch=names["accumulate"])[-1]["test_loss"]
    assert accumulated == pytest.approx(train()[-1]["test_loss"])
    logits = torch.tensor([[0, 1.5], [0, -3], [0, 0.2]])
    labels = torch.tensor([0, 1, 1])
    loss = names["binary_cross_entropy"](logits, labels)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))
    heat = names["heat"]
    assert heat.shape == (8, 32, 32)
    assert 0 <= heat.min() < heat.max() <= 1
    program = torch.export.load("model.pt2").module()
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(program(images), names["model"].cpu()(images))


def test_the_pages_name_only_files_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^):#]+)[^):]*\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_what_can_be_relied_on_is_held_by_the_tests_that_are_named():
    named = re.findall(r"`(test_\w+)` \|", (ROOT / "docs/numbers.md").read_text())
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert all(f"def {name}(" in tests for name in named)
