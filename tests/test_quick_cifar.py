"""What a user of quick_cifar.py may rely on besides what all recipes share."""

import importlib.util
import sys

import common
import quick_cifar

import pytest
import torch
from conftest import ROOT, one_error_line, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_one_batch_of_drawn_digits_leaves_a_run_that_tensorboard_shows(tmp_path):
    args = ("--data", "drawn", "--epochs", 2, "--batch-size", 8, "--limit-batches", 60)
    run("quick_cifar.py", *args, cwd=tmp_path, figures=True)
    folder = tmp_path / "runs/quick_cifar"
    assert {"epoch_1.pt", "epoch_2.pt", "last.pt", "best.pt", "confusion.png"} <= {
        f.name for f in folder.iterdir()
    }
    log = EventAccumulator(str(folder), size_guidance={"images": 0})
    log.Reload()
    tags = log.Tags()
    scalars = {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "lr"}
    assert tags["graph"] and set(tags["scalars"]) == scalars
    assert len(log.Scalars("train/loss")) == 2 * 50  # each 1/50 of an epoch
    for name in scalars - {"train/loss"}:
        assert [point.step for point in log.Scalars(name)] == [60, 120]  # all over the same steps
    layers = {tag for tag in tags["images"] if tag.startswith("layer")}
    assert len(layers) == 12 and "layer 0 Conv2d/before" in layers and "layer 5 MaxPool2d/after" in layers
    assert "samples" in tags["images"]


def test_a_copy_with_another_network_and_no_docstring_is_logged_too(tmp_path, folder):
    text = (ROOT / "quick_cifar.py").read_text().split('"""', 2)[2]
    network = "nn.Sequential(nn.Flatten(), nn.Linear(3 * spec.size**2, len(spec.classes)))"
    text = text.replace("Quick(spec.channels, spec.size, len(spec.classes), args.activation)", network)
    (tmp_path / "my_net.py").write_text(text)
    run(tmp_path / "my_net.py", "--data", folder, "--epochs", 2, cwd=tmp_path)
    log = EventAccumulator(str(tmp_path / "runs/my_net"))
    log.Reload()
    assert log.Tags()["graph"] and len(log.Scalars("test/loss")) == 2


def test_no_tensorboard_and_an_activation_can_be_asked_for_and_predicted_with(tmp_path, folder):
    args = ["--data", folder, "--epochs", 1, "--no-tensorboard", "--activation", "tanh"]
    run("quick_cifar.py", *args, cwd=tmp_path)
    assert not list((tmp_path / "runs/quick_cifar").glob("events*"))
    run("predict.py", "runs/quick_cifar/best.pt", folder / "test/ball/0.png", cwd=tmp_path)
    _, err = run("quick_cifar.py", "--resume", "--activation", "relu", cwd=tmp_path, status=2)
    one_error_line(err, "activation from tanh to relu")


def without_tensorboard():
    sys.modules["tensorboard"] = None
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "tensorboard" else find(name, *more)


def test_a_run_goes_on_where_tensorboard_is_not_and_says_so_if_asked_for_it(tmp_path, folder):
    run("quick_cifar.py", "--data", folder, "--epochs", 1, cwd=tmp_path)
    args = ("--resume", "--epochs", 2, "--no-tensorboard")
    run("quick_cifar.py", *args, cwd=tmp_path, before=without_tensorboard)
    args = ("--resume", "--epochs", 3, "--tensorboard")
    _, err = run("quick_cifar.py", *args, cwd=tmp_path, status=2, before=without_tensorboard)
    one_error_line(err, "pip install tensorboard")


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "tanh"])
def test_the_network_has_the_sources_layers(activation):
    model = quick_cifar.Quick(3, 32, 10, activation)
    assert sum(parameter.numel() for parameter in model.parameters()) == 145_578
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 4, 4)
    assert len(model.features) == (6 if activation == "none" else 9)
    spec = common.Spec([str(i) for i in range(7)], 48, 1, 0, 1)
    network = quick_cifar.build_model(spec, type("args", (), {"activation": activation}))
    assert network(torch.zeros(2, 1, 48, 48)).shape == (2, 7)
