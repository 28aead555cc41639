"""Damaged and hostile files, at random: a script works with each, or refuses it in one line.

python tests/fuzz.py                                     # 100 each of images, tables, checkpoints
python tests/fuzz.py checkpoints --count 1000 --seed 7
python tests/fuzz.py checkpoints --count 1 --first 321 --seed 7     # one of them again
"""

import argparse
import contextlib
import faulthandler
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import lenet_cifar
import predict

import torch
from PIL import Image

BYTES = 2**30  # of memory, that no case may exceed
TINY = ["--epochs", "1", "--batch-size", "4", "--quiet"]
SIZES = [(20, 20), (900_000, 1), (8000, 8000), (9000, 9000), (13_000, 13_000)]
SIZES += [(0, 20), (2**31 - 1, 1), (2**32 - 1, 2**32 - 1)]
CHUNKS = [b"PLTE", b"tRNS", b"sBIT", b"eXIf", b"iCCP", b"tEXt"]
MODES = {"PNG": "L LA P 1 I;16 RGB RGBA", "TIFF": "L LA P 1 F RGB RGBA CMYK", "JPEG": "L RGB CMYK"}
MODES |= {"BMP": "L P 1 RGB RGBA", "WEBP": "RGB RGBA", "JPEG2000": "L LA RGB RGBA", "GIF": "L P"}
MODES |= {"PPM": "L RGB I;16 1", "AVIF": "RGB RGBA"}
SPECIAL = ["pipe.png", "loop.png", "zero.png", "missing.png"]
TABLES = {  # a header, and a row with ? for the label
    "file,label": "0.png,?",
    "Label;File": "?;0.png",
    "\tid\tbreed": "7\t0\t?",
    "Image ID,fold,Class": "0,3,?",
    "path,file,category": "x,0.png,?",
    "a,b": "0.png,?",
    "x,y,z": "0.png,?,3",
    "label": "?",
    "file,label,class": "0.png,?,b",
    "label" + ",pixel" * 99: "?" + ",7" * 99,
    "0.png,a": "0.png,?",
}
FIELDS = ["", "\0", '"', '"a', "x" * 100_000, "\ufeff", "../" * 9 + "etc/passwd", "/dev/zero", "."]
FIELDS += ["0.png\n", "\r", "1" * 5000, "\ud800", "\x1b[2J", "0.png", "b,c", ";", "\t", " a "]
FIELDS += ["../data", *SPECIAL]
WRONG = [None, 1, "x", [], {}, {"format": torch.ones(2)}, torch.ones(3)]


def mutate(rng, data):
    """Bytes with a few mistakes in them."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        start = rng.randrange(rng.choice([64, len(data) + 1]))  # headers are short
        piece = data[start : start + rng.randrange(1, 64)]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:1])
        new = rng.choice([flipped + piece[1:], b"", piece * 2, bytes(len(piece))])
        data[start : start + len(piece)] = new
    if rng.random() < 0.1:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


# ---------------------------------------------------------------- images


def deflate(count, mode):
    """So many zero bytes, packed."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(bytes(count)) + packer.flush(mode)


def pack(rng, size):
    """A zlib stream of random bytes, of zeros if they are many: all its blocks are the same."""
    if size < 10_000 or size > 2**31:
        return zlib.compress(rng.randbytes(min(size, 10_000)))
    blocks = deflate(2**20, zlib.Z_FULL_FLUSH) * (size // 2**20)
    end = deflate(size % 2**20, zlib.Z_FINISH)
    return b"\x78\x9c" + blocks + end + struct.pack(">I", size % 65521 << 16 | 1)


def png(rng, width, height, depth, samples):
    """With chunks that do not fit, and wrong lengths of chunks."""
    row = (width * depth * samples + 7) // 8 + 1
    color = rng.choice([[0, 3], [4], [2], [6]][samples - 1])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))]
    for name in rng.sample(CHUNKS, rng.choice([0, 0, 1, 2])):
        chunks.append((name, rng.randbytes(rng.choice([0, 1, 2, 6, 768]))))
    chunks += [(b"IDAT", pack(rng, row * height)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        length = len(content)
        if rng.random() < 0.1:
            length = rng.choice([0, length + 1, 1 << rng.randrange(32)])
        checksum = zlib.crc32(name + content)
        data += struct.pack(">I", length) + name + content + struct.pack(">I", checksum)
    return data


def tiff(rng, width, height, depth, samples):
    """With bands that are alpha or are not, side by side or one by one, of integers or floats."""
    data = pack(rng, width * height * depth * samples // 8)
    tags = {256: width, 257: height, 258: depth, 259: 8, 262: 2, 273: 8, 277: samples, 278: height}
    tags |= {279: len(data), 284: rng.choice([1, 1, 2]), 339: rng.choice([1, 1, 2, 3])}
    if samples < 3:
        tags[262] = rng.choice([0, 1, 1])  # white or black is 0
    if samples in (2, 4):
        tags[338] = rng.randrange(4)  # no alpha, premultiplied, alpha, nonsense
    header = struct.pack("<4sI", b"II*\0", 8 + len(data))
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    return header + data + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


def pnm(rng, width, height, depth, samples):
    """With a greatest value that is too small, too large, or none."""
    kind = rng.choice([5, 6, rng.randrange(1, 8)])
    top = rng.choice([0, 1, 100, 255, 256, 1023, 65_535, 65_536, 2**depth - 1])
    return b"P%d %d %d %d\n" % (kind, width, height, top) + rng.randbytes(2400)


def picture(rng, *_):
    """As a program writes it, in any format."""
    form = rng.choice([*MODES])
    mode = rng.choice(MODES[form].split())
    exif = Image.Exif()
    exif[274] = rng.choice([1, 3, 6, 9])  # 6: the camera was held sideways
    image = Image.frombytes("RGB", (30, 20), rng.randbytes(1800)).convert(mode.split(";")[0])
    image.convert(mode).save("picture", form, exif=exif)
    return Path("picture").read_bytes()


def special_files():
    """Make files that have the name of an image, and no more than that, and an image."""
    os.mkfifo("pipe.png")
    os.symlink("loop.png", "loop.png")
    os.symlink("/dev/zero", "zero.png")
    Image.effect_noise((20, 20), 50).save("0.png")


def images(rng):
    """predict.py for an image, and for a good one."""
    special_files()
    make = rng.choice([picture, png, tiff, pnm])
    size = rng.choice([(20, 20), rng.choice(SIZES)])
    shape = (*size, rng.choice([1, 8, 8, 8, 12, 16]), rng.randrange(1, 5))
    what = f"{make.__name__} {shape}"
    data = make(rng, *shape)
    if rng.random() < 0.4:
        what += " mutated"
        data = mutate(rng, data)
    name = "x.png"
    if rng.random() < 0.05:
        what = name = rng.choice(SPECIAL)
    else:
        Path(name).write_bytes(data)
    return what, predict.main, ["../run/best.pt", name, "0.png"]


# ---------------------------------------------------------------- tables


def tables(rng):
    """lenet_cifar.py for a train.csv and a test.csv."""
    special_files()
    header, row = rng.choice(list(TABLES.items())[: rng.choice([5, len(TABLES)])])
    mark = max(",;\t", key=header.count)
    what = header[:40]
    for part in ("train.csv", "test.csv"):
        rows = [header.split(mark)]
        rows += [row.replace("?", label).split(mark) for label in "abababab"]
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            field = rng.choice(FIELDS)
            cells = rng.choice(rows)
            cells[rng.randrange(len(cells))] = field
            what += f" {field[:20]}"
        text = rng.choice(["\n", "\r\n"]).join(map(mark.join, rows))
        code = rng.choice(["utf-8"] * 18 + ["utf-8-sig", "utf-16"])
        data = text.encode(code, "surrogatepass")
        if rng.random() < 0.1:
            data = mutate(rng, data)
        Path(part).write_bytes(data)
    flags = rng.choice([[], [], ["--skip-bad"], ["--holdout", "2"], ["--limit-batches", "1"]])
    return what, lenet_cifar.main, [*TINY, *flags, "--data", "."]


# ---------------------------------------------------------------- checkpoints


class Code:
    """Pickles as a call, which `pickle.load` makes."""

    def __reduce__(self):
        return os.mkdir, ("code",)


def checkpoints(rng):
    """A checkpoint to predict with, to continue, or to test."""
    shutil.copytree("../run", "run")
    use = rng.choice(["predict", "--resume", "--test-only"])
    file = Path("run", "last.pt" if use == "--resume" else "best.pt")
    how = rng.choice(["mutated", "cut", "packed", "another type", "old", "code", "old code"])
    if how == "mutated":
        file.write_bytes(mutate(rng, file.read_bytes()))
    elif how == "cut":
        os.truncate(file, rng.randrange(file.stat().st_size))
    elif how == "packed":
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("best/data/99", bytes(2**20))
    elif how == "another type":
        torch.save(rng.choice(WRONG), file)
    else:  # old: as PyTorch before 1.6 wrote it
        checkpoint = torch.load(file)
        if "code" in how:
            checkpoint[rng.choice([*checkpoint])] = Code()
        torch.save(checkpoint, file, _use_new_zipfile_serialization="old" not in how)
    if use == "predict":
        return f"{use} {how}", predict.main, [file, "../data/0.png"]
    return f"{use} {how}", lenet_cifar.main, [use, *TINY, "--data", "../data", "--out", "run"]


# ---------------------------------------------------------------- cases


def run(main, argv):
    """Run a script; returns its exit status, and what is wrong with how it ended, or None."""
    sys.argv = ["fuzz.py", *map(str, argv)]
    with (
        open("out", "w") as out,
        open("err", "w", errors="backslashreplace") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            common.cli(main)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            status = 1
            traceback.print_exc()
    lines = Path("err").read_text().splitlines()
    refusals = [line for line in lines if ".py: error: " in line]
    if (status, len(lines), len(refusals)) not in [(0, 0, 0), (2, 1, 1)]:
        return status, "\n".join([f"exit status {status}", *lines])
    if "0.png" in argv and "0.png: " not in Path("out").read_text():
        return status, "the good image is not classified"
    if os.path.exists("code"):
        return status, "the code in it was executed"
    return status, None


def prepare_process():
    """Limits of a process that is to run cases, and a log of the one that it runs."""
    global idle, log
    resource.setrlimit(resource.RLIMIT_DATA, (8 * BYTES, 8 * BYTES))  # for the machine's sake
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log = open("log", "w")  # noqa: SIM115
    os.dup2(log.fileno(), 2)  # what C libraries print


def attempt(make, case, args):
    """Run a case; returns exit status, what is wrong or None, seconds, and bytes."""
    folder = f"{make.__name__}{case}"
    os.mkdir(folder)
    os.chdir(folder)
    what, main, argv = make(random.Random(f"{make.__name__} {args.seed} {case}"))
    log.truncate(log.seek(0))
    print(ascii(what)[:200], file=log, flush=True)
    begin = time.perf_counter()
    faulthandler.dump_traceback_later(args.seconds, exit=True, file=log)
    status, problem = run(main, argv)
    faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - begin
    os.chdir("..")
    shutil.rmtree(folder)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) * 1024
    if used >= BYTES:
        problem = f"{used / BYTES:.2f} GiB of memory"
    return status, problem, seconds, used


def fuzz(make, args):
    """Run the cases of a kind in another process; returns how many failed."""
    pool = None
    results = []
    for case in range(args.first, args.first + args.count):
        pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("fork"), prepare_process)
        try:
            result = pool.submit(attempt, make, case, args).result()
        except BrokenProcessPool:
            result = (1, f"crashed, or took {args.seconds} s", args.seconds, BYTES)
        results.append(result)
        if result[1]:
            print(f"FAILED {make.__name__} --seed {args.seed} --first {case}: {result[1]}")
            print(Path("log").read_text(), flush=True)
        if result[3] >= BYTES:
            pool.shutdown()
            pool = None
    statuses, problems, seconds, used = zip(*results, strict=True)
    failed = len(results) - problems.count(None)
    print(
        f"{len(results)} {make.__name__}: {statuses.count(2)} refused, {failed} failed, "
        f"at most {max(seconds):.2f} s and {max(used) / BYTES:.2f} GiB"
    )
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("kinds", nargs="*", help="images, tables, checkpoints")
    add("--count", type=int, default=100, help="cases of each kind")
    add("--first", type=int, default=0, help="number of the first case")
    add("--seed", type=int, default=0)
    add("--seconds", type=int, default=5, help="that no case may exceed")
    args = parser.parse_args()
    os.mkdir("data")
    Image.effect_noise((20, 20), 50).save("data/0.png")
    for part in ("train", "test"):
        Path(f"data/{part}.csv").write_text("file,label\n" + "0.png,a\n0.png,b\n" * 4)
    run(lenet_cifar.main, [*TINY, "--data", "data", "--out", "run", "--size", "16"])
    failed = 0
    for make in (images, tables, checkpoints):
        if not args.kinds or make.__name__ in args.kinds:
            failed += fuzz(make, args)
    sys.exit(failed > 0)


if __name__ == "__main__":
    os.environ["https_proxy"] = os.environ["http_proxy"] = "http://127.0.0.1:9"  # no downloads
    torch.set_num_threads(1)  # of OpenMP: processes that are forked from more hang
    common.import_figures = lambda: None  # which take most of the time of a tiny run
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
