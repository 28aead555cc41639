"""What all recipes share, from arrays to a trained network. Start reading at `fit`."""

import os

PARENT = os.getppid()  # before PyTorch is imported, which takes seconds: see `init_distributed`

import argparse
import copy
import csv
import ctypes
import functools
import math
import shlex
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import readers
from readers import Spec, UserError

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset
from tqdm import tqdm

FORMAT = "pytorch-image-recipes/4"  # of checkpoints; the number goes up when their layout changes
RECIPES = ("lenet_cifar", "quick_cifar", "mnist_cnn", "vgg_transfer")
HERE = Path(__file__).resolve().parent
IN_MEMORY = 2**31  # bytes; a larger data set is decoded batch by batch
SIGNALS = []  # SIGINT and SIGTERM, as they come
JOB = ""  # a random name for all processes that one torchrun starts, and starts again


# ---------------------------------------------------------------- the command line


def cli(main):
    """Run a script's `main()`, and exit: with status 2 after a UserError, 130 after Ctrl-C, 143
    after SIGTERM. The error is one line on stderr."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    # For names that it cannot encode, and so that each line is seen at once.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    message = ""
    status = 2
    try:
        if "RANK" in os.environ:
            init_distributed()
        main()
        if SIGNALS:
            raise KeyboardInterrupt
        if dist.is_initialized():
            dist.destroy_process_group()
        status = 0
    except BrokenPipeError:  # `| head` has seen enough
        status = 141
    except KeyboardInterrupt as stop:
        status = 128 + (SIGNALS or [2])[0]  # 2: SIGINT
        message = f"stopped{stop}"
    except (torch.OutOfMemoryError, MemoryError) as error:
        message = f"error: {error}: try a smaller --batch-size or --size"
    except (UserError, OSError) as error:
        message = f"error: {error}"
    if message:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}\n")
    if status == 141 or "RANK" in os.environ:
        os._exit(status)  # a normal exit would write to the pipe again; Gloo's threads may abort it
    sys.exit(status)


def interrupt(number, frame):
    """End the run. A KeyboardInterrupt that is raised in a destructor is lost: `load_batches` looks
    at SIGNALS as well."""
    SIGNALS.append(number)
    raise KeyboardInterrupt


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and a description as it is written."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with errors that `cli` prints in one line."""

    def error(self, message):
        raise UserError(f"{message}: see --help; in a notebook, main(['--epochs', '1'])")


def between(low, high):
    """An argparse type: a number of the same type as `low`, from low to high."""

    def number(text):
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    return number


def make_parser(file, description, tuned, min_size=1, **defaults):
    """A parser with the flags of all training scripts; a recipe adds its own. file: the script;
    tuned: what --tuned sets; min_size: the least --size of its network; defaults: the source's."""
    recipe = Path(file).stem
    parser = ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.set_defaults(recipe=recipe, script=file, **defaults)
    count = between(1, 2**31)
    count_or_0 = between(0, 2**31)

    add = parser.add_argument
    add("--data", default="data", help="a folder, or drawn: synthetic images of the digits")
    add("--epochs", type=count, help="passes over the training images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--out", default=f"runs/{recipe}", help="the run folder")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    add("--test-only", action="store_true", help="evaluate best.pt of --out on the test set")
    add("--tuned", action="store_true", help=f"better than the source: {tuned}, and more")
    add("--batch-size", type=count, help="images a step, of all processes together")
    add("--lr", type=between(1e-30, 1e38), help="learning rate")
    add("--size", type=between(min_size, 1024), help="height and width of the input")
    add("--seed", type=count_or_0, default=0, help="of everything that is random")
    add("--holdout", type=count_or_0, default=0, help="validate on N training images")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16; with --tuned if fast")
    add("--compile", action="store_true", help="torch.compile: pays on a GPU, needs a C++ compiler")
    add("--data-parallel", action="store_true", help="one process, all GPUs: see multi_gpu.py")
    add("--limit-batches", type=count, help="use N batches of the data: a quick check")
    add("--skip-bad", action="store_true", help="leave unreadable images out")
    add("--download", action="store_true", help="download into a folder that is not there yet")
    add("--save-every", type=count_or_0, default=0, help="keep epoch_N.pt too, every N epochs")
    add("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="log to --out")
    add("--quiet", action="store_true", help="no progress bar and no table of layers")
    return parser


def parse_args(parser, argv, tuned):
    """The flags. Defaults are the source's, then those of `--tuned`, then those of a run that is
    continued or tested; a flag on the command line wins over all of them."""
    args = parser.parse_args(argv)
    if args.tuned:
        parser.set_defaults(**tuned)
    saved = load_saved(args)
    if saved:
        parser.set_defaults(**saved["settings"])
    if args.test_only:
        parser.set_defaults(limit_batches=None)  # the whole test set

    args = parser.parse_args(argv)
    if args.resume and not saved:
        print(f"there is no last.pt in {args.out}: a new run begins")
    args.resume = bool(saved) and not args.test_only
    if args.test_only:
        args.epochs = 0
    args.device = pick_device(args.device)
    if args.amp is None:
        args.amp = args.tuned and has_fast_bfloat16(args.device)
    if args.batch_size % get_world_size():
        raise UserError(f"--batch-size has to be a multiple of {get_world_size()} processes")
    return args


def load_saved(args):
    """The checkpoint that this command continues, or tests, if any."""
    if args.test_only:
        return load_checkpoint(Path(args.out, "best.pt"))
    last = Path(args.out, "last.pt")
    if args.resume and last.exists():
        return load_checkpoint(last)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        try:
            saved = load_checkpoint(last)
        except (UserError, OSError):
            return None
        if saved["job"] == JOB:  # and not an earlier run's
            return saved
    return None


def settings(**changed):
    """What `parse_args` gives, for one's own code: settings(epochs=3, out="runs/mine")."""
    parser = make_parser("notebook", "", {}, epochs=10, batch_size=128, lr=0.001, size=32)
    argv = []
    for name, value in changed.items():
        if name not in parser.parse_args([]):
            raise TypeError(f"settings() got an unexpected keyword argument '{name}'")
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            argv += [flag]
        elif value is False:
            parser.set_defaults(**{name: value})
        elif value is not None:
            argv += [f"{flag}={value}"]
    return parse_args(parser, argv, {})


# ---------------------------------------------------------------- devices and processes


def pick_device(name):
    """The device that `--device` names. Each process of a machine has a GPU of its own."""
    known = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available() and get_world_size() == 1:
        known += ["mps"]
    known += ["cpu"]
    if name == "auto":
        name = known[0].partition(":")[0]
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in known:
        raise UserError(f"--device {name} is not there: this machine has {', '.join(known)}")
    return torch.device(name)


def has_fast_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("amx_bf16", False)


def init_distributed():
    """Join the processes that torchrun has started; only the main process prints."""
    global JOB
    if sys.platform == "linux":  # end this process when torchrun is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != PARENT:  # it was killed before
            os._exit(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store, rank, world_size = next(dist.rendezvous("env://"))
    JOB = store.compare_set("job", "", os.urandom(8).hex()).decode()
    # torchrun keeps its store when it starts processes again: what dead ones left would hang Gloo.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(store=store, rank=rank, world_size=world_size)  # NCCL, or Gloo on CPUs
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    return get_rank() == 0


def all_reduce(tensor):
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def on_main_process(action, *arguments):
    """Call `action` on the main process. A UserError or OSError there is raised on all of them."""
    problem = [None]
    if is_main_process():
        try:
            action(*arguments)
        except (UserError, OSError) as error:
            problem = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise problem[0]


def my_part(indices):
    """What of these this process takes; all of them, where there is one process."""
    return indices.tensor_split(get_world_size())[get_rank()]


def parallelize(model, args):
    """Wrap the model in DistributedDataParallel under torchrun, or in DataParallel with
    --data-parallel. A wrapped model is wrapped anew: other layers may be frozen by now."""
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    if get_world_size() > 1:
        model = DistributedDataParallel(model)
    elif args.data_parallel and str(args.device) in ("cuda", "cuda:0"):
        model = DataParallel(model)  # splits each batch over this process's GPUs
    return model


# ---------------------------------------------------------------- data sets


class ImageDataset(Dataset):
    """Labelled images in memory. A batch of them is one index operation: dataset[indices].

    images: uint8 (N, size, size, channels), on any device; labels: integers (N,), indices into
    spec.classes; files: N names, for predictions.csv. Raises UserError for other arrays.
    """

    def __init__(self, images, labels, spec, files=None):
        self.images = images
        self.labels = check_labels(labels, spec)
        self.spec = spec
        self.files = range(len(labels)) if files is None else files
        self.normalize = Normalize(spec)
        self.check_images()
        if len(self.files) != len(self):
            raise UserError(f"{len(files)} files for {len(self)} images")

    def check_images(self):
        # Contiguous, with the channels last: a batch is read in a tenth of the time.
        self.images = images = torch.as_tensor(self.images).contiguous()
        self.labels = self.labels.to(images.device)
        shape = (len(self), *self.spec.shape)
        if images.dtype != torch.uint8 or images.shape != shape:
            raise UserError(
                f"images are {images.dtype} {tuple(images.shape)} and have to be torch.uint8 "
                f"{shape}: images.movedim(1, -1) has the channels last"
            )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """uint8 (C, H, W) and label for an int; (B, C, H, W), (B,) for a slice, list or tensor."""
        indices = torch.arange(len(self), device=self.labels.device)[index]  # () or (B,)
        images = self.read(indices.flatten())
        images = images.view(*indices.shape, *images.shape[1:])
        return images.movedim(-1, -3), self.labels[indices]  # (..., H, W, C) -> (..., C, H, W)

    def __getitems__(self, indices):
        """For a DataLoader, which then asks for a batch at a time."""
        return list(zip(*self[indices], strict=True))

    def read(self, indices):
        """uint8 (B, H, W, C)."""
        return self.images.index_select(0, indices)  # 18 times as fast as images[indices]

    def load(self, batches):
        """Yield (images, labels) for each batch of indices."""
        for indices in batches:
            yield self[indices]


class StreamedImageDataset(ImageDataset):
    """The same for more images than memory holds: files, each read when it is asked for."""

    def check_images(self):
        pass  # not before they are read

    def read(self, indices):
        images = []
        for image in readers.read_images([self.images[i] for i in indices.tolist()], self.spec):
            if isinstance(image, UserError):
                raise UserError(f"{image}: replace it, or add --skip-bad")
            images.append(image)
        return torch.from_numpy(np.array(images, np.uint8).reshape(len(images), *self.spec.shape))

    def load(self, batches):
        """The next batch is read while the device works on this one."""
        reading = None
        with ThreadPoolExecutor(1) as thread:
            for indices in batches:
                next_one = thread.submit(self.__getitem__, indices)
                if reading:
                    yield reading.result()
                reading = next_one
            if reading:
                yield reading.result()


def check_labels(labels, spec):
    """Labels as int64 (N,). Raises UserError where they are no indices of classes."""
    labels = torch.as_tensor(labels)
    last = len(spec.classes) - 1
    integers = not labels.is_floating_point() and labels.dtype != torch.bool
    if labels.ndim == 1 and integers and (labels >= 0).all() and (labels <= last).all():
        return labels.long()
    raise UserError(
        f"labels are {labels.dtype} {tuple(labels.shape)}, {labels[:5].tolist()} and so on, "
        f"and have to be integers (N,) from 0 to {last}"
    )


def load_data(args, dataset, channels=3, mean=0.5, std=0.5, crop=0.0):
    """The images to train on and to evaluate on, as the flags say. dataset: name of a torchvision
    data set, for a folder without images of one's own. See `Spec` for the others. With
    `--test-only` both are the test set, and its `Spec` is the checkpoint's."""
    spec = Spec([], args.size, channels, mean, std, crop)
    if args.test_only:
        spec = Spec(**load_saved(args)["spec"])
    found = []

    def read():
        found.extend(readers.read_data(args, dataset, spec))

    on_main_process(read)  # which may download
    if not found:
        read()
    spec.classes, parts = found
    sets = [load_images(part, spec, args) for part in parts]
    return sets[0], sets[-1]


def load_images(part, spec, args):
    """An ImageDataset of what fits into memory, decoded now; of files, if it does not fit."""
    if args.limit_batches:  # the same images for every seed
        count = min(args.limit_batches * args.batch_size, len(part))
        print(f"--limit-batches {args.limit_batches}: {count:,} of {len(part):,} images")
        part = part.take(np.random.default_rng(0).permutation(len(part))[:count])
    shape = (len(part), *spec.shape)
    fits = math.prod(shape) <= IN_MEMORY
    if fits and getattr(part.sources, "shape", None) == shape:
        images = part.sources
    elif fits or args.skip_bad:
        part, images = decode_part(part, spec, args, fits)
    if not fits:
        return StreamedImageDataset(part.sources, part.labels, spec, part.files)
    images = torch.from_numpy(images).to(args.device)
    return ImageDataset(images, part.labels, spec, part.files)


def decode_part(part, spec, args, keep):
    """The part without what cannot be read, if --skip-bad allows it; its images, uint8 (N, size,
    size, channels), if they are to be kept."""
    images = np.zeros((len(part) if keep else 0, *spec.shape), np.uint8)
    good = []
    lost = set()  # classes
    found = readers.read_images(part.sources, spec)
    for i, image in enumerate(progress_bar(found, "reading", args, total=len(part))):
        if isinstance(image, UserError):
            lost.add(spec.classes[part.labels[i]])
            if not args.skip_bad:
                raise UserError(f"{image}: replace it, or add --skip-bad")
        else:
            if keep:
                images[len(good)] = image
            good.append(i)
    if not good:
        raise UserError("no image can be read")
    if lost:
        print(
            f"{len(part) - len(good)} of {len(part)} images cannot be read and are left out: "
            f"of {', '.join(sorted(lost))}"
        )
    return part.take(good), images[: len(good)]


# ---------------------------------------------------------------- batches


class Normalize(nn.Module):
    """Images (N, C, H, W) with values from 0 to 255 to float32: (value / 255 - mean) / std."""

    def __init__(self, spec):
        super().__init__()
        std = torch.tensor(spec.std)
        self.register_buffer("scale", (1 / (255 * std)).view(-1, 1, 1))
        self.register_buffer("shift", (-torch.tensor(spec.mean) / std).view(-1, 1, 1))

    def forward(self, images):
        return images.float().mul(self.scale).add_(self.shift)


class Classifier(nn.Sequential):
    """`Normalize`, then a network: from uint8 images (N, C, H, W) to logits (N, classes)."""


def random_flip_and_crop(images, padding, flip=True):
    """Random horizontal flip, and random crop after padding by reflection, of each of the square
    images (N, C, H, H) by its own draw. padding: pixels. Returns the same shape and dtype."""
    n, channels, size, _ = images.shape
    device = images.device
    shift = torch.randint(-padding, padding + 1, (2, n, 1), device=device)
    last = size - 1
    position = torch.arange(size, device=device) + shift  # (2, N, H), some beyond the edges
    rows, columns = last - (last - position.abs()).abs()  # reflected: -1 -> 1, last + 1 -> last - 1
    if flip:
        flipped = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(flipped, last - columns, columns)
    # One gather from the pixels of all images is half the work of pad, flip and crop.
    rows = rows + size * torch.arange(n, device=device)[:, None]
    source = rows[:, :, None] * size + columns[:, None, :]  # (N, H, H)
    pixels = images.movedim(1, -1).reshape(-1, channels)
    cropped = pixels.index_select(0, source.flatten())
    return cropped.view(n, size, size, channels).movedim(-1, 1)


def by_batch(augment):
    """`augment` as a function of a batch. A transform of torchvision, or any other `nn.Module`, is
    called for each image: it draws once for all that it is called with."""
    module = type(augment).__module__
    if not isinstance(augment, nn.Module) and not module.startswith("torchvision."):
        return augment

    def augment_each(images):
        return torch.stack([augment(image) for image in images])

    return augment_each


def shuffle(count, args, epoch):
    """The batches of an epoch in random order, as indices; of several processes, this one's part.
    Seeds PyTorch's generator by seed and epoch, so that a resumed run is the same."""
    seed = args.seed * 1_000_003 + epoch
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed + (get_rank() << 52))  # processes differ in augmentation and dropout
    processes = get_world_size()
    count -= count % processes  # each process has as many
    if count % args.batch_size == processes < count:
        count -= processes  # batch normalization cannot learn from a single image
    return [my_part(batch) for batch in order[:count].split(args.batch_size)]


def load_batches(dataset, batches, device, augment=None, normalize=None):
    """Yield, for each batch of indices, its images on the device, augmented and normalized,
    float32 (B, C, H, W), and its labels, int64 (B,)."""
    normalize = (normalize or dataset.normalize).to(device)
    augment = by_batch(augment)
    for images, labels in dataset.load(batches):
        if SIGNALS:
            raise KeyboardInterrupt
        images = images.to(device)
        if augment:
            images = augment(images)
            if images.is_floating_point():  # from 0 to 1
                images = images * 255
        yield normalize(images), labels.to(device)


# ---------------------------------------------------------------- training


class Metrics:
    """Loss and accuracy in training. They stay on the device: to read them is to wait for it."""

    def __init__(self):
        self.start = time.perf_counter()
        self.steps = []  # of each step: (sum of losses, correct predictions, images)

    def update(self, loss, logits, labels):
        """Count a batch: its mean loss, its logits (B, classes) and labels (B,)."""
        count = torch.full_like(loss, len(labels), dtype=torch.float)
        correct = (logits.argmax(1) == labels).sum()
        self.steps.append(torch.stack([loss.detach() * count, correct, count]))

    def __str__(self):
        """What tqdm shows behind its bar, twice a second."""
        if not self.steps:
            return ""
        loss, correct, images = torch.stack(self.steps).sum(0).tolist()
        return f", loss {loss / images:.2f}, accuracy {correct / images:.2f}"

    def finish(self, epoch):
        """Columns of history.csv, and rows of loss.csv: the mean of each 1/50 of the epoch."""
        steps = all_reduce(torch.stack(self.steps)).cpu().double()
        seconds = time.perf_counter() - self.start
        loss, correct, images = steps.sum(0).tolist()
        row = {
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "train_seconds": seconds,
            "images_per_second": images / seconds,
        }
        curve = []
        step = (epoch - 1) * len(steps)
        for part in steps.tensor_split(min(50, len(steps))):
            step += len(part)
            loss, _, images = part.sum(0).tolist()
            curve += [(step, loss / images)]
        return row, curve


def progress_bar(steps, title, args, **options):
    """A tqdm bar, of the main process, in a terminal or a notebook."""
    hidden = args.quiet or not is_main_process()
    if not hidden and "ipykernel" not in sys.modules:
        hidden = None  # unless stderr is a terminal
    return tqdm(
        steps,
        title,
        disable=hidden,
        leave=False,
        position=0,  # whatever an interrupted cell of a notebook has left
        mininterval=0.5,  # seconds
        bar_format="{desc} |{bar}| {percentage:3.0f}%, {remaining} left{postfix}",
        **options,
    )


def train_one_epoch(model, dataset, loss_fn, optimizer, args, epoch, scheduler=None, augment=None):
    """Train for one epoch. Returns columns of history.csv, and rows of loss.csv."""
    metrics = Metrics()
    model = parallelize(model, args)
    batches = shuffle(len(dataset), args, epoch)
    bar = progress_bar(batches, f"epoch {epoch}/{args.epochs}", args, postfix=metrics)
    model.train()  # dropout and batch normalization work differently in training
    for images, labels in load_batches(dataset, bar, args.device, augment):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(images)
            loss = loss_fn(logits, labels)
        optimizer.zero_grad()  # else backward() would add to the gradients of the batch before
        loss.backward()
        optimizer.step()
        step_after_batch(scheduler)
        metrics.update(loss, logits, labels)
    return metrics.finish(epoch)


@dataclass
class Predictions:
    """What `evaluate` has found, of each image: (N,), on the CPU."""

    labels: Tensor
    classes: Tensor  # the predicted ones
    probabilities: Tensor  # of the predicted classes

    def accuracy(self):
        return (self.classes == self.labels).double().mean().item()

    def by_class(self, count):
        """Precision, recall, F1 and number of images of each of so many classes. A fraction of
        nothing, as the precision of a class that is never predicted, is 0."""
        right = self.labels[self.classes == self.labels].bincount(minlength=count)
        predicted = self.classes.bincount(minlength=count)
        images = self.labels.bincount(minlength=count)
        columns = [
            right / predicted.clamp(min=1),  # precision
            right / images.clamp(min=1),  # recall
            2 * right / (predicted + images).clamp(min=1),  # F1
            images,
        ]
        return torch.stack(columns, 1).tolist()


@torch.no_grad()  # without gradients evaluation takes half the time and a fraction of the memory
def evaluate(model, dataset, args):
    """Classify every image once. Returns columns of history.csv, and the predictions. A model of
    `predict.load_model` normalizes by itself, another one gets normalized images."""
    start = time.perf_counter()
    normalize = nn.Identity() if isinstance(model, Classifier) else dataset.normalize
    # At least 192 images of 32x32, and not many more: larger outputs of a layer would be allocated
    # anew for each batch.
    batch_size = max(args.batch_size, 3 * 2**16 // dataset.spec.size**2)
    batches = my_part(torch.arange(len(dataset))).split(batch_size)
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)  # each process has its own statistics of batch normalization
    model.eval()
    results = torch.zeros(4, len(dataset), device=args.device)  # other processes fill in theirs
    bar = progress_bar(batches, "evaluation", args)
    loaded = load_batches(dataset, bar, args.device, None, normalize)
    for indices, (images, labels) in zip(batches, loaded, strict=True):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
            logits = model(images).float()
        if logits.shape[-1] != len(dataset.spec.classes):
            raise UserError(f"the network has {logits.shape[-1]} outputs: it needs one a class")
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        probabilities, classes = logits.softmax(1).max(1)
        results[:, indices] = torch.stack([losses, labels, classes, probabilities])
    losses, labels, classes, probabilities = all_reduce(results).cpu()
    predictions = Predictions(labels.long(), classes.long(), probabilities)
    row = {
        "test_loss": losses.double().mean().item(),
        "test_accuracy": predictions.accuracy(),
        "test_seconds": time.perf_counter() - start,
    }
    return row, predictions


PER_BATCH = (OneCycleLR, CyclicLR)  # schedulers that are stepped after each batch, not each epoch


def step_after_batch(scheduler):
    if isinstance(scheduler, PER_BATCH):
        scheduler.step()


def step_after_epoch(scheduler, test_loss):
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(test_loss)
    elif scheduler and not isinstance(scheduler, PER_BATCH):
        scheduler.step()


def one_cycle(optimizer, train_set, args):
    """The learning-rate schedule of `--tuned`: from near 0 up to the rates that the optimizer has,
    each group's own, in a quarter of the run, then down to 0 (arXiv 1708.07120)."""
    steps = max(3, args.epochs * math.ceil(len(train_set) / args.batch_size))
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps + 1,  # it is stepped once more, after the last batch
        pct_start=max(0.25, 2 / steps),
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=max(1, steps // 4),
    )


def fit(
    model,
    train_set,
    test_set,
    loss_fn,
    optimizer,
    args,
    scheduler=None,
    augment=None,
    after_epoch=None,
    train_one_epoch=train_one_epoch,
    evaluate=evaluate,
):
    """Train up to epoch `args.epochs`; evaluate and save after each. Returns history.csv's rows.
    loss_fn: logits (B, classes), labels (B,) -> mean loss. augment: uint8 images (B, C, H, W) ->
    the same, or floats from 0 to 1; or a transform of torchvision. after_epoch gets the `Run` so
    far; if it returns True, training ends. train_one_epoch, evaluate: in place of those above."""
    model.to(args.device, memory_format=torch.channels_last)  # the fastest for convolutions
    if isinstance(loss_fn, nn.Module):
        loss_fn.to(args.device)  # class weights
    if args.compile:
        model.compile()
    run = Run(model, optimizer, scheduler, train_set, args)
    try:
        run.start()
        describe(run, model, train_set, test_set, augment)
        for epoch in range(len(run.history) + 1, args.epochs + 1):
            lr = float(optimizer.param_groups[0]["lr"])
            net = parallelize(model, args)  # which shares its parameters with the model
            trained, losses = train_one_epoch(
                net, train_set, loss_fn, optimizer, args, epoch, scheduler, augment
            )
            tested, predictions = evaluate(model, test_set, args)
            step_after_epoch(scheduler, tested["test_loss"])
            run.save({"epoch": epoch, "lr": lr, **trained, **tested}, losses, predictions)
            if after_epoch and after_epoch(run):
                break
        report(run, test_set, evaluate)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.kept()) from None
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        raise UserError(f"{error}{run.kept()}") from error
    finally:
        run.close()
    return run.history


# ---------------------------------------------------------------- the run folder

COLUMNS = ["epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
COLUMNS += ["train_seconds", "test_seconds", "images_per_second"]  # of history.csv
NOT_OF_THE_RUN = ("out", "resume", "test_only", "device", "script", "recipe")  # of this command
MAY_CHANGE = ["data", "epochs", "compile", "data_parallel"]  # when a run is continued
MAY_CHANGE += ["save_every", "tensorboard", "quiet", "download", "skip_bad"]


class Run:
    """A run folder: history.csv, loss.csv, last.pt, best.pt; and what `after_epoch` may look at."""

    def __init__(self, model, optimizer, scheduler, train_set, args):
        self.folder = Path(args.out)
        self.history = []  # rows of history.csv
        self.losses = []  # rows of loss.csv: step, train_loss
        self.saved = 0  # epochs
        self.predictions = None  # of best.pt
        self.writer = None  # TensorBoard's SummaryWriter
        self.args = args
        self.spec = train_set.spec
        self.parts = {"model": model, "optimizer": optimizer}
        if scheduler:
            self.parts["scheduler"] = scheduler
        settings = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
        self.settings = tree_map_only(Path, str, settings)  # of a flag of one's own
        self.facts = {
            "training_images": len(train_set),
            "optimizer": type(optimizer).__name__,
            "scheduler": type(scheduler).__name__,
            "epochs of its schedule": isinstance(scheduler, OneCycleLR) and args.epochs,
            "T_max": getattr(scheduler, "T_max", None),  # of other schedules that end
            "total_iters": getattr(scheduler, "total_iters", None),
        }
        self.tested_on = "validation" if args.holdout and not args.test_only else "test"
        self.lock = None

    def start(self):
        """Open the run folder: for a new run, or for one that is continued, or tested."""
        if self.args.test_only:
            self.history = load_checkpoint(self.folder / "best.pt")["history"]
            return
        on_main_process(self.open_folder)
        if self.args.resume:
            self.resume()

    def open_folder(self):
        """Make the folder and lock it; move an earlier run in it aside, as a whole."""
        folder = self.folder
        if self.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs: pip install tensorboard") from None
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(folder)
        checkpoints = [
            file for name in ("last.pt", "best.pt", "epoch_*.pt") for file in folder.glob(name)
        ]
        if checkpoints and not self.args.resume:
            number = 1
            while Path(f"{folder}-{number}").exists():
                number += 1
            aside = folder.rename(f"{folder}-{number}")
            print(f"{folder} had an earlier run, which is in {aside} now")
            (aside / "lock").unlink(missing_ok=True)
            return self.open_folder()  # a new one
        if self.args.tensorboard:
            self.writer = SummaryWriter(folder)
            self.writer.add_text("settings", str(self.settings))

    def close(self):
        if self.writer:
            self.writer.close()
        if self.lock:
            (self.folder / "lock").unlink(missing_ok=True)
            self.lock.close()

    def resume(self):
        """Continue from last.pt. Raises UserError where the run would become another one."""
        saved = load_checkpoint(self.folder / "last.pt")
        before = {**saved["settings"], **saved["facts"], **saved["spec"]}
        now = {**self.settings, **self.facts, **asdict(self.spec)}
        if self.args.skip_bad:
            del now["training_images"]
        for name, value in now.items():
            old = before.get(name, value)
            if name not in MAY_CHANGE and value != old:
                raise UserError(
                    f"--resume cannot change {name} from {str(old)[:80]} to {str(value)[:80]}: "
                    "name another --out"
                )
        for name, part in self.parts.items():
            load_state(part, saved[name])
        self.history = saved["history"]
        self.losses = saved["losses"]
        self.saved = len(self.history)

    def save(self, row, losses, predictions):
        """Keep an epoch: its row of history.csv, and its rows of loss.csv."""
        if not math.isfinite(row["train_loss"] + row["test_loss"]):
            raise UserError("the loss is not finite: start anew with a smaller --lr")
        self.history.append(row)
        self.losses += losses
        if row is self.best():
            self.predictions = predictions
        on_main_process(self.write_epoch, row, losses)
        self.saved = len(self.history)

    def write_epoch(self, row, losses):
        """Write the checkpoints, last.pt last of all, and the tables."""
        checkpoint = {
            "format": FORMAT,
            "recipe": self.args.recipe,
            "job": JOB,
            "settings": self.settings,
            "facts": self.facts,
            "spec": asdict(self.spec),
            "history": self.history,
            "losses": self.losses,
        }
        for name, part in self.parts.items():
            checkpoint[name] = part.state_dict()
        # torch.load(weights_only=True) refuses NumPy's numbers and arrays, as of a LambdaLR.
        checkpoint = tree_map_only((np.generic, np.ndarray), lambda x: x.tolist(), checkpoint)
        if row is self.best():
            save_atomically(checkpoint, self.folder / "best.pt")
        if self.args.save_every and row["epoch"] % self.args.save_every == 0:
            save_atomically(checkpoint, self.folder / f"epoch_{row['epoch']}.pt")
        save_atomically(checkpoint, self.folder / "last.pt")
        if not self.saved:
            load_checkpoint(self.folder / "last.pt")  # or it may be of no use, as is said now
        self.saved += 1  # Ctrl-C may come from here on

        rows = [[row[name] for name in COLUMNS] for row in self.history]
        write_table(self.folder / "history.csv", COLUMNS, rows)
        write_table(self.folder / "loss.csv", ("step", "train_loss"), self.losses)
        print(
            f"{row['epoch']:>3}/{self.args.epochs:<3}"
            f"{row['train_loss']:>11.4f}{row['train_accuracy']:>10.4f}"
            f"{row['test_loss']:>17.4f}{row['test_accuracy']:>10.4f}"
            f"{row['train_seconds']:>9.1f}{row['images_per_second']:>10,.0f}"
        )
        if self.writer:
            for step, loss in losses:
                self.writer.add_scalar("train/loss", loss, step)
            for name in ("lr", "train_accuracy", "test_loss", "test_accuracy"):
                self.writer.add_scalar(name.replace("_", "/"), row[name], losses[-1][0])

    def best(self):
        """The row of the highest accuracy; of several, the one with the lowest loss."""
        return max(self.history, key=lambda row: (row["test_accuracy"], -row["test_loss"]))

    def kept(self):
        """What the run folder has of this run, and how to go on, in words."""
        if not self.saved:
            return ""
        return (
            f"; {self.saved} of {self.args.epochs} epochs are saved in {self.folder}, "
            f"continue with --resume --out {shlex.quote(str(self.folder))}"
        )


def load_state(part, state):
    try:
        part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = readers.printable(str(error).rpartition("\n\t")[2])  # the last of all
        raise UserError(f"this is another network or optimizer than the run's: {reason}") from None


def lock_folder(folder):
    """An open file, locked until it is closed or this process ends; None without such locks.
    Raises UserError where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process trains in {folder}: name another --out") from None
    except OSError as error:  # some network file systems
        print(f"{folder} cannot be locked ({error.strerror}): let no other process train in it")
    return file


def write_table(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header, *rows])


def save_atomically(checkpoint, path):
    """Write a checkpoint whole or not at all: the old one stays until the new one is complete."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(checkpoint, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into a RuntimeError
        raise UserError(
            f"cannot write {path}, is the disk full? ({readers.printable(error)})"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint of these recipes, on the CPU. Raises UserError where it is none, or damaged."""
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of {FORMAT}")
    return checkpoint


def load_file(path):
    """What `torch.save` wrote, on the CPU. Nothing in the file is executed, and its checksums are
    looked at. Raises UserError where it is damaged, or has more than tensors and plain values."""
    try:
        if zipfile.is_zipfile(path):  # not, if PyTorch before 1.6 wrote it
            with zipfile.ZipFile(path) as file:  # torch.save does not compress
                if any(part.compress_type for part in file.infolist()) or file.testzip():
                    raise ValueError
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise anything
        if getattr(error, "filename", ""):  # the system's, which says what is wrong
            raise
        raise UserError(
            f"{path} is no checkpoint, or damaged, or has code in it, which is all but tensors, "
            "numbers, strings, lists and dicts"
        ) from None


# ---------------------------------------------------------------- what a run prints and draws


@functools.cache
def import_figures():
    """The module that draws, which is slow to import; None without matplotlib, as is said once."""
    try:
        import figures
    except ImportError:
        print("no figures are drawn: pip install matplotlib")
        return None
    return figures


def describe(run, model, train_set, test_set, augment):
    """Print the network, and what it is trained on; draw samples.png."""
    args = run.args
    spec = run.spec
    if args.test_only:
        return
    images, labels = train_set[torch.randperm(len(train_set))[:8]]
    images = images.to(args.device)
    if not args.quiet:
        print_layers(model, images[:1].float())
    count = sum(parameter.numel() for parameter in model.parameters())
    precision = "bfloat16" if args.amp else "float32"
    print(
        f"{args.recipe} on {args.device} in {precision}: {count:,} parameters, "
        f"{len(spec.classes)} classes\ninput {spec.channels}x{spec.size}x{spec.size}, "
        f"{len(train_set):,} + {len(test_set):,} images"
    )
    print(f" epoch  train loss  accuracy  {run.tested_on:>10} loss  accuracy  seconds  images/s")

    augmented = None
    if augment:
        augmented = by_batch(augment)(images).cpu()
        if augmented.is_floating_point() and (augmented - 0.5).abs().max() > 0.51:
            raise UserError("augment gives floats that are not from 0 to 1; normalization follows")
    if is_main_process() and import_figures():
        titles = [spec.classes[label] for label in labels.tolist()]
        import_figures().draw_samples(images.cpu(), augmented, titles, run.folder / "samples.png")


def print_layers(model, image):
    """A line for each layer, in the order in which an image passes through them."""
    names = {layer: name for name, layer in model.named_modules() if not [*layer.children()]}

    def print_layer(layer, inputs, output):
        if layer in names and isinstance(output, Tensor):
            shape = "x".join(map(str, output.shape[1:]))
            count = sum(parameter.numel() for parameter in layer.parameters())
            print(f"  {names[layer]:<20}{type(layer).__name__:<22}{shape:<18}{count:>12,}")

    print(f"  {'layer':<20}{'kind':<22}{'output':<18}{'parameters':>12}")
    with nn.modules.module.register_module_forward_hook(print_layer), torch.no_grad():
        model.eval()(image)


def report(run, test_set, evaluate):
    """Write predictions.csv, draw the results, print a table of the classes and how to predict."""
    if run.predictions is None:  # best.pt is of an earlier command
        model = copy.deepcopy(run.parts["model"])  # that one stays as it is
        load_state(model, load_checkpoint(run.folder / "best.pt")["model"])
        _, run.predictions = evaluate(model, test_set, run.args)
    if not is_main_process():
        return
    classes = run.spec.classes
    predictions = run.predictions
    labels = [classes[i] for i in predictions.labels.tolist()]
    predicted = [classes[i] for i in predictions.classes.tolist()]
    rows = zip(test_set.files, labels, predicted, predictions.probabilities.tolist(), strict=True)
    write_table(run.folder / "predictions.csv", ("file", "label", "predicted", "probability"), rows)
    figures = import_figures()
    if figures:
        figures.draw_results(
            run.history, run.losses, predictions, test_set, run.tested_on, run.folder
        )

    print(
        f"\n{run.tested_on} images by class, best.pt:\n"
        f"  {'class':<20}{'precision':>10}{'recall':>10}{'F1':>10}{'images':>10}"
    )
    for name, values in zip(classes, predictions.by_class(len(classes)), strict=True):
        print("  {:<20}{:>10.4f}{:>10.4f}{:>10.4f}{:>10,.0f}".format(name[:19], *values))
    print(
        f"best epoch: {run.best()['epoch']}, {run.tested_on} accuracy "
        f"{predictions.accuracy():.4f}\nrun folder: {run.folder}"
    )
    script = Path(run.args.script).absolute()
    if not script.suffix:  # one's own code
        return
    here = f"{Path.cwd()}{os.sep}"
    command = ["python", f"{HERE / 'predict.py'}".removeprefix(here), f"{run.folder}/best.pt"]
    if script.stem not in RECIPES or script.resolve().parent != HERE:
        command += ["--recipe", f"{script}".removeprefix(here)]
    print(f"classify: {shlex.join(command)} IMAGE...")


if __name__ == "__main__":
    cli(readers.unpack)
