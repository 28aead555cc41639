"""What a user of predict.py may rely on."""

import csv
import importlib
import io
import pickle
from pathlib import Path

import common
import lenet_cifar
import predict
from common import UserError, load_checkpoint

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, draw
from test_vgg_transfer import SmallVGG
from torch import nn

MY_NET = """
from pathlib import Path
import common
import torch
from torch import nn

Path("imported").touch()

def build_model(spec, args):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * spec.size**2, len(spec.classes)))

def main(argv):
    parser = common.make_parser(__file__, __doc__, {}, epochs=1, batch_size=8, lr=0.01, size=8)
    args = common.parse_args(parser, argv, {})
    train_set, test_set = common.load_data(args, "CIFAR10")
    model = build_model(train_set.spec, args)
    optimizer = torch.optim.SGD(model.parameters(), args.lr)
    return common.fit(model, train_set, test_set, nn.CrossEntropyLoss(), optimizer, args)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """The run folder of a LeNet that knows balls from bars."""
    out = tmp_path_factory.mktemp("trained")
    flags = f"--data {folder} --tuned --batch-size 4 --lr 0.01 --epochs 20 --out {out} --quiet"
    lenet_cifar.main(flags.split())
    return out


@pytest.fixture
def classify(capsys):
    """Call predict.py with these arguments; gives what it prints. Fails if it exits otherwise."""

    def main(*arguments, status=0):
        capsys.readouterr()
        code = 0
        try:
            predict.main([str(one) for one in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        assert code == status
        return capsys.readouterr()

    return main


def read_table(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.figures
def test_prediction_sees_what_the_test_loop_sees_and_draws_it(trained, folder, classify):
    saved = load_checkpoint(trained / "best.pt")
    arguments = (trained / "best.pt", folder / "test", "--figure", "out.png", "--csv", "table.csv")
    out, _ = classify(*arguments)
    accuracy = saved["history"][-1]["test_accuracy"]
    assert f"{round(accuracy * 21)} of 21 right, {accuracy:.4f}, by their folders" in out
    assert cv2.imread("out.png").shape[0] > 200
    tested = {row["file"]: row["predicted"] for row in read_table(trained / "predictions.csv")}
    assert len(tested) == 21
    for row in read_table("table.csv"):
        (file,) = (name for name in tested if row["file"].endswith(name))
        assert tested[file] == row["class"]


def test_files_are_judged_by_the_first_folder_with_a_class_s_name(trained, classify):
    picture = draw("ball", np.random.default_rng(5))
    for name in ("ball/lying/1.png", "lying/ball/2.png", "other/ball/3.png", "other/4.png"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(f"photos/{name}", picture)
    out, _ = classify(trained / "best.pt", "photos")
    assert "2 of 3 right, 0.6667, by their folders" in out
    assert "1 images are in no folder with a class's name" in out
    # Two folders and a file, as where the shell expands nothing.
    out, _ = classify(trained / "best.pt", "photos/*/*")
    assert out.count(".png: ball ") == 4


def test_what_is_left_out_of_a_folder_is_counted(trained, classify):
    Path("photos").mkdir()
    cv2.imwrite("photos/1.png", draw("ball", np.random.default_rng(5)))
    for name in ("2.heic", "3.HEIC", "notes.txt"):
        Path("photos", name).touch()
    out, _ = classify(trained / "best.pt", "photos")
    left_out = out.splitlines()[0].lower()
    assert left_out.startswith("left out of photos: ")
    assert "2 .heic" in left_out
    assert "1 .txt" in left_out


def test_unreadable_files_are_named_and_the_others_classified(trained, classify):
    picture = draw("lying", np.random.default_rng(1))
    cv2.imwrite("good.png", picture)
    for name in ("cut.jpg", "cut.png"):
        cv2.imwrite(name, picture)
        Path(name).write_bytes(Path(name).read_bytes()[:-200])
    Path("text.png").write_text("I am no picture")
    Path("empty.png").touch()
    bad = ["cut.jpg", "text.png", "empty.png", "missing.png", "cut.png"]
    out, err = classify(trained / "best.pt", *bad, "good.png", status=2)
    assert out.startswith("good.png: ")
    assert out.count("\n") == 1
    assert err.count("\n") == err.count("predict.py: error: ") == 5
    for name in bad:
        assert name in err
    assert "missing.png cannot be read: no such file" in err


class Evil:
    def __reduce__(self):
        return (exec, ("open('evil-was-here', 'w')",))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_checkpoints_that_are_none_are_refused_and_never_run(trained, folder, classify):
    best = (trained / "best.pt").read_bytes()
    middle = len(best) // 2
    others = {
        "evil": saved(Evil()),
        "evil inside": saved({**load_checkpoint(trained / "best.pt"), "spec": Evil()}),
        "pickle": pickle.dumps(Evil(), protocol=2),
        "whole model": saved(nn.Linear(1, 1)),
        "foreign": saved(nn.Linear(1, 1).state_dict()),
        "old": saved({"format": "pytorch-image-recipes/0"}),
        "half": best[:middle],
        "quarter": best[: middle // 2],
        "flipped": best[:middle] + bytes([best[middle] ^ 1]) + best[middle + 1 :],
        "empty": b"",
    }
    for name, data in others.items():
        Path(f"{name}.pt").write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.pt is no checkpoint"):
            classify(f"{name}.pt", folder / "test")
    assert not Path("evil-was-here").exists()


def test_a_recipe_of_ones_own_is_named_by_the_user_alone(folder, classify):
    Path("my_net.py").write_text(MY_NET)
    module = predict.import_recipe("my_net", "my_net.py")
    module.main(["--data", str(folder)])
    Path("imported").unlink()
    best = "runs/my_net/best.pt"
    picture = folder / "test/ball/0.png"
    with pytest.raises(UserError, match="add --recipe my_net"):
        classify(best, picture)
    assert not Path("imported").exists()  # a checkpoint decides nothing about imports
    out, _ = classify("--recipe", "my_net.py", best, picture)
    assert out.startswith(f"{picture}: ")
    with pytest.raises(UserError, match="made by my_net, with another network"):
        classify("--recipe", ROOT / "lenet_cifar.py", best, picture)

    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    model, spec = predict.load_model(best, model=network)
    same, _ = predict.load_model(best, recipe="my_net.py")
    images = torch.randint(256, (2, 3, spec.size, spec.size), dtype=torch.uint8)
    assert torch.equal(model(images), same(images))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("nothing", "no images in nothing"),
        ("x.png --top 0", "--top"),
        ("x.png --device cuda:77", "cuda:77"),
        ("x.png --recipe none.py", "none.py"),
        ("x.png --figure x.bmp", ".png"),
        ("", "IMAGE"),
    ],
)
@pytest.mark.figures
def test_bad_use_is_one_line(trained, flags, reason, classify):
    Path("nothing").mkdir()
    with pytest.raises(UserError, match=reason) as refused:
        classify(trained / "best.pt", *flags.split())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", common.RECIPES)
@pytest.mark.filterwarnings("ignore")
def test_the_network_of_every_recipe_is_exported(name, monkeypatch):
    monkeypatch.setattr(torchvision.models, "vgg16", SmallVGG)
    recipe = importlib.import_module(name)
    args = recipe.parse_args(["--data", "drawn"])
    train_set, _ = common.load_data(args, "CIFAR10", 1 if name == "mnist_cnn" else 3)
    images, _ = train_set[:4]
    model = nn.Sequential(train_set.normalize, recipe.build_model(train_set.spec, args)).eval()
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(model, (images,), "model.onnx", input_names=["input"])
    session = onnxruntime.InferenceSession("model.onnx")
    (logits,) = session.run(None, {"input": images.numpy()})
    np.testing.assert_allclose(logits, model(images).detach(), atol=1e-4)
