"""What a user of quick_cifar.py may rely on besides what all recipes share."""

import sys
from argparse import Namespace
from pathlib import Path

import common
import quick_cifar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn


def train(flags):
    return quick_cifar.main(flags.split())


def read_log(folder):
    log = EventAccumulator(folder, size_guidance={"images": 0})
    log.Reload()
    return log


def test_tensorboard_shows_the_run_its_settings_the_graph_and_an_images_way():
    train("--data drawn --epochs 2 --batch-size 8 --limit-batches 60")
    log = read_log("runs/quick_cifar")
    tags = log.Tags()
    others = {"train/accuracy", "test/loss", "test/accuracy", "lr"}
    assert set(tags["scalars"]) == {"train/loss", *others}
    assert len(log.Scalars("train/loss")) == 2 * 50  # each 1/50 of an epoch
    for name in others:
        assert [point.step for point in log.Scalars(name)] == [60, 120]  # all over the same steps
    assert tags["graph"]
    assert "settings/text_summary" in tags["tensors"]
    images = set(tags["images"])
    assert {"images", "layer 0 Conv2d/before", "layer 5 MaxPool2d/after"} <= images
    assert len(images) == 1 + 2 * 6
    assert Path("runs/quick_cifar/epoch_1.pt").exists()


def test_another_network_is_logged_too(folder, monkeypatch):
    def build_model(spec, args):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * spec.size**2, len(spec.classes)))

    monkeypatch.setattr(quick_cifar, "build_model", build_model)
    train(f"--data {folder} --epochs 2")
    log = read_log("runs/quick_cifar")
    assert log.Tags()["graph"]
    assert len(log.Scalars("test/loss")) == 2


def test_a_run_goes_on_without_tensorboard_which_is_named_if_it_is_asked_for(folder, monkeypatch):
    train(f"--data {folder} --epochs 1")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train("--resume --epochs 2 --no-tensorboard")
    with pytest.raises(common.UserError, match="pip install tensorboard"):
        train("--resume --epochs 3 --tensorboard")
    train(f"--data {folder} --epochs 1 --out new --activation tanh")
    assert not list(Path("new").glob("events*"))


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "tanh"])
def test_the_network_has_the_sources_layers(activation):
    model = quick_cifar.Quick(3, 32, 10, activation)
    assert sum(parameter.numel() for parameter in model.parameters()) == 145_578
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 4, 4)
    assert len(model.features) == (6 if activation == "none" else 9)
    spec = common.Spec("abcdefg", 48, 1, 0, 1)
    network = quick_cifar.build_model(spec, Namespace(activation=activation))
    assert network(torch.zeros(2, 1, 48, 48)).shape == (2, 7)
