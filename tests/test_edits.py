"""What people change in a copy, each as a function of its own: it holds on a GPU, in two processes,
and in a run that is killed and resumed."""

import os
import shutil
from pathlib import Path
from unittest import mock

import common

import numpy as np
import pytest
import torch
import torch.distributed.run
from conftest import ROOT, run
from torch import nn
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.filterwarnings("ignore")  # of the order of steps, of fake tensors
CUDA = torch.device("cuda:0")


def draw_set(count):
    """Noise with more of one colour in it, which is the class."""
    images = np.random.default_rng(count).integers(0, 200, (count, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(count) % 3
    images[np.arange(count), :, :, labels] += 50
    return common.ImageDataset(images, labels, common.Spec(["red", "green", "blue"], 8))


def learn(args, edit):
    """A recipe; `edit` returns what is different in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
    train_set = draw_set(36)
    options = {
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), args.lr, momentum=0.9),
        "args": args,
        **edit(model, train_set, args),
    }
    return common.fit(model, train_set, draw_set(13), **options)


def weigh_the_classes(model, train_set, args):
    return {"loss_fn": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))}


def give_the_backbone_a_tenth_of_the_rate(model, train_set, args):
    backbone = {"params": model[1].parameters(), "lr": args.lr / 10}
    optimizer = torch.optim.SGD([backbone, {"params": model[3].parameters()}], args.lr)
    return {"optimizer": optimizer, "scheduler": common.one_cycle(optimizer, train_set, args)}


def lower_the_rate_on_a_plateau_and_augment(model, train_set, args):
    from torchvision.transforms import v2

    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, threshold=1e9, patience=0)
    augment = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise()])
    return {"optimizer": optimizer, "scheduler": scheduler, "augment": augment}


def unfreeze_from_epoch_3_on(model, train_set, args):
    backbone = model[1].requires_grad_(False)

    def train_one_epoch(model, dataset, loss_fn, optimizer, args, epoch, *more):
        backbone.requires_grad_(epoch >= 3)
        return common.train_one_epoch(model, dataset, loss_fn, optimizer, args, epoch, *more)

    return {"train_one_epoch": train_one_epoch}


def stop_after_two_epochs_that_are_no_better(model, train_set, args):
    def after_epoch(run):
        losses = [row["test_loss"] for row in run.history]
        return len(losses) - losses.index(min(losses)) > 2

    optimizer = torch.optim.SGD(model.parameters(), 1e-30)  # learns nothing
    return {"optimizer": optimizer, "after_epoch": after_epoch}


def clip_gradients_of_two_batches(model, train_set, args):
    def train_one_epoch(model, dataset, loss_fn, optimizer, args, epoch, scheduler, augment):
        metrics = common.Metrics()
        batches = common.shuffle(len(dataset), args, epoch)
        loaded = common.load_batches(dataset, batches, args.device, augment)
        model.train()
        for step, (images, labels) in enumerate(loaded, 1):
            logits = model(images)
            loss = loss_fn(logits, labels)
            (loss / 2).backward()
            if step % 2 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            common.step_after_batch(scheduler)
            metrics.update(loss, logits, labels)
        return metrics.finish(epoch)

    optimizer = torch.optim.SGD(model.parameters(), args.lr)
    scheduler = common.one_cycle(optimizer, train_set, args)
    return {"optimizer": optimizer, "scheduler": scheduler, "train_one_epoch": train_one_epoch}


def measure_the_mean_recall(model, train_set, args):
    def evaluate(model, dataset, args):
        row, predictions = common.evaluate(model, dataset, args)
        recalls = [recall for _, recall, _, _ in predictions.by_class(3)]
        return {**row, "recall": sum(recalls) / 3}, predictions

    return {"evaluate": evaluate}


def normalize_batches(model, train_set, args):
    model[2] = nn.BatchNorm1d(16)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    return {"optimizer": optimizer}


SAME_IN_TWO_PROCESSES = [  # what looks at images one by one, and draws nothing at random
    give_the_backbone_a_tenth_of_the_rate,
    stop_after_two_epochs_that_are_no_better,
    clip_gradients_of_two_batches,
    measure_the_mean_recall,
    unfreeze_from_epoch_3_on,
]
OTHERS = [weigh_the_classes, lower_the_rate_on_a_plateau_and_augment, normalize_batches]
EDITS = [*SAME_IN_TWO_PROCESSES, *OTHERS]
each_edit = pytest.mark.parametrize("edit", EDITS)


def settings(out, resume=False):
    numbers = {"epochs": 4, "batch_size": 6, "lr": 0.05, "size": 8, "save_every": 1}
    return common.settings(**numbers, device="cpu", out=out, resume=resume, quiet=True)


def load(folder, name="last.pt"):
    return common.load_checkpoint(Path(folder, name))


def results(history):
    """The rows without what depends on the clock."""
    clock = ("train_seconds", "test_seconds", "images_per_second")
    return [{name: row[name] for name in row if name not in clock} for row in history]


@each_edit
def test_a_run_that_was_killed_ends_as_if_nothing_had_been(edit):
    history = learn(settings("whole"), edit)
    Path("killed").mkdir()
    for name in ("last.pt", "best.pt"):
        shutil.copy("whole/epoch_2.pt", Path("killed", name))
    resumed = learn(settings("killed", resume=True), edit)
    assert results(resumed) == results(history)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(load("killed")[part], load("whole")[part], rtol=0, atol=0)


class Stop(Exception):
    """Raised where numbers would be asked for, which fake tensors do not have."""


def stop(tensor):
    assert tensor.device == CUDA
    raise Stop


@each_edit
def test_on_a_gpu_no_devices_are_mixed(edit, monkeypatch):
    """PyTorch's fake tensors know the device that they would be on, and refuse a mix of two."""
    fit = common.fit

    def fit_on_gpu(model, train_set, *others, args, **options):
        args.device = CUDA
        with FakeTensorMode(allow_non_fake_inputs=True):
            train_set.images = train_set.images.to(CUDA)
            train_set.labels = train_set.labels.to(CUDA)
            fit(model, train_set, *others, args=args, **options)

    monkeypatch.setattr(common, "fit", fit_on_gpu)
    monkeypatch.setattr(common, "describe", lambda *more: None)
    monkeypatch.setattr(common, "all_reduce", stop)
    with mock.patch("torch.Tensor.backward"), pytest.raises(Stop):
        learn(settings("fake"), edit)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The run folders of all edits, which two processes have trained to the end."""
    cwd = tmp_path_factory.mktemp("two")
    torchrun = (torch.distributed.run.__file__, "--standalone", "--nproc-per-node=2")
    run(*torchrun, __file__, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return cwd


@pytest.mark.parametrize("edit", SAME_IN_TWO_PROCESSES)
def test_two_processes_end_as_one(edit, two_processes):
    learn(settings("one"), edit)
    torch.testing.assert_close(load(two_processes / edit.__name__)["model"], load("one")["model"])


def test_what_is_frozen_stays_as_it_is_until_its_epoch():
    learn(settings("runs"), unfreeze_from_epoch_3_on)
    first, second, third = (load("runs", f"epoch_{i}.pt")["model"]["1.weight"] for i in (1, 2, 3))
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def main():
    for edit in EDITS:
        learn(settings(edit.__name__), edit)


if __name__ == "__main__":
    common.import_figures = lambda: None
    common.cli(main)
