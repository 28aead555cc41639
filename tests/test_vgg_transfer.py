"""What a user of vgg_transfer.py may rely on besides what all recipes share."""

import csv
import types

import common
import vgg_transfer

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import FEW, one_error_line, run, slow
from torch import nn

SCRIPT = "vgg_transfer.py"


def first_blocks():
    """Two narrow blocks of VGG16 in its place: 1/1000 of the work."""

    def vgg16():
        features = torchvision.models.vgg.make_layers([16, 16, "M", 32, 32, "M"])
        middle = (nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.1))
        classifier = nn.Sequential(nn.Linear(32 * 16, 128), *middle, nn.Linear(128, 100))
        for layer in (*features, *classifier):
            if hasattr(layer, "weight"):
                nn.init.kaiming_normal_(layer.weight)
        return types.SimpleNamespace(
            features=features, avgpool=nn.AdaptiveAvgPool2d(4), classifier=classifier
        )

    torchvision.models.vgg16 = vgg16


def accuracy(folder):
    with open(folder / "history.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["test_accuracy"])


def test_imagenet_weights_come_from_torchvisions_cache_and_bring_their_normalisation(
    tmp_path, folder, monkeypatch
):
    with torch.device("meta"):
        model, vgg = vgg_transfer.VGG(3), torchvision.models.vgg16().state_dict()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes.pop("head.weight") == (3, 4096) and shapes.pop("head.bias") == (3,)
    assert shapes == {name: value.shape for name, value in vgg.items() if "classifier.6" not in name}
    monkeypatch.setattr(torchvision.models, "vgg16", None)  # to be put back
    first_blocks()
    vgg = torchvision.models.vgg16()
    parts = [(name, getattr(vgg, name).state_dict()) for name in ("features", "classifier")]
    state = {f"{part}.{name}": value for part, values in parts for name, value in values.items()}
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    args = (
        "--data",
        folder,
        "--freeze",
        "--size",
        32,
        "--epochs",
        1,
        "--limit-batches",
        1,
        "--batch-size",
        4,
    )
    _, err = run(SCRIPT, *args, cwd=tmp_path, status=2, before=first_blocks)
    one_error_line(err, str(cache), vgg_transfer.IMAGENET.url, "--weights none")

    torch.save(state, cache / "vgg16-397923af.pth")
    run(SCRIPT, *args, cwd=tmp_path, before=first_blocks)
    checkpoint = common.load_checkpoint(tmp_path / "runs/vgg_transfer/last.pt")
    weights = checkpoint["model"]
    assert all(torch.equal(weights[name], state[name]) for name in weights if "head" not in name)
    assert checkpoint["spec"]["mean"] == [0.485, 0.456, 0.406] and checkpoint["spec"]["crop"] == 0.875
    (cache / "vgg16-397923af.pth").write_bytes(b"half a file")
    _, err = run(SCRIPT, *args, cwd=tmp_path, status=2)
    one_error_line(err, str(cache))


def test_photos_are_cut_as_the_weights_expect():
    photo = np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)
    photo = cv2.GaussianBlur(cv2.resize(photo, (400, 300)), (0, 0), 3)
    spec = common.Spec(["a", "b"], 224, crop=224 / 256)
    expected = vgg_transfer.IMAGENET.transforms()(torch.from_numpy(photo).movedim(-1, 0))
    about = vgg_transfer.IMAGENET.transforms()
    spec.mean, spec.std = about.mean, about.std
    found = common.Normalize(spec)(torch.from_numpy(common.prepare(photo, spec)).movedim(-1, 0)[None])[0]
    assert (found - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("head", "freeze"),
    [("replace", []), ("replace", ["--freeze", "--tuned"]), ("add", ["--freeze"]), ("add", ["--tuned"])],
)
def test_both_heads_frozen_or_not_save_resume_exactly_and_predict(tmp_path, folder, head, freeze):
    args = ["--data", folder, "--weights", "none", "--head", head, *freeze, "--size", 32, "--batch-size", 8]
    args += ["--limit-batches", 4]
    run(SCRIPT, *args, "--epochs", 3, "--out", "unbroken", cwd=tmp_path, before=first_blocks)
    run(
        SCRIPT,
        *args,
        "--epochs",
        3,
        "--out",
        "broken",
        cwd=tmp_path,
        before=stop_after_two_epochs,
        status=130,
    )
    run(SCRIPT, "--resume", "--out", "broken", cwd=tmp_path, before=first_blocks)
    one, other = (common.load_checkpoint(tmp_path / name / "last.pt") for name in ("unbroken", "broken"))
    for name in one["model"]:
        assert torch.equal(one["model"][name], other["model"][name])
    if "--freeze" in freeze:
        torch.manual_seed(0)
        first_blocks()
        start = vgg_transfer.VGG(3, head).state_dict()
        assert all(torch.equal(one["model"][name], start[name]) == (name[:4] != "head") for name in start)
    picture = folder / "test/ball/0.png"
    out, _ = run("predict.py", "broken/best.pt", picture, cwd=tmp_path, before=first_blocks)
    assert out.startswith(f"{picture}: ")


def stop_after_two_epochs():
    first_blocks()
    whole = common.train_one_epoch

    def train_one_epoch(model, data, loss_fn, optimizer, args, epoch, *more):
        if epoch == 3:
            raise KeyboardInterrupt
        return whole(model, data, loss_fn, optimizer, args, epoch, *more)

    common.train_one_epoch = train_one_epoch


def draw_two_tasks(root):
    """Folders of drawn digits: many 0 to 4, and a few 5 to 9."""
    for i, (image, label) in enumerate(FEW[32, 3]):
        if label < 5 or i not in range(300, 1400):
            task, part = "many" if label < 5 else "few", "train" if i < 1400 else "test"
            file = root / task / part / str(label) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), image)


@slow
def what_was_learnt_on_one_task_helps_with_another(cwd):
    def train(task, weights, *flags):
        args = ["--data", task, "--weights", weights, "--size", 32, "--batch-size", 32, *flags]
        run(SCRIPT, *args, "--out", "run", cwd=cwd, before=first_blocks)
        return accuracy(cwd / "run")

    draw_two_tasks(cwd)
    head_alone = ("--freeze", "--epochs", 10, "--lr", 0.02)
    from_random = train("few", "none", *head_alone)
    assert train("many", "none", "--epochs", 10, "--lr", 0.01) > 0.9
    (cwd / "run").rename(cwd / "trained")
    from_many = train("few", "trained/best.pt", *head_alone)
    before = common.load_checkpoint(cwd / "run/last.pt")
    args = ("--resume", "--epochs", 12, "--out", "run")  # on the features of the same backbone
    run(SCRIPT, *args, cwd=cwd, before=first_blocks)
    after = common.load_checkpoint(cwd / "run/last.pt")
    plain = common.load_checkpoint(cwd / "trained/best.pt")["model"]
    torch.save({f"module.{name}": value for name, value in plain.items()}, cwd / "plain.pt")
    return from_random, from_many, train("few", "plain.pt", *head_alone), before, after


def test_what_was_learnt_on_one_task_helps_with_another(done):
    from_random, from_many, from_plain, before, after = done
    assert from_many > from_random + 0.3
    assert from_plain > from_random + 0.1  # with ImageNet's normalisation
    assert after["history"][10]["train_loss"] < 1.1 * before["history"][9]["train_loss"]  # 2.35 on others
    backbone = [name for name in before["model"] if not name.startswith("head.")]
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in backbone)


def test_the_backbone_sees_every_image_once_and_is_not_in_training():
    seen = []

    class Model(nn.Module):
        head = nn.Linear(3, 2)

        def backbone(self, images):
            assert not self.training
            seen.append(len(images))
            return images.mean((2, 3))

    images = torch.randint(256, (150, 32, 32, 3), dtype=torch.uint8)
    data = common.ImageDataset(images, torch.arange(150) % 2, common.Spec(["a", "b"], 32))
    args = types.SimpleNamespace(device=torch.device("cpu"), amp=False, quiet=True)
    cached = vgg_transfer.cache_features(Model(), data, args)
    for order in (torch.arange(150), torch.randperm(150)):
        for indices, features, labels in common.load_batches(cached, order.split(11), args):
            torch.testing.assert_close(features, data.normalize(data[indices][0]).mean((2, 3)))
            assert torch.equal(labels, data.labels[indices])
    assert sum(seen) == 150


def test_a_downloaded_data_set_takes_another_size_image_by_image(monkeypatch):
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    rng, spec = np.random.default_rng(0), common.Spec(["a", "b"], 48)
    pairs = [(rng.integers(256, size=(32, 32, 3), dtype=np.uint8), i % 2) for i in range(12)]
    data = common.load_images(pairs, spec, types.SimpleNamespace(quiet=True, skip_bad=False))
    assert not data.in_memory and data[torch.tensor([1, 2])][0].shape == (2, 3, 48, 48)
    expected = torch.from_numpy(cv2.resize(pairs[5][0], (48, 48)))
    assert torch.equal(data[5][0].movedim(0, -1), expected)


def test_grey_photos_become_what_colour_weights_expect(tmp_path):
    for i in range(16):
        picture = tmp_path / f"grey/{('train', 'test')[i % 2]}/{'ab'[i // 2 % 2]}/{i}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(picture), np.full((40, 50), 10 * i, np.uint8))
    args = ("--data", "grey", "--size", 32, "--epochs", 1)
    run(SCRIPT, *args, "--weights", "none", "--out", "a", cwd=tmp_path, before=first_blocks)
    run(SCRIPT, *args, "--weights", "a/best.pt", "--freeze", "--out", "b", cwd=tmp_path, before=first_blocks)
    plain = common.load_checkpoint(tmp_path / "a/best.pt")["model"]
    for out, zipped in ("c", True), ("d", False):  # not: as PyTorch wrote before 1.6, torchvision's VGG16 too
        torch.save(plain, tmp_path / "plain.pt", _use_new_zipfile_serialization=zipped)
        run(SCRIPT, *args, "--weights", "plain.pt", "--out", out, cwd=tmp_path, before=first_blocks)
    for out in "abcd":
        assert common.load_checkpoint(tmp_path / out / "last.pt")["spec"]["channels"] == 3
        run("predict.py", f"{out}/best.pt", "grey/test/a/1.png", cwd=tmp_path, before=first_blocks)


def test_other_weights_are_refused_in_one_line(tmp_path, folder):
    args = ("--data", folder, "--size", 32, "--epochs", 1)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({1: torch.zeros(2)}, tmp_path / "number.pt")
    wrong = {
        "linear.pt": "features.0.weight",
        "number.pt": "features.0",
        "list.pt": "features.0",
        "no.pt": "No such file",
    }
    for name, part in wrong.items():
        _, err = run(SCRIPT, *args, "--weights", name, cwd=tmp_path, status=2, before=first_blocks)
        one_error_line(err, name, part)
    _, err = run(SCRIPT, *args, "--size", 31, cwd=tmp_path, status=2)
    one_error_line(err, "--size", "31", "32")
