"""What a user may rely on when images are read: from files, folders, tables and data sets."""

import hashlib
import http.server
import io
import os
import pickle
import runpy
import shutil
import struct
import sys
import threading
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import readers
from readers import Spec, UserError

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, STL10

RNG = np.random.default_rng(0)
RGB = cv2.resize(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8), (20, 16))
GRAY = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY)
ALPHA = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (16, 1))[..., None]
RGBA = np.dstack([RGB, ALPHA])
ON_WHITE = RGB * (ALPHA / 255) + 255.0 - ALPHA
PNG = cv2.imencode(".png", RGB)[1].tobytes()
HELD = [0, 3, 1, 5, 2, 6, 4]  # how Pillow turns, for each orientation from 2 on
LOSSLESS = {"quality": 100, "subsampling": "4:4:4", "lossless": True, "exact": True}
TOLERANCE = {"jpg": 12, "avif": 12}  # of formats that lose


def read(data, dataset="CIFAR10", spec=None, **flags):
    flags = {"holdout": 0, "seed": 0, "test_only": False, "download": False, **flags}
    args = SimpleNamespace(data=str(data), **flags)
    return readers.read_data(args, dataset, spec or Spec([], 32))


def write(folder, *names, suffix=".png", count=2):
    """Folders with some images in each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}{suffix}").write_bytes(PNG)


# ------------------------------------------------------------------------------------- pictures


def check(path, expected, tolerance=1):
    found = readers.decode(path)
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found - expected.astype(float)).max() <= tolerance


def refused(path, data, why):
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"x.* cannot be read: {why}"):
        readers.decode(path)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif"])
def test_images_are_upright_whatever_their_exif(suffix, orientation):
    file = f"x.{suffix}"
    image = Image.fromarray(RGB).transpose(HELD[orientation - 2])
    exif = Image.Exif()
    exif[274] = orientation
    image.save(file, exif=exif, **LOSSLESS)
    check(file, RGB, TOLERANCE.get(suffix, 1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGB"])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif", "webp", "ppm", "jpg", "jp2"])
def test_images_of_all_modes_have_the_pixels_that_pillow_gives(suffix, mode):
    image = Image.fromarray(RGB).convert(mode)
    try:
        image.save(f"x.{suffix}", quality=100, lossless=True)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"there is no such {suffix}")
    with Image.open(f"x.{suffix}") as again:
        check(f"x.{suffix}", np.asarray(again.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "webp", "avif", "tif"])
def test_what_is_transparent_is_on_white(suffix):
    file = f"x.{suffix}"
    Image.fromarray(RGBA).save(file, **LOSSLESS)
    check(file, ON_WHITE, TOLERANCE.get(suffix, 1))


@pytest.mark.parametrize(("name", "mode"), [("x.png", "P"), ("x.gif", "P"), ("x.png", "L")])
def test_a_color_that_stands_for_transparent_is_white(name, mode):
    black = int(GRAY.min())
    Image.fromarray(GRAY).convert(mode).save(name, transparency=black)
    check(name, np.dstack([np.where(black == GRAY, 255, GRAY)] * 3))


def tiff(pixels, tag, value, new_tag, new_value):
    """The bytes of a TIFF, one tag of which is replaced by another."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    entry = struct.pack("<HHII", tag, 3, 1, value)
    return file.getvalue().replace(entry, struct.pack("<HHII", new_tag, 3, 1, new_value))


def test_a_fourth_band_of_a_tiff_is_alpha_only_where_the_file_says_so(tmp_path):
    unusual = "a TIFF of an unusual kind: convert it to RGB"
    file = tmp_path / "x.tif"
    refused(file, tiff(RGBA, 338, 2, 337, 0), unusual)  # near infrared, say
    file.write_bytes(tiff(RGBA, 338, 2, 338, 0))
    check(file, RGB)
    multiplied = np.round(RGB * (ALPHA / 255)).astype(np.uint8)
    file.write_bytes(tiff(np.dstack([multiplied, ALPHA]), 338, 2, 338, 1))
    check(file, multiplied + 255.0 - ALPHA)
    refused(file, tiff(GRAY, 284, 1, 284, 2), unusual)  # band by band
    file.write_bytes(tiff(GRAY, 262, 1, 262, 0))  # white is 0
    check(file, np.dstack([255 - GRAY] * 3))


def test_more_than_8_bits_are_refused_where_the_file_does_not_say_what_is_white(tmp_path):
    why = r"one of the 16-bit images, .*: convert it to 8 bits"
    rgba = RGBA.astype(np.uint16) * 257
    for suffix in (".png", ".tif"):
        for image in (rgba[..., 0], rgba[..., :3], rgba):
            refused(tmp_path / f"x{suffix}", cv2.imencode(suffix, image)[1].tobytes(), why)
    refused(tmp_path / "x.pgm", b"P5 1 1 4095\n12", why)


@pytest.mark.parametrize("default", [False, True])  # an image beside the frames, in a PNG
@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_the_first_image_of_an_animation_is_taken(suffix, default):
    file = f"x.{suffix}"
    others = [Image.fromarray(255 - RGB)] * 2
    Image.fromarray(RGB).save(file, save_all=True, append_images=others, default_image=default)
    check(file, np.asarray(Image.open(file).convert("RGB")))


def test_what_is_no_image_is_named_with_the_reason_and_takes_no_memory(tmp_path):
    claims = bytearray(PNG)
    claims[33:37] = b"\xff\xff\xff\xf0"  # the length of the second chunk
    huge = bytearray(PNG)
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    contents = {"claims.png": claims, "huge.png": huge, "text.png": b"I am none", "empty.jpg": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for suffix in ("png", "jpg", "webp", "tif"):
        file = tmp_path / f"cut.{suffix}"
        Image.fromarray(RGB).save(file)
        os.truncate(file, file.stat().st_size * 2 // 3)
    Image.fromarray(GRAY).convert("1").save(tmp_path / "few_bits.png", transparency=0)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for file in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{file.name} cannot be read: [^<]+$"):
            readers.decode(file)


def test_strips_lose_no_pixels_and_ordinary_images_are_resized_as_ever():
    stripes = np.tile(np.array([0, 254], np.uint8), (30, 500))
    for image in (stripes, stripes.T):
        assert np.abs(readers.prepare(image, Spec([], 32, 1)).astype(int) - 127).max() <= 4
    for size, mode in ((12, cv2.INTER_AREA), (64, cv2.INTER_LINEAR)):
        expected = cv2.resize(RGB, (size, size), interpolation=mode)
        assert np.array_equal(readers.prepare(RGB, Spec([], size)), expected)
    square = readers.prepare(RGB, Spec([], 8, crop=0.5))
    assert np.array_equal(square, RGB[4:12, 6:14])


@pytest.mark.filterwarnings("error")
def test_many_images_come_in_order_with_errors_in_their_places(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    sources = [np.full((5, 5), i % 251, np.uint8) for i in range(3000)]
    sources[7] = tmp_path / "none.png"
    sources[8] = tmp_path / "x.png"
    images = list(readers.read_images(sources, Spec([], 4)))
    assert str(images[7]).endswith("none.png cannot be read: no such file")
    assert images[8].shape == images[9].shape == (4, 4, 3)
    assert [image[0, 0, 0] for image in images[9:]] == [i % 251 for i in range(9, 3000)]


# -------------------------------------------------------------------------------------- folders


def test_a_run_says_what_it_read_and_what_it_left_out(tmp_path, capsys):
    write(tmp_path, "train/ball", "train/standing", "val/ball", "test/ball")
    write(tmp_path, "train/bar", count=5)
    write(tmp_path, "train/__MACOSX", "train/bar/.ipynb_checkpoints")
    for name in ("train/ball/x.HEIC", "train/ball/y.heic", "train/loose.png", "train/ball/._0.png"):
        (tmp_path / name).touch()
    classes, (train, test) = read(tmp_path)
    assert classes == ["ball", "bar", "standing"]
    assert (len(train), test.labels.tolist()) == (9, [0, 0])
    assert test.sources[0] == tmp_path / "val/ball/0.png"
    first, _, last = capsys.readouterr().out.splitlines()
    assert first == "train: 9 images, 3 classes, 2 (ball) to 5 (bar) images a class"
    for part in ("2 .heic", "1 .png", "test"):
        assert part in last


def test_test_only_takes_test_and_may_lack_classes_but_has_no_others(tmp_path, capsys):
    write(tmp_path, "val/ball", "test/standing")
    _, (test,) = read(tmp_path, spec=Spec(["ball", "bar", "standing"], 32), test_only=True)
    assert test.labels.tolist() == [2, 2]
    assert "2 images, 1 classes, 0 (ball) to 2 (standing)" in capsys.readouterr().out
    with pytest.raises(UserError, match="'standing' is a class of the test images only"):
        read(tmp_path, spec=Spec(["ball", "bar"], 32), test_only=True)


def test_a_class_folder_without_images_is_an_error(tmp_path):
    write(tmp_path, "train/ball", "train/bar", "test/ball")
    write(tmp_path, "train/bird", suffix=".heic")
    with pytest.raises(UserError, match=r"train/bird has no images.*2 \.heic"):
        read(tmp_path)


def test_images_in_no_class_folder_are_an_error(tmp_path):
    write(tmp_path, "train/ball", "train/bar", "test")
    with pytest.raises(UserError, match=r"test has no class folders: 2 \.png.*--holdout N"):
        read(tmp_path)


def test_two_unicode_forms_of_a_name_are_one_class_and_links_are_followed(tmp_path):
    write(tmp_path, "train/caf\u00e9", "train/cafe\u0301", "elsewhere", "test/cafe\u0301")
    (tmp_path / "train/link").symlink_to(tmp_path / "elsewhere")
    classes, (train, test) = read(tmp_path)
    assert classes == ["caf\u00e9", "link"]
    assert (len(train), len(test)) == (6, 2)
    assert all(file.exists() for file in train.sources)


@pytest.mark.skipif(os.geteuid() == 0, reason="root enters every folder")
def test_a_folder_that_cannot_be_entered_is_an_error(tmp_path):
    write(tmp_path, "a", "b")
    (tmp_path / "b").chmod(0)
    with pytest.raises(UserError, match=r"cannot be entered: .*b"):
        readers.find_images(tmp_path)


def test_a_loop_of_links_is_an_error_and_no_endless_walk(tmp_path):
    write(tmp_path, "a")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="too deep"):
        readers.find_images(tmp_path)


def test_holdout_takes_of_each_class_its_share_and_says_where_there_is_none(tmp_path, capsys):
    write(tmp_path, "cat", "dog", count=9)
    write(tmp_path, "rare", count=2)
    for seed in range(3):
        _, parts = read(tmp_path, holdout=10, seed=seed)
        assert [np.bincount(part.labels).tolist() for part in parts] == [[5, 4, 1], [4, 5, 1]]
        assert len({*parts[0].sources, *parts[1].sources}) == 20
    read(tmp_path, holdout=2)
    assert "--holdout 2 leaves no validation images of class rare" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--holdout 18 leaves no training images of .*rare"):
        read(tmp_path, holdout=18)


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        (("photos/train/cat", "photos/train/dog"), "train/ is deeper: --data .*mine/photos$"),
        (("cat", "dog"), "--holdout N"),
        ((".",), "2 images are in it, the first is .*0.png"),
    ],
)
def test_nothing_is_downloaded_to_images_of_the_users(tmp_path, folders, hint):
    write(tmp_path / "mine", *folders)
    before = sorted(tmp_path.rglob("*"))
    for download in (False, True):
        with pytest.raises(UserError, match=hint) as error:
            read(tmp_path / "mine", download=download)
        assert "--download" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_without_images_that_are_read_and_tables_are_the_users_too(tmp_path):
    write(tmp_path / "one", "cat", suffix=".heic")
    write(tmp_path, "two", suffix=".csv")
    for name in ("one", "two"):
        with pytest.raises(UserError, match="no train/<class>/"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"no folder .*none: .*--download"):
        read(tmp_path / "none")


# --------------------------------------------------------------------------------------- tables


def table(folder, text):
    """The training images of a table, beside which is one to test on."""
    (folder / "train.csv").write_text(text, encoding="utf-8")
    (folder / "test.csv").write_text("file,label\na/0.png,cat\n")
    return read(folder)[1][0]


@pytest.fixture
def images(tmp_path):
    write(tmp_path, "a", "train")
    (tmp_path / "train/id7.jpg").write_bytes(PNG)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("Label;File\ncat;a/0.png\ndog;a/1.png\n", ["a/0.png", "a/1.png"]),
        (",fold,Class,Image ID\n0,1,cat ,a/0\n1,1,dog,\ta/1\n", ["a/0.png", "a/1.png"]),
        ("id\tfilename\tbreed\n1\ta/0.png\tcat\n2\ta/1.png\tdog\n", ["a/0.png", "a/1.png"]),
        ("picture,kind\nid7,cat\n1,dog\n", ["train/id7.jpg", "train/1.png"]),
        ('\ufeffkind,file\r\n"cat","a/0.png"\r\n\r\ndog,a/1.png\r\n', ["a/0.png", "a/1.png"]),
    ],
)
def test_a_table_is_read_by_its_header(images, text, files):
    assert table(images, text).sources == [images / file for file in files]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("image_id,healthy,rust,scab\na,1,0,0\n", "columns image_id, healthy, rust, scab: rename"),
        ("file,label,class\na,b,c\n", "columns file, label, class: rename"),
        ("id7,cat\na/1.png,dog\n", "header"),
        (f"label{',pixel' * 64}\n1{',2' * 64}\n", "table of pixels"),
        ("file,label\n\na/0.png\n", "train.csv, line 3: no file,label"),
        ("file,label\na,b.png,cat\n", "train.csv, line 2: "),
        ('file,label\na/0.png,"cat\na/1.png,dog\n', "train.csv, line 2: "),
        ("file,label\na/0.png,cat\n", "classes .*cat.*: it takes 2"),
        ("", "train.csv"),
        (f"{'x' * 9999},b,c\n1,2,3\n", "rename"),
    ],
)
def test_a_table_that_is_not_clear_is_refused_with_what_is_at_fault(images, text, error):
    with pytest.raises(UserError, match=error) as raised:
        table(images, text)
    assert len(str(raised.value)) < 500


def test_columns_that_are_not_used_are_named_and_missing_files_are_no_such_file(images, capsys):
    train = table(images, "file,fold,label\na/0.png,1,cat\nnone.png,2,dog\n")
    assert "fold" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match=r"none.png cannot be read: no such file"):
        readers.decode(train.sources[1])


def test_a_table_to_train_on_alone_needs_holdout(images):
    (images / "train.csv").write_text("file,label\na/0.png,cat\na/1.png,dog\na/0.png,cat\n")
    with pytest.raises(UserError, match=r"no test/<class>/ and no test.csv.*--holdout N"):
        read(images)
    (images / "val.csv").write_text("file,label\na/0.png,cat\n")
    assert len(read(images)[1][1]) == 1


# ----------------------------------------------------------------------------- other data sets


def test_drawn_digits_are_the_same_every_time_and_in_one_array():
    classes, (train, test) = read("drawn", spec=Spec([], 20, 1))
    _, (_, again) = read("drawn", spec=Spec([], 20, 1))
    assert classes == list("0123456789")
    assert train.sources.shape[1:] == (20, 20, 1)
    assert np.array_equal(test.sources, again.sources)


BATCH = RNG.integers(256, size=(4, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with CIFAR-10, of 4 + 4 images, and its archive, which torchvision takes for those
    that it knows."""
    folder = tmp_path / "cifar/cifar-10-batches-py"
    folder.mkdir(parents=True)
    batch = pickle.dumps({"data": BATCH.reshape(4, 3072), "labels": [0, 1, 0, 1]})
    (folder / "data_batch_1").write_bytes(batch)
    (folder / "test_batch").write_bytes(batch)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    archive = shutil.make_archive(tmp_path / "good", "gztar", folder.parent)
    md5 = hashlib.md5(batch).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(Path(archive).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5]])
    return folder.parent


@pytest.fixture
def server(tmp_path):
    """The address of a server on this machine, which has the files in tmp_path."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


NOBODY = "http://127.0.0.1:9/nobody"


def test_cifar10_comes_from_the_first_mirror_that_has_it_once(
    tmp_path, monkeypatch, cifar10, server
):
    (tmp_path / "wrong").write_bytes(b"another archive")
    mirrors = [NOBODY, f"{server}/none", f"{server}/wrong", f"{server}/good.tar.gz"]
    monkeypatch.setattr(CIFAR10, "url", NOBODY)
    monkeypatch.setattr(readers, "CIFAR10_MIRRORS", mirrors)
    read(tmp_path / "new", download=True)
    (tmp_path / "good.tar.gz").unlink()
    (tmp_path / "new/cifar-10-batches-py/data_batch_1").write_bytes(b"half a file")
    classes, (train, test) = read(tmp_path / "new", download=True)  # from the archive that is kept
    assert classes == ["cat", "dog"]
    assert (len(train), test.labels.tolist()) == (4, [0, 1, 0, 1])
    assert np.array_equal(train.sources, BATCH.transpose(0, 2, 3, 1))
    with pytest.raises(UserError, match=r"CIFAR10 does not download.*--data drawn"):
        read(tmp_path / "other", download=True)


def test_unpack_writes_folders_that_are_read_as_they_are(tmp_path, monkeypatch, cifar10):
    def unpack(*argv):
        monkeypatch.setattr(sys, "argv", ["common.py", *argv])
        readers.unpack()

    unpack("unpack", str(cifar10), "out")
    check(tmp_path / "out/train/dog/00001.png", BATCH[1].transpose(1, 2, 0), 0)
    classes, (train, test) = read("out")
    assert (classes, len(train), len(test)) == (["cat", "dog"], 4, 4)
    with pytest.raises(UserError, match=r"usage: python common\.py unpack DATA FOLDER"):
        unpack("unpack")
    with pytest.raises(UserError, match="not CIFAR-10"):
        unpack("unpack", "out", "again")


def test_a_data_set_without_a_test_set_needs_holdout(tmp_path):
    write(tmp_path, "eurosat/2750/Forest", "eurosat/2750/River", suffix=".jpg", count=6)
    _, parts = read(tmp_path, "EuroSAT", holdout=4)
    assert [len(part) for part in parts] == [8, 4]
    with pytest.raises(UserError, match=r"no test set: add --holdout N"):
        read(tmp_path, "EuroSAT")


def test_a_data_set_with_channels_first_is_read_as_torchvision_gives_it(tmp_path, monkeypatch):
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = RNG.integers(256, size=(2, 3, 96, 96), dtype=np.uint8)
    (folder / "test_X.bin").write_bytes(images.tobytes())
    (folder / "test_y.bin").write_bytes(bytes([1, 2]))
    _, (test,) = read(tmp_path, "STL10", test_only=True)
    assert test.labels.tolist() == [0, 1]
    found = list(readers.read_images(test.sources, Spec([], 96)))
    assert np.array_equal(found[1], np.asarray(STL10(tmp_path, split="test")[1][0]))


def test_a_data_set_with_other_parts_is_refused_by_its_own_message(tmp_path):
    with pytest.raises(UserError, match=r"EMNIST does not download.*Unknown value 'train'"):
        read(tmp_path / "new", "EMNIST", download=True)


PACKED = Path(__file__).parents[2] / "shared/data/unpack.py"


@pytest.mark.skipif(not PACKED.exists(), reason="needs the real data sets, packed")
def test_the_real_data_sets_are_read_as_torchvision_reads_them(tmp_path, monkeypatch):
    unpack = runpy.run_path(str(PACKED))
    for name, _ in CIFAR10.train_list:  # to unpack them takes long
        del unpack["CIFAR10"][name]
    monkeypatch.setattr(CIFAR10, "train_list", [])
    unpack["main"](tmp_path)
    for kind in (CIFAR10, MNIST):
        _, (test,) = read(tmp_path, kind.__name__, test_only=True)
        reference = kind(tmp_path, train=False)
        assert np.array_equal(test.sources.squeeze(), np.asarray(reference.data))
        assert test.labels.tolist() == np.asarray(reference.targets).tolist()
