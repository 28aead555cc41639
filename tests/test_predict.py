"""What a user of predict.py may rely on."""

import csv
import pickle
import shutil

import common
import predict

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, draw, one_error_line, run
from PIL import Image


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """The run folder of a LeNet that knows balls from bars."""
    cwd = tmp_path_factory.mktemp("trained")
    run(
        "lenet_cifar.py",
        "--data",
        folder,
        "--tuned",
        "--batch-size",
        4,
        "--lr",
        0.01,
        "--epochs",
        20,
        cwd=cwd,
    )
    return cwd / "runs/lenet_cifar"


def test_every_kind_of_picture_is_classified_as_its_plain_png(trained, tmp_path):
    ball = draw("ball", np.random.default_rng(5), 60, 60)
    image = Image.fromarray(ball[..., ::-1])
    turned = Image.Exif()
    turned[274] = 6  # the camera was held sideways: turn by 90 degrees to see it upright
    image.save(tmp_path / "plain.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    image.save(tmp_path / "plain.bmp")
    image.save(tmp_path / "plain.webp", lossless=True)
    image.save(tmp_path / "plain.jpg", quality=95)
    image.convert("L").save(tmp_path / "grey.jpg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "exif.jpg", exif=turned, quality=95)
    image.resize((8000, 6000), Image.Resampling.NEAREST).save(tmp_path / "large.jpg")
    image.resize((1, 1)).save(tmp_path / "dot.png")
    out, _ = run("predict.py", trained / "best.pt", tmp_path, "--top", 99, "--csv", "t.csv", cwd=tmp_path)
    assert len(out.splitlines()) == 11
    with open(tmp_path / "t.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 33  # three classes each
    chance = {(row["file"].split("/")[-1], row["class"]): float(row["probability"]) for row in table}
    for name in ("alpha.png", "plain.bmp", "plain.webp"):
        assert chance[name, "ball"] == pytest.approx(chance["plain.png", "ball"], abs=1e-6)
    for name in ("plain.jpg", "cmyk.jpg", "exif.jpg", "palette.png"):
        assert chance[name, "ball"] == pytest.approx(chance["plain.png", "ball"], abs=0.15)
    assert chance["plain.png", "ball"] > 0.5


def test_prediction_sees_what_the_test_loop_sees(trained, folder):
    checkpoint = common.load_checkpoint(trained / "last.pt")
    model, spec = predict.load_model(trained / "last.pt")
    files = [file for name in spec.classes for file in common.find_images(folder / "test" / name)]
    correct = sum(
        spec.classes[chances.argmax()] == file.parent.name
        for file, _, chances in predict.classify(model, spec, files)
    )
    assert correct / len(files) == checkpoint["history"][-1]["test_accuracy"]
    out, _ = run(
        "predict.py", trained / "last.pt", folder / "test", "--figure", "f.png", cwd=trained, figures=True
    )
    assert f"{correct} of {len(files)} right, {correct / len(files):.4f}" in out


def test_what_is_transparent_is_white(tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4, :, 3], image[4:, :, 3] = 255, 128  # black: above opaque, below half transparent
    for name in ("a.png", "a.webp"):
        cv2.imwrite(str(tmp_path / name), image, [cv2.IMWRITE_WEBP_QUALITY, 101])
        assert common.decode(tmp_path / name)[:, 0, 0].tolist() == [0] * 4 + [127] * 4
    cv2.imwrite(str(tmp_path / "deep.png"), image.astype(np.uint16) * 257)
    assert common.decode(tmp_path / "deep.png")[:, 0, 0].tolist() == [0] * 4 + [127] * 4
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter
    Image.fromarray(image[:, :5]).save(tmp_path / "exif.png", exif=exif)
    assert common.decode(tmp_path / "exif.png")[:, 0, 0].tolist() == [0] * 4 + [127] * 4


def test_unreadable_files_are_named_and_the_others_classified(trained, tmp_path):
    good = draw("lying", np.random.default_rng(1))
    cv2.imwrite(str(tmp_path / "good.png"), good)
    for name in ("cut.jpg", "cut.png"):
        cv2.imwrite(str(tmp_path / name), good)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    (tmp_path / "text.png").write_text("I am no picture")
    (tmp_path / "empty.png").touch()
    names = ["cut.jpg", "text.png", "good.png", "empty.png", "missing.png", "cut.png"]
    args = (trained / "best.pt", *names, "--figure", "out.png")
    out, err = run("predict.py", *args, cwd=tmp_path, status=2, figures=True)
    assert out.startswith("good.png: ") and out.count("\n") == 1
    assert (tmp_path / "out.png").stat().st_size > 1000
    for name in set(names) - {"good.png"}:
        assert f"cannot read {name}: " in err
    assert "missing.png: no such file" in err and "empty.png: no image" in err


class Evil:
    def __reduce__(self):
        return (exec, ("open('evil-was-here', 'w')",))


def test_checkpoints_that_are_none_are_refused_and_never_run(trained, tmp_path, folder):
    picture = folder / "test/ball/0.png"
    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "whole_model.pt")
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "foreign.pt")
    torch.save({**common.load_checkpoint(trained / "best.pt"), "format": "older/0"}, tmp_path / "old.pt")
    (tmp_path / "half.pt").write_bytes((trained / "best.pt").read_bytes()[:-5000])
    (tmp_path / "empty.pt").touch()
    for name in ("evil", "pickle", "whole_model", "foreign", "old", "half", "empty", "missing"):
        _, err = run("predict.py", f"{name}.pt", picture, cwd=tmp_path, status=2)
        one_error_line(err, f"{name}.pt")
    assert not (tmp_path / "evil-was-here").exists()


def test_a_copied_recipe_with_another_network_needs_no_other_change(tmp_path, folder):
    text = (ROOT / "lenet_cifar.py").read_text().replace("LeNet(", "MyNet(").replace("120", "50")
    text = text.replace("import common\n", "import common\n\nopen('imported', 'a').write('x')\n")
    (tmp_path / "my_net.py").write_text(text)
    out, _ = run(tmp_path / "my_net.py", "--data", folder, "--epochs", 1, cwd=tmp_path)
    best, picture = tmp_path / "runs/my_net/best.pt", folder / "test/ball/0.png"
    assert "--recipe my_net.py runs/my_net/best.pt" in out
    assert common.load_checkpoint(best)["recipe"] == "my_net"
    (tmp_path / "imported").unlink()
    _, err = run("predict.py", best, picture, cwd=tmp_path, status=2)
    one_error_line(err, "my_net", "--recipe my_net.py")
    assert not (tmp_path / "imported").exists()  # a checkpoint decides nothing about imports
    out, _ = run("predict.py", "--recipe", "my_net.py", best, picture, cwd=tmp_path)
    assert out.startswith(f"{picture}: ")
    shutil.copy(ROOT / "lenet_cifar.py", tmp_path / "other.py")
    _, err = run("predict.py", "--recipe", "other.py", best, picture, cwd=tmp_path, status=2)
    one_error_line(err, "made by my_net, and not by this --recipe", "size mismatch")


def test_bad_use_is_one_line_and_status_2(trained, tmp_path):
    (tmp_path / "nothing").mkdir()
    for args, part in (
        ((trained / "best.pt", "nothing"), "no images in nothing"),
        ((trained / "best.pt", "x.png", "--top", 0), "--top"),
        ((trained / "best.pt", "x.png", "--device", "cuda:77"), "cuda:77"),
        ((trained / "best.pt", "x.png", "--recipe", "none.py"), "none.py"),
        ((trained / "best.pt",), "IMAGE"),
        ((trained / "best.pt", "x.png", "--recipe", trained / "history.csv"), "Python script"),
        ((trained / "best.pt", "x.png", "--figure", "x.bmp"), ".png"),
        ((trained / "best.pt", "x.png", "--recipe", ROOT / "vgg_transfer.py"), "made by lenet_cifar"),
    ):
        _, err = run("predict.py", *args, cwd=tmp_path, status=2, figures=True)
        one_error_line(err, part)
