"""What a recipe, or a script of one's own, may rely on in common.py."""

import fcntl
import functools
import os
import pty
import re
import resource
import runpy
import shutil
import signal
import struct
import sys
import termios
import time
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import common
import lenet_cifar
import predict
from common import UserError, load_checkpoint, load_data

import numpy as np
import pytest
import torch
from conftest import ROOT, one_error_line
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import normalize

CPU = torch.device("cpu")


def flags(text=""):
    """Of a quick run in the folder a, which continues the one that is there."""
    return lenet_cifar.parse_args(f"--out a --resume --batch-size 16 {text}".split())


@functools.cache
def load_digits():
    return load_data(flags("--data drawn"), "CIFAR10")[0]


def digits(count):
    whole = load_digits()
    return common.ImageDataset(whole.images[:count], whole.labels[:count], whole.spec)


def network(*layers, classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes), *layers)


def train(data, text, make_scheduler=None, model=None, **options):
    """`fit` as a script of one's own calls it, with a learning rate for the weights and another for
    the biases."""
    model = model or network(classes=len(data.spec.classes))
    groups = [{"params": [part], "lr": 0.01 / part.ndim} for part in model.parameters()]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    options["scheduler"] = make_scheduler and make_scheduler(optimizer)
    loss_fn = nn.CrossEntropyLoss()
    return common.fit(model, data, data, loss_fn, optimizer, flags(text), **options)


def fingerprint(folder):
    """What a resumed run has to have in common with an unbroken one: all but the clock."""
    saved = load_checkpoint(Path(folder, "last.pt"))
    del saved["settings"]
    for row in saved["history"]:
        del row["train_seconds"], row["test_seconds"], row["images_per_second"]
    return tree_map_only(torch.Tensor, lambda tensor: hash(tensor.numpy().tobytes()), saved)


# ---------------------------------------------------------------- images


def test_images_are_indexed_one_by_one_or_by_the_batch():
    data = digits(600)
    image, label = data[3]
    assert image.shape == (3, 32, 32)
    assert label == data.labels[3]
    loader = DataLoader(data, batch_size=2, sampler=[4, 5])
    for images, labels in (data[torch.tensor([4, 5])], data[4:6], next(iter(loader))):
        assert torch.equal(images, data.images[4:6].movedim(-1, 1))
        assert torch.equal(labels, data.labels[4:6])


IMAGES = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "part"),
    [
        (IMAGES.transpose(0, 3, 1, 2), [0, 1, 0, 1], "channels last"),
        (IMAGES / 255, [0, 1, 0, 1], "uint8"),
        (IMAGES, [0, 1, 0], r"\(3, 8, 8, 3\)"),
        (IMAGES, [0, 1, 0, 2], "from 0 to 1"),
        (IMAGES, [0, 1, 0, -1], "from 0 to 1"),
        (IMAGES, [0.0, 1.0, 0.0, 1.0], "integers"),
        (IMAGES, np.eye(2, dtype=int)[[0, 1, 0, 1]], "integers"),
        (IMAGES, [0, 1, 0, 1], "1 files for 4 images"),
    ],
)
def test_arrays_that_would_be_read_wrongly_are_refused(images, labels, part):
    spec = common.Spec("ab", 8)
    with pytest.raises(UserError, match=part):
        common.ImageDataset(images, labels, spec, ["a.png"])
    right = np.array([0, 1, 0, 1], np.uint8)
    assert common.ImageDataset(IMAGES, right, spec)[:][1].tolist() == [0, 1, 0, 1]


def test_arrays_are_kept_in_the_order_that_is_fast_to_index():
    channels_first = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    data = common.ImageDataset(channels_first.movedim(1, -1), [0] * 4, common.Spec("ab", 8))
    assert data.images.is_contiguous()


def test_normalization_is_torchvisions():
    spec = common.Spec("ab", 32, mean=(0.1, 0.2, 0.3), std=np.float64(0.25))
    assert (spec.mean, type(spec.std)) == ([0.1, 0.2, 0.3], float)  # plain, for a checkpoint
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = normalize(images / 255, [0.1, 0.2, 0.3], [0.25] * 3)
    torch.testing.assert_close(common.Normalize(spec)(images), expected)


def test_each_image_is_flipped_and_cropped_by_its_own_draw():
    def contents(images):
        return {image.numpy().tobytes() for image in images}

    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    padded = nn.functional.pad(image.float(), [2] * 4, mode="reflect").byte()
    crops = [padded[0, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
    flipped = [crop.flip(2) for crop in crops]
    torch.manual_seed(1)
    for flip, ways in ((True, crops + flipped), (False, crops)):
        found = common.random_flip_and_crop(image.expand(300, 1, 8, 8), padding=2, flip=flip)
        drawn = contents(found)
        assert drawn <= contents(ways)
        assert len(drawn) > 0.8 * len(ways)


@pytest.mark.parametrize("module", [transforms, v2])
def test_a_transform_of_torchvision_draws_for_each_image(module):
    augment = module.Compose([module.RandomHorizontalFlip(), module.RandomCrop(32, padding=4)])
    same = torch.zeros(60, dtype=torch.int64)
    ((images, _),) = common.load_batches(digits(1), [same], CPU, augment)
    assert len(images.unique(dim=0)) > 30


def test_an_augment_gives_floats_from_0_to_1_and_others_are_an_error():
    load = partial(common.load_batches, digits(8), [torch.arange(8)], CPU)
    ((expected, _),) = load()
    ((images, _),) = load(v2.ToDtype(torch.float32, scale=True))
    torch.testing.assert_close(images, expected)
    with pytest.raises(UserError, match="augment gives floats that are not from 0 to 1"):
        train(digits(32), "--epochs 1", augment=lambda images: images / 127.5 - 1)


def test_limited_batches_are_of_all_classes_and_the_same_for_every_seed():
    sets = load_data(flags("--data drawn --limit-batches 10"), "CIFAR10")
    assert [len(part.labels.unique()) for part in sets] == [10, 10]
    again, _ = load_data(flags("--data drawn --limit-batches 10 --seed 9"), "CIFAR10")
    assert torch.equal(again.images, sets[0].images)


# ---------------------------------------------------------------- more images than memory holds


@pytest.fixture
def mine(folder):
    """The folder mine, where an image is none."""
    shutil.copytree(folder, "mine")
    bad = Path("mine/train/ball/0.png")
    bad.write_text("no image")
    return bad


def test_a_set_too_large_for_memory_streams_and_gives_the_same(folder, monkeypatch):
    args = flags(f"--data {folder}")
    whole, _ = load_data(args, "CIFAR10")
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    streamed, _ = load_data(args, "CIFAR10")
    assert isinstance(streamed, common.StreamedImageDataset)
    batches = torch.randperm(60).split(16)
    both = [common.load_batches(part, batches, CPU) for part in (whole, streamed)]
    for (images, labels), (same_images, same_labels) in zip(*both, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_the_next_batch_is_read_while_one_is_trained_on_and_no_other(folder, monkeypatch):
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    data, _ = load_data(flags(f"--data {folder}"), "CIFAR10")
    data.read = Mock(wraps=data.read)
    batches = data.load(torch.arange(60).split(10))
    next(batches)
    end = time.monotonic() + 10
    while data.read.call_count < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert data.read.call_count == 2
    assert len(list(batches)) == 5


@pytest.mark.parametrize("memory", [0, 2**31])
def test_images_that_cannot_be_read_are_left_out_with_skip_bad(mine, monkeypatch, capsys, memory):
    monkeypatch.setattr(common, "IN_MEMORY", memory)
    data, _ = load_data(flags("--data mine --skip-bad"), "CIFAR10")
    left_out = r"1 of 60 images cannot be read and are left out.* of ball\n"
    assert re.search(left_out, capsys.readouterr().out)
    assert data[:][1].bincount().tolist() == [19, 20, 20]


def test_an_image_that_cannot_be_read_is_named(mine):
    with pytest.raises(UserError, match=f"{mine} cannot be read.*, or add --skip-bad"):
        load_data(flags("--data mine"), "CIFAR10")


def test_an_image_that_goes_bad_while_streaming_ends_the_run_and_can_be_left_out(
    folder, mine, monkeypatch
):
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    shutil.copy(folder / "train/ball/0.png", mine)
    data, _ = load_data(flags("--data mine"), "CIFAR10")
    named = f"{mine} cannot be read.*, or add --skip-bad; 1 of 3 epochs are saved in a"
    with pytest.raises(UserError, match=named):
        train(data, "--epochs 3", after_epoch=lambda run: mine.write_text("no image") == 0)
    data, _ = load_data(flags("--data mine --skip-bad"), "CIFAR10")
    with pytest.raises(UserError, match="cannot change training_images from 60 to 59"):
        train(data, "--epochs 3")
    assert len(train(data, "--epochs 3 --skip-bad")) == 3


# ---------------------------------------------------------------- training


def test_accuracy_and_loss_are_means_over_images_not_batches():
    data = digits(300)  # batches of 256 and 44
    model = network()
    row, found = common.evaluate(model, data, flags())
    logits = model(data.normalize(data[:][0]))
    loss = nn.functional.cross_entropy(logits, data.labels).item()
    assert row["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["test_accuracy"] == (logits.argmax(1) == data.labels).sum().item() / 300
    assert torch.equal(found.classes, logits.argmax(1))
    torch.testing.assert_close(found.probabilities, logits.softmax(1).amax(1))


def test_precision_recall_and_f1_are_each_classes_own():
    labels = torch.tensor([0, 0, 0, 1])
    predicted = torch.tensor([0, 0, 1, 1])
    found = common.Predictions(labels, predicted, torch.ones(4))
    expected = [[1, 2 / 3, 4 / 5, 3], [1 / 2, 1, 2 / 3, 1], [0, 0, 0, 0]]
    np.testing.assert_allclose(found.by_class(3), expected, rtol=1e-6)


def test_training_is_what_a_plain_loop_does():
    data = digits(50)
    loss_fn = nn.CrossEntropyLoss()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    row, curve = common.train_one_epoch(model, data, loss_fn, optimizer, flags(), epoch=2)
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    losses = []
    for indices in torch.randperm(50, generator=torch.Generator().manual_seed(2)).split(16):
        optimizer.zero_grad()
        loss = loss_fn(plain((data[indices][0] / 255 - 0.5) / 0.5), data.labels[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    second_epoch = dict(zip(range(5, 9), losses, strict=True))
    assert dict(curve) == pytest.approx(second_epoch, rel=1e-5)
    assert row["train_loss"] == pytest.approx(np.average(losses, weights=[16, 16, 16, 2]))


def test_best_pt_and_predictions_csv_are_of_the_highest_accuracy_then_the_lowest_loss():
    scores = iter([(0.5, 1.0), (0.7, 2.0), (0.7, 1.5), (0.6, 0.1)])
    data = digits(100)

    def mine(model, dataset, args):
        row, found = common.evaluate(model, dataset, args)
        row["test_accuracy"], row["test_loss"] = next(scores)
        row["confusion"] = np.eye(2)
        return row, found

    train(data, "--epochs 4", evaluate=mine)
    assert len(load_checkpoint("a/best.pt")["history"]) == 3
    model, _ = predict.load_model("a/best.pt", model=network())
    _, found = common.evaluate(model, data, flags())  # it normalizes, evaluate() does not again
    rows = np.loadtxt("a/predictions.csv", delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == list(range(100))
    assert rows[:, 1].tolist() == data.labels.tolist()
    assert rows[:, 2].tolist() == found.classes.tolist()
    assert rows[:, 3] == pytest.approx(found.probabilities.numpy())


SCHEDULERS = {
    "one_cycle": lambda o: common.one_cycle(o, digits(60), flags("--epochs 4")),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "NumPy": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: np.cos(epoch / 4)),
    "Plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=0),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_schedulers_are_stepped_as_their_documentation_says_and_resume_exactly(name):
    def train_to(epoch, out):
        return train(
            digits(60),  # 4 steps an epoch
            f"--epochs 4 --out {out}",
            SCHEDULERS[name],
            network(nn.Dropout(0.1)),
            augment=partial(common.random_flip_and_crop, padding=2),
            after_epoch=lambda run: len(run.history) == epoch,
        )

    rates = [row["lr"] for row in train_to(4, "whole")]
    if name == "StepLR":
        assert rates == pytest.approx([0.005, 0.005, 0.0005, 0.0005])
    if name == "Plateau":
        assert rates == pytest.approx([0.005, 0.005, 0.0005, 0.00005])
    if name == "CyclicLR":
        assert rates == pytest.approx([0.001 + 0.099 * 4 * i / 2000 for i in range(4)])
    train_to(2, "broken")
    train_to(4, "broken")
    assert fingerprint("broken") == fingerprint("whole")


def test_a_schedule_that_ends_is_not_resumed_with_more_epochs():
    cosine = lr_scheduler.CosineAnnealingLR
    train(digits(32), "--epochs 1", partial(cosine, T_max=1))
    with pytest.raises(UserError, match="T_max from 1 to 2"):
        train(digits(32), "--epochs 2", partial(cosine, T_max=2))


@pytest.mark.parametrize("epochs", [1, 30])
def test_one_cycle_takes_each_group_to_its_own_rate_and_none_below_0(epochs):
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.01, 0.1)]
    optimizer = torch.optim.SGD(groups)
    scheduler = common.one_cycle(optimizer, digits(5), flags(f"--epochs {epochs}"))
    rates = []
    for _ in range(epochs):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert np.max(rates, 0).tolist() == pytest.approx([0.01, 0.1], rel=0.02)
    assert np.min(rates) > 0
    assert min(scheduler.get_last_lr()) >= 0


def test_after_epoch_gets_the_whole_run_after_a_resume_too_and_may_end_it(capsys):
    seen = []

    def after_epoch(run):
        seen.append([row["epoch"] for row in run.history])
        return len(run.history) in (2, 3)

    for _ in range(2):
        train(digits(32), "--epochs 9", after_epoch=after_epoch)
    assert seen == [[1], [1, 2], [1, 2, 3]]
    assert "there is no last.pt in a: a new run begins" in capsys.readouterr().out


def test_settings_are_a_recipes_without_a_command_line():
    args = common.settings(epochs=1, out=Path("a"), device="cpu", lr=0.5)
    assert (args.epochs, args.out, args.device, args.lr) == (1, "a", CPU, 0.5)
    with pytest.raises(TypeError, match="'epoch'"):
        common.settings(epoch=3)
    with pytest.raises(UserError, match="--epochs: 0"):
        common.settings(epochs=0)


def test_settings_of_a_run_that_is_resumed_are_its_own_where_the_call_says_nothing():
    train(digits(32), "--epochs 1")
    args = common.settings(out="a", resume=True, epochs=2)
    assert (args.batch_size, args.epochs) == (16, 2)


def test_a_terminal_gets_a_progress_bar_with_epoch_loss_and_accuracy(monkeypatch):
    def slowly(images):
        time.sleep(0.1)
        return images

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows, columns
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train(digits(160), "--epochs 1", augment=slowly)
        shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert re.search(r"epoch 1/1 \|.*loss 2\.\d\d, accuracy 0\.\d\d", shown)


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint():
    def explode(optimizer):
        return lr_scheduler.LambdaLR(optimizer, lambda epoch: 1e40 if epoch else 1)

    with pytest.raises(UserError, match="a smaller --lr; 1 of 3 epochs are saved in a"):
        train(digits(32), "--epochs 3", explode)
    assert len(load_checkpoint("a/last.pt")["history"]) == 1


def test_a_full_disk_leaves_the_last_good_checkpoint():
    train(digits(32), "--epochs 1")
    before = Path("a/best.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes a file
        with pytest.raises(UserError, match=r"disk full.*; 1 of 2 epochs are saved in a"):
            train(digits(32), "--epochs 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("a/best.pt").read_bytes() == before
    assert not list(Path("a").glob("*.tmp"))
    assert len(load_checkpoint("a/last.pt")["history"]) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_cell_of_a_notebook_that_was_interrupted_or_failed_runs_again(error):
    def stop(run):
        raise error

    with pytest.raises(error) as kept:
        train(digits(32), "--epochs 2", after_epoch=stop)
    if error is KeyboardInterrupt:
        assert "1 of 2 epochs are saved in a, continue with --resume --out a" in str(kept.value)
    assert len(train(digits(32), "--epochs 2")) == 2  # while the error has the frames of the first


def test_a_ctrl_c_that_a_destructor_swallowed_still_ends_the_run(monkeypatch):
    def swallow(run):
        monkeypatch.setattr(common, "SIGNALS", [signal.SIGINT])

    with pytest.raises(KeyboardInterrupt, match="1 of 9 epochs are saved"):
        train(digits(32), "--epochs 9", after_epoch=swallow)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_stops_a_run_right_after_the_checkpoint_counts_its_epoch(monkeypatch, error):
    monkeypatch.setattr(common, "write_table", Mock(side_effect=error))
    with pytest.raises((KeyboardInterrupt, UserError), match="1 of 3 epochs are saved"):
        train(digits(32), "--epochs 3")


def test_import_has_no_effects_on_the_users_process():
    def state():
        return [*warnings.filters], signal.getsignal(signal.SIGINT), sys.excepthook

    before = state()
    for name in ("readers", "figures", "common"):
        runpy.run_path(str(ROOT / f"{name}.py"))
    assert state() == before


def exit_status(main, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as stop:
        common.cli(main)
    return stop.value.code


def test_a_network_with_other_outputs_than_classes_is_refused():
    with pytest.raises(UserError, match="11 outputs"):
        train(digits(32), "--epochs 1", model=network(classes=11))


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    assert exit_status(main, monkeypatch) == 2
    one_error_line(capsys.readouterr().err, "out of memory", "smaller --batch-size")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main():
        raise ValueError("skip connection: cannot allocate 64 channels")

    with pytest.raises(ValueError, match="skip connection"):
        exit_status(main, monkeypatch)


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.pick_device("auto") == common.pick_device("cuda") == torch.device("cuda:1")
    assert common.pick_device("cpu") == CPU
