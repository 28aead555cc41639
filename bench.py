"""How fast are the recipes on this machine? Needs the data sets in data/, or downloads them.

python bench.py                                              # all three recipes
python bench.py --quick --json speed.json                    # two to three minutes; figures as JSON
python bench.py mnist_cnn --only training -- --data drawn    # after --, flags of the recipe

training    images a second. recipe: common.train_one_epoch at the source's settings. textbook: the same
            network, with a DataLoader that takes one image at a time through torchvision's transforms,
            without workers and with the best number of them. compute alone: one batch that is on the device
            already, again and again. times: how many times as fast the recipe is.
accuracy    seconds of training, evaluation not counted, to the source's accuracy on the test set. --tuned is
            run for 1 epoch, for 2, and so on: the seconds are those of the run that is enough. textbook: at
            the source's settings, evaluated after each epoch. One run each.
prediction  predict.py on a folder of small files, its start not counted; and the process, for one of them.
start       seconds from the command, python RECIPE.py, to the end of the first training step: Python and
            PyTorch start, all images are read, the run folder is made.
growth      ever more drawn images: the second epoch, and the most memory of the process. One run each.

Ways take turns, in an order that alternates: median (least to most). The first recipe stands for all in
prediction and growth. --quick leaves out accuracy, and bfloat16 where the hardware is slow at it.
"""

import contextlib
import functools
import inspect
import io
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import predict

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

TARGETS = {"lenet_cifar": 0.54, "quick_cifar": 0.65, "mnist_cnn": 0.985}  # the sources' test accuracy
FLAGS = {  # default, with --quick, least, help
    "rounds": (5, 1, 0, "rounds that count, after one that warms up; 0: only that one"),
    "batches": (150, 10, 1, "training: batches a round"),
    "epochs": (10, 1, 1, "accuracy: the most epochs with --tuned"),
    "limit": (120, 5, 1, "accuracy: the most seconds of the textbook's loop"),
    "growth": (500_000, 50_000, 5_000, "growth: the most images"),
    "threads": (torch.get_num_threads(),) * 2 + (1, "threads of PyTorch"),
}
HERE = str(Path(__file__).resolve().parent)
FIRST_STEP = """import os, runpy, sys, time
sys.argv, sys.path[0] = sys.argv[1:], os.path.dirname(sys.argv[1])
import common
def stop(self, loss, *_):
    loss.item()  # waits for the device
    print(time.time() - float(os.environ["START"]), flush=True)
    os._exit(0)
common.Metrics.update = stop
runpy.run_path(sys.argv[0], run_name="__main__")"""


def take_turns(unit, ways, rounds):
    """Call each of these functions once a round; returns {name: {unit: its results}}, and how many times as
    fast the recipe is."""
    turns = []
    for turn in range(rounds + 1):
        order = list(ways)[:: 1 if turn % 2 else -1]  # so that nobody always comes after the same other
        turns.append({name: ways[name]() for name in order})
    turns = turns[1:] or turns
    rows = {name: {unit: summarize(one[name] for one in turns)} for name in ways}
    for name in ways if "recipe" in ways else ():
        rows[name]["times"] = summarize(one["recipe"] / one[name] for one in turns)
    return rows


def summarize(values):
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def run_python(args, *command):
    """Run Python in a process of its own; returns its seconds, and the last line that it printed."""
    begin = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "START": str(begin)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise common.UserError(done.stderr.strip().split("\n")[-1] or f"{command} failed")
    return time.time() - begin, done.stdout.splitlines()[-1]


def capture(name, *flags):
    """What a recipe hands to `common.fit`, by the names of fit's parameters: it does all but train."""
    with mock.patch("common.fit", inspect.signature(common.fit).bind):
        bound = predict.import_recipe(name).main([*flags, "--quiet"])
    bound.apply_defaults()
    run = SimpleNamespace(**bound.arguments)
    run.model.to(run.args.device)
    return run


def train(name, out, *flags):
    """Run a recipe to its end, in silence and without figures; returns the rows of its history."""
    silence = contextlib.redirect_stdout(io.StringIO())
    flags = [*flags, "--quiet", "--no-tensorboard", "--out", out]
    try:
        with silence, mock.patch("common.HAS_MATPLOTLIB", False):
            return predict.import_recipe(name).main(flags)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # without how to resume a run that is going to be removed


# ------------------------------------------------------------------------------- textbook's way to train
class OneByOne(Dataset):
    """A recipe's images as torchvision's data sets give them: each transformed when it is asked for."""

    def __init__(self, data):
        self.images, self.labels, spec = data.images.cpu().numpy(), data.labels.tolist(), data.spec
        mean, std = (torch.tensor(value).expand(spec.channels) for value in (spec.mean, spec.std))
        normalize = [transforms.Normalize(mean, std)] if (spec.mean, spec.std) != (0, 1) else []
        self.transform = transforms.Compose([transforms.ToTensor(), *normalize])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index].squeeze())), self.labels[index]


def load_one_by_one(run, workers):
    """The textbook's batches. Worker processes stay: only the first epoch waits for them to start."""
    options = {"num_workers": workers, "persistent_workers": workers > 0, "shuffle": True}
    return DataLoader(OneByOne(run.train_set), run.args.batch_size, **options)


def plain_loop(run, batches, limit=float("inf")):
    """The textbook's training loop, over anything that yields (images, labels), for so many seconds at most;
    returns its seconds."""
    start, device = time.perf_counter(), run.args.device
    run.model.train()
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.args.amp):
            loss = run.loss_fn(run.model(images.to(device)), labels.to(device))
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        if time.perf_counter() - start > limit:
            break
    loss.item()  # waits for the device
    return time.perf_counter() - start


@functools.cache
def time_workers(name, batches, *flags):
    """Seconds of so many batches of the textbook's, {number of worker processes: seconds}."""
    run, cores, seconds = capture(name, *flags, "--limit-batches", str(batches)), os.cpu_count(), {}
    for workers in sorted({0, cores, *(2**i for i in range(cores.bit_length()))}):
        loader = load_one_by_one(run, workers)
        seconds[workers] = [plain_loop(run, loader) for _ in range(2)][1]  # in the first one they start
    return seconds


# ------------------------------------------------------ ways to train: functions that return images/s
def recipe_loop(run):
    net, epochs = common.parallelize(run.model, run.args), itertools.count(1)
    run.train_set.augment = run.augment

    def train_epoch():
        how = (run.loss_fn, run.optimizer, run.args, next(epochs), run.scheduler)
        return common.train_one_epoch(net, run.train_set, *how)[0]["images_per_second"]

    return train_epoch


def textbook_loop(run, workers):
    loader = load_one_by_one(run, workers)
    return lambda: len(run.train_set) / plain_loop(run, loader)


def compute_loop(run, count):
    batch = torch.arange(min(run.args.batch_size, len(run.train_set)))
    _, *data = next(common.load_batches(run.train_set, [batch], run.args))
    return lambda: count * len(batch) / plain_loop(run, [data] * count)


# ------------------------------------------------------------ the parts, which return {row: {column: figure}}
def training(name, args):
    flags = [*args.flags, "--limit-batches", str(args.batches), "--epochs", str(args.rounds + 1)]
    textbook, *runs = (capture(name, *flags, *more) for more in ([], [], ["--tuned"], ["--amp"]))
    for run in runs:
        run.model.to(memory_format=torch.channels_last)  # as `common.fit` does
    ways = dict(zip(("recipe", "recipe --tuned", "recipe, bfloat16"), map(recipe_loop, runs), strict=True))
    seconds = time_workers(name, args.batches, *args.flags)
    for workers in 0, min([number for number in seconds if number], key=seconds.get):
        ways[f"textbook, {workers} workers"] = textbook_loop(textbook, workers)
    ways["compute alone"] = compute_loop(runs[0], args.batches)
    ways["compute alone, bfloat16"] = compute_loop(runs[2], args.batches)
    if args.quick and "slower" in runs[2].args.precision:
        ways = {name: way for name, way in ways.items() if "bfloat16" not in name}
    return take_turns("images/s", ways, args.rounds)


def accuracy(name, args):
    if read_flags(name, args).data == "drawn":
        return {"skipped: the source's is not of drawn images": {}}
    rows = {"recipe --tuned": train_tuned(name, args), "textbook": train_textbook(name, args)}
    for row in rows.values():
        reached = "reached" if row["accuracy"] >= TARGETS[name] else f"not in {row['seconds']:.0f} s"
        row["target"] = f"{TARGETS[name]} {reached}"
    return rows


def train_tuned(name, args):
    """Runs with --tuned, each of an epoch more than the one before, until one reaches the target."""
    for epochs in range(1, args.epochs + 1):
        with tempfile.TemporaryDirectory() as out:
            history = train(name, out, *args.flags, "--tuned", "--epochs", str(epochs))
        seconds, reached = sum(row["train_seconds"] for row in history), history[-1]["test_accuracy"]
        if reached >= TARGETS[name]:
            break
    return {"seconds": seconds, "epochs": epochs, "accuracy": reached}


def train_textbook(name, args):
    """Epochs of the textbook's loop, until one reaches the target, or for `--limit` seconds."""
    trial, run = time_workers(name, args.batches, *args.flags), capture(name, *args.flags)
    loader, seconds, reached, epochs = load_one_by_one(run, min(trial, key=trial.get)), 0.0, 0.0, 0
    while reached < TARGETS[name] and seconds < args.limit:
        seconds += plain_loop(run, loader, args.limit - seconds)
        reached, epochs = common.evaluate(run.model, run.test_set, run.args)[0]["test_accuracy"], epochs + 1
    return {"seconds": seconds, "epochs": epochs, "accuracy": reached}


def prediction(name, args):
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
        train(name, out, *args.flags, "--epochs", "1", "--limit-batches", "1")
        for i, (image, _) in enumerate(common.draw_digits("test", common.Spec([], 32))):
            common.cv2.imwrite(f"{folder}/{i}.png", image)
        device, files = read_flags(name, args).device, predict.find_files([folder])
        model, spec = predict.load_model(f"{out}/best.pt", device=device)
        one = [predict.__file__, f"{out}/best.pt", str(files[0]), "--device", str(device)]

        def classify():
            begin = time.perf_counter()
            return len(list(predict.classify(model, spec, files, device))) / (time.perf_counter() - begin)

        ways = {f"{len(files):,} files, images/s": classify}
        ways["one file, seconds"] = lambda: run_python(args, *one)[0]
        return take_turns("value", ways, args.rounds)


def start(name, args):
    with tempfile.TemporaryDirectory() as out:
        command = ["-c", FIRST_STEP, f"{HERE}/{name}.py", *args.flags, "--quiet", "--out", out]
        ways = {"first step": lambda: float(run_python(args, *command)[1])}
        return take_turns("seconds", ways, args.rounds)


def growth(name, args):
    code, rows = f"import sys; sys.path[0] = {HERE!r}; import bench; bench.grow(*sys.argv[1:])", {}
    for count in [count for count in (5_000, 50_000, 500_000) if count <= args.growth]:
        rows[f"{count:,} images"] = json.loads(run_python(args, "-c", code, name, str(count), *args.flags)[1])
    return rows


def grow(name, count, *flags):
    """Print a row of `growth`, as JSON, for so many drawn images: the same ones again and again."""
    draw = common.draw_digits

    def draw_more(part, spec):
        pairs = draw(part, spec)
        return pairs if part == "test" else [pairs[i % len(pairs)] for i in range(int(count))]

    with mock.patch("common.draw_digits", draw_more), tempfile.TemporaryDirectory() as out:
        row = train(name, out, *flags, "--data", "drawn", "--epochs", "2")[-1]
    try:  # Linux: getrusage's figure is no less than the memory of the process that started this one
        memory = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    except (OSError, TypeError):
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on macOS
    row = {"seconds": row["train_seconds"], "s per 1,000": 1000 / row["images_per_second"]}
    print(json.dumps({**row, "memory, MiB": memory}))


PARTS = {part.__name__: part for part in (training, accuracy, prediction, start, growth)}


# ------------------------------------------------------------------------------- command line and tables
def show(value):
    """A figure, or one with its range, as text."""
    if isinstance(value, dict):
        return "{} ({} to {})".format(*map(show, value.values()))
    return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_table(title, rows):
    columns = [*next(iter(rows.values()))]
    lines, width = [(title, columns)], 27 if len(columns) < 3 else 11
    lines += [(f"  {way}", map(show, row.values())) for way, row in rows.items()]
    print()
    for label, cells in lines:
        print(f"{label:<24}", " ".join(f"{cell:<{width}}" for cell in cells).rstrip(), flush=True)


def describe_machine(args):
    info, packages = Path("/proc/cpuinfo"), (torch, torchvision, common.cv2)
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"cpu": cpu[1] if cpu else platform.processor(), "gpu": gpu, "cores": os.cpu_count()}
    machine |= {"threads": args.threads, "python": platform.python_version()}
    machine |= {package.__name__: package.__version__ for package in packages}
    return machine | {"date": datetime.now().astimezone().isoformat(timespec="seconds")}


def read_flags(name, args):
    return predict.import_recipe(name).parser().parse_args(args.flags)


def parse_args(argv):
    parser = common.ArgumentParser(__doc__, usage="bench.py [RECIPE ...] [flags] [-- flags of the recipes]")
    parser.add_argument("recipes", nargs="*", help=f"all by default: {', '.join(TARGETS)}", metavar="RECIPE")
    for name, (default, _, _, text) in FLAGS.items():
        parser.add_argument(f"--{name}", default=default, help=text, type=int, metavar="N")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts; all by default")
    parser.add_argument("--json", metavar="FILE", help="write the figures, and the machine's, to FILE")
    end = argv.index("--") if "--" in argv else len(argv)
    if parser.parse_args(argv[:end]).quick:  # as defaults, so that a flag on the command line still wins
        parser.set_defaults(**{name: quick for name, (_, quick, _, _) in FLAGS.items()})
    args = parser.parse_args(argv[:end])
    args.recipes, args.flags = args.recipes or list(TARGETS), argv[end + 1 :]
    args.only = args.only or [part for part in PARTS if not (args.quick and part == "accuracy")]
    if unknown := [name for name in args.recipes if name not in TARGETS]:
        parser.error(f"{unknown[0]} is none of {', '.join(TARGETS)}")
    for name, (_, _, least, _) in FLAGS.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is out of range: the least is {least}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"no folder for --json {args.json}")
    for name in args.recipes:
        read_flags(name, args)  # to say now what is wrong with them
    return args


def main():
    args = parse_args(sys.argv[1:])
    torch.set_num_threads(args.threads)
    results = {"machine": describe_machine(args), "settings": vars(args)}
    print(textwrap.fill(", ".join(f"{key} {value}" for key, value in results["machine"].items()), 80))
    for part in args.only:
        for name in args.recipes[: 1 if part in ("prediction", "growth") else None]:
            rows = results.setdefault(part, {})[name] = PARTS[part](name, args)
            print_table(f"{part}, {name}", rows)
            if args.json:
                with common.atomic_write(Path(args.json)) as path:
                    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    common.cli(main)
