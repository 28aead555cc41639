"""Damaged and hostile files, at random: a script works with each of them, or refuses it in one line.

python tests/fuzz.py                                     # 100 each of images, CSV files and checkpoints
python tests/fuzz.py checkpoints --count 1000 --seed 7
python tests/fuzz.py checkpoints --seed 7 --case 321     # one of them again
"""
# ruff: noqa: E402

import argparse
import faulthandler
import math
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
import lenet_cifar
import predict
import vgg_transfer

import torch
from PIL import Image

SECONDS, BYTES = 5, 2**30  # that no case may exceed
TINY = ["--epochs", 1, "--batch-size", 4, "--quiet"]
MODES = {"PNG": "L LA P 1 I;16 RGB RGBA", "TIFF": "L LA P 1 F RGB RGBA CMYK", "JPEG": "L RGB CMYK"}
MODES |= {"BMP": "L P 1 RGB RGBA", "WEBP": "RGB RGBA", "JPEG2000": "L RGB RGBA", "PPM": "L RGB", "GIF": "L P"}
LIBRARIES = (
    "libpng ",
    "Corrupt JPEG",
    "Premature end",
    "Invalid ",
    "Unsupported ",
    "Inconsistent ",
    "Bogus ",
    "Warning: unknown JFIF",
)
FIELDS = ["", "\0", '"', "x" * 100_000, "x" * 200_000, "\ufeff", "../" * 9 + "etc/passwd", "/dev/zero", "."]
FIELDS += ["0.png\n", "\r", "1", "-1", "1" * 5000, "²", "٣", "NaN", "\ud800", "\x1b[2J", "x" * 300, "~", "%s"]
FIELDS += ["folder.png", "pipe.png", "loop.png", "broken.png", "0.png", "a", "b,c", ";", "\t", " "]
WRONG = [None, True, 0, -1, 1, 2, 3000, 10**9, 10**400, 2.5, 1e-320, 1e300, math.nan, math.inf, "", "x"]
WRONG += [b"x", "../x", (), [], [0.5] * 3, [0.5] * 2, [None], [[1, 2]], [[1, "x"]], {}, {"x": 1}, {1: 2}]
WRONG += [{"a": 0, "b": 1}, ["x"] * 100_000, torch.zeros(0), torch.tensor(1.0), torch.ones(3, 3), torch.int8]
WRONG += [*common.RECIPES]


class Call:
    """Pickles as a call, which `pickle.load` makes."""

    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


def mutate(rng, data):
    """Bytes with a few mistakes in them."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        short, how = slice(a, min(b, a + 64)), rng.choice(["flip", "head", "cut", "remove", "splice", "zero"])
        if how in ("flip", "head") and data:
            data[rng.randrange(len(data) if how == "flip" else min(64, len(data)))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[b:]
        else:
            data[short] = {"remove": b"", "splice": data[b : b + 99]}.get(how, bytes(short.stop - a))
    return bytes(data)


# ------------------------------------------------------------------------------------------------ images
def zeros(count):
    """A zlib stream of zero bytes, made at once: its blocks are all the same."""
    block, end = zlib.compressobj(wbits=-15), zlib.compressobj(wbits=-15)
    block = block.compress(bytes(2**20)) + block.flush(zlib.Z_FULL_FLUSH)
    end = end.compress(bytes(count % 2**20)) + end.flush() + struct.pack(">I", count % 65521 << 16 | 1)
    return b"\x78\x9c" + block * (count // 2**20) + end


def png(width, height, bits, samples, data):
    header = struct.pack(">IIBBBBB", width, height, bits, [0, 0, 4, 2, 6][samples], 0, 0, 0)
    parts = [b"IHDR" + header, b"IDAT" + data, b"IEND"]
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width, height, bits, samples, data):
    tags = {256: width, 257: height, 258: bits, 259: 8, 262: 2 if samples > 2 else 1, 273: 8, 277: samples}
    tags |= {278: height, 279: len(data), 339: 3 if bits > 16 else 1}  # 3: floats
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<4sI", b"II*\0", 8 + len(data)) + data + struct.pack("<H", 10) + tags + bytes(4)


def crafted_image(rng):
    """What it is, and an image file that no camera writes: a bomb, a strip, or a header without an image."""
    make, samples, bits = rng.choice([png, tiff]), rng.choice([1, 2, 3, 4]), rng.choice([8, 16, 32, 64])
    bits = bits if make is tiff else min(bits, 16)
    sides = {"bomb": [999, 4000, 9000, 16_384], "strip": [1, 50_000, 900_000]}
    sides["header"] = [0, 1, 999, 16_000, 30_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1]
    what = rng.choice([*sides])
    width, height = rng.choices(sides[what], k=2)
    size = 999 if what == "header" else min(2**31, (width * samples * bits // 8 + (make is png)) * height)
    what += f": {make.__name__} {width}x{height}, {samples} of {bits} bits"
    return what, make(width, height, bits, samples, zeros(size))


def special_files(folder):
    """Make files that have the name of an image, and no more than that; returns some names."""
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.effect_noise((20, 20), 50).save(folder / "0.png")
    return ["pipe.png", "loop.png", "zero.png", "broken.png", "missing.png", "."]


def images(rng, folder):
    """predict.py for an image, mutated, crafted, or none at all, and for a good one."""
    name, kind, exif = "x" + rng.choice(common.SUFFIXES), rng.random(), Image.Exif()
    Image.effect_noise((20, 20), 50).save(folder / "good.png")
    if kind < 0.05:
        what = name = rng.choice(special_files(folder))
    elif kind < 0.4:
        what, data = crafted_image(rng)
        (folder / name).write_bytes(data)
    else:
        form, exif[274] = rng.choice([*MODES]), rng.choice([1, 3, 6, 9])  # 6: the camera was held sideways
        what = f"{form} {(mode := rng.choice(MODES[form].split()))} {exif[274]}"
        image = Image.frombytes("RGB", (30, 20), rng.randbytes(1800)).convert(mode.split(";")[0])
        image.convert(mode).save(folder / name, form, exif=exif, progressive=rng.random() < 0.2)
        if kind < 0.85:
            what += " mutated"
            (folder / name).write_bytes(mutate(rng, (folder / name).read_bytes()))
    return what, predict.main, [f"{BASE}/lenet/last.pt", folder / name, folder / "good.png"]


# --------------------------------------------------------------------------------------------- CSV files
def csvs(rng, folder):
    """lenet_cifar.py for a train.csv and a test.csv."""
    special_files(folder)
    what = []
    for name in ("train.csv", "test.csv"):
        rows = [["file", "label"], *(["0.png", "ab"[i % 2]] for i in range(8))]
        if rng.random() < 0.03:
            rows = rows[:1] + [["0.png", str(i)] for i in range(100_000)]
        for _ in range(rng.randrange(3)):
            row, i, field = rng.choice(rows), rng.randrange(3), rng.choice(FIELDS)
            row[i : i + rng.randrange(2)] = [field]  # in the place of another, or before it
            what.append(field[:20])
        code = rng.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16", "utf-32"])
        data = "\n".join(map(",".join, rows)).encode(code, "surrogatepass")
        (folder / name).write_bytes(mutate(rng, data) if rng.random() < 0.3 else data)
    if rng.random() < 0.05:
        (folder / "test.csv").unlink()
        rng.choice([os.mkdir, Path])(folder / "test.csv")
    flags = rng.choice([[], [], ["--skip-bad"], ["--holdout", 2], ["--limit-batches", 1]])
    return f"{what} {flags}", lenet_cifar.main, [*TINY, *flags, "--data", folder]


# ------------------------------------------------------------------------------------------- checkpoints
def wrong(rng, v):
    """What may stand in the place of a value in a checkpoint."""
    if rng.random() < 0.1:
        # PyTorch lets a file call the last two, with any size: these are small, since that is for it to stop.
        return Call(*rng.choice([(os.mkdir, f"{BASE}/code"), (bytearray, 2**21), (torch.Tensor, 2**19)]))
    if not isinstance(v, torch.Tensor) or rng.random() < 0.2:
        return rng.choice(WRONG)
    changed = [v[..., :0], v[None], v[..., :1].expand(v.shape), v.new_ones(1).expand(2**40), v.to_sparse()]
    changed += [v * math.nan, v * 1e30, v.double() * 1e300, v + 2**40, v.to("meta"), torch.nn.Parameter(v)]
    return rng.choice([*changed, v.half(), v.double(), v.bool(), v.to(torch.int8), v.to(torch.complex64)])


def damage(rng, place):
    """Change, add or remove something at any depth of a checkpoint; returns where and what."""
    value, path = place, []
    while not path or (isinstance(value, (dict, list)) and value and rng.random() < 0.7):
        place = value
        path.append(rng.choice([*place] if isinstance(place, dict) else range(len(place))))
        value = place[path[-1]]
    how = rng.choice(["remove", "add", *["change"] * 8])
    if how == "remove":
        del place[path[-1]]
        return f"{path} removed"
    new = wrong(rng, value)
    place[rng.choice(["x", 5]) if how == "add" and isinstance(place, dict) else path[-1]] = new
    return f"{path} {how} {str(getattr(new, 'function', new))[:60]}"


def checkpoints(rng, folder):
    """A checkpoint to predict with, to resume, or to begin from."""
    use, what = rng.choice(["predict", "resume", "tuned", "weights"]), ""
    base = {"tuned": "tuned", "weights": "vgg"}.get(use, "lenet")
    file = shutil.copytree(f"{BASE}/{base}", folder / "run") / "last.pt"
    kind = rng.choice(["bytes", "records", "legacy", *["values"] * 6])
    if kind == "bytes":
        file.write_bytes(mutate(rng, file.read_bytes()))
    elif kind == "records":  # with right checksums
        with zipfile.ZipFile(file) as old:
            parts = [[name, old.read(name)] for name in old.namelist()]
        part = parts[0] if rng.random() < 0.5 else rng.choice(parts)
        part[1], what = mutate(rng, part[1]), part[0]
        with zipfile.ZipFile(file, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as new:
            for name, data in parts:
                new.writestr(name, data)
    else:
        checkpoint = torch.load(file)
        checkpoint = checkpoint["model"] if use == "weights" and rng.random() < 0.5 else checkpoint
        if use == "predict" and rng.random() < 0.03:  # at 4096 parameters each
            checkpoint["spec"]["classes"], checkpoint["recipe"] = ["x"] * 100_000, "vgg_transfer"
            checkpoint["settings"] |= {"head": "replace", "freeze": False}
        own = ["optimizer", "scheduler"] * (use in ("resume", "tuned"))  # their state is for PyTorch to check
        kept = {name: checkpoint.pop(name) for name in own}
        what = damage(rng, checkpoint)
        checkpoint.update(kept)
        torch.save(checkpoint, file, _use_new_zipfile_serialization=kind == "values")
    what = f"{use}: {kind} {what}"
    if use == "predict":
        return what, predict.main, [file, f"{BASE}/data/0.png"]
    if use == "weights":
        return what, vgg_transfer.main, [*TINY, "--data", f"{BASE}/data", "--size", 32, "--weights", file]
    flags = ["--resume", "--epochs", 3, "--out", file.parent, "--quiet"]
    return what, lenet_cifar.main, [*flags, *(["--data", f"{BASE}/data"] * rng.randrange(2))]


# ------------------------------------------------------------------------------------------------- cases
def run(main, argv):
    """Run a script; returns its exit status, and what is wrong with how it ended, or None."""
    stdout, stderr, path, status = sys.stdout, os.dup(2), [*sys.path], 0
    files = [open(BASE / name, "w+") for name in ("out", "err")]  # noqa: SIM115
    sys.stdout, sys.argv, torchvision.models.vgg16 = files[0], ["fuzz.py", *map(str, argv)], VGG16
    os.dup2(files[1].fileno(), 2)  # for what C libraries write, too
    if main is vgg_transfer.main:
        first_blocks()
    try:
        common.cli(main)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        return 1, traceback.format_exc()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        sys.stdout, sys.path[:] = stdout, path
        out, err = (file.seek(0) or file.read() for file in files)
    if (BASE / "code").exists():
        return status, "code in it was executed"
    lines = [line for line in err.splitlines() if not line.startswith(LIBRARIES)]
    if status not in (0, 2) or len(lines) != status // 2 or (status and ".py: error: " not in lines[0]):
        return status, f"{err}exit status {status}"
    if "good.png" in str(argv) and "good.png: " not in out:
        return status, f"{err}the good image is not classified"
    return status, f"{out}not finite" if " nan" in out else None


def prepare_process():
    """Limits of a process that is to run cases."""
    global idle, log
    resource.setrlimit(resource.RLIMIT_DATA, (8 * BYTES, 8 * BYTES))  # for the machine's sake
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log = open(BASE / "log", "w")  # noqa: SIM115
    faulthandler.enable(log)


def attempt(make, seed, case):
    """Run a case; returns what it was, exit status, what is wrong or None, seconds, and bytes."""
    folder = BASE / f"{make.__name__}{case}"
    folder.mkdir()
    os.chdir(folder)
    what, main, argv = make(random.Random(f"{make.__name__} {seed} {case}"), folder)
    what, start = common.printable(what), time.perf_counter()
    log.truncate(log.seek(0))
    print(what, file=log, flush=True)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=log)
    status, problem = run(main, argv)
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(folder)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) * 1024
    problem = problem if used < BYTES else f"{used / BYTES:.2f} GiB of memory"
    return what, status, problem, time.perf_counter() - start, used


def fuzz(make, seed, cases):
    """Yield a case's number, and what `attempt` returns, which runs in another process."""
    pool = None
    for case in cases:
        pool = pool or ProcessPoolExecutor(1, FORK, prepare_process)
        try:
            result = pool.submit(attempt, make, seed, case).result()
        except BrokenProcessPool:  # it has crashed, or was stopped
            what, problem = (BASE / "log").read_text().split("\n", 1)
            result = what, 1, f"crashed, or took {SECONDS} s\n{problem}", SECONDS, BYTES
        yield case, *result
        if result[-1] >= BYTES:
            pool = pool.shutdown()


def main():
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="images, csvs, checkpoints")
    parser.add_argument("--count", type=int, default=100, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="that no case may exceed")
    args, failed = parser.parse_args(), 0
    SECONDS = args.seconds
    (BASE / "data").mkdir()  # what is to be damaged
    for i in range(8):
        Image.effect_noise((20, 20), 50).save(BASE / f"data/{i}.png")
    for name in ("train", "test"):
        rows = [f"{i}.png,{'ab'[i % 2]}\n" for i in range(8)]
        (BASE / f"data/{name}.csv").write_text("file,label\n" + "".join(rows))
    tiny = [*TINY, "--data", BASE / "data", "--out"]
    run(lenet_cifar.main, [*tiny, BASE / "lenet", "--size", 16])
    run(lenet_cifar.main, [*tiny, BASE / "tuned", "--size", 16, "--tuned", "--epochs", 3])
    run(vgg_transfer.main, [*tiny, BASE / "vgg", "--size", 32, "--weights", "none"])
    for make in (images, csvs, checkpoints):
        if args.kinds and make.__name__ not in args.kinds:
            continue
        start, results = time.perf_counter(), []
        for case, *result in fuzz(make, args.seed, range(args.count) if args.case is None else [args.case]):
            results.append(result)
            if result[2]:
                print(f"FAILED {make.__name__} --seed {args.seed} --case {case}: {result[0]}\n{result[2]}\n")
        _, statuses, problems, seconds, used = zip(*results, strict=True)
        failed += sum(map(bool, problems))
        print(
            f"{len(results)} {make.__name__}, {statuses.count(2)} refused, {failed} failed so far;", end=" "
        )
        most = f"{max(seconds):.2f} s and {max(used) / BYTES:.2f} GiB"
        print(f"{time.perf_counter() - start:.1f} s in all, at most {most} each", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    import torchvision
    from test_vgg_transfer import first_blocks  # after common, which sets OpenCV up

    os.environ["https_proxy"] = os.environ["http_proxy"] = "http://127.0.0.1:9"  # nothing is downloaded
    torch.set_num_threads(1)  # of OpenMP: processes that are forked from more hang
    common.HAS_MATPLOTLIB = False
    VGG16, FORK = torchvision.models.vgg16, multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        BASE = Path(folder).resolve()
        main()
