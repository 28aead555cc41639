"""What a user of mnist_cnn.py may rely on besides what all recipes share."""

import gzip
import struct

import cv2
import numpy as np
import pytest
import torch
from conftest import run, start

import common
import mnist_cnn


def test_one_batch_of_drawn_digits(tmp_path):
    process = start("mnist_cnn.py", "--data", "drawn", "--epochs", 1, "--limit-batches", 1, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    spec = common.load_checkpoint(tmp_path / "runs/mnist_cnn/last.pt")["spec"]
    assert (spec["size"], spec["channels"]) == (28, 1)


@pytest.fixture
def mnist(tmp_path):
    """A folder with 40 + 10 pictures in MNIST's own format, for both data sets."""
    rng = np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        raw = tmp_path / "data" / name / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 40), ("t10k", 10)):
            labels = (np.arange(count) % 10).astype(np.uint8)
            pictures = rng.integers(0, 30, (count, 28, 28), dtype=np.uint8)
            for picture, label in zip(pictures, labels, strict=True):
                picture[2 + 2 * label : 6 + 2 * label, 5:23] = 250
            images = struct.pack(">IIII", 2051, count, 28, 28) + pictures.tobytes()
            (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(
                struct.pack(">II", 2049, count) + labels.tobytes()
            )
            for kind in ("images-idx3", "labels-idx1"):
                file = raw / f"{part}-{kind}-ubyte"
                (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    return tmp_path


@pytest.mark.parametrize("dataset", ["mnist", "fashion"])
@pytest.mark.parametrize("model", ["cnn", "lenet5"])
def test_both_networks_learn_both_data_sets_and_predict(mnist, dataset, model):
    args = ["--dataset", dataset, "--model", model, "--epochs", 1, "--batch-size", 16]
    out, _ = run("mnist_cnn.py", *args, cwd=mnist)
    assert "40 + 10 images" in out
    classes = common.load_checkpoint(mnist / "runs/mnist_cnn/last.pt")["spec"]["classes"]
    assert classes[0] == ("0" if dataset == "mnist" else "T-shirt/top")
    cv2.imwrite(str(mnist / "x.png"), np.zeros((100, 100), np.uint8))
    out, _ = run("predict.py", "runs/mnist_cnn/best.pt", "x.png", cwd=mnist)
    assert out.startswith("x.png: ")


def test_a_picture_is_padded_as_in_training_and_turned_light_on_dark():
    spec = common.Spec(list("0123456789"), 32, 1, 0, 1, pad=2, dark_ground=True)
    digit = np.zeros((28, 28), np.uint8)
    digit[4:24, 12:16] = 220
    padded = np.pad(digit, 2)
    assert np.array_equal(common.prepare(digit, spec)[..., 0], padded)
    grey_paper = np.full((28, 28), 180, np.uint8)
    grey_paper[4:24, 12:16] = 20
    expected = np.pad(255 - grey_paper, 2)
    assert np.array_equal(common.prepare(grey_paper, spec)[..., 0], expected)
    photo = cv2.cvtColor(cv2.resize(grey_paper, (600, 400)), cv2.COLOR_GRAY2RGB)
    found = common.prepare(photo, spec)[..., 0]
    assert found[16, 15] > 200 and found[16, 4] < 100 and found[0, 0] == 0


def test_the_networks_have_the_sources_shapes():
    assert mnist_cnn.CNN(1, 28, 10).fc1.in_features == 576
    assert mnist_cnn.LeNet5(1, 32, 10)(torch.zeros(5, 1, 32, 32)).shape == (5, 10)
