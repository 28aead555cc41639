"""What a user of torchrun with any recipe, and of multi_gpu.py, may rely on: Gloo on the CPU."""

import csv
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import common
import lenet_cifar
import multi_gpu
import predict

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, run, start

TORCHRUN = (torch.distributed.run.__file__, "--standalone", "--nproc-per-node=2")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
QUICKLY = "--size 16 --lr 0.01 --epochs 3 --batch-size 6"

GROUP = """
import importlib, sys
import common

def main():
    refused = []
    for command in sys.argv[1:]:
        script, *flags = command.split()
        try:
            importlib.import_module(script).main(flags)
        except common.UserError as error:
            refused.append(str(error))
    raise common.UserError(" | ".join(refused))

common.import_figures = lambda: None
common.cli(main)
"""

MY_NET = """
import os, signal
import common, lenet_cifar
import torch
from torch import nn

attempt = os.environ.get("DIES") and os.environ["TORCHELASTIC_RESTART_COUNT"]
common.import_figures = lambda: None

def build_model(spec, args):
    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16), nn.BatchNorm1d(16))
    return nn.Sequential(body, nn.ReLU(), nn.Linear(16, 3))

def after_epoch(run):
    if attempt == "1" and common.get_rank() == 1 and len(run.history) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

def main(argv=None):
    args = lenet_cifar.parse_args(argv)
    if attempt == "0" and common.get_rank() == 1:
        os._exit(1)  # while the other process reads the data
    train_set, test_set = common.load_data(args, "CIFAR10")
    torch.manual_seed(0)
    model = build_model(train_set.spec, args)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    common.fit(model, train_set, test_set, loss_fn, optimizer, args, after_epoch=after_epoch)

if __name__ == "__main__":
    common.cli(main)
"""


@pytest.fixture(scope="module")
def group(folder, tmp_path_factory):
    """Two processes that do one thing after the other: their folder, their stdout and stderr."""
    cwd = tmp_path_factory.mktemp("group")
    (cwd / "group.py").write_text(GROUP)
    (cwd / "my_net.py").write_text(MY_NET)
    (cwd / "locked").mkdir()
    data = f"--data {folder} {QUICKLY}"
    commands = [
        f"multi_gpu {data} --out same",
        f"my_net {data} --out calm",
        f"my_net {data} --out few --holdout 1",
        "multi_gpu --demo",
        "lenet_cifar --batch-size 7",
        f"lenet_cifar {data} --out locked",
    ]
    with common.lock_folder(cwd / "locked"):
        out, err = run(*TORCHRUN, "group.py", *commands, cwd=cwd, status=1, env=ENVIRONMENT)
    return cwd, out, err


def predictions(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [(row["file"], row["predicted"]) for row in csv.DictReader(file)]


def last_model(folder):
    return common.load_checkpoint(folder / "last.pt")["model"]


def test_two_processes_learn_what_one_learns_and_test_every_image_once(group, folder):
    cwd, out, _ = group
    lenet_cifar.main(f"--data {folder} {QUICKLY} --out one".split())
    torch.testing.assert_close(last_model(Path("one")), last_model(cwd / "same"))
    assert len(predictions(cwd / "same")) == 21  # which two processes do not divide
    assert predictions(cwd / "same") == predictions(Path("one"))
    assert out.count("run folder: same") == 1
    lenet_cifar.main(f"--resume --epochs 4 --out {cwd / 'same'}".split())


@pytest.mark.parametrize(("out", "holdout", "images"), [("calm", 0, 21), ("few", 1, 1)])
def test_what_is_tested_is_what_is_saved_with_batch_normalization_or_one_image_too(
    group, folder, out, holdout, images
):
    cwd, _, _ = group
    args = common.settings(data=folder, holdout=holdout, size=16)
    _, test_set = common.load_data(args, "CIFAR10")
    assert len(test_set) == len(predictions(cwd / out)) == images
    model, _ = predict.load_model(cwd / out / "last.pt", recipe=cwd / "my_net.py")
    row, _ = common.evaluate(model, test_set, args)
    history = common.load_checkpoint(cwd / out / "last.pt")["history"]
    assert row["test_loss"] == pytest.approx(history[-1]["test_loss"], rel=1e-4)


def test_what_a_user_does_wrong_is_one_line_of_each_process(group):
    _, _, err = group
    line = (
        "group.py: error: --batch-size has to be a multiple of 2 processes | "
        "another process trains in locked: name another --out"
    )
    assert err.count(line) == err.count(": error: ") == 2, err
    assert err.count("Traceback") == 1  # torchrun's own


def test_a_restart_continues_its_own_run_and_never_an_older_one(group, folder):
    cwd, _, _ = group
    shutil.copytree(cwd / "calm", cwd / "killed")  # yesterday's, with the same flags
    args = f"--max-restarts=2 my_net.py --data {folder} {QUICKLY} --out killed".split()
    process = start(*TORCHRUN, *args, cwd=cwd, env={**ENVIRONMENT, "DIES": "1"})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "killed had an earlier run, which is in killed-1 now" in out
    assert [line.split()[0] for line in out.splitlines() if "/3 " in line] == ["1/3", "2/3", "3/3"]
    for old, new in (("calm", "killed-1"), ("calm", "killed")):
        torch.testing.assert_close(last_model(cwd / old), last_model(cwd / new), rtol=0, atol=0)


def test_a_restart_moves_aside_what_it_cannot_read(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    Path("run").mkdir()
    Path("run/last.pt").write_text("damaged, or an older version's")
    lenet_cifar.main(f"--data {folder} {QUICKLY} --out run".split())
    assert Path("run-1/last.pt").exists()


def test_workers_end_with_torchrun_also_while_they_import(tmp_path):
    process = start(*TORCHRUN, ROOT / "lenet_cifar.py", "--data", "drawn", cwd=tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("finds the workers in Linux's /proc")
    importing = []
    while len(importing) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
        with suppress(OSError):  # of a child that has just ended
            importing = [
                child
                for child in children.read_text().split()
                if "libtorch" in Path(f"/proc/{child}/maps").read_text()
            ]
    process.kill()
    process.communicate(timeout=30)  # as long as a worker has its stdout
    assert not Path("runs").exists()


def test_a_group_prints_its_part_of_each_batch_in_the_demo(group):
    _, out, _ = group
    assert out.count("input [15, 5], output [15, 2]") == 2 * 3
    assert out.count("input [5, 5], output [5, 2]") == 2


def test_the_demo_prints_what_replicas_and_caller_see(capsys):
    multi_gpu.main(["--demo"])
    out = capsys.readouterr().out
    for where in ("in the model, on cpu", "outside"):
        sizes = [line.split(": ")[1] for line in out.splitlines() if line.strip().startswith(where)]
        large = "input [30, 5], output [30, 2]"
        assert sizes == [large, large, large, "input [10, 5], output [10, 2]"]


def test_help_has_the_flags_of_the_recipe_too(capsys):
    with pytest.raises(SystemExit):
        multi_gpu.main(["--recipe", "quick_cifar", "--help"])
    out = capsys.readouterr().out
    for part in ("--activation", "--demo", "--data-parallel"):
        assert part in out


def test_a_recipe_of_ones_own_is_trained_with_data_parallel(folder):
    Path("my_net.py").write_text(MY_NET)
    multi_gpu.main(f"--recipe my_net.py --data {folder} {QUICKLY}".split())
    assert common.load_checkpoint("runs/multi_gpu/last.pt")["settings"]["data_parallel"]
    args = common.settings(data_parallel=True)
    args.device = torch.device("cuda:0")
    model = common.parallelize(torch.nn.Linear(2, 2), args)
    assert isinstance(model, torch.nn.DataParallel)
