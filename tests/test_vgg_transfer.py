"""What a user of vgg_transfer.py may rely on besides what all recipes share."""

import shutil
from pathlib import Path
from unittest import mock

import common
import predict
import readers
import vgg_transfer
from common import UserError

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

VGG16 = torchvision.models.vgg16
ABOUT = vgg_transfer.IMAGENET.transforms()


class SmallVGG(nn.Module):
    """Two narrow blocks of VGG16, 1/1000 of the work."""

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.vgg.make_layers([16, 16, "M", 32, 32, "M"])
        self.avgpool = nn.AdaptiveAvgPool2d(4)
        middle = [nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.1)]
        self.classifier = nn.Sequential(nn.Linear(512, 128), *middle, nn.Linear(128, 100))


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """A small VGG16, an empty cache of torchvision's, and the download that fails."""
    download = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(torchvision.models, "vgg16", SmallVGG)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return download


def train(data, flags):
    quickly = "--size 32 --epochs 1 --batch-size 8 --limit-batches 4"
    vgg_transfer.main(f"--data {data} {quickly} {flags}".split())


def load(out, name="last.pt"):
    return common.load_checkpoint(Path(out, name))


def assert_same(one, other, but="no layer"):
    """Two state_dicts with the same parameters, but for a layer of the first one."""
    kept = [name for name in one if not name.startswith(but)]
    assert len(kept) >= len(one) - 2
    for name in kept:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("head", "last"), [("replace", 4096), ("add", 1000)])
def test_the_network_is_torchvisions_with_another_last_layer(head, last, monkeypatch):
    monkeypatch.setattr(torchvision.models, "vgg16", VGG16)
    with torch.device("meta"):
        model = vgg_transfer.VGG(3, head)
        expected = {name: value.shape for name, value in VGG16().state_dict().items()}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes.pop("head.weight") == (3, last)
    assert shapes.pop("head.bias") == (3,)
    if head == "replace":
        del expected["classifier.6.weight"], expected["classifier.6.bias"]
    assert shapes == expected


def test_imagenet_weights_come_from_torchvisions_cache_with_their_normalization(folder, tmp_path):
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    with pytest.raises(UserError, match="no network") as refused:
        train(folder, "--freeze")
    for part in (str(cache), vgg_transfer.IMAGENET.url, "--weights none"):
        assert part in str(refused.value)

    state = SmallVGG().state_dict()
    torch.save(state, cache / "vgg16-397923af.pth")
    train(folder, "--freeze")
    saved = load("runs/vgg_transfer")
    assert_same(saved["model"], state, but="head")
    assert (saved["spec"]["mean"], saved["spec"]["std"]) == (ABOUT.mean, ABOUT.std)
    assert saved["spec"]["crop"] == 224 / 256

    (cache / "vgg16-397923af.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="hub/checkpoints"):
        train(folder, "")


def test_the_data_are_looked_at_before_anything_is_downloaded(no_network):
    with pytest.raises(UserError, match="nowhere"):
        train("nowhere", "")
    no_network.assert_not_called()


def test_photos_are_prepared_as_the_weights_expect():
    noise = np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)
    photo = cv2.GaussianBlur(cv2.resize(noise, (400, 300)), (0, 0), 3)
    spec = common.Spec(["a", "b"], 224, mean=ABOUT.mean, std=ABOUT.std, crop=224 / 256)
    image = torch.from_numpy(readers.prepare(photo, spec)).movedim(-1, 0)
    expected = ABOUT(torch.from_numpy(photo).movedim(-1, 0))
    assert (common.Normalize(spec)(image[None])[0] - expected).abs().mean() < 0.05


@pytest.mark.parametrize("freeze", ["", "--freeze"])
@pytest.mark.parametrize("head", ["--head replace --tuned", "--head add"])
def test_both_heads_frozen_or_not_resume_exactly_and_predict_as_tested(folder, head, freeze):
    train(folder, f"--weights none {head} {freeze} --epochs 3 --save-every 1 --out whole")
    Path("killed").mkdir()
    for name in ("last.pt", "best.pt"):
        shutil.copy("whole/epoch_2.pt", Path("killed", name))
    vgg_transfer.main(["--resume", "--out", "killed"])
    whole = load("whole")
    assert_same(whole["model"], load("killed")["model"])
    if freeze:
        assert_same(whole["model"], load("whole", "epoch_1.pt")["model"], but="head")

    model, spec = predict.load_model("killed/last.pt")
    args = common.settings(data=folder, size=32)
    _, test_set = common.load_data(args, "", mean=spec.mean, std=spec.std, crop=spec.crop)
    row, _ = common.evaluate(model, test_set, args)
    assert row["test_loss"] == pytest.approx(whole["history"][-1]["test_loss"], rel=1e-4)


def test_after_its_head_all_of_it_is_trained_and_the_head_is_kept_for_the_same_classes(
    folder, capsys
):
    train(folder, "--weights none --freeze --out a")
    train(folder, "--weights a/best.pt --lr 1e-30 --out b")  # which changes nothing
    assert "head is kept, since the classes are the same" in capsys.readouterr().out
    assert_same(load("a")["model"], load("b")["model"])
    train("drawn", "--weights a/best.pt --lr 1e-30 --out c")
    assert "head is kept" not in capsys.readouterr().out
    assert_same(load("a")["model"], load("c")["model"], but="head")
    assert load("a")["spec"]["mean"] == load("c")["spec"]["mean"]


def test_weights_are_found_however_others_have_wrapped_them(folder):
    state = SmallVGG().state_dict()

    def renamed(old, new):
        return {name.replace(old, new, 1): value for name, value in state.items()}

    files = {
        "torchvision": state,  # as PyTorch before 1.6 wrote it
        "examples": {"epoch": 3, "state_dict": renamed("features.", "features.module.")},
        "parallel": {"model": renamed("", "module.")},
        "compiled": renamed("", "_orig_mod."),
    }
    for name, saved in files.items():
        torch.save(saved, f"{name}.pt", _use_new_zipfile_serialization=name != "torchvision")
        train(folder, f"--freeze --weights {name}.pt --out {name}")
        assert_same(load(name)["model"], state, but="head")
        assert load(name)["spec"]["mean"] == ABOUT.mean


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (nn.Linear(2, 2).state_dict(), "no VGG16"),
        ([1], "no VGG16"),
        ({1: torch.zeros(2)}, "no VGG16"),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "no VGG16 for this --head"),
        (nn.Linear(2, 2), "code"),
    ],
)
def test_what_is_no_vgg16_is_refused(folder, saved, reason):
    torch.save(saved, "other.pt")
    with pytest.raises(UserError, match=reason) as refused:
        train(folder, "--weights other.pt")
    assert "other.pt" in str(refused.value)
