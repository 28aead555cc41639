"""What a user of mnist_cnn.py may rely on besides what all recipes share."""

import gzip
import hashlib
import http.server
import struct
import threading
from functools import partial

import common
import mnist_cnn
import predict

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import one_error_line, run


def test_one_batch_of_drawn_digits(tmp_path):
    run("mnist_cnn.py", "--data", "drawn", "--epochs", 1, "--limit-batches", 1, cwd=tmp_path)
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


def served_at(address, sums):
    kind = torchvision.datasets.FashionMNIST
    kind.mirrors, kind.resources = [address], [(name, sums[name]) for name, _ in kind.resources]


def test_fashion_is_downloaded_and_checked_by_its_md5(mnist):
    raw = mnist / "data/FashionMNIST/raw"
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=raw)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in raw.glob("*.gz")}
    args = ("--dataset", "fashion", "--epochs", 1, "--data", "new", "--download")
    wrong = partial(served_at, address, dict.fromkeys(sums, "0" * 32))
    _, err = run("mnist_cnn.py", *args, cwd=mnist, status=2, before=wrong)
    one_error_line(err.splitlines(keepends=True)[-1], "FashionMNIST does not download to new", "--data drawn")
    out, _ = run("mnist_cnn.py", *args, cwd=mnist, before=partial(served_at, address, sums))
    assert "FashionMNIST is not in new, or not whole: downloading it" in out and "40 + 10 images" in out
    server.shutdown()
    out, _ = run("mnist_cnn.py", *args, "--out", "again", cwd=mnist)
    assert "downloading" not in out


@pytest.mark.parametrize("left", [0, 1000])  # bytes of a file that was not written whole
def test_damaged_files_are_one_error_that_says_what_to_do(mnist, left):
    file = mnist / "data/MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:left])
    _, err = run("mnist_cnn.py", cwd=mnist, status=2)
    one_error_line(err, "MNIST does not download to data", "remove what is there")


def test_photos_of_digits_become_light_on_black():
    digit = torch.zeros(1, 1, 28, 28)
    digit[..., 4:24, 12:16] = 220 / 255
    dark = mnist_cnn.DarkBackground()
    assert torch.equal(dark(digit), digit)
    torch.testing.assert_close(dark(1 - digit), digit)
    white = (digit > 0).float()
    gray_paper, gray_background = torch.where(white > 0, 0.1, 0.7), torch.where(white > 0, 0.7, 0.35)
    for images in (gray_paper, gray_background):
        torch.testing.assert_close(dark(images), white)
    both = torch.cat([digit, gray_paper])
    torch.testing.assert_close(dark(both), torch.cat([digit, white]))  # each image by itself


def test_fashion_is_prepared_as_it_was_trained_on(mnist):
    run("mnist_cnn.py", "--dataset", "fashion", "--epochs", 1, "--batch-size", 16, cwd=mnist)
    kind = torchvision.datasets.FashionMNIST(mnist / "data", train=False)
    for i, (image, _) in enumerate(kind):
        image.save(mnist / f"{i}.png")
    model, spec = predict.load_model(mnist / "runs/mnist_cnn/best.pt")
    files = [mnist / f"{i}.png" for i in range(len(kind))]
    found = torch.stack([image for _, image, _ in predict.classify(model, spec, files)])
    assert torch.equal(found[:, 0], kind.data)


def no_flip():
    def fit(*args):
        assert args[-1].keywords == {"flip": False}

    common.fit = fit


def test_digits_in_folders_are_not_flipped(tmp_path, folder):
    run("mnist_cnn.py", "--tuned", "--data", folder, cwd=tmp_path, before=no_flip)


def test_each_image_is_rotated_scaled_moved_and_flipped_by_its_own_draw():
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[:, :, 8:20, 6:10] = 255  # an upright bar, left of the middle
    some = image.expand(300, 1, 28, 28)
    torch.manual_seed(0)
    found = mnist_cnn.random_affine(some, flip=False)
    assert found.shape == some.shape and len({bytes(one.numpy()) for one in found}) == 300
    assert found.min() >= 0 and found.max() <= 1.001
    mass = found.sum((1, 2, 3)) / 48
    assert 0.8 < mass.min() < 0.9 and 1.1 < mass.max() < 1.25  # 8 % a side
    column = (found.sum((1, 2)) * torch.arange(28)).sum(1) / found.sum((1, 2, 3))
    assert 7.5 - 3 < column.min() < 7 and 8 < column.max() < 7.5 + 3
    found = mnist_cnn.random_affine(some, flip=True)
    right = (found[..., 14:].sum((1, 2, 3)) > found[..., :14].sum((1, 2, 3))).float().mean()
    assert 0.4 < right < 0.6


def test_the_networks_have_the_sources_shapes():
    assert mnist_cnn.CNN(1, 28, 10).fc1.in_features == 576
    assert mnist_cnn.LeNet5(1, 28, 10).fc1.in_features == 16 * 6 * 6
    assert mnist_cnn.LeNet5(1, 28, 10)(torch.zeros(5, 1, 28, 28)).shape == (5, 10)
