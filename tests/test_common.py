"""What a recipe may rely on in common.py."""

import argparse
import hashlib
import http.server
import io
import os
import pickle
import shutil
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, one_error_line, run
from torch.utils.data import DataLoader

import common

CPU = torch.device("cpu")


def flags(**changed):
    settings = dict(
        data="drawn", holdout=0, skip_bad=False, device=CPU, seed=0, limit_batches=None, amp=False
    )
    return argparse.Namespace(**{**settings, "batch_size": 7, "epochs": 1, **changed})


@pytest.fixture(scope="module")
def digits():
    return common.load_data(flags(), "CIFAR10", size=32)


# ------------------------------------------------------------------------------------------- pictures


def test_drawn_digits_are_too_hard_for_the_nearest_centroid(digits):
    train, test = ((part.pixels.float().flatten(1), part.labels) for part in digits)
    centroids = torch.stack([train[0][train[1] == digit].mean(0) for digit in range(10)])
    accuracy = (torch.cdist(test[0], centroids).argmin(1) == test[1]).float().mean()
    assert 0.1 < accuracy < 0.6


def test_pictures_are_a_dataset_that_is_indexed_one_by_one_or_by_the_batch(digits):
    data = digits[1]
    picture, label = data[3]
    assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8 and label == data.labels[3]
    for index in ([3, 1, 3], torch.tensor([3, 1, 3]), slice(2, 5)):
        pictures, labels = data[index]
        assert pictures.shape == (3, 3, 32, 32) and labels.shape == (3,)
        assert torch.equal(pictures[1], data[3 if isinstance(index, slice) else 1][0])
    batches = list(DataLoader(data, batch_size=300))
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)
    assert torch.equal(batches[1][0], data[slice(300, 600)][0])


def test_every_picture_comes_once_in_batches_whatever_the_batch_size(digits):
    order = torch.randperm(len(digits[1]))
    seen = [labels for _, labels in common.batches(digits[1], order.split(7), flags())]
    assert torch.equal(torch.cat(seen), digits[1].labels[order])
    assert [len(step) for step, _ in common.split(order, 7, flags(limit_batches=3))] == [7] * 3


def test_normalise_gives_what_the_sources_transforms_give():
    spec = common.Spec(["a", "b"], 4, 3, 0.5, 0.5)
    pictures = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(pictures / 255, [0.5] * 3, [0.5] * 3)
    torch.testing.assert_close(common.Normalise(spec)(pictures), expected)


def test_each_picture_is_flipped_and_shifted_by_its_own_draw():
    pictures = torch.arange(64.0).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    found = common.flip_and_shift(pictures, torch.Generator().manual_seed(1), mirror=True, pixels=2)
    padded = torch.nn.functional.pad(pictures[:1], [2] * 4, mode="reflect")[0]
    flipped = torch.nn.functional.pad(pictures[:1].flip(3), [2] * 4, mode="reflect")[0]
    ways = [image[:, y : y + 8, x : x + 8] for image in (padded, flipped) for y in range(5) for x in range(5)]
    drawn = {[torch.equal(picture, way) for way in ways].index(True) for picture in found}
    assert len(drawn) > 40  # of 50 ways, all pictures being one of them
    again = common.flip_and_shift(pictures, torch.Generator().manual_seed(1), mirror=True, pixels=2)
    assert torch.equal(found, again)
    still = common.flip_and_shift(pictures, torch.Generator().manual_seed(1), mirror=False, pixels=2)
    assert all(any(torch.equal(picture, way) for way in ways[:25]) for picture in still)


def test_holdout_takes_pictures_from_the_training_set_and_no_others(digits):
    train, held = common.load_data(flags(holdout=1000, seed=5), "CIFAR10", size=32)
    assert (len(train), len(held)) == (9000, 1000)
    both = {bytes(picture) for part in (train, held) for picture in part.pixels.numpy()}
    assert both == {bytes(picture) for picture in digits[0].pixels.numpy()}


def test_a_set_too_large_for_memory_streams_and_gives_the_same(folder, monkeypatch):
    whole, _ = common.load_data(flags(data=folder), "CIFAR10", size=32)
    monkeypatch.setattr(common, "IN_MEMORY", 0)
    streamed, test_set = common.load_data(flags(data=folder), "CIFAR10", size=32)
    assert streamed.streamed and not whole.streamed
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    both = zip(*(common.batches(part, order.split(16), flags()) for part in (whole, streamed)), strict=True)
    for (pictures, labels), (same_pictures, same_labels) in both:
        assert torch.equal(pictures, same_pictures) and torch.equal(labels, same_labels)
    assert torch.equal(whole[5][0], streamed[5][0])
    assert len(test_set.subset(torch.tensor([1, 2]))[[0, 1]][0]) == 2


def test_a_picture_that_goes_bad_while_it_is_streamed_is_named_in_one_line(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "mine")
    _, err = run("lenet_cifar.py", "--data", "mine", cwd=tmp_path, before=lose_a_picture, status=2)
    one_error_line(err, "mine/train/ball/0.png cannot be read any more", "no epoch is whole yet")
    assert "Original Traceback" not in err


def lose_a_picture():
    common.IN_MEMORY, read = 0, common.read_files

    def read_files(*args, **options):
        sets = read(*args, **options)
        os.remove("mine/train/ball/0.png")
        return sets

    common.read_files = read_files


def test_a_csv_may_test_on_some_of_the_classes_and_a_folder_may_not(folder, tmp_path):
    for part, kinds in (("train", ("ball", "lying")), ("test", ("ball",))):
        rows = [
            f"{folder / part / kind / str(i)}{end},{kind},x"
            for kind in kinds
            for i, end in enumerate([".png", ".jpg"])
        ]
        (tmp_path / f"{part}.csv").write_text("\n".join(["Picture,Kind,more", *rows]))
    _, test = common.load_data(flags(data=tmp_path), "CIFAR10", size=32)
    assert test.spec.classes == ["ball", "lying"] and test.labels.tolist() == [0, 0]


def test_pictures_of_one_size_keep_it_and_grey_ones_their_channel(tmp_path):
    import cv2

    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("1", "2", "10"):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(2):
                picture = rng.integers(256, size=(48, 48), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / part / kind / f"{i}.png"), picture)
    train, test = common.load_data(flags(data=tmp_path), "CIFAR10", size=32)
    assert train.spec.classes == ["1", "2", "10"]  # numbers count as numbers
    assert train.pixels.shape == (6, 48, 48, 1) and len(test) == 6
    cv2.imwrite(str(tmp_path / "train/1/large.png"), np.zeros((300, 200, 3), np.uint8))
    assert common.load_data(flags(data=tmp_path), "CIFAR10", size=32)[0].pixels.shape == (7, 32, 32, 3)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("file,label\nmissing.png,a\n", "missing.png"),
        ("file\nx.png\n", "two columns"),
        ("file,label\nx.png\n", "x.png"),
        ("x.png,a\nx.png,b\n", "header"),
        ("", "two columns"),
        ("file,label\nx.png,a\n", "two at least"),
        ('file,label\nx.png,"a\nb"\n', r"a\\nb.*two at least"),  # a line break in quotes is part of the label
        ("file,label\nx\u2028y.png,a\n", "x\u2028y.png,a"),
    ],
)
def test_a_bad_csv_is_refused_with_the_row_at_fault(tmp_path, text, part):
    (tmp_path / "x.png").touch()
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(text)
    with pytest.raises(common.UserError, match=part):
        common.load_data(flags(data=tmp_path), "CIFAR10", size=32)


# ------------------------------------------------------------------------------------------- training


def test_accuracy_and_loss_are_means_over_pictures_not_batches(digits):
    data = digits[1].subset(torch.arange(300))  # batches of 256 and 44
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    loss_fn = torch.nn.CrossEntropyLoss()
    loss, accuracy, _, confusion = common.evaluate(model, data, loss_fn, flags())
    logits = model(common.Normalise(data.spec)(data[:][0]))
    assert loss == pytest.approx(loss_fn(logits, data.labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == data.labels).float().mean().item() or accuracy == pytest.approx(
        (logits.argmax(1) == data.labels).sum().item() / 300
    )
    assert confusion.sum() == 300 and confusion.diagonal().sum() == round(accuracy * 300)
    for true, guess in zip(data.labels[:5], logits.argmax(1)[:5], strict=True):
        assert confusion[true, guess] > 0


def test_training_is_what_a_plain_loop_does(digits):
    data, args = digits[1].subset(torch.arange(50)), flags(batch_size=16)
    loss_fn, models = torch.nn.CrossEntropyLoss(), []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)))
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.01)
    common.train_one_epoch(models[0], data, loss_fn, optimizer, args, epoch=1)
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.01)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    for indices in order.split(16):
        optimizer.zero_grad()
        loss_fn(models[1]((data[indices][0] / 255 - 0.5) / 0.5), data.labels[indices]).backward()
        optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, {"format": common.FORMAT, "epoch": 1})
    with pytest.raises(ZeroDivisionError), common.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert common.load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


# ------------------------------------------------------------------------------------------- downloads

CONTENT = bytes(range(256)) * 2000  # 512 kB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT in the way that the path names; `requests` keeps all (path, Range) asked for."""

    requests = []  # noqa: RUF012

    def do_GET(self):
        asked = self.headers.get("Range")
        self.requests.append((self.path, asked))
        start = int(asked[6:-1]) if asked and self.path != "/no-range" else 0
        body = CONTENT[::-1] if self.path.startswith("/wrong") else CONTENT
        if self.path == "/dead":
            return self.send_error(503)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.path.endswith("breaks"):
            return self.wfile.write(body[start : start + 200_000])
        if self.path == "/slow":
            for i in range(start, len(body), 20_000):
                self.wfile.write(body[i : i + 20_000])
                time.sleep(0.1)
            return None
        return self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """The address of a server on 127.0.0.1, with the clock for slow mirrors sped up: 0.5 s."""
    monkeypatch.setattr(common, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(common, "SLOW_BYTES", 1_000_000)
    Mirror.requests.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def asked(path):
    return [wanted for name, wanted in Mirror.requests if name == path]


@pytest.mark.parametrize("bad", ["dead", "wrong", "slow", "nobody"])
def test_a_bad_mirror_is_left_for_the_next_one(mirror, tmp_path, bad):
    url = "http://127.0.0.1:9/nobody" if bad == "nobody" else f"{mirror}/{bad}"
    common.download([url, f"{mirror}/good"], tmp_path / "a.tar.gz", MD5)
    assert (tmp_path / "a.tar.gz").read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]
    assert len(asked("/good")) == 1
    if bad == "slow":
        assert asked("/good")[0].startswith("bytes=")  # what the slow one sent is kept


def test_a_broken_off_download_goes_on_where_it_stopped(mirror, tmp_path):
    common.download([f"{mirror}/breaks"], tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert asked("/breaks") == [None, "bytes=200000-", "bytes=400000-"]
    (tmp_path / "b.part").write_bytes(CONTENT[:300_000])  # from an earlier start
    common.download([f"{mirror}/good"], tmp_path / "b", MD5)
    assert asked("/good") == ["bytes=300000-"]


@pytest.mark.parametrize("part", [b"of another file", CONTENT + b"too much"])
@pytest.mark.parametrize("server", ["good", "no-range"])
def test_wrong_bytes_of_an_earlier_mirror_do_not_spoil_a_good_one(mirror, tmp_path, part, server):
    (tmp_path / "a.part").write_bytes(part)
    common.download([f"{mirror}/{server}"], tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_the_last_mirror_may_be_slow(mirror, tmp_path):
    common.download([f"{mirror}/dead", f"{mirror}/slow"], tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_of_wrong_bytes_that_breaks_off_does_not_go_on_for_ever(mirror, tmp_path):
    common.download([f"{mirror}/wrong-and-breaks", f"{mirror}/good"], tmp_path / "a", MD5)
    assert (tmp_path / "a").read_bytes() == CONTENT and len(asked("/wrong-and-breaks")) == 6


def test_no_mirror_leaves_no_file_and_names_all_failures(mirror, tmp_path):
    with pytest.raises(common.UserError, match=r"503.*other bytes"):
        common.download([f"{mirror}/dead", f"{mirror}/wrong"], tmp_path / "a", MD5)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- the archive


def cifar_archive(path, *more, names=("cat", "dog")):
    """An archive as CIFAR-10's, of 4 pictures a batch; `more` are (name, bytes); returns the pixels."""
    rng, pixels = np.random.default_rng(0), {}
    with tarfile.open(path, "w:gz") as tar:
        batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        for name in batches:
            pixels[name] = rng.integers(256, size=(4, 3072), dtype=np.uint8)
            add(tar, name, pickle.dumps({"data": pixels[name], "labels": [0, 1, 0, 1]}, protocol=2))
        add(tar, "batches.meta", pickle.dumps({"label_names": list(names)}, protocol=2))
        for name, content in more:
            add(tar, name, content)
    return pixels


def add(tar, name, content):
    member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_unpack_writes_folders_that_train_as_they_are(tmp_path):
    pixels = cifar_archive(tmp_path / "a.tar.gz", ("../../outside", b"x"))
    run("common.py", "unpack", "a.tar.gz", "out/cifar", cwd=tmp_path)
    files = sorted(
        str(file.relative_to(tmp_path / "out/cifar")) for file in (tmp_path / "out").rglob("*.png")
    )
    assert len(files) == 24 and files[:3] == [
        "test/cat/00000.png",
        "test/cat/00002.png",
        "test/dog/00001.png",
    ]
    expected = pixels["data_batch_2"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(common.decode(tmp_path / "out/cifar/train/dog/00005.png"), expected)
    assert not (tmp_path / "out/outside").exists() and not (tmp_path / "outside").exists()
    train, test = common.load_data(flags(data=tmp_path / "out/cifar"), "CIFAR10", size=32)
    assert (len(train), len(test), train.spec.classes) == (20, 4, ["cat", "dog"])


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def test_unpack_refuses_what_is_no_such_archive_and_runs_nothing(tmp_path):
    (tmp_path / "text.tar.gz").write_text("no archive")
    cifar_archive(tmp_path / "evil.tar.gz", ("test_batch", pickle.dumps(Evil())))
    cifar_archive(tmp_path / "climbs.tar.gz", names=("cat", "../../dog"))
    whole = (tmp_path / "evil.tar.gz").read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "evil", "climbs", "half", "missing"):
        _, err = run("common.py", "unpack", f"{name}.tar.gz", "out", cwd=tmp_path, status=2)
        one_error_line(err, f"{name}.tar.gz")
    assert not (tmp_path / "evil-was-here").exists() and not (tmp_path / "out").exists()


def test_cifar10_is_downloaded_once_checked_and_taken_up_after_damage(mirror, tmp_path, monkeypatch):
    pixels = cifar_archive(tmp_path / "a.tar.gz")
    content = (tmp_path / "a.tar.gz").read_bytes()
    monkeypatch.setattr(Mirror, "do_GET", lambda self: serve(self, content))
    monkeypatch.setattr(common, "CIFAR10_MIRRORS", ["http://127.0.0.1:9/nobody", f"{mirror}/good"])
    cifar10 = torchvision.datasets.CIFAR10
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        md5 = {member.name[20:]: hashlib.md5(tar.extractfile(member).read()).hexdigest() for member in tar}
    monkeypatch.setattr(cifar10, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(
        cifar10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": md5["batches.meta"]})
    args = flags(data=tmp_path / "data")
    for _ in range(2):
        train, _ = common.load_data(args, "CIFAR10", size=32)
        assert np.array_equal(train[5][0].numpy().ravel(), pixels["data_batch_2"][1])
        (tmp_path / "data/cifar-10-batches-py/data_batch_3").write_bytes(b"half a file")
    assert len(Mirror.requests) == 1  # the second time, the archive was still there


def serve(handler, content):
    handler.requests.append(handler.path)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


PACKED = ROOT.parent / "shared/data/unpack.py"


@pytest.mark.skipif(not PACKED.exists(), reason="needs the real data sets, packed, beside the repository")
def test_the_real_data_sets_are_read_as_torchvision_reads_them(tmp_path):
    import subprocess
    import sys

    subprocess.run([sys.executable, PACKED, tmp_path], check=True, stdout=subprocess.DEVNULL)
    train, test = common.load_data(flags(data=tmp_path), "CIFAR10", size=32)
    reference = torchvision.datasets.CIFAR10(tmp_path, train=False)
    assert len(train) == 50_000 and train.spec.classes == reference.classes
    assert np.array_equal(test.pixels.numpy(), reference.data) and test.labels.tolist() == reference.targets
    about = dict(channels=1, mean=0, std=1, dark_ground=True)
    digits = common.load_data(flags(data=tmp_path), "MNIST", size=28, **about)[1].pixels
    assert torch.equal(digits[..., 0], torchvision.datasets.MNIST(tmp_path, train=False).data)
    for digit in digits.numpy()[::10]:  # in prediction they, and black on white ones, come out as in training
        assert np.array_equal(common.light_on_black(digit), digit)
        assert np.array_equal(common.light_on_black(255 - digit), digit)


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert common.pick_device("auto") == common.pick_device("cuda") == torch.device("cuda:1")
    assert common.pick_device("cpu") == CPU
    with pytest.raises(common.UserError, match="cuda:0 is one device for 2 processes"):
        common.pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(common.UserError, match="3 processes, but 2 GPUs"):
        common.pick_device("auto")
