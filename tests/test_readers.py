"""What a user may rely on when images are read: from files, folders, tables and data sets."""

import bz2
import hashlib
import http.server
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import readers
from readers import Spec, UserError

import cv2
import numpy as np
import pytest
import torchvision
from PIL import Image

RNG = np.random.default_rng(0)
RGB = cv2.resize(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8), (20, 16))
GRAY = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY)
ALPHA = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (16, 1))
RGBA = np.dstack([RGB, ALPHA])
HELD = [None, None, 0, 3, 1, 5, 2, 6, 4]  # how Pillow turns, for each orientation


FLAGS = {"holdout": 0, "seed": 0, "test_only": False, "download": False}


def read(data, dataset="CIFAR10", spec=None, **flags):
    args = SimpleNamespace(data=str(data), **{**FLAGS, **flags})
    return readers.read_data(args, dataset, spec or Spec([], 32))


def write(folder, *names, suffix=".png", count=2):
    """Folders with some images in each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            file = folder / name / f"{i}{suffix}"
            file.write_bytes(cv2.imencode(".png", RNG.integers(0, 256, (9, 9, 3)))[1])
    return folder


# ------------------------------------------------------------------------------------- pictures


def on_white(rgb, alpha):
    part = alpha[..., None] / 255
    return rgb * part + 255 * (1 - part)


def check(path, expected, tolerance=1):
    found = readers.decode(path)
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found - expected.astype(float)).max() <= tolerance


def tiff(image, photometric=2, tags=()):
    """The bytes of a TIFF, by hand: Pillow writes no bands without a meaning."""
    height, width, bands = image.shape
    tags = [(256, width), (257, height), (258, image.itemsize * 8), (262, photometric), *tags]
    tags += [(259, 1), (277, bands), (278, height), (279, image.nbytes), (273, 8)]
    entries = b""
    for tag, value in sorted(tags):
        entries += struct.pack("<HHII", tag, 4, 1, value)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, 8 + image.nbytes) + image.tobytes() + directory


def chunk(name, content):
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif"])
def test_images_are_upright_whatever_their_exif_and_alpha(tmp_path, suffix, orientation):
    options = {"quality": 100, "subsampling": "4:4:4"}
    if suffix == "webp":
        options = {"lossless": True, "exact": True}
    tolerance = 12 if suffix in ("jpg", "avif") else 1
    for pixels, expected in ((RGB, RGB), (RGBA, on_white(RGB, ALPHA))):
        if pixels is RGBA and suffix == "jpg":
            continue
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        exif[274] = orientation
        if orientation > 1:
            image = image.transpose(HELD[orientation])
        image.save(tmp_path / f"x.{suffix}", exif=exif, **options)
        check(tmp_path / f"x.{suffix}", expected, tolerance)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGB"])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif", "webp", "ppm", "jpg", "jp2"])
def test_images_of_all_modes_have_the_pixels_that_pillow_gives(tmp_path, suffix, mode):
    image = Image.fromarray(RGB).convert(mode)
    try:
        image.save(tmp_path / f"x.{suffix}", quality=100, lossless=True)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"there is no such {suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as again:
        check(tmp_path / f"x.{suffix}", np.asarray(again.convert("RGB")))


def test_what_is_transparent_is_white(tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4, :, 3], image[4:, :, 3] = 255, 128  # black: above opaque, below half transparent
    for name in ("a.png", "a.webp"):
        cv2.imwrite(str(tmp_path / name), image, [cv2.IMWRITE_WEBP_QUALITY, 101])
        assert readers.decode(tmp_path / name)[:, 0, 0].tolist() == [0] * 4 + [127] * 4
    black = int(GRAY.min())
    expected = np.dstack([np.where(black == GRAY, 255, GRAY)] * 3)
    for name, mode in (("p.png", "P"), ("p.gif", "P"), ("gray.png", "L")):
        Image.fromarray(GRAY).convert(mode).save(tmp_path / name, transparency=black)
        check(tmp_path / name, expected)


def refused(path, data, why="x.* cannot be read: a TIFF of an unusual kind: convert it to RGB"):
    path.write_bytes(data)
    with pytest.raises(UserError, match=why):
        readers.decode(path)


def test_a_fourth_band_of_a_tiff_is_alpha_only_where_the_file_says_so(tmp_path):
    file = tmp_path / "x.tif"
    refused(file, tiff(RGBA))  # near infrared, say
    file.write_bytes(tiff(RGBA, tags=[(338, 0)]))
    check(file, RGB)
    file.write_bytes(tiff(RGBA, tags=[(338, 2)]))
    check(file, on_white(RGB, ALPHA))
    multiplied = np.round(RGB * (ALPHA[..., None] / 255)).astype(np.uint8)
    file.write_bytes(tiff(np.dstack([multiplied, ALPHA]), tags=[(338, 1)]))
    check(file, multiplied + 255.0 - ALPHA[..., None])
    refused(file, tiff(GRAY[..., None], 0, [(284, 2)]))  # which Pillow takes for its negative
    refused(file, tiff(GRAY.astype(np.int8)[..., None], 1, [(339, 2)]))
    file.write_bytes(tiff(GRAY[..., None], 0))
    check(file, np.dstack([255 - GRAY] * 3))


def test_more_than_8_bits_are_refused_where_the_file_does_not_say_what_is_white(tmp_path):
    why = r"x.* cannot be read: one of the 16-bit images, .*: convert it to 8 bits"
    rgba = RGBA[..., [2, 1, 0, 3]].astype(np.uint16) * 257
    for suffix in (".png", ".tif"):
        for image in (rgba[..., 0], rgba[..., :3], rgba):
            refused(tmp_path / f"x{suffix}", cv2.imencode(suffix, image)[1].tobytes(), why)
    deep = cv2.resize(rgba[..., 0], (80, 64))
    refused(tmp_path / "x.jp2", cv2.imencode(".jp2", deep)[1].tobytes(), why)
    for pixels, form in ((GRAY.astype(np.float32), 3), (GRAY.astype(np.uint32), 1)):
        refused(tmp_path / "x.tif", tiff(pixels[..., None], 1, [(339, form)]), why)
    refused(tmp_path / "x.pgm", b"P5 1 1 4095\n12", why)
    for largest in (100, 255, 1000, 65535):  # which these files name
        kind = ">u2" if largest > 255 else "u1"
        values = np.round(RGB / 255 * largest)
        header = f"P6 20 16 {largest}\n".encode()
        (tmp_path / "x.ppm").write_bytes(header + values.astype(kind).tobytes())
        check(tmp_path / "x.ppm", np.round(values * 255 / largest))


def test_the_first_image_of_an_animation_is_taken(tmp_path):
    for name in ("x.gif", "x.png", "x.webp"):
        frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        check(tmp_path / name, np.asarray(Image.open(tmp_path / name).convert("RGB")))


def test_what_is_no_image_is_named_with_the_reason_and_takes_no_memory(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
    few_bits = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 4, 0, 0, 0, 0)) + chunk(b"tRNS", b"")
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n"
    claims = png + header + struct.pack(">I", 2**32 - 20) + b"IDAT" + bytes(30)
    bmp = bytearray(cv2.imencode(".bmp", RGB)[1])
    bmp[18:26] = struct.pack("<II", 60_000, 60_000)
    jpeg = bytearray(cv2.imencode(".jpg", RGB)[1])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\x00\xff\x00"
    contents = {"claims.png": claims, "huge.png": png + huge + chunk(b"IEND", b""), "x.bmp": bmp}
    contents |= {
        "few.png": png + few_bits + chunk(b"IEND", b""),
        "huge.jpg": jpeg,
        "text.png": b"I am none",
        "empty.jpg": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for suffix in ("png", "jpg", "webp", "tif", "bmp", "gif", "ppm"):
        Image.fromarray(RGB).save(tmp_path / f"cut.{suffix}")
        data = (tmp_path / f"cut.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for file in tmp_path.iterdir():
        with pytest.raises(UserError, match=rf"{file.name} cannot be read: [^<]+$"):
            readers.decode(file)
    with pytest.raises(UserError, match=r"none.png cannot be read: no such file"):
        readers.decode(tmp_path / "none.png")


def test_strips_lose_no_pixels_and_ordinary_images_are_resized_as_ever():
    stripes = np.tile(np.array([0, 254], np.uint8), (30, 500))
    for image in (stripes, stripes.T):
        assert np.abs(readers.prepare(image, Spec([], 32, 1)).astype(int) - 127).max() <= 4
    assert readers.prepare(RGB[..., :1], Spec([], 8)).shape == (8, 8, 3)
    for size, mode in ((12, cv2.INTER_AREA), (64, cv2.INTER_LINEAR)):
        expected = cv2.resize(RGB, (size, size), interpolation=mode)
        assert np.array_equal(readers.prepare(RGB, Spec([], size)), expected)
    square = readers.prepare(RGB, Spec([], 8, crop=0.5))
    assert np.array_equal(square, RGB[4:12, 6:14])


def test_many_images_come_in_order_with_errors_in_their_places(tmp_path):
    write(tmp_path, "a", count=1)
    sources = [np.full((5, 5), i % 251, np.uint8) for i in range(3000)]
    sources[7] = tmp_path / "none.png"
    sources[8] = tmp_path / "a/0.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = list(readers.read_images(sources, Spec([], 4, 1)))
    assert isinstance(images[7], UserError)
    assert images[8].shape == (4, 4, 1)
    assert all(images[i][0, 0, 0] == i % 251 for i in range(9, 3000))
    assert len(list(readers.read_images(np.zeros((9, 5, 5, 3), np.uint8), Spec([], 4)))) == 9


def test_a_spec_is_of_plain_numbers():
    spec = Spec([], 4, 3, np.float64(0.5), (0.1, 0.2, 0.3))
    assert type(spec.mean) is float
    assert spec.std == [0.1, 0.2, 0.3]


# -------------------------------------------------------------------------------------- folders


def test_a_run_says_what_it_read_and_what_it_left_out(tmp_path, capsys):
    write(tmp_path, "train/ball", "train/standing", "val/ball", "test/ball")
    write(tmp_path, "train/bar", count=5)
    for name in ("train/ball/x.HEIC", "train/ball/y.heic", "train/loose.png", "train/ball/._0.png"):
        (tmp_path / name).touch()
    write(tmp_path, "train/__MACOSX", "train/bar/.ipynb_checkpoints")
    classes, (train, test) = read(tmp_path)
    assert classes == ["ball", "bar", "standing"]
    assert (len(train), len(test), test.labels.tolist()) == (9, 2, [0, 0])
    assert test.sources[0] == tmp_path / "val/ball/0.png"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 9 images, 3 classes, 2 (ball) to 5 (bar) images a class"
    assert len(lines) == 3
    for part in ("2 .heic", "1 .png", "test"):
        assert part in lines[2]


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
        files = {*parts[0].sources, *parts[1].sources}
        assert len(files) == 20
    read(tmp_path, holdout=2)
    assert "--holdout 2 leaves no validation images of class rare" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--holdout 18 leaves no training images of .*rare"):
        read(tmp_path, holdout=18)
    with pytest.raises(UserError, match="leaves no training images of class cat"):
        read(tmp_path, holdout=2**31)


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        (("photos/train/cat", "photos/train/dog"), "train/ is deeper: --data .*mine/photos$"),
        (("cat", "dog"), "--holdout N"),
        (("a/b/c/d",), "2 images are in it, the first is .*a/b/c/d/0.png"),
        ((".",), "2 images are in it, the first is .*0.png"),
    ],
)
def test_nothing_is_downloaded_to_images_of_the_users(tmp_path, folders, hint):
    for folder in folders:
        write(tmp_path / "mine", folder)
    before = sorted(tmp_path.rglob("*"))
    for download in (False, True):
        with pytest.raises(UserError, match=hint) as error:
            read(tmp_path / "mine", download=download)
        assert "--download" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_without_images_that_are_read_and_tables_are_the_users_too(tmp_path):
    write(tmp_path / "one", "cat", suffix=".heic")
    (tmp_path / "two").mkdir()
    (tmp_path / "two/labels.csv").touch()
    for name in ("one", "two"):
        with pytest.raises(UserError, match="no train/<class>/"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"no folder .*none: .*--download"):
        read(tmp_path / "none")


# --------------------------------------------------------------------------------------- tables


def table(folder, text, name="train.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    (folder / "test.csv").write_text("file,label\na/0.png,cat\n")
    return [
        [file.relative_to(folder).as_posix() for file in part.sources] for part in read(folder)[1]
    ]


@pytest.fixture
def images(tmp_path):
    write(tmp_path, "a", "train")
    (tmp_path / "train/id7.jpg").write_bytes((tmp_path / "train/0.png").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("Label;File\ncat;a/0.png\ndog;a/1.png\n", ["a/0.png", "a/1.png"]),
        (",fold,Class,Image ID\n0,1,cat ,a/0\n1,1,dog,\ta/1\n", ["a/0.png", "a/1.png"]),
        ("id\tfilename\tbreed\n1\ta/0.png\tcat\n2\ta/1.png\tdog\n", ["a/0.png", "a/1.png"]),
        ("picture,kind\nid7,cat\n1,dog\n", ["train/id7.jpg", "train/1.png"]),
        ('\ufefffile,label\r\n"a/0.png","cat"\r\n\r\na/1.png,dog\r\n', ["a/0.png", "a/1.png"]),
        ("kind,file\ncat,a/0.png\ndog,none.png\n", ["a/0.png", "none.png"]),
    ],
)
def test_a_table_is_read_by_its_header(images, text, files):
    assert table(images, text)[0] == files


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("image_id,healthy,rust,scab\na,1,0,0\n", "columns image_id, healthy, rust, scab: rename"),
        ("file,label,class\na,b,c\n", "columns file, label, class: rename"),
        ("a/0.png,cat\na/1.png,dog\n", "header"),
        ("id7,cat\na/1.png,dog\n", "header"),
        ("gone.png,cat\na/1.png,dog\n", "header"),
        (f"label{',pixel' * 64}\n1{',2' * 64}\n", "table of pixels"),
        ("file,label\n\na/0.png\n", "train.csv, line 3: no file,label"),
        ("file,label\na/0.png,cat\na/1.png,\n", "train.csv, line 3: no file,label"),
        ("file,label\na,b.png,cat\n", "train.csv, line 2: "),
        ('file,label\na/0.png,"cat\na/1.png,dog\n', "train.csv, line 2: "),
        ('file,label\na/0.png,"cat\n"\na/1.png,dog\n', "train.csv, line 2: "),
        ("file,label\na/0.png,cat\n", "classes .*cat.*: it takes 2"),
        ("file,label\n", "train.csv"),
        ("", "train.csv"),
        (f"file,label\na/0.png,{'x' * 9999}\n", "classes"),
        (f"{'x' * 9999},b,c\n1,2,3\n", "rename"),
    ],
)
def test_a_table_that_is_not_clear_is_refused_with_what_is_at_fault(images, text, error):
    with pytest.raises(UserError, match=error) as raised:
        table(images, text)
    assert len(str(raised.value)) < 500


def test_columns_that_are_not_used_are_named_and_missing_files_are_no_such_file(images, capsys):
    table(images, "file,fold,label\na/0.png,1,cat\nnone.png,2,dog\n")
    assert "fold" in capsys.readouterr().out.splitlines()[-1]
    _, (train, _) = read(images)
    error = [*readers.read_images(train.sources, Spec([], 32))][1]
    assert str(error).endswith("none.png cannot be read: no such file")


def test_a_table_to_train_on_alone_needs_holdout(images):
    (images / "train.csv").write_text("file,label\na/0.png,cat\na/1.png,dog\na/0.png,cat\n")
    with pytest.raises(UserError, match=r"no test/<class>/ and no test.csv.*--holdout N"):
        read(images)
    (images / "val.csv").write_text("file,label\na/0.png,cat\n")
    assert len(read(images)[1][1]) == 1


# ----------------------------------------------------------------------------- other data sets


def test_drawn_digits_are_the_same_every_time_and_in_one_array():
    spec = Spec([], 20, 1)
    classes, (train, test) = read("drawn", spec=spec)
    assert classes == list("0123456789")
    assert train.sources.shape[1:] == (20, 20, 1)
    assert train.sources.dtype == np.uint8
    assert np.array_equal(test.sources, read("drawn", spec=spec)[1][1].sources)
    assert np.array_equal(test.take(np.array([5, 3])).sources[1], test.sources[3])


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10's archive with 4 images a batch, which torchvision takes for the real one."""
    kind = torchvision.datasets.CIFAR10
    md5 = {}
    contents = {"batches.meta": {"label_names": ["cat", "dog"]}}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = RNG.integers(256, size=(4, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": [0, 1, 0, 1]}
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, value in contents.items():
            data = pickle.dumps(value, protocol=2)
            md5[name] = hashlib.md5(data).hexdigest()
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    archive = hashlib.md5((tmp_path / "a.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "tgz_md5", archive)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(
        kind, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    return {name: value.get("data") for name, value in contents.items()}


class Mirror(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.content
        self.server.requests.append(self.path)
        if self.path == "/dead":
            return self.send_error(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        ways = {"/breaks": content[: len(content) // 2], "/wrong": content[::-1]}
        return self.wfile.write(ways.get(self.path, content))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, cifar10):
    """A server on 127.0.0.1 with the archive."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.content = (tmp_path / "a.tar.gz").read_bytes()
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_cifar10_comes_from_the_first_mirror_that_has_it_once(
    tmp_path, monkeypatch, cifar10, server
):
    address = f"http://127.0.0.1:{server.server_port}"
    bad = [
        "http://127.0.0.1:9/nobody",
        *(f"{address}/{name}" for name in ("dead", "wrong", "breaks")),
    ]
    monkeypatch.setattr(readers, "CIFAR10_MIRRORS", [*bad, f"{address}/good"])
    url = torchvision.datasets.CIFAR10.url
    for _ in range(2):
        classes, (train, test) = read(tmp_path / "new", download=True)
        assert classes == ["cat", "dog"]
        assert (len(train), len(test)) == (20, 4)
        pixels = cifar10["data_batch_2"][1].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(train.sources[5], pixels)
    assert server.requests.count("/good") == 2  # torchvision asks for a redirection first
    assert torchvision.datasets.CIFAR10.url == url
    (tmp_path / "new/cifar-10-batches-py/data_batch_3").write_bytes(b"half a file")
    assert len(read(tmp_path / "new")[1][0]) == 20  # from the archive, which is still there
    assert server.requests.count("/good") == 2


def test_without_any_mirror_the_error_says_what_needs_none(tmp_path, monkeypatch, cifar10):
    monkeypatch.setattr(readers, "CIFAR10_MIRRORS", [])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar")
    with pytest.raises(UserError, match=r"CIFAR10 does not download.*--data drawn"):
        read(tmp_path / "new", download=True)


def test_unpack_writes_folders_that_are_read_as_they_are(tmp_path, monkeypatch, cifar10):
    def unpack(*argv):
        monkeypatch.setattr(sys, "argv", ["common.py", *map(str, argv)])
        readers.unpack()

    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        tar.extractall(tmp_path / "data", filter="data")
    unpack("unpack", tmp_path / "data", tmp_path / "out")
    expected = cifar10["data_batch_2"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    check(tmp_path / "out/train/dog/00005.png", expected, 0)
    classes, (train, test) = read(tmp_path / "out")
    assert (classes, len(train), len(test)) == (["cat", "dog"], 20, 4)
    assert train.take([0]).files == [tmp_path / "out/train/cat/00000.png"]
    with pytest.raises(UserError, match=r"usage: python common\.py unpack DATA FOLDER"):
        unpack("unpack")
    with pytest.raises(UserError, match="not CIFAR-10"):
        unpack("unpack", tmp_path / "out", tmp_path / "again")


def write_usps(root):
    pixels = " ".join(f"{i + 1}:{i / 256:.3f}" for i in range(256))
    rows = "\n".join(f"{i % 10 + 1} {pixels}" for i in range(12))
    for name in ("usps.bz2", "usps.t.bz2"):
        (root / name).write_bytes(bz2.compress(rows.encode()))


def write_eurosat(root):
    write(root, "eurosat/2750/Forest", "eurosat/2750/River", suffix=".jpg", count=6)


def write_stl10(root):
    (root / "stl10_binary").mkdir()
    for name in ("train", "test"):
        images = RNG.integers(256, size=(4, 3, 96, 96), dtype=np.uint8)
        (root / f"stl10_binary/{name}_X.bin").write_bytes(images.tobytes())
        (root / f"stl10_binary/{name}_y.bin").write_bytes(bytes([1, 2, 1, 2]))
    (root / "stl10_binary/class_names.txt").write_text("airplane\nbird\n")


@pytest.mark.parametrize(
    ("name", "write_files", "sizes", "holdout"),
    [
        ("USPS", write_usps, [12, 12], 0),
        ("EuroSAT", write_eurosat, [8, 4], 4),
        ("STL10", write_stl10, [4, 4], 0),
    ],
)
def test_other_data_sets_of_torchvision_are_read(
    tmp_path, monkeypatch, name, write_files, sizes, holdout
):
    write_files(tmp_path)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    kind = getattr(torchvision.datasets, name)
    classes, parts = read(tmp_path, name, holdout=holdout)
    assert [len(part) for part in parts] == sizes
    assert len(classes) > max(part.labels.max() for part in parts)
    images = list(readers.read_images(parts[0].sources, Spec(classes, 28)))
    assert images[0].shape == (28, 28, 3)
    if name == "STL10":  # (3, H, W) in its files
        expected = np.asarray(kind(tmp_path, split="train")[1][0])
        assert np.array_equal(images[1], readers.prepare(expected, Spec(classes, 28)))
    if name == "EuroSAT":
        with pytest.raises(UserError, match=r"no test set: add --holdout N"):
            read(tmp_path, name)


def test_a_data_set_with_other_parts_is_refused_by_its_own_message(tmp_path):
    with pytest.raises(UserError, match=r"EMNIST does not download.*Unknown value 'train'"):
        read(tmp_path / "new", "EMNIST", download=True)


PACKED = Path(__file__).parents[2] / "shared/data/unpack.py"


@pytest.mark.skipif(not PACKED.exists(), reason="needs the real data sets, packed")
def test_the_real_data_sets_are_read_as_torchvision_reads_them(tmp_path):
    subprocess.run([sys.executable, PACKED, tmp_path], check=True, stdout=subprocess.DEVNULL)
    for name in ("CIFAR10", "MNIST"):
        _, (_, test) = read(tmp_path, name)
        reference = getattr(torchvision.datasets, name)(tmp_path, train=False)
        assert np.array_equal(test.sources.squeeze(), np.asarray(reference.data))
        assert test.labels.tolist() == np.asarray(reference.targets).tolist()
