"""Draws the tiny data that the tests train on, and runs the scripts as a user does."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny batches, in processes beside each other
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # else the fork server finds neither
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

# Processes that begin with the slow imports done: a test starts a script in 0.1 s instead of 3.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["torch", "torchvision", "torch._dynamo", "cv2", "matplotlib.figure", "conftest"])

# A sixth of the drawn images, which the warm processes share, for where it does not matter what is learnt.
DRAW_DIGITS = common.draw_digits
FEW = {shape: DRAW_DIGITS("test", common.Spec([], *shape)) for shape in ((32, 3), (28, 1))}
SLOW = {}  # {name of a test: what it is about, a function}
ENVIRONMENT = {**os.environ}  # before a test changes it


def hear_ctrl_c():
    """What was started in the background, as CI may start pytest, ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(script, *args, cwd, **options):
    """Start a script as the user does, `python SCRIPT ...` in the folder `cwd`; returns the process."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, cwd=cwd, preexec_fn=hear_ctrl_c, **options)


def run(script, *args, cwd, status=0, **options):
    """Run a script to its end in a warm process, with the options of `warm`; returns (stdout, stderr). Fails
    where its exit status is another than `status`."""
    return finish(warm(script, *args, cwd=cwd, **options), status)


def warm(script, *args, cwd, before=None, name="", figures=False, few=True):
    """Start a script in a warm process, after the function `before`; `name` is for several in one folder.
    Figures, half the time of a tiny run, only if wanted; few drawn images, unless all are wanted."""
    files = [Path(cwd, f".stdout{name}"), Path(cwd, f".stderr{name}")]
    args = (str(ROOT / script), [*map(str, args)], str(cwd), files, dict(os.environ), before, figures, few)
    process = WARM.Process(target=_run, args=args)
    process.start()
    return process, files


def finish(started, status):
    """Wait for what `warm` has started; returns (stdout, stderr)."""
    process, files = started
    process.join(100)
    process.kill()
    process.join()
    out, err = (file.read_text() for file in files)
    assert process.exitcode == status, f"exited with {process.exitcode}\n{out}\n{err}"
    assert status == 1 or "Traceback" not in err, err
    return out, err


def _run(script, args, cwd, files, environment, before, figures, few):
    os.environ.update(environment)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    sys.argv = [script if os.path.dirname(script) != str(ROOT) else os.path.basename(script), *args]
    common.HAS_MATPLOTLIB = figures
    if few:
        common.draw_digits = few_digits
    if before:
        before()
    runpy.run_path(script, run_name="__main__")


def few_digits(part, spec):
    """In the place of common.draw_digits."""
    spec.classes = list("0123456789")
    return FEW.get((spec.size, spec.channels)) or DRAW_DIGITS("test", spec)


def slow(work):
    """Have `work`, a function of an empty folder, run beside the other tests; the test of the same name, with
    test_ before it, gets what it returns as the fixture `done`."""
    SLOW[f"test_{work.__name__}"] = work
    return work


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name in SLOW)  # last


@pytest.fixture(scope="session", autouse=True)
def works(request, tmp_path_factory):
    names = {item.name for item in request.session.items}
    pool = ThreadPoolExecutor(1)
    yield {name: pool.submit(SLOW[name], tmp_path_factory.mktemp("slow")) for name in SLOW if name in names}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def done(request, works):
    return works[request.node.name].result()


def one_error_line(err, *parts):
    """The only line of stderr, which must hold these parts."""
    assert err.count("\n") == 1, err
    assert ": error: " in err, err
    for part in parts:
        assert part in err, err
    return err


def draw(kind, rng, height=32, width=32):
    """A picture, uint8 BGR (H, W, 3): bars that lie, bars that stand, or a ball, on noise."""
    picture = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
    y, x = int(height * rng.uniform(0.3, 0.7)), int(width * rng.uniform(0.3, 0.7))
    color = rng.integers(150, 256, 3).tolist()
    if kind == "lying":
        picture[y - height // 8 : y + height // 8] = color
    elif kind == "standing":
        picture[:, x - width // 8 : x + width // 8] = color
    else:
        cv2.circle(picture, (x, y), min(height, width) // 4, color, -1)
    return picture


def write_pictures(root):
    """train/<class>/ and test/<class>/ of three classes, in several formats and sizes; CSVs of the same."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 7)):
        rows = ["file,label"]
        for kind in ("ball", "lying", "standing"):
            (root / part / kind).mkdir(parents=True)
            for i in range(count):
                file = root / part / kind / f"{i}{['.png', '.jpg', '.bmp', '.webp'][i % 4]}"
                cv2.imwrite(str(file), draw(kind, rng, 30 + 5 * (i % 3), 40))
                rows.append(f"{file.relative_to(root)},{kind}")
        (root / f"{part}-rows.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root)
    return root
