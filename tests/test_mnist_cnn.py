"""What a user of mnist_cnn.py may rely on besides what all recipes share."""

import struct
from pathlib import Path

import common
import mnist_cnn
import predict

import numpy as np
import pytest
import torch
import torchvision


def train(flags):
    return mnist_cnn.main(flags.split())


@pytest.fixture
def mnist():
    """data/ has 40 + 10 images in MNIST's own format, for both data sets: a bar for each class."""
    rng = np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        raw = Path("data", name, "raw")
        raw.mkdir(parents=True)
        for part, count in (("train", 40), ("t10k", 10)):
            labels = np.arange(count, dtype=np.uint8) % 10
            images = rng.integers(0, 30, (count, 28, 28), dtype=np.uint8)
            for image, label in zip(images, labels, strict=True):
                image[2 + 2 * label : 6 + 2 * label, 5:23] = 250
            head = struct.pack(">IIII", 2051, count, 28, 28)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
            head = struct.pack(">II", 2049, count)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


@pytest.mark.parametrize(("dataset", "first"), [("mnist", "0"), ("fashion", "T-shirt/top")])
@pytest.mark.parametrize("model", ["cnn", "lenet5"])
def test_both_networks_learn_both_data_sets_and_predict_as_tested(
    mnist, dataset, first, model, capsys
):
    flags = f"--dataset {dataset} --model {model} --lr 0.003 --batch-size 8 --epochs 8"
    history = train(flags)
    assert history[-1]["train_loss"] < 1.5 < history[0]["train_loss"]
    assert "40 + 10 images" in capsys.readouterr().out
    network, spec = predict.load_model("runs/mnist_cnn/last.pt")
    assert (spec.classes[0], spec.size, spec.channels) == (first, 28, 1)

    kind = getattr(torchvision.datasets, mnist_cnn.DATASETS[dataset])
    tested = kind("data", train=False)
    files = []
    for i, (image, _) in enumerate(tested):
        files.append(Path(f"{i}.png"))
        image.save(files[i])
    results = list(predict.classify(network, spec, files))
    assert all(torch.equal(image[0], tested.data[i]) for i, (_, image, _) in enumerate(results))
    predicted = torch.stack([probabilities for _, _, probabilities in results]).argmax(1)
    accuracy = (predicted == tested.targets).double().mean()
    assert accuracy == pytest.approx(history[-1]["test_accuracy"])


def test_photos_of_digits_become_light_on_black():
    digit = torch.zeros(1, 1, 28, 28)
    digit[..., 4:24, 12:16] = 220 / 255
    dark = mnist_cnn.DarkBackground()
    assert torch.equal(dark(digit), digit)
    torch.testing.assert_close(dark(1 - digit), digit)
    white = (digit > 0).float()
    gray_paper = torch.where(white > 0, 0.1, 0.7)
    gray_background = torch.where(white > 0, 0.7, 0.35)
    for images in (gray_paper, gray_background):
        torch.testing.assert_close(dark(images), white)
    both = torch.cat([digit, gray_paper])
    torch.testing.assert_close(dark(both), torch.cat([digit, white]))  # each image by itself


def test_each_image_is_rotated_scaled_moved_and_flipped_by_its_own_draw():
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[:, :, 8:20, 6:10] = 255  # an upright bar, left of the middle
    some = image.expand(300, 1, 28, 28)
    torch.manual_seed(0)
    found = mnist_cnn.random_affine(some, flip=False)
    assert found.shape == some.shape
    assert len(found.unique(dim=0)) == 300
    assert found.min() >= 0
    assert found.max() <= 1.001
    mass = found.sum((1, 2, 3))
    area = mass / 48
    assert 0.8 < area.min() < 0.9  # 8 % a side
    assert 1.1 < area.max() < 1.25
    column = (found.sum((1, 2)) * torch.arange(28)).sum(1) / mass
    assert 7.5 - 3 < column.min() < 7
    assert 8 < column.max() < 7.5 + 3
    found = mnist_cnn.random_affine(some, flip=True)
    is_right = found[..., 14:].sum((1, 2, 3)) > found[..., :14].sum((1, 2, 3))
    assert 0.4 < is_right.float().mean() < 0.6


@pytest.mark.parametrize(("dataset", "flip"), [("mnist", False), ("fashion", True)])
def test_clothes_are_flipped_and_digits_are_not(dataset, flip, monkeypatch):
    monkeypatch.setattr(common, "fit", lambda *arguments: arguments)
    *_, augment = train(f"--tuned --data drawn --dataset {dataset}")
    assert augment.keywords == {"flip": flip}


def test_the_networks_have_the_sources_shapes():
    assert mnist_cnn.CNN(1, 28, 10).fc1.in_features == 576
    lenet5 = mnist_cnn.LeNet5(1, 28, 10)
    assert lenet5.fc1.in_features == 16 * 6 * 6
    assert lenet5(torch.zeros(5, 1, 28, 28)).shape == (5, 10)
