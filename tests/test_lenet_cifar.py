"""What a user of lenet_cifar.py may rely on; the other recipes share all of it."""

import fcntl
import io
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import common
import lenet_cifar
import predict
from common import UserError, load_checkpoint

import pytest
import torch
import torchvision
from conftest import ROOT, one_error_line, run, start
from test_common import exit_status, fingerprint

SCRIPT = "lenet_cifar.py"
RUN = Path("runs/lenet_cifar")
RUN_FILES = (
    "last.pt best.pt history.csv loss.csv predictions.csv samples.png curves.png confusion.png "
    "mistakes.png"
)
HEADER = (
    "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,"
    "train_seconds,test_seconds,images_per_second"
)


def main(text):
    return lenet_cifar.main(text.split())


def names_in(folder):
    return {file.name for file in folder.iterdir()}


@pytest.mark.figures
def test_a_run_fills_its_folder_and_ends_with_a_table_of_the_classes(capsys):
    main("--data drawn --epochs 2 --limit-batches 2 --save-every 2 --tensorboard")
    (events,) = RUN.glob("events.out.tfevents.*")
    assert names_in(RUN) == {events.name, *RUN_FILES.split(), "epoch_2.pt"}
    assert (RUN / "history.csv").read_text().startswith(f"{HEADER}\n1,")
    assert (RUN / "loss.csv").read_text().startswith("step,train_loss\n1,")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-13:-3]] == list("0123456789")
    assert lines[-3].startswith("best epoch: ")
    assert lines[-2] == "run folder: runs/lenet_cifar"
    assert lines[-1].endswith("predict.py runs/lenet_cifar/best.pt IMAGE...")
    assert all(len(line) <= 80 for line in lines[:-1])


@pytest.mark.figures
def test_without_matplotlib_a_run_has_no_figures_and_says_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "figures", raising=False)
    common.import_figures.cache_clear()
    main("--data drawn --epochs 1 --limit-batches 1")
    common.import_figures.cache_clear()
    assert capsys.readouterr().out.count("pip install matplotlib\n") == 1
    assert not list(RUN.glob("*.png"))


def test_help_shows_every_default_and_what_tuned_changes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    text = " ".join(capsys.readouterr().out.split())
    for default in ("10", "128", "0.001", "runs/lenet_cifar"):
        assert f"(default: {default})" in text
    assert re.search("better than the source.*lr.* 0.03", text)


def test_tuned_learns_drawn_digits():
    assert main("--data drawn --tuned --batch-size 32 --epochs 6")[-1]["test_accuracy"] > 0.8


@pytest.mark.parametrize("amx", [True, False])
def test_tuned_is_in_bfloat16_where_the_cpu_has_amx(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    expected = {"": False, "--tuned": amx, "--amp": True, "--tuned --no-amp": False}
    for flags, amp in expected.items():
        assert lenet_cifar.parse_args(["--device", "cpu", *flags.split()]).amp == amp


def test_a_copy_with_another_network_trains_at_another_size(folder, monkeypatch, capsys):
    shutil.copy(ROOT / SCRIPT, "my_net.py")
    mine = predict.import_recipe("", "my_net.py")
    resnet = torchvision.models.resnet18
    monkeypatch.setattr(mine, "LeNet", lambda channels, size, classes: resnet(num_classes=classes))
    mine.main(f"--data {folder} --size 40 --epochs 1 --batch-size 59 --tuned".split())  # 59 + 1
    out = capsys.readouterr().out
    assert "3x40x40" in out
    assert "best.pt --recipe my_net.py" in out


@pytest.mark.figures
def test_strange_names_are_classes_as_any_others(folder, monkeypatch):
    names = {"ball": "a$x$ _{b", "lying": os.fsdecode(b"caf\xe9"), "standing": "\u72ac " * 9}
    for part in ("train", "test"):
        for name, strange in names.items():
            shutil.copytree(folder / part / name, f"mine/{part}/{strange.strip()}")
    narrow = io.TextIOWrapper(io.BytesIO(), "cp1252")  # as a terminal of Windows
    monkeypatch.setattr(sys, "stdout", narrow)
    train = partial(main, "--data mine --epochs 1")
    assert exit_status(train, monkeypatch) == 0  # fails: matplotlib refuses a surrogate
    assert b"\\u72ac" in narrow.buffer.getvalue()
    table = (RUN / "predictions.csv").read_text(errors="surrogateescape")
    assert "\nmine/test/a$x$ _{b/0.png,a$x$ _{b," in table


# ---------------------------------------------------------------- resume


def test_a_complete_run_trains_on_with_more_epochs_or_prints_its_report(folder, capsys):
    main(f"--data {folder} --epochs 1 --batch-size 8 --tuned --out tuned")
    main(f"--data {folder} --epochs 1 --batch-size 8 --out a")
    main(f"--data {folder} --epochs 2 --batch-size 8 --out b")
    main("--resume --epochs 2 --out a")
    assert fingerprint("a") == fingerprint("b")
    capsys.readouterr()
    assert len(main("--resume --out tuned")) == 1
    assert "best epoch: 1" in capsys.readouterr().out


def test_resume_refuses_what_would_be_another_run_and_names_both(folder, monkeypatch):
    def refused(flags, *parts):
        with pytest.raises(UserError) as error:
            main(f"--resume --epochs 2 {flags}")
        for part in parts:
            assert part in str(error.value)

    LeNet = lenet_cifar.LeNet
    main(f"--data {folder} --epochs 1")
    main(f"--data {folder} --epochs 1 --tuned --out tuned")
    refused("--lr 0.5", "lr from 0.001 to 0.5")
    shutil.copytree(folder, "cats")
    for part in ("train", "test"):
        Path(f"cats/{part}/ball").rename(f"cats/{part}/cat")
    refused("--data cats", "classes from ['ball', ", "to ['cat', ")
    refused("--out tuned", "epochs", "from 1 to 2")
    monkeypatch.setattr(lenet_cifar, "LeNet", lambda *shape: LeNet(3, 36, 3))
    refused("", "fc1.weight", "[120, 400]", "[120, 576]")
    monkeypatch.setattr(torch.optim, "SGD", torch.optim.RMSprop)
    refused("", "optimizer from SGD to RMSprop")
    assert len(load_checkpoint(RUN / "last.pt")["history"]) == 1


def test_test_only_prints_the_report_of_best_pt_on_the_test_set_of_this_command(folder, capsys):
    main(f"--data {folder} --epochs 2 --size 20 --holdout 12 --limit-batches 1 --batch-size 5")
    assert "validation accuracy" in capsys.readouterr().out
    before = fingerprint(RUN)
    shutil.copytree(folder / "test/ball", "mine/test/ball")  # no training set, one of the classes
    main("--data mine --test-only")
    out = capsys.readouterr().out
    assert "test images by class, best.pt:" in out
    assert out.splitlines()[-6].split()[0::4] == ["ball", "7"]
    rows = (RUN / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["ball"] * 7
    assert fingerprint(RUN) == before
    with pytest.raises(OSError, match=r"other/best\.pt"):
        main("--data mine --test-only --out other")


# ---------------------------------------------------------------- the run folder


def test_an_earlier_run_is_moved_aside_once_the_data_are_read(folder, capsys):
    RUN.mkdir(parents=True)
    (RUN / "notes.txt").touch()  # a folder without a checkpoint is no run
    train = f"--data {folder} --epochs 1 --save-every 1"
    main(train)
    assert "earlier run" not in capsys.readouterr().out
    with pytest.raises(UserError):
        main("--data missing")
    main(train)
    line = f"{RUN} had an earlier run, which is in {RUN}-1 now\n"
    assert capsys.readouterr().out.count(line) == 1
    assert {"notes.txt", "last.pt", "history.csv"} <= names_in(Path(f"{RUN}-1"))
    for name in ("last.pt", "best.pt"):
        (RUN / name).unlink()
    main(train)  # what --save-every kept is an earlier run too
    assert "epoch_1.pt" in names_in(Path(f"{RUN}-2"))


def test_a_run_that_misses_a_package_leaves_the_folder_to_the_next(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        main(f"--data {folder} --epochs 1 --tensorboard")
    assert len(main(f"--data {folder} --epochs 1")) == 1


def test_where_nothing_can_be_locked_a_run_trains(folder, monkeypatch, capsys):
    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    main(f"--data {folder} --epochs 1")
    assert f"{RUN} cannot be locked (No locks available)" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    assert len(main(f"--data {folder} --epochs 1")) == 1
    assert "lock" not in names_in(RUN)


# ---------------------------------------------------------------- processes


@pytest.fixture
def training(folder):
    """A process that trains, once it has saved an epoch."""
    args = f"--data {folder} --epochs 1000 --batch-size 4".split()
    process = start(SCRIPT, *args, cwd=".")
    while not (RUN / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_keep_the_last_whole_epoch_and_say_how_to_go_on(
    training, folder, number, status
):
    with pytest.raises(UserError, match=f"process.* trains in {RUN}: .*--out"):
        main(f"--data {folder}")  # a second run into the same folder
    training.send_signal(number)
    _, err = training.communicate(timeout=10)
    assert training.returncode == status
    epochs = len(load_checkpoint(RUN / "last.pt")["history"])
    assert err.count("\n") == 1
    assert f"{epochs} of 1000 epochs are saved in {RUN}, continue with --resume --out {RUN}" in err
    assert not names_in(RUN) & {"lock", "last.tmp", "best.tmp"}


def test_a_run_killed_and_resumed_ends_as_the_unbroken_one(training, folder):
    training.kill()
    training.wait()
    epochs = len(load_checkpoint(RUN / "last.pt")["history"]) + 1
    main(f"--resume --epochs {epochs}")
    main(f"--data {folder} --epochs {epochs} --batch-size 4 --out unbroken")
    assert fingerprint(RUN) == fingerprint("unbroken")


def test_a_closed_pipe_ends_quietly(folder):
    ours, theirs = os.pipe()
    os.close(ours)
    _, err = run(SCRIPT, "--data", folder, cwd=".", stdout=theirs, status=141)
    assert err == ""
    os.close(theirs)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--device cuda:99", ["--device cuda:99", "cpu"]),
        ("--epochs many", ["--epochs", "many"]),
        ("--size 15", ["--size", "15", "16"]),
        ("--data drawn --holdout 99999", ["--holdout", "leaves no training images"]),
        ("--data drawn --out /dev/null/run", ["/dev/null/run"]),
        ("--data mistyped", ["mistyped", "--download"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, flags, parts):
    assert exit_status(partial(main, flags), monkeypatch) == 2
    one_error_line(capsys.readouterr().err, *parts)
