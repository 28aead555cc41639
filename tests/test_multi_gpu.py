"""What a user of multi_gpu.py may rely on: two and more processes with Gloo on the CPU."""

import contextlib
import csv
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import common
import lenet_cifar
import predict

import pytest
import torch
import torch.distributed.run
from conftest import ENVIRONMENT, ROOT, finish, one_error_line, run, slow, warm, write_pictures

SCRIPT = "multi_gpu.py"
LENET = "lenet_cifar.py"
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


def join(environment):
    torch.set_num_threads(1)
    os.environ.update(environment)


def run_group(count, script, *args, cwd, status=0, each=lambda rank: [], **options):
    """Run the processes of a group, as torchrun does, which has the store; `each` gives further flags of a
    rank. Returns stdout and stderr of all together."""
    store, started = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True)
        before = partial(join, {name: str(value) for name, value in environment.items()})
        started.append(warm(script, *args, *each(rank), cwd=cwd, before=before, name=rank, **options))
    ended = [finish(one, status) for one in started]
    return "".join(out for out, _ in ended), "".join(err for _, err in ended)


def torchrun(*args, cwd):
    """Start torchrun with two processes, which are as cold as a user's."""
    flags = ["--standalone", "--nproc-per-node=2"]
    return warm(torch.distributed.run.__file__, *flags, *args, cwd=cwd, before=prepare_torchrun)


def prepare_torchrun():
    os.environ.update(ENVIRONMENT)
    os.setsid()


def children(parent):
    """The processes that this one has started, as Linux lists them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # gone in the meantime
            if f"PPid:\t{parent}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return [[float(row[name]) for name in COLUMNS] for row in csv.DictReader(file)]


def assert_close(one, other, rtol):
    """Two run folders with the same weights and history, but for rounding."""
    for row, twin in zip(history(one), history(other), strict=True):
        assert row == pytest.approx(twin, rel=rtol)
    a, b = (common.load_checkpoint(folder / "last.pt")["model"] for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= rtol * b[name].norm()


def test_a_group_learns_what_one_process_learns(tmp_path, folder):
    # 60 pictures in batches of 7: the parts differ, and the last one has 4, for 3 processes 2, 1 and 1
    args = ["--data", folder, "--epochs", 3, "--batch-size", 7, "--lr", 0.01]
    run_group(3, LENET, *args, "--out", "three", cwd=tmp_path)
    run(LENET, *args, "--out", "one", cwd=tmp_path)
    out, err = run_group(2, SCRIPT, *args, "--out", "group", cwd=tmp_path)
    assert err == "" and out.count("best epoch") == 1 and "60 + 21 images" in out
    assert_close(tmp_path / "one", tmp_path / "group", 1e-5)
    assert_close(tmp_path / "one", tmp_path / "three", 1e-5)
    run(LENET, "--resume", "--epochs", 4, "--out", "group", cwd=tmp_path)  # in one process
    run_group(2, LENET, "--resume", "--epochs", 4, "--out", "one", cwd=tmp_path)
    assert_close(tmp_path / "one", tmp_path / "group", 1e-5)
    run("predict.py", "one/best.pt", folder / "test/ball/0.png", cwd=tmp_path)


def test_fewer_pictures_than_processes_still_count_once(tmp_path, folder):
    args = ["--data", folder, "--epochs", 1, "--batch-size", 58, "--lr", 0.01]  # the last batch has 2
    run("quick_cifar.py", *args, "--out", "one", cwd=tmp_path)
    run_group(3, SCRIPT, "--recipe", "quick_cifar", *args, "--out", "group", cwd=tmp_path)
    assert_close(tmp_path / "one", tmp_path / "group", 1e-5)
    out, _ = run_group(3, "mnist_cnn.py", *args, "--tuned", cwd=tmp_path)  # with data augmentation
    assert out.count("best epoch") == 1


def test_an_image_that_one_process_replaces_counts_for_its_new_class(tmp_path, folder):
    text = (ROOT / LENET).read_text().replace("import common\n", "import common\n\ncommon.IN_MEMORY = 0\n", 1)
    (tmp_path / "my_net.py").write_text(text)
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data/test/standing/6.bmp").write_text("no image")  # the last one: the first is taken
    args = ["--epochs", 2, "--batch-size", 8, "--lr", 0.01, "--skip-bad"]
    out, _ = run_group(2, tmp_path / "my_net.py", "--data", "data", *args, cwd=tmp_path)
    lines = out.split("test accuracy per class")[1].splitlines()[1:4]
    accuracy = sum(float(line.split()[1]) * count for line, count in zip(lines, (8, 7, 6), strict=True)) / 21
    assert accuracy == pytest.approx(history(tmp_path / "runs/my_net")[-1][5], abs=1e-4)


def test_what_is_tested_is_what_is_saved_with_batch_normalization_too(tmp_path, folder):
    text = (ROOT / LENET).read_text().replace("F.relu(self.fc2(x))", "self.norm(F.relu(self.fc2(x)))")
    text = text.replace("        self.fc3 =", "        self.norm = nn.BatchNorm1d(84)\n        self.fc3 =")
    (tmp_path / "my_net.py").write_text(text)
    args = ["--data", folder, "--epochs", 1, "--batch-size", 8, "--lr", 0.1]
    run_group(2, tmp_path / "my_net.py", *args, "--out", "group", cwd=tmp_path)
    model, spec = predict.load_model(tmp_path / "group/last.pt", tmp_path / "my_net.py")
    args = lenet_cifar.parser().parse_args(["--data", str(folder), "--quiet"])
    _, test_set = common.load_data(args, "CIFAR10", mean=spec.mean, std=spec.std)
    row, _ = common.evaluate(model[1], test_set, args)
    assert row["test_loss"] == pytest.approx(history(tmp_path / "group")[-1][4], rel=1e-5)


def test_one_process_says_so_and_trains_as_the_recipe_does(tmp_path, folder):
    shutil.copy(ROOT / "mnist_cnn.py", tmp_path / "my_net.py")
    args = ["--data", folder, "--epochs", 1, "--tuned", "--amp"]
    out, _ = run(SCRIPT, "--recipe", "my_net.py", *args, cwd=tmp_path)
    assert "one device" in out and "--recipe my_net.py" in out
    run(tmp_path / "my_net.py", *args, cwd=tmp_path)
    assert_close(tmp_path / "runs/multi_gpu", tmp_path / "runs/my_net", 0)
    run_group(2, SCRIPT, "--recipe", "my_net.py", *args, "--out", "group", cwd=tmp_path)
    assert len(history(tmp_path / "group")) == 1


def test_the_demo_prints_what_replicas_and_caller_see(tmp_path):
    out, _ = run(SCRIPT, "--demo", cwd=tmp_path)
    inside = [line for line in out.splitlines() if "in the model" in line]
    assert [line.split("input ")[1] for line in inside] == ["[30, 5], output [30, 2]"] * 3 + [
        "[10, 5], output [10, 2]"
    ]
    assert out.count("outside: input [30, 5]") == 3 and out.count("outside: input [10, 5]") == 1


def test_help_has_the_flags_of_the_recipe_too(tmp_path):
    out, _ = run(SCRIPT, "--recipe", "quick_cifar", "--help", cwd=tmp_path)
    text = " ".join(out.split())
    assert "--activation" in text and "--demo" in text and "of all processes together" in text


@pytest.mark.parametrize(
    ("args", "parts"),
    [(["--epochs", 0], ["--epochs 0"]), (["--data", "missing"], ["missing", "--download"])],
)
def test_bad_use_is_one_message_of_one_process(tmp_path, args, parts):
    _, err = run_group(2, LENET, *args, cwd=tmp_path, status=2)
    one_error_line(err, *parts)


@slow
def a_raising_worker_ends_the_others_and_is_the_one_that_speaks(cwd):
    text = (ROOT / "lenet_cifar.py").read_text()
    line, bug = "        x = x.flatten(1)", "; int(__import__('os').environ['RANK']) and 1 / 0"
    (cwd / "my_net.py").write_text(text.replace(line, line + bug))
    write_pictures(cwd / "data")
    return finish(torchrun(ROOT / SCRIPT, "--recipe", "my_net.py", cwd=cwd), 1)


def test_a_raising_worker_ends_the_others_and_is_the_one_that_speaks(done):
    _, err = done
    assert err.index("ZeroDivisionError: division by zero") < err.index("Root Cause")
    assert "another process is gone" not in err


@slow
def a_killed_worker_comes_back_and_the_run_ends_as_if_nothing_had_been(cwd):
    if not Path("/proc/self/status").exists():
        return None
    write_pictures(cwd / "data")
    args = ["--limit-batches", 15, "--epochs", 15, "--batch-size", 4]
    run_group(2, LENET, *args, "--out", "calm", cwd=cwd)
    process, (out, _) = torchrun("--max-restarts=3", ROOT / LENET, *args, "--out", "killed", cwd=cwd)
    while not (cwd / "killed/last.pt").exists() and process.is_alive():
        time.sleep(0.02)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    process.join(100)
    return cwd, process.exitcode, out.read_text()


def test_a_killed_worker_comes_back_and_the_run_ends_as_if_nothing_had_been(done):
    if done is None:
        pytest.skip("finds the worker in Linux's /proc")
    cwd, status, out = done
    assert status == 0
    assert out.count("lenet_cifar on cpu") == 2  # it was started twice
    assert_close(cwd / "calm", cwd / "killed", 0)
