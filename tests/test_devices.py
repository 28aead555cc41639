"""Without a GPU: PyTorch's fake tensors know the device they would be on, and refuse a mix of two."""

import importlib
from unittest import mock

import common
from predict import import_recipe

import pytest
import torch
import torchvision
from torch._subclasses import FakeTensorMode

CUDA = torch.device("cuda:0")


class Stop(Exception):
    """Raised where numbers would be asked for, which fake tensors do not have."""


def stop(tensor):
    assert tensor.device == CUDA
    raise Stop


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "on_gpu"), [("--amp", True), ("--no-amp", False)])
@pytest.mark.parametrize("recipe", common.RECIPES)
def test_training_and_evaluation_mix_no_devices(folder, monkeypatch, recipe, precision, on_gpu):
    argv = ["--data", str(folder), "--limit-batches", "1", "--batch-size", "4", "--quiet"]
    argv += ["--size", "32", "--tuned", precision] + ["--weights", "none"] * (recipe == "vgg_transfer")
    with mock.patch.object(common, "fit") as fit, monkeypatch.context() as patch:
        patch.setattr(torchvision.models, "vgg16", torchvision.models.vgg11)  # in a tenth of the time
        import_recipe(recipe).main(argv)
    _, data, _, loss_fn, optimizer, args, _, augment = (*fit.call_args.args, None)[:8]
    args.device, place = CUDA, CUDA if on_gpu else torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch("torch.Tensor.backward"):
        images, labels = (torch.zeros(part.shape, dtype=part.dtype, device=place) for part in data[:])
        data = common.ImageDataset(images.movedim(1, -1), labels, data.spec)
        data.augment = augment
        with CUDA:
            model = importlib.import_module(recipe).build_model(data.spec, args)
        optimizer = type(optimizer)(model.parameters(), lr=0.1)
        monkeypatch.setattr(common, "all_reduce", stop)
        with pytest.raises(Stop):
            common.train_one_epoch(model, data, loss_fn, optimizer, args, 1)
        with pytest.raises(Stop):
            common.evaluate(model, data, args)
