"""Without a GPU: PyTorch's fake tensors know the device they would be on, and refuse another."""

import importlib

import common

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

CUDA = torch.device("cuda:0")


class Stop(Exception):
    """Raised where numbers would be asked for, which fake tensors do not have."""


def stop(tensor):
    assert tensor.device == CUDA
    raise Stop


def train_and_evaluate(model, dataset, loss_fn, optimizer, args, *options):
    """Up to the numbers, in the place of an epoch of training."""
    assert isinstance(dataset.labels, torch._subclasses.FakeTensor)
    with pytest.raises(Stop):
        common.train_one_epoch(model, dataset, loss_fn, optimizer, args, *options)
    with pytest.raises(Stop):
        common.evaluate(model, dataset, args)
    raise Stop


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", ["--amp", "--no-amp"])
@pytest.mark.parametrize("recipe", common.RECIPES)
def test_training_and_evaluation_mix_no_devices(folder, monkeypatch, recipe, flags):
    """Nor with class weights in the loss. The images are on the GPU with --amp, else streamed."""
    found = []
    module = importlib.import_module(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(module, "build_model", lambda spec, args: nn.Linear(1, 1))  # no VGG16
        patch.setattr(common, "fit", lambda *options: found.extend(options))
        argv = f"--data {folder} --limit-batches 1 --batch-size 4 --size 32 --tuned {flags}"
        weights = "--weights none" if recipe == "vgg_transfer" else ""
        module.main([*argv.split(), *weights.split()])
    _, data, _, _, optimizer, args, _, augment, *_ = found
    args.device = CUDA
    place = CUDA if args.amp else torch.device("cpu")
    monkeypatch.setattr(common, "all_reduce", stop)
    monkeypatch.setattr(common, "describe", lambda *options: None)  # they look at numbers
    monkeypatch.setattr(common, "check_labels", lambda labels, spec: labels)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(data.images.shape, dtype=torch.uint8, device=place)
        labels = torch.zeros(len(data), dtype=torch.int64, device=place)
        data = common.ImageDataset(images, labels, data.spec)
        with CUDA:
            model = module.build_model(data.spec, args)
        monkeypatch.setattr(model, "to", lambda *options, **more: model)  # fake ones cannot
        optimizer = type(optimizer)(model.parameters(), lr=0.1)
        loss_fn = nn.CrossEntropyLoss(torch.ones(3))
        options = {"augment": augment, "train_one_epoch": train_and_evaluate}
        with pytest.raises(Stop):
            common.fit(model, data, data, loss_fn, optimizer, args, **options)
