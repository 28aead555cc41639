"""What a recipe may rely on in common.py."""

import argparse
import bz2
import contextlib
import dataclasses
import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
from unittest import mock

import common
import lenet_cifar
import mnist_cnn

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, few_digits, one_error_line, run
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchvision.transforms import v2

CPU = torch.device("cpu")


def flags(**changed):
    """The flags of lenet_cifar.py, with batches of 7 drawn digits."""
    args = lenet_cifar.parser().parse_args(
        ["--data", "drawn", "--batch-size", "7", "--epochs", "1", "--quiet"]
    )
    return argparse.Namespace(**{**vars(args), **changed})


@pytest.fixture(scope="module")
def digits():
    with mock.patch.object(common, "draw_digits", few_digits):
        return common.load_data(flags(), "CIFAR10")


@pytest.fixture(autouse=True)
def neither_figures_nor_many_digits(monkeypatch):
    """They take most of the time of a tiny run."""
    monkeypatch.setattr(common, "HAS_MATPLOTLIB", False)
    monkeypatch.setattr(common, "draw_digits", few_digits)


# ------------------------------------------------------------------------------------------- images


def test_drawn_digits_are_too_hard_for_the_nearest_centroid(digits):
    data = digits[0]
    train, test = zip(data.images.float().flatten(1).split(1000), data.labels.split(1000), strict=True)
    centroids = torch.stack([train[0][train[1] == digit].mean(0) for digit in range(10)])
    accuracy = (torch.cdist(test[0], centroids).argmin(1) == test[1]).float().mean()
    assert 0.1 < accuracy < 0.6


def test_images_are_a_dataset_that_is_indexed_one_by_one_or_by_the_batch(digits):
    data = digits[1]
    image, label = data[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == data.labels[3]
    for index in ([3, 1, 3], torch.tensor([3, 1, 3]), slice(2, 5)):
        images, labels = data[index]
        assert images.shape == (3, 3, 32, 32) and labels.shape == (3,)
        assert torch.equal(images[1], data[3 if isinstance(index, slice) else 1][0])
    ones, labels = data[data.labels == 1]
    assert len(ones) == (data.labels == 1).sum() and labels.unique().tolist() == [1]
    batches = list(DataLoader(data, batch_size=300))
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)
    assert torch.equal(batches[1][0], data[slice(300, 600)][0])


def test_normalize_gives_what_the_sources_transforms_give():
    spec = common.Spec(["a", "b"], 4, 3, np.float64(0.5), [0.5] * 3)
    assert type(spec.mean) is float  # which a checkpoint can hold
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(images / 255, [0.5] * 3, [0.5] * 3)
    torch.testing.assert_close(common.Normalize(spec)(images), expected)
    torch.testing.assert_close(common.Normalize(spec)(images / 255), expected)


def test_each_image_is_flipped_and_cropped_by_its_own_draw():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    torch.manual_seed(1)
    found = common.random_flip_and_crop(images, padding=2)
    pad = torch.nn.functional.pad
    padded = pad(images[:1].float(), [2] * 4, mode="reflect")[0]
    flipped = pad(images[:1].flip(3).float(), [2] * 4, mode="reflect")[0]
    ways = [image[:, y : y + 8, x : x + 8] for image in (padded, flipped) for y in range(5) for x in range(5)]
    drawn = {[torch.equal(image.float(), way) for way in ways].index(True) for image in found}
    assert len(drawn) > 40 and found.dtype == torch.uint8  # of 50 ways, all images being one of them
    still = common.random_flip_and_crop(images, padding=2, flip=False)
    assert all(any(torch.equal(image.float(), way) for way in ways[:25]) for image in still)


def test_holdout_takes_images_from_the_training_set_and_no_others(digits):
    train, held = common.load_data(flags(holdout=200, seed=5), "CIFAR10")
    assert (len(train), len(held)) == (1800, 200)
    both = {bytes(image) for part in (train, held) for image in part.images.numpy()}
    assert both == {bytes(image) for image in digits[0].images.numpy()}


def test_limited_batches_are_of_all_classes_and_always_the_same():
    train, test = common.load_data(flags(limit_batches=10), "CIFAR10")
    assert len(train) == len(test) == 70 and len(test.labels.unique()) == 10
    again = common.load_data(flags(limit_batches=10, seed=9), "CIFAR10")
    assert torch.equal(again[1].images, test.images)


def test_a_set_too_large_for_memory_streams_and_gives_the_same(folder, monkeypatch):
    whole, _ = common.load_data(flags(data=folder), "CIFAR10")
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    streamed, _ = common.load_data(flags(data=folder), "CIFAR10")
    assert whole.in_memory and not streamed.in_memory
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    both = [common.load_batches(part, order.split(16), flags()) for part in (whole, streamed)]
    for (_, images, labels), (_, same_images, same_labels) in zip(*both, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert torch.equal(whole[5][0], streamed[5][0])


def test_an_image_that_cannot_be_read_is_named_and_left_out_or_replaced(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "mine")
    (tmp_path / "mine/train/ball/0.png").write_text("no image")
    args = ("--data", "mine", "--epochs", 2, "--batch-size", 8)
    for before in (None, stream):
        _, err = run("lenet_cifar.py", *args, cwd=tmp_path, before=before, status=2)
        one_error_line(err, "mine/train/ball/0.png cannot be read: replace it, or add --skip-bad")
    out, _ = run("lenet_cifar.py", *args, "--skip-bad", cwd=tmp_path)
    assert "1 of 60 images are unreadable and left out" in out and "59 + 21 images" in out
    assert out.count("skipped, cannot be read: mine/train/ball/0.png\n") == 1
    out, _ = run("lenet_cifar.py", *args, "--skip-bad", cwd=tmp_path, before=stream)
    assert out.count("skipped, cannot be read: mine/train/ball/0.png\n") == 1 and "60 + 21 images" in out


def stream():
    common.IN_MEMORY = 0


def test_an_image_that_goes_bad_while_streaming_ends_the_run_and_can_be_left_out(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "mine")
    args = ("--data", "mine", "--epochs", 3, "--tuned", "--lr", 0.01)
    _, err = run("lenet_cifar.py", *args, cwd=tmp_path, before=lose_images, status=2)
    one_error_line(err, "/0.png cannot be read: replace it, or add --skip-bad", "1 of 3 epochs are saved")
    _, err = run("lenet_cifar.py", "--resume", cwd=tmp_path, before=stream, status=2)
    one_error_line(err, "--resume cannot change training images from 60 to 59")
    out, _ = run("lenet_cifar.py", "--resume", "--skip-bad", cwd=tmp_path, before=stream)
    assert "59 + 20 images" in out
    shutil.copy(folder / "train/ball/0.png", tmp_path / "mine/train/ball/more.png")
    shutil.copy(folder / "train/ball/0.png", tmp_path / "mine/train/ball/0.png")
    args = ("--resume", "--skip-bad", "--epochs", 4)
    _, err = run("lenet_cifar.py", *args, cwd=tmp_path, before=stream, status=2)
    one_error_line(err, "--resume cannot change training images from 59 to 61")
    assert len(common.load_checkpoint(tmp_path / "runs/lenet_cifar/last.pt")["history"]) == 3


def test_images_that_go_bad_while_streaming_are_replaced_and_the_run_resumes_exactly(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "mine")
    args = ("--data", "mine", "--batch-size", 8, "--skip-bad")
    out, _ = run("lenet_cifar.py", *args, "--epochs", 3, "--out", "a", cwd=tmp_path, before=lose_images)
    assert all(out.count(f"skipped, cannot be read: {image}\n") == 1 for image in LOST)
    for image in LOST:
        (tmp_path / image).write_text("no image")
    run("lenet_cifar.py", *args, "--epochs", 3, "--out", "whole", cwd=tmp_path, before=stream)
    run("lenet_cifar.py", *args, "--epochs", 1, "--out", "broken", cwd=tmp_path, before=stream)
    run("lenet_cifar.py", "--resume", "--epochs", 3, "--out", "broken", cwd=tmp_path, before=stream)
    one, other = (common.load_checkpoint(tmp_path / name / "last.pt") for name in ("broken", "whole"))
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)


LOST = ("mine/test/ball/0.png", "mine/train/ball/0.png")


def lose_images():
    stream()
    save = common.save_epoch

    def lose(*args):
        for image in LOST:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(image)
        return save(*args)

    common.save_epoch = lose


def test_the_next_image_that_can_be_read_replaces_another_with_its_label(folder):
    good = [folder / "train/ball/0.png", folder / "train/lying/0.png"]
    files = [folder / "missing.png", folder, *good, folder / "none.png"]
    data = common.ImageDataset(files, [2, 1, 0, 1, 0], common.Spec(["a", "b", "c"], 32), skip_bad=True)
    assert data[0][1] == 0 and data[4][1] == 0  # the first one comes after the last
    images, labels = data[:]
    assert labels.tolist() == data.labels.tolist() == [0, 0, 0, 1, 0]
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[2])
    assert data[[]][0].shape == (0, 3, 32, 32)
    data = common.ImageDataset(files[:2], [2, 1], data.spec, skip_bad=True)
    with pytest.raises(common.UserError, match="no image can be read"):
        data[0]


def test_a_csv_may_test_on_some_of_the_classes_and_a_folder_may_not(folder, tmp_path):
    for part, kinds in (("train", ("ball", "lying")), ("test", ("ball",))):
        rows = [
            f"{folder / part / kind}/{i}{end},{kind},x"
            for kind in kinds
            for i, end in enumerate([".png", ".jpg"])
        ]
        (tmp_path / f"{part}.csv").write_text("\n".join(["Picture,Kind,more", *rows]))
    _, test = common.load_data(flags(data=tmp_path), "CIFAR10")
    assert test.spec.classes == ["ball", "lying"] and test.labels.tolist() == [0, 0]


def test_files_are_resized_to_size_whatever_they_are(tmp_path):
    for part in ("train", "val"):
        for i, kind in enumerate(("1", "2", "10")):
            (tmp_path / part / kind).mkdir(parents=True)
            cv2.imwrite(
                str(tmp_path / part / kind / "x.png"), np.full((48 + i, 40, 3 - 2 * (i == 1)), 99, np.uint8)
            )
    (tmp_path / "train/1/x.png").rename(tmp_path / "train/1/x.JFIF")  # as browsers save a JPEG
    (tmp_path / "test").mkdir()
    (tmp_path / "test/1.png").touch()  # without labels, as on Kaggle: val/ is taken
    train, test = common.load_data(flags(data=tmp_path, size=24), "CIFAR10")
    assert train.spec.classes == ["1", "10", "2"]  # in the order of torchvision's ImageFolder
    assert train.images.shape == test.images.shape == (3, 24, 24, 3)
    gray, _ = common.load_data(flags(data=tmp_path, size=24), "MNIST", channels=1)
    assert gray.images.shape == (3, 24, 24, 1)


def test_a_class_folder_may_be_a_link_and_hidden_ones_are_none(folder, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / ".thumbnails").symlink_to(folder / "train/standing")
        for kind in ("ball", "lying"):
            (tmp_path / part / kind).symlink_to(folder / part / kind)
    train, test = common.load_data(flags(data=tmp_path), "CIFAR10")
    assert (train.spec.classes, len(train), len(test)) == (["ball", "lying"], 40, 14)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("file,label\nmissing.png,a\nx.png,b\n", "missing.png, .*x.png cannot be read"),
        ("file,label\n\nx.png\n", "train.csv, line 3: no file,label"),
        ("", "no images in .*train.csv: add some"),
        ("file,label\n", "no images in .*train.csv: add some"),
        ("file,label\nx.png,a\n", "1 classes"),
        ("file,label\nx.png,a\nx.png,\n", "2 classes, \\['', 'a'\\]"),
        ("file,label\nx\u2028y.png,a\nx.png,b\n", "x\u2028y.png"),
    ],
)
def test_a_bad_csv_is_refused_with_the_row_at_fault(tmp_path, text, part):
    (tmp_path / "x.png").touch()
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(text)
    with pytest.raises(common.UserError, match=part):
        common.load_data(flags(data=tmp_path), "CIFAR10")


def test_a_csv_to_train_on_alone_needs_holdout(folder, tmp_path):
    (tmp_path / "train.csv").write_text(
        f"file,label\n{folder}/train/ball/0.png,a\n{folder}/train/ball/1.jpg,b\n"
    )
    with pytest.raises(common.UserError, match=r"no images in .*test\.csv: .*--holdout N"):
        common.load_data(flags(data=tmp_path), "CIFAR10")
    assert [len(part) for part in common.load_data(flags(data=tmp_path, holdout=1), "CIFAR10")] == [1, 1]


# ------------------------------------------------------------------------------------------- training


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), *layers)


def subset(data, count):
    return common.ImageDataset(data.images[:count], data.labels[:count], data.spec)


def test_accuracy_and_loss_are_means_over_images_not_batches(digits):
    data, model = subset(digits[1], 300), network()  # batches of 256 and 44
    row, (labels, predicted, probability, mistakes) = common.evaluate(model, data, flags())
    logits = model(data.normalize(data[:][0]))
    assert row["test_loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, data.labels).item(), rel=1e-5
    )
    assert row["test_accuracy"] == (logits.argmax(1) == data.labels).sum().item() / 300
    assert torch.equal(predicted, logits.argmax(1)) and torch.equal(labels, data.labels)
    assert (
        mistakes == sorted(mistakes, key=lambda i: -probability[i])
        and len(mistakes) == (predicted != data.labels).sum()
    )


def test_images_are_counted_exactly_where_the_loss_is_in_bfloat16():
    metrics, labels = common.Metrics(), torch.zeros(301, dtype=torch.int64)
    metrics.update(torch.tensor(0.5, dtype=torch.bfloat16), torch.zeros(301, 10), labels)
    assert torch.stack(metrics.sums).tolist() == [[150.5, 301, 301]]


def test_training_is_what_a_plain_loop_does(digits):
    data, args = subset(digits[1], 50), flags(batch_size=16)
    loss_fn, models = nn.CrossEntropyLoss(), [network(), network()]
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.01)
    row, points = common.train_one_epoch(models[0], data, loss_fn, optimizer, args, epoch=2)
    optimizer, losses = torch.optim.SGD(models[1].parameters(), lr=0.01), []
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    for indices in order.split(16):
        optimizer.zero_grad()
        loss = loss_fn(models[1]((data[indices][0] / 255 - 0.5) / 0.5), data.labels[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
    assert [step for step, _ in points] == [5, 6, 7, 8]  # the second epoch of 4 steps
    assert [loss for _, loss in points] == pytest.approx(losses, rel=1e-5)
    assert row["train_loss"] == pytest.approx(np.average(losses, weights=[16, 16, 16, 2]), rel=1e-5)


def train(tmp_path, data, out, epochs, make_scheduler=None, augment=None, model=None, **options):
    """`fit` as a copied recipe calls it; returns the history, and the learning rate at the end."""
    argv = [
        "--data",
        "drawn",
        "--batch-size",
        "16",
        "--epochs",
        str(epochs),
        "--out",
        str(tmp_path / out),
        "--quiet",
    ]
    args = lenet_cifar.parser().parse_args([*argv, *["--resume"] * (tmp_path / out).exists()])
    model = model() if model else network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    loss_fn = nn.CrossEntropyLoss()
    history = common.fit(model, data, data, loss_fn, optimizer, args, scheduler, augment, **options)
    return history, optimizer.param_groups[0]["lr"], model


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "NumPy": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: np.cos(epoch / 4)),
    "Plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=16),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_schedulers_are_stepped_as_their_documentation_says_and_resume_exactly(
    tmp_path, digits, name, capsys
):
    data, make = subset(digits[1], 60), SCHEDULERS[name]  # 4 steps an epoch
    whole, lr, model = train(tmp_path, data, "whole", 4, make)
    if name == "StepLR":
        assert [row["lr"] for row in whole] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    if name == "Plateau":
        assert whole[-1]["lr"] < 0.01
    train(tmp_path, data, "broken", 2, make)
    again, same_lr, same_model = train(tmp_path, data, "broken", 4, make)
    columns = ("epoch", "lr", "train_loss", "test_loss", "test_accuracy")
    assert [[row[c] for c in columns] for row in again] == [[row[c] for c in columns] for row in whole]
    assert lr == same_lr
    torch.testing.assert_close(same_model.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_one_cycle_works_with_very_few_steps(digits, epochs):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    scheduler = common.one_cycle(optimizer, subset(digits[1], 5), flags(epochs=epochs, lr=0.1))
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        common.step_scheduler(scheduler)
    assert max(rates) == 0.1 and min(rates) > 0


def test_a_transform_of_torchvision_draws_for_each_image_and_resumes_exactly(tmp_path, digits):
    seen = []

    class Record(v2.Transform):
        def transform(self, inpt, params):
            seen.append(inpt)
            return inpt

    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4), Record()])
    data = subset(digits[1], 1)
    many = common.ImageDataset(data.images.expand(60, -1, -1, -1), data.labels.expand(60), data.spec)
    _, _, model = train(tmp_path, many, "whole", 2, augment=transform)
    assert seen[0].shape == (3, 32, 32) and seen[0].dtype == torch.uint8
    assert len({bytes(image.numpy()) for image in seen}) > 30
    train(tmp_path, many, "broken", 1, augment=transform)
    _, _, same = train(tmp_path, many, "broken", 2, augment=transform)
    torch.testing.assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)
    floats = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.RandomErasing(p=1)])
    train(tmp_path, many, "floats", 1, augment=floats)


def test_after_epoch_gets_the_row_and_may_end_the_run(tmp_path, digits, capsys, monkeypatch):
    monkeypatch.setattr(common, "HAS_MATPLOTLIB", True)
    rows = []
    stop = lambda row: rows.append(row) or row["epoch"] == 2  # noqa: E731
    history, _, _ = train(tmp_path, subset(digits[1], 60), "a", 9, after_epoch=stop)
    assert history == rows and len(history) == 2
    assert "best epoch: " in capsys.readouterr().out and (tmp_path / "a/confusion.png").exists()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(96, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.lstm(x.flatten(1, 2).movedim(1, 2).reshape(len(x), 32, 96))[0][:, -1])


def test_what_a_copied_recipe_may_have_trains_and_resumes(tmp_path, digits, capsys):
    data = subset(digits[1], 60)
    data.spec = dataclasses.replace(data.spec, classes=tuple(data.spec.classes))
    note = lambda row: row.update(norm=torch.ones(1))  # noqa: E731
    for epochs in (2, 3):
        history, _, _ = train(tmp_path, data, "a", epochs, model=Recurrent, after_epoch=note)
    assert len(history) == 3 and capsys.readouterr().out.count("best epoch") == 2


def test_an_interrupted_cell_of_a_notebook_runs_again(tmp_path, digits):
    def stop(row):
        raise KeyboardInterrupt

    data = subset(digits[1], 60)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 epochs are saved in") as kept:
        train(tmp_path, data, "a", 2, after_epoch=stop)
    history, _, _ = train(tmp_path, data, "a", 2)  # while `kept` has the frames of the first, as IPython does
    assert len(history) == 2 and kept
    with pytest.raises(RuntimeError, match="shapes") as kept:
        train(tmp_path, data, "b", 1, model=lambda: network(nn.Linear(9, 9)))
    history, _, _ = train(tmp_path, data, "b", 1)
    assert len(history) == 1 and kept


def test_batch_normalization_leaves_a_last_batch_of_one_image_out(tmp_path, digits):
    make = lambda: network(nn.BatchNorm1d(10))  # noqa: E731
    history, _, _ = train(tmp_path, subset(digits[1], 33), "a", 2, model=make)
    assert len(history) == 2


def test_smoothed_labels_do_not_show_in_the_test_loss(digits):
    model = network()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_().add_(100 * torch.eye(10)[3])  # it is sure of 3
    threes = digits[1].labels == 3
    data = common.ImageDataset(digits[1].images[threes], digits[1].labels[threes], digits[1].spec)
    assert common.evaluate(model, data, flags())[0]["test_loss"] == 0


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("whole")
    with pytest.raises(ZeroDivisionError), common.atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "whole" and [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to("elsewhere")  # which is replaced, not followed
    with common.atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_text() == "new" and (tmp_path / "elsewhere").read_text() == "whole"


# ------------------------------------------------------------------------------------------- downloads


def batch(rng, labels=(0, 1, 0, 1)):
    return {"data": rng.integers(256, size=(len(labels), 3072), dtype=np.uint8), "labels": list(labels)}


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10's archive with 4 images a batch, which torchvision takes for the real one; its pixels."""
    rng, md5, kind = np.random.default_rng(0), {}, torchvision.datasets.CIFAR10
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    content = {name: batch(rng) for name in names}
    classes = ["cat", "dog"]
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, value in {**content, "batches.meta": {"label_names": classes}}.items():
            data = pickle.dumps(value, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size, md5[name] = len(data), hashlib.md5(data).hexdigest()
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((tmp_path / "a.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["batches.meta"]})
    return {name: value["data"] for name, value in content.items()}


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `content` whole, or in the way that the path names; `requests` keeps the paths asked for."""

    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.content
        if self.path == "/dead":
            return self.send_error(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half, wrong = content[: len(content) // 2], content[::-1]
        return self.wfile.write({"/breaks": half, "/wrong": wrong}.get(self.path, content))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, cifar10):
    """A server on 127.0.0.1 with the archive."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.content, server.requests = (tmp_path / "a.tar.gz").read_bytes(), []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_cifar10_comes_from_the_first_mirror_that_has_it_and_is_downloaded_once(
    tmp_path, monkeypatch, cifar10, server
):
    bad = ["http://127.0.0.1:9/nobody", *(f"{server.address}/{name}" for name in ("dead", "wrong", "breaks"))]
    monkeypatch.setattr(common, "CIFAR10_MIRRORS", [*bad, f"{server.address}/good"])
    args = flags(data=tmp_path / "new", download=True)
    for _ in range(2):
        train, test = common.load_data(args, "CIFAR10")
        assert np.array_equal(train[5][0].numpy().ravel(), cifar10["data_batch_2"][1])
        assert (len(train), len(test), train.spec.classes) == (20, 4, ["cat", "dog"])
    assert server.requests.count("/good") == 2  # torchvision asks for a redirection first
    own, _ = common.load_data(flags(data=tmp_path / "new/cifar-10-batches-py"), "CIFAR10")
    shutil.copytree(tmp_path / "new", tmp_path / "cifar10")
    same, _ = common.load_data(flags(data=tmp_path / "cifar10"), "CIFAR10")
    assert len(own) == len(same) == 20  # its own folder may be named, or one with a similar name that has it
    (tmp_path / "new/cifar-10-batches-py/data_batch_3").write_bytes(b"half a file")
    train, _ = common.load_data(args, "CIFAR10")  # from the archive, which is still there
    assert len(train) == 20 and server.requests.count("/good") == 2


def test_no_mirror_and_a_folder_that_is_not_there_are_errors(tmp_path, monkeypatch, cifar10):
    monkeypatch.setattr(common, "CIFAR10_MIRRORS", [])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar")
    with pytest.raises(common.UserError, match=r"CIFAR10 does not download.*--data drawn"):
        common.load_data(flags(data=tmp_path / "new", download=True), "CIFAR10")
    (tmp_path / "loose/cat").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "loose/cat/x.png"), np.zeros((9, 9), np.uint8))
    shutil.copytree(tmp_path / "loose", tmp_path / "kaggle/Training")
    for name in ("mistyped", "loose", "kaggle", "cifar10"):
        with pytest.raises(common.UserError, match=rf"no folder .*{name} with train/<class>/.*--download"):
            common.load_data(flags(data=tmp_path / name), "CIFAR10")


def test_unpack_writes_folders_that_train_as_they_are(tmp_path, monkeypatch, cifar10):
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        tar.extractall(tmp_path / "data", filter="data")
    monkeypatch.setattr(sys, "argv", ["common.py", "unpack", str(tmp_path / "data"), str(tmp_path / "out")])
    common.unpack()
    expected = cifar10["data_batch_2"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(common.decode(tmp_path / "out/train/dog/00005.png"), expected)
    train, test = common.load_data(flags(data=tmp_path / "out"), "CIFAR10")
    assert (len(train), len(test), train.spec.classes) == (20, 4, ["cat", "dog"])
    (tmp_path / "data/cifar-10-batches-py/data_batch_3").write_bytes(b"not what its md5 says")
    monkeypatch.setattr(common, "CIFAR10_MIRRORS", [])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar")
    with pytest.raises(common.UserError, match="does not download"):
        common.unpack()


# ------------------------------------------------------------------------------------- other data sets


def idx(array):
    """An array in MNIST's file format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_emnist(root, rng):
    raw = root / "EMNIST/raw"
    raw.mkdir(parents=True)
    for split in torchvision.datasets.EMNIST.splits:
        for part in ("train", "test"):
            images, labels = rng.integers(256, size=(6, 28, 28), dtype=np.uint8), np.arange(6, dtype=np.uint8)
            (raw / f"emnist-{split}-{part}-images-idx3-ubyte").write_bytes(idx(images))
            (raw / f"emnist-{split}-{part}-labels-idx1-ubyte").write_bytes(idx(labels))


def write_usps(root, rng):
    rows = [f"{i % 10 + 1} " + " ".join(f"{j + 1}:{v:.3f}" for j, v in enumerate(rng.uniform(-1, 1, 256)))
            for i in range(12)]  # fmt: skip
    for name in ("usps.bz2", "usps.t.bz2"):
        (root / name).write_bytes(bz2.compress("\n".join(rows).encode()))


def write_eurosat(root, rng):
    for name in ("Forest", "River"):
        (root / "eurosat/2750" / name).mkdir(parents=True)
        for i in range(6):
            image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(root / f"eurosat/2750/{name}/{i}.jpg"), image)


def write_stl10(root, rng):
    folder = root / "stl10_binary"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}_X.bin").write_bytes(
            rng.integers(256, size=(4, 3, 96, 96), dtype=np.uint8).tobytes()
        )
        (folder / f"{name}_y.bin").write_bytes(np.array([1, 2, 1, 2], np.uint8).tobytes())
    (folder / "class_names.txt").write_text("airplane\nbird\n")


@pytest.mark.parametrize(
    ("name", "write", "sizes", "holdout"),
    [
        ("EMNIST", write_emnist, (6, 6), 0),
        ("USPS", write_usps, (12, 12), 0),
        ("EuroSAT", write_eurosat, (8, 4), 4),
        ("STL10", write_stl10, (4, 4), 0),
    ],
)
def test_other_data_sets_of_torchvision_need_one_changed_word(
    tmp_path, monkeypatch, name, write, sizes, holdout
):
    write(tmp_path, np.random.default_rng(0))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    train, test = common.load_data(flags(data=tmp_path, holdout=holdout), name)
    assert (len(train), len(test)) == sizes
    assert train[0][0].shape == (3, 32, 32) and len(train.spec.classes) > int(train.labels.max())
    kind = getattr(torchvision.datasets, name)
    if name == "STL10":  # (3, H, W) in its files
        expected = np.asarray(kind(tmp_path, split="train")[1][0].resize((32, 32)), np.float32)
        found = train[1][0].permute(1, 2, 0).numpy()
        assert np.abs(expected - found).mean() < 30  # another interpolation, but the same image
    if name == "EMNIST":  # upright, which torchvision's are not
        expected = np.asarray(kind(tmp_path, split="balanced")[1][0]).T
        train, _ = common.load_data(flags(data=tmp_path, size=28), name)
        assert np.array_equal(train[1][0][0], expected)
    if name == "EuroSAT":
        with pytest.raises(common.UserError, match="no test set: add --holdout N"):
            common.load_data(flags(data=tmp_path), name)


def test_a_root_of_several_data_sets_is_taken(tmp_path, cifar10):
    write_eurosat(tmp_path, np.random.default_rng(0))
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    assert len(common.load_data(flags(data=tmp_path), "CIFAR10")[0]) == 20


PACKED = ROOT.parent / "shared/data/unpack.py"


@pytest.mark.skipif(not PACKED.exists(), reason="needs the real data sets, packed, beside the repository")
def test_the_real_data_sets_are_read_as_torchvision_reads_them(tmp_path):
    subprocess.run([sys.executable, PACKED, tmp_path], check=True, stdout=subprocess.DEVNULL)
    train, test = common.load_data(flags(data=tmp_path), "CIFAR10")
    reference = torchvision.datasets.CIFAR10(tmp_path, train=False)
    assert len(train) == 50_000 and train.spec.classes == reference.classes
    assert np.array_equal(test.images.numpy(), reference.data) and test.labels.tolist() == reference.targets
    digits = common.load_data(flags(data=tmp_path, size=28), "MNIST", channels=1, mean=0, std=1)[1]
    assert torch.equal(digits.images[..., 0], torchvision.datasets.MNIST(tmp_path, train=False).data)
    dark, images = mnist_cnn.DarkBackground(), digits.normalize(digits[:][0])
    assert torch.equal(dark(images), images)  # it leaves MNIST as it is, and makes ink on paper like it
    torch.testing.assert_close(dark(1 - images), images)


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.pick_device("auto") == common.pick_device("cuda") == torch.device("cuda:1")
    assert common.pick_device("cpu") == CPU
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.UserError, match="cuda:2 is not there: this machine has cuda:0, cuda:1, cpu"):
        common.pick_device("auto")
