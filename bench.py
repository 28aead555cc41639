"""How fast are the recipes on this machine? Needs the data sets in data/, or downloads them.

python bench.py                                                    # all three recipes
python bench.py --quick --json speed.json                          # a few minutes, offline too
python bench.py --only training --flags="--data drawn --amp"       # flags of the recipes

training    images a second. recipe: common.train_one_epoch at the source's settings. textbook: the
            same network, with a DataLoader that takes one image at a time through torchvision's
            transforms. compute alone: a batch that is on the device already, again and again.
accuracy    seconds of training, evaluation not counted, to the source's accuracy on the test set,
            or two minutes. --tuned is run for 1 epoch, for 2, and so on: the seconds are those of
            the last run. textbook: at the source's settings, evaluated after each epoch.
streaming   images a second of a JPEG of 500x375, again and again, at 224x224, uint8, in batches of
            64, for each of which a stand-in for a device sleeps. recipe: common.load_batches, which
            reads a batch while the device works on the one before. textbook: a DataLoader. Where
            the recipe is 1 times as fast as the slower of the two alone, the other costs nothing.
prediction  predict.py on small files, its start not counted; and the process, for one of them.
start       seconds from the command, python RECIPE.py, to the end of the first training step:
            Python and PyTorch start, all images are read, the run folder is made.
growth      ever more drawn images: the second epoch, and the most memory of the process (Linux).

Ways take turns, in an order that alternates: median (least to most). times: how many times as fast
the recipe is. LeNet stands for all in prediction and growth. --quick: one round of ten batches, no
accuracy, no 500,000 images.
"""

import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import predict

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, PILToTensor, Resize, ToTensor

TARGETS = {"lenet_cifar": 0.54, "quick_cifar": 0.65, "mnist_cnn": 0.985}  # the sources' accuracy
LIMIT = 120  # seconds of training, after which no more epochs are tried
DEVICES = {"5 ms": 0.005, "60 ms": 0.06, "200 ms": 0.2}  # seconds a batch
CORES = os.cpu_count()
WORKERS = (0, CORES // 2, CORES)  # processes of a DataLoader
FIRST_STEP = """import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
import common
def stop(self, loss, *_):
    loss.item()  # waits for the device
    os._exit(0)
common.Metrics.update = stop
runpy.run_path(sys.argv[0], run_name="__main__")"""


def take_turns(unit, ways, rounds):
    """Call each of these functions once a round, after a round that warms up. Returns
    {name: {unit: its results}}, and how many times as fast the recipe is."""
    results = {name: [] for name in ways}
    for turn in range(rounds + 1):
        # In alternating order, so that nobody always comes after the same other.
        for name in sorted(ways, reverse=turn % 2 == 1):
            results[name].append(ways[name]())
    rows = {}
    for name, (_, *values) in results.items():
        rows[name] = {unit: values}
        if "recipe" in ways:
            rows[name]["times"] = np.divide(results["recipe"][1:], values).tolist()
    return rows


def run_python(*command):
    """Run Python in a process of its own; returns its seconds. Exits if that fails."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL)
    if done.returncode != 0:  # it has said why
        sys.exit(done.returncode)
    return time.perf_counter() - begin


def exhaust(load, count, seconds=0.0):
    """Call `load`, which gives so many images, and sleep after each item; returns images/s."""
    begin = time.perf_counter()
    for _ in load():
        time.sleep(seconds)
    return count / (time.perf_counter() - begin)


# ---------------------------------------------------------------- ways to train


def hand_over(model, train_set, test_set, loss_fn, optimizer, args, scheduler, augment, *_):
    """In the place of `common.fit`: returns what it would train, prepared as it does that."""
    model.to(args.device, memory_format=torch.channels_last)
    model = common.parallelize(model, args)
    return SimpleNamespace(**locals())


def capture(name, *flags):
    """What a recipe hands to `common.fit`."""
    with mock.patch("common.fit", hand_over), mock.patch("builtins.print"):
        return predict.import_recipe(name).main([*flags, "--quiet"])


def train_epoch(run, epoch=1):
    """Train as a recipe does; returns images/s."""
    row, _ = common.train_one_epoch(
        run.model,
        run.train_set,
        run.loss_fn,
        run.optimizer,
        run.args,
        epoch,
        run.scheduler,
        run.augment,
    )
    return row["images_per_second"]


class OneByOne(Dataset):
    """A recipe's images as torchvision gives them: each transformed when it is asked for."""

    def __init__(self, dataset):
        self.images = dataset.images.cpu().numpy()
        self.labels = dataset.labels.tolist()
        steps = [ToTensor()]
        if dataset.spec.std != 1:
            steps.append(Normalize(dataset.spec.mean, dataset.spec.std))
        self.transform = Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index].squeeze())
        return self.transform(image), self.labels[index]


def make_loader(dataset, batch_size, workers):
    """A DataLoader. Its processes stay, so that only the first epoch waits for them to start."""
    return DataLoader(
        dataset, batch_size, True, num_workers=workers, persistent_workers=workers > 0
    )


def capture_textbook(name, workers, *flags):
    """A recipe's run, and the textbook's loader of its images."""
    run = capture(name, *flags)
    run.model.to(memory_format=torch.contiguous_format)  # as PyTorch makes it
    return run, make_loader(OneByOne(run.train_set), run.args.batch_size, workers)


def plain_loop(run, batches):
    """The textbook's loop over anything that yields (images, labels); returns images/s."""
    device = run.args.device
    begin = time.perf_counter()
    count = 0
    run.model.train()
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.args.amp):
            loss = run.loss_fn(run.model(images.to(device)), labels.to(device))
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        count += len(labels)
    loss.item()  # waits for the device
    return count / (time.perf_counter() - begin)


# ---------------------------------------------------------------- parts: {row: {column: figure}}


def training(name, args):
    flags = [*args.flags, f"--limit-batches={args.batches}", f"--epochs={args.rounds + 1}"]
    ways = {}
    for title, more in {"": [], " --tuned": ["--tuned"], ", bfloat16": ["--amp"]}.items():
        run = capture(name, *flags, *more)
        ways[f"recipe{title}"] = partial(train_epoch, run)
        batches = common.shuffle(len(run.train_set), run.args, 0)
        first = next(common.load_batches(run.train_set, batches, run.args.device))
        ways[f"compute alone{title}"] = partial(plain_loop, run, [first] * len(batches))
    for workers in WORKERS:
        textbook = capture_textbook(name, workers, *flags)
        ways[f"textbook, {workers} workers"] = partial(plain_loop, *textbook)
    return take_turns("images/s", ways, args.rounds)


def accuracy(name, args):
    ways = {"recipe --tuned": train_tuned(name, args)}
    for workers in (0, CORES):
        ways[f"textbook, {workers} workers"] = train_textbook(name, workers, args)
    target = TARGETS[name]
    rows = {}
    for way, runs in ways.items():
        for epochs, (run, seconds) in enumerate(runs, 1):
            tested, _ = common.evaluate(run.model, run.test_set, run.args)
            reached = tested["test_accuracy"]
            rows[way] = {
                "seconds": seconds,
                "epochs": epochs,
                "accuracy": reached,
                "target": target,
            }
            if reached >= target or seconds > LIMIT:
                break
    return rows


def train_tuned(name, args):
    """Yield runs with --tuned, each of an epoch more than the one before, and their seconds."""
    for epochs in itertools.count(1):
        run = capture(name, *args.flags, "--tuned", f"--epochs={epochs}")
        yield run, sum(len(run.train_set) / train_epoch(run, i + 1) for i in range(epochs))


def train_textbook(name, workers, args):
    """Yield the textbook's run after each epoch, and the seconds so far."""
    run, loader = capture_textbook(name, workers, *args.flags)
    seconds = 0
    while True:
        seconds += len(run.train_set) / plain_loop(run, loader)
        yield run, seconds


def write_noise(file, height, width):
    """An image file as large as a photo's of so many pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    cv2.imwrite(file, cv2.GaussianBlur(noise, (0, 0), 1))


def streaming(device, args):
    seconds = DEVICES[device]
    count = 64 * min(30, args.batches)
    spec = common.Spec(["photo"], 224)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "photo/0.jpg")
        file.parent.mkdir()
        write_noise(file, 375, 500)
        photos = common.StreamedImageDataset([file] * count, [0] * count, spec)
        batches = torch.arange(count).split(64)
        # Identity: to normalize them is the device's work.
        load = partial(common.load_batches, photos, batches, "cpu", None, torch.nn.Identity())
        ways = {
            "recipe": partial(exhaust, load, count, seconds),
            "reading alone": partial(exhaust, load, count),
            "device alone": partial(exhaust, batches.__iter__, count, seconds),
        }
        transform = Compose([Resize((224, 224)), PILToTensor()])
        textbook = ConcatDataset([ImageFolder(folder, transform)] * count)
        for workers in WORKERS:
            loader = make_loader(textbook, 64, workers)
            ways[f"textbook, {workers} workers"] = partial(exhaust, loader.__iter__, count, seconds)
        return take_turns("images/s", ways, args.rounds)


def prediction(name, args):
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data=drawn", "--epochs=1", "--limit-batches=1", "--quiet", f"--out={folder}"]
        run_python(common.HERE / f"{name}.py", *args.flags, *flags)
        file = Path(folder, "0.png")
        write_noise(file, 32, 32)
        device = common.pick_device("auto")
        model, spec = predict.load_model(f"{folder}/best.pt", device=device)
        one = partial(run_python, common.HERE / "predict.py", f"{folder}/best.pt", file)
        many = partial(predict.classify, model, spec, [file] * 2000, device)
        ways = {"one file, seconds": one, "2,000 files, images/s": partial(exhaust, many, 2000)}
        return take_turns("value", ways, args.rounds)


def start(name, args):
    with tempfile.TemporaryDirectory() as out:
        script = common.HERE / f"{name}.py"
        command = ["-c", FIRST_STEP, script, *args.flags, "--quiet", f"--out={out}"]
        return take_turns("seconds", {"first step": partial(run_python, *command)}, args.rounds)


def growth(name, args):
    rows = {}
    for count in (5_000, 50_000, 500_000):
        if count < 500_000 or not args.quick:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows[f"{count:,} images"] = pool.submit(grow, name, count, args.flags).result()
    return rows


def grow(name, count, flags):
    """A row of `growth`, for so many drawn images: the same ones again and again."""
    run = capture(name, *flags, "--data=drawn")
    digits = run.train_set
    indices = torch.arange(count) % len(digits)
    digits.images = digits.images[indices]
    digits.labels = digits.labels[indices]
    train_epoch(run)
    speed = train_epoch(run)
    row = {"seconds": count / speed, "s per 1,000": 1000 / speed}
    status = Path("/proc/self/status")
    if status.exists():
        _, most = status.read_text().split("VmHWM:")
        row["memory, MiB"] = int(most.split()[0]) / 1024
    return row


PARTS = {part.__name__: part for part in (training, accuracy, streaming, prediction, start, growth)}


# ---------------------------------------------------------------- command line and tables


def show(value):
    """A figure, or the median and the range of several, as text."""
    if isinstance(value, list):
        text = show(statistics.median(value))
        if len(value) > 1:
            text += f" ({show(min(value))} to {show(max(value))})"
        return text
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def print_table(title, rows):
    *_, columns = rows.values()
    width = 52 // len(columns)
    print(f"\n{title:<28}" + "".join(f"{column:>{width}}" for column in columns))
    for name, row in rows.items():
        cells = [f"{show(value):>{width}}" for value in row.values()]
        print(f"  {name:<26}" + "".join(cells), flush=True)


def describe_machine():
    able = torch.cpu.get_capabilities()
    sets = [name for name in ("avx2", "avx512_f", "amx_bf16") if able.get(name)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [
        f"{able.get('cpu_name', 'CPU')} with {' '.join(sets)}, {CORES} cores, {gpu}",
        f"{torch.get_num_threads()} threads, Python {sys.version.split()[0]}, "
        f"PyTorch {torch.__version__}, OpenCV {cv2.__version__}, {time.strftime('%F')}",
    ]


def parse_args(argv):
    parser = common.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=TARGETS, default=list(TARGETS), help="these recipes")
    add("--only", nargs="+", choices=PARTS, help="these parts, all by default")
    add("--quick", action="store_true", help="less of everything, offline too")
    add("--flags", default="", help="of the recipes, in quotes")
    add("--json", metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    args.rounds = 5
    args.batches = 150
    parts = list(PARTS)
    if args.quick:
        args.rounds = 1
        args.batches = 10
        parts.remove("accuracy")
        needed = ["data/MNIST", "data/cifar-10-batches-py"]
        if "--data" not in args.flags and not all(map(os.path.isdir, needed)):
            print("no MNIST and CIFAR-10 in data/: --data drawn")
            args.flags += " --data drawn"
    args.flags = shlex.split(args.flags)
    args.only = args.only or parts
    return args


def main(argv=None):
    args = parse_args(argv)
    results = {"machine": describe_machine(), "settings": vars(args)}
    print(*results["machine"], sep="\n")
    subjects = {"streaming": DEVICES, "prediction": ["lenet_cifar"], "growth": ["lenet_cifar"]}
    for part in args.only:
        for name in subjects.get(part, args.recipes):
            rows = PARTS[part](name, args)
            results[f"{part}, {name}"] = rows
            print_table(f"{part}, {name}", rows)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    common.cli(main)
