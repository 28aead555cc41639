"""What a user of lenet_cifar.py may rely on; the other recipes share all of it."""

import contextlib
import csv
import fcntl
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial

import lenet_cifar

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, finish, one_error_line, run, slow, start, warm

SCRIPT = "lenet_cifar.py"
HEADER = (
    "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,train_seconds,test_seconds,images_per_second"
)


def load(path):
    return torch.load(path, weights_only=True)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(one, other):
    """Same weights, optimizer and history, bit for bit; the clock aside."""
    a, b = load(one / "last.pt"), load(other / "last.pt")
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    for state, twin in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert torch.equal(state["momentum_buffer"], twin["momentum_buffer"])
    for row, twin in zip(rows_of(one / "history.csv"), rows_of(other / "history.csv"), strict=True):
        for name in HEADER.split(",")[:6]:
            assert row[name] == twin[name]


@slow
def one_batch_of_drawn_digits_fills_the_run_folder(cwd):
    args = ("--data", "drawn", "--epochs", 1, "--limit-batches", 1)
    process = start(SCRIPT, *args, cwd=cwd, env=ENVIRONMENT)
    return cwd, process, *process.communicate(timeout=120)


def test_one_batch_of_drawn_digits_fills_the_run_folder(done):
    cwd, process, out, err = done
    assert process.returncode == 0
    folder = cwd / "runs/lenet_cifar"
    names = {"last.pt", "best.pt", "history.csv", "loss.csv"}
    names |= {f"{name}.png" for name in ("samples", "curves", "confusion", "mistakes")}
    assert {file.name for file in folder.iterdir()} == names
    assert (folder / "history.csv").read_text().splitlines()[0] == HEADER
    (row,) = rows_of(folder / "history.csv")
    assert row["epoch"] == "1" and row["lr"] == "0.001"
    assert (folder / "loss.csv").read_text().startswith("step,train_loss\n1,")
    assert 0 <= float(row["test_accuracy"]) <= 1 and float(row["images_per_second"]) > 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[-12:-2]] == list("0123456789")
    assert lines[-2].startswith("best epoch: 1, test accuracy ")
    assert "predict.py runs/lenet_cifar/best.pt IMAGE..." in lines[-1]
    assert err == ""  # no progress bar where stderr is no terminal
    assert all(len(line) <= 80 for line in lines[:-1]) and "62,006 parameters" in out
    assert sum("Conv2d" in line for line in lines) == 2


def test_help_shows_every_default_and_what_tuned_changes(tmp_path):
    out, _ = run(SCRIPT, "--help", cwd=tmp_path)
    text = " ".join(out.split())
    for default in ("(default: 10)", "(default: 128)", "(default: 0.001)", "(default: runs/lenet_cifar)"):
        assert default in text
    assert "batch size 64" in text


@slow
def tuned_learns_drawn_digits_in_three_epochs(cwd):
    run(SCRIPT, "--data", "drawn", "--tuned", "--epochs", 3, cwd=cwd, few=False)
    return cwd


def test_tuned_learns_drawn_digits_in_three_epochs(done):
    assert float(rows_of(done / "runs/lenet_cifar/history.csv")[-1]["test_accuracy"]) > 0.90


def speak_to(terminal):
    os.dup2(os.open(terminal, os.O_RDWR | os.O_NOCTTY), 2)


def test_a_terminal_gets_a_progress_bar_with_epoch_loss_and_accuracy(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # 24 rows of 80 columns
    args = ("--data", "drawn", "--epochs", 1, "--batch-size", 2, "--limit-batches", 1000)
    process, _ = warm(SCRIPT, *args, cwd=tmp_path, before=partial(speak_to, os.ttyname(theirs)))
    process.join(0.5)  # until it has opened the terminal, too
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal says that the other end is closed
        while chunk := os.read(ours, 2**16):
            shown += chunk
    os.close(ours)
    process.join(60)
    assert process.exitcode == 0
    for line in shown.decode().replace("\n", "\r").split("\r"):
        assert len(line) <= 80
    assert b"epoch 1/1 |" in shown and b"loss 2." in shown and b"accuracy 0." in shown


@pytest.mark.parametrize("flags", [[], ["--tuned"]])
def test_a_run_killed_and_resumed_ends_as_the_unbroken_one(tmp_path, folder, flags):
    args = ["--data", folder, "--epochs", 15, "--batch-size", 2, *flags]
    run(SCRIPT, *args, "--out", "unbroken", cwd=tmp_path)
    process, _ = warm(SCRIPT, *args, "--out", "broken", cwd=tmp_path)
    while not (tmp_path / "broken/last.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert len(load(tmp_path / "broken/last.pt")["history"]) < 15
    run(SCRIPT, "--resume", "--out", "broken", cwd=tmp_path)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def raise_at_ctrl_c():
    """As Python does that was started from a terminal; what CI starts in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_keep_the_last_whole_epoch_and_say_how_to_go_on(tmp_path, folder, number, status):
    args = ["--data", folder, "--epochs", 1000, "--batch-size", 2]
    first = warm(SCRIPT, *args, cwd=tmp_path, name="first", before=raise_at_ctrl_c, figures=True)
    while not (tmp_path / "runs/lenet_cifar/last.pt").exists():
        time.sleep(0.01)
    _, err = run(SCRIPT, *args, cwd=tmp_path, status=2)  # a second run into the same folder
    one_error_line(err, f"process {first[0].pid} trains in runs/lenet_cifar", "--out")
    os.kill(first[0].pid, number)
    _, err = finish(first, status)
    assert err.count("\n") == 1 and "--resume --out runs/lenet_cifar" in err
    assert load(tmp_path / "runs/lenet_cifar/last.pt")["history"]
    assert (tmp_path / "runs/lenet_cifar/curves.png").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_goes_away_while_training_is_one_line_that_claims_nothing(tmp_path, folder):
    started = warm(SCRIPT, "--data", folder, "--epochs", 1000, "--batch-size", 2, cwd=tmp_path)
    while not (tmp_path / "runs/lenet_cifar/last.pt").exists():
        time.sleep(0.01)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    _, err = finish(started, 2)
    one_error_line(err, "cannot write runs/lenet_cifar/", "0 of 1000 epochs are saved in")


def test_resume_asks_for_more_epochs_or_says_why_not(tmp_path, folder):
    args = ["--data", folder, "--epochs", 1, "--batch-size", 16]
    run(SCRIPT, *args, "--out", "a", cwd=tmp_path)
    run(SCRIPT, *args, "--epochs", 2, "--out", "b", cwd=tmp_path)
    run(SCRIPT, "--resume", "--epochs", 2, "--out", "a", cwd=tmp_path)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    _, err = run(SCRIPT, "--resume", "--lr", 0.5, "--out", "a", cwd=tmp_path, status=2)
    one_error_line(err, "lr from 0.001 to 0.5")
    _, err = run(SCRIPT, "--resume", "--data", "drawn", "--out", "a", cwd=tmp_path, status=2)
    one_error_line(err, "classes", "ball", "'9'")
    run(SCRIPT, *args, "--tuned", "--out", "t", cwd=tmp_path)
    _, err = run(SCRIPT, "--resume", "--epochs", 2, "--out", "t", cwd=tmp_path, status=2)
    one_error_line(err, "epochs of the schedule from 1 to 2")
    out, _ = run(SCRIPT, "--resume", "--out", "t", cwd=tmp_path)  # complete: only the report is missing
    assert "best epoch: 1" in out


def test_resume_refuses_another_network_or_optimizer_naming_both(tmp_path, folder):
    mine = tmp_path / SCRIPT  # a changed copy that has kept the name
    shutil.copy(ROOT / SCRIPT, mine)
    args = ["--data", folder, "--limit-batches", 1]
    out, _ = run(mine, *args, "--epochs", 1, cwd=tmp_path)
    assert f"--recipe {SCRIPT}" in out.splitlines()[-1]
    source = mine.read_text()
    mine.write_text(source.replace("120", "99"))
    _, err = run(mine, "--resume", "--epochs", 2, cwd=tmp_path, status=2)
    one_error_line(err, "fc1.weight", "[99, 400]", "[120, 400]")
    mine.write_text(source.replace("SGD(", "RMSprop("))
    _, err = run(mine, "--resume", "--epochs", 2, cwd=tmp_path, status=2)
    one_error_line(err, "SGD", "RMSprop")


def test_a_csv_trains_as_the_folder_of_the_same_pictures(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "csv")
    for part in ("train", "test"):
        (tmp_path / f"csv/{part}-rows.csv").rename(tmp_path / f"csv/{part}.csv")
    args = ["--epochs", 1, "--batch-size", 16, "--seed", 3, "--save-every", 1]
    run(SCRIPT, "--data", "csv", *args, "--out", "a", cwd=tmp_path)
    run(SCRIPT, "--data", folder, *args, "--out", "b", cwd=tmp_path)
    assert load(tmp_path / "a/epoch_1.pt")["spec"]["classes"] == ["ball", "lying", "standing"]
    assert rows_of(tmp_path / "a/history.csv")[0]["test_accuracy"]
    assert load(tmp_path / "a/last.pt")["setup"]["training images"] == 60


def test_holdout_needs_no_test_set_and_says_what_it_tests_on(tmp_path, folder):
    shutil.copytree(folder / "train", tmp_path / "mine/train")
    _, err = run(SCRIPT, "--data", "mine", cwd=tmp_path, status=2)
    one_error_line(err, "mine/test", "--holdout")
    out, _ = run(SCRIPT, "--data", "mine", "--holdout", 12, "--epochs", 1, cwd=tmp_path)
    assert "48 + 12 images" in out and "validation accuracy" in out


@pytest.mark.parametrize("amx", [True, False])
def test_tuned_is_in_bfloat16_where_the_cpu_has_amx_and_amp_says_where_not(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    args = {name: lenet_cifar.parser().parse_args(name.split()) for name in ("", "--tuned", "--amp")}
    precision = {name: one.precision for name, one in args.items()}
    fast = {"": "float32", "--tuned": "bfloat16", "--amp": "bfloat16"}
    slow = {"": "float32", "--tuned": "float32", "--amp": "bfloat16, often slower than float32"}
    assert precision == (fast if amx else slow)


def test_the_device_is_not_the_runs_but_each_process_picks_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        args = lenet_cifar.parser().parse_args(["--tuned"])
        assert (
            str(args.device) == f"cuda:{rank}" and args.settings["device"] == "auto" and args.settings["amp"]
        )


def test_amp_and_tensorboard_run(tmp_path, folder):
    out, _ = run(SCRIPT, "--data", folder, "--epochs", 1, "--amp", "--tensorboard", cwd=tmp_path)
    assert "in bfloat16" in out
    assert list((tmp_path / "runs/lenet_cifar").glob("events.out.tfevents*"))


def test_without_matplotlib_a_run_has_no_pictures(tmp_path, folder):
    script = tmp_path / "without.py"
    lines = ["import runpy, sys", "sys.modules['matplotlib'] = None"]
    script.write_text("\n".join([*lines, f"runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')"]))
    run(script, "--data", folder, "--epochs", 1, "--out", "o", cwd=tmp_path)
    assert not list((tmp_path / "o").glob("*.png"))


def small_disk():
    """Writing past 400 kB into a file fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, folder):
    run(SCRIPT, "--data", folder, "--epochs", 1, cwd=tmp_path)
    before = (tmp_path / "runs/lenet_cifar/last.pt").read_bytes()

    _, err = run(SCRIPT, "--resume", "--epochs", 2, cwd=tmp_path, status=2, before=small_disk)
    one_error_line(err, "last.pt", "disk full")
    assert (tmp_path / "runs/lenet_cifar/last.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, folder):
    run(SCRIPT, "--data", folder, "--epochs", 1, cwd=tmp_path)
    before = (tmp_path / "runs/lenet_cifar/last.pt").read_bytes()
    _, err = run(SCRIPT, "--data", folder, "--epochs", 9, "--lr", 1e30, cwd=tmp_path, status=2)
    one_error_line(err, "loss is", "smaller --lr")
    assert (tmp_path / "runs/lenet_cifar-1/last.pt").read_bytes() == before


def test_an_earlier_run_is_moved_aside_once_the_data_are_read(tmp_path, folder):
    args = ["--data", folder, "--epochs", 1]
    others = [tmp_path / "runs/lenet_cifar" / name for name in ("notes.txt", "yolo.pt", "other/last.pt")]
    others[-1].parent.mkdir(parents=True)
    for file in others:  # no part of a run
        file.touch()
    for out in ("", "lenet_cifar-1", "lenet_cifar-2"):
        text, _ = run(SCRIPT, *args, "--save-every", 1, cwd=tmp_path)
        assert (f"which is in runs/{out} now" in text) == bool(out)
    run(SCRIPT, "--data", "missing", cwd=tmp_path, status=2)
    run(SCRIPT, "--resume", "--epochs", 2, cwd=tmp_path)
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["lenet_cifar", "lenet_cifar-1", "lenet_cifar-2"]
    assert all(file.exists() for file in others)
    assert not (runs / "lenet_cifar-1/yolo.pt").exists()
    assert [len(load(runs / name / "last.pt")["history"]) for name in ("lenet_cifar", "lenet_cifar-1")] == [
        2,
        1,
    ]
    for name in ("last.pt", "best.pt"):
        (runs / "lenet_cifar" / name).unlink()
    text, _ = run(SCRIPT, *args, cwd=tmp_path)  # what --save-every kept is an earlier run too
    assert "which is in runs/lenet_cifar-3 now" in text and (runs / "lenet_cifar-3/epoch_1.pt").exists()


def test_a_copy_with_one_changed_class_trains_at_another_size(tmp_path, folder):
    text = (ROOT / SCRIPT).read_text().replace("import torch\n", "import torch\nimport torchvision\n", 1)
    changed = "torchvision.models.resnet18(num_classes=len(spec.classes))"
    text = text.replace("LeNet(spec.channels, spec.size, len(spec.classes))", changed)
    (tmp_path / "my_net.py").write_text(text)
    out, _ = run(tmp_path / "my_net.py", "--help", cwd=tmp_path)
    assert "python my_net.py --tuned" in out and "python lenet_cifar.py" not in out
    args = ["--data", folder, "--size", 40, "--epochs", 1, "--batch-size", 59, "--tuned"]  # 59 + 1 images
    out, _ = run(tmp_path / "my_net.py", *args, cwd=tmp_path)
    assert "input 3x40x40" in out and "BasicBlock" not in out  # blocks, not their layers
    image = folder / "test/ball/0.png"
    run("predict.py", "--recipe", "my_net.py", "runs/my_net/best.pt", image, cwd=tmp_path)


def test_a_closed_pipe_ends_quietly(tmp_path):
    command = f"{sys.executable} {ROOT / SCRIPT} --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("usage: lenet_cifar.py")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--device", "cuda:99"], ["--device cuda:99", "cpu"]),
        (["--device", "gpu"], ["--device gpu", "cpu"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--batch-size", "-4"], ["--batch-size", "-4"]),
        (["--lr", "0"], ["--lr", "0"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--data", "drawn", "--holdout", "99999"], ["--holdout 99999", "2000"]),
        (["--data", "drawn", "--out", "/dev/null/run"], ["/dev/null/run", "--out"]),
        (["--data", "."], ["CIFAR10", "--data drawn"]),
        (["--data", "mistyped"], ["no folder mistyped", "--download"]),
        (["--size", "15"], ["--size", "16"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--seed", "-1"], ["--seed"]),
        (["--data", "drawn", "--compile", "--device", "cpu"], ["--compile", "GPU"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, flags, parts):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network: the download fails at once
    _, err = run(SCRIPT, *flags, cwd=tmp_path, status=2)
    one_error_line(err, *parts)


def test_bad_folders_are_one_line_and_status_2(tmp_path, folder):
    def refused(name, *parts, flags=()):
        _, err = run(SCRIPT, "--data", name, *flags, cwd=tmp_path, status=2)
        one_error_line(err, *parts)

    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    shutil.move(mine / "test/ball", mine / "test/balls")
    refused("mine", "'balls'", "test images only")
    shutil.move(mine / "test/balls", mine / "test/ball")
    for i in range(6):
        (mine / f"train/ball/bad{i}.png").write_text("no picture")
    refused("mine", "bad0.png", "bad4.png", "--skip-bad")
    out, _ = run(SCRIPT, "--data", mine, "--skip-bad", "--epochs", 1, cwd=tmp_path)
    assert "6 of 66 images are unreadable and left out" in out and "60 + 21 images" in out
    for file in (mine / "test").glob("*/*"):
        file.write_text("no picture")
    _, err = run(SCRIPT, "--data", mine, "--skip-bad", cwd=tmp_path, status=2)
    one_error_line(err, "no image can be read")
    for part in ("train", "test"):
        for kind in ("lying", "standing"):
            shutil.rmtree(mine / part / kind)
    refused("mine", "['ball']", "2 to 10,000")
    shutil.rmtree(mine / "test")
    refused("mine", "mine/test")
    (tmp_path / "loose").mkdir()
    shutil.copy(folder / "train/ball/0.png", tmp_path / "loose")
    refused("loose/0.png", "no folder loose/0.png")
    (tmp_path / "loose").rename(tmp_path / "train")
    refused(".", "no images in train/<class>/")


def test_strange_names_are_classes_as_any_others(tmp_path, folder):
    names = {"ball": "a$x$ _{b", "lying": os.fsdecode(b"caf\xe9"), "standing": "\u72ac " * 9}
    for part in ("train", "test"):
        for name, strange in names.items():
            shutil.copytree(folder / part / name, tmp_path / "mine" / part / strange)
            (tmp_path / "mine" / part / strange / ".hidden.png").write_text("no picture")
    out, _ = run(SCRIPT, "--data", "mine", "--epochs", 1, cwd=tmp_path, figures=True)
    assert "a$x$ _{b" in out and "3 classes" in out and "60 + 21 images" in out
    args = ("runs/lenet_cifar/best.pt", "mine/test", "--csv", "t.csv", "--figure", "f.png")
    out, _ = run("predict.py", *args, cwd=tmp_path, figures=True)
    assert len(out.splitlines()) == 22 and "of 21 right" in out and (tmp_path / "f.png").exists()
