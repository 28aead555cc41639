"""Draws the tiny data that the tests train on, and runs scripts as a user does."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny batches, in processes beside each other
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import readers  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


def start(script, *args, cwd, **options):
    """Start a script in a process of its own: `python SCRIPT ...` in the folder `cwd`."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, preexec_fn=hear_ctrl_c, **{**pipes, **options})


def run(script, *args, cwd, status=0, **options):
    """Run a script in its own process; returns (stdout, stderr). Its exit status has to be this."""
    process = start(script, *args, cwd=cwd, **options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, f"exited with {process.returncode}\n{out}\n{err}"
    assert status == 1 or "Traceback" not in err, err
    return out, err


def hear_ctrl_c():
    """What CI starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def one_error_line(err, *parts):
    """The only line of stderr, which must hold these parts."""
    assert err.count("\n") == 1, err
    assert ": error: " in err, err
    for part in parts:
        assert part in err, err


def draw(kind, rng, height=32, width=32):
    """A picture, uint8 BGR (H, W, 3): bars that lie, bars that stand, or a ball, on noise."""
    picture = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
    y = int(height * rng.uniform(0.3, 0.7))
    x = int(width * rng.uniform(0.3, 0.7))
    color = rng.integers(150, 256, 3).tolist()
    if kind == "lying":
        picture[y - height // 8 : y + height // 8] = color
    elif kind == "standing":
        picture[:, x - width // 8 : x + width // 8] = color
    else:
        cv2.circle(picture, (x, y), min(height, width) // 4, color, -1)
    return picture


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/<class>/ with 20 pictures each and test/<class>/ with 7, of three classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 7)):
        for kind in ("ball", "lying", "standing"):
            (root / part / kind).mkdir(parents=True)
            for i in range(count):
                file = root / part / kind / f"{i}{['.png', '.jpg', '.bmp', '.webp'][i % 4]}"
                cv2.imwrite(str(file), draw(kind, rng, 30 + 5 * (i % 3), 40))
    return root


few_digits = functools.cache(functools.partial(readers.draw_digits, "test"))


@pytest.fixture(autouse=True)
def quick(request, monkeypatch, tmp_path):
    """In the tests' own process: an empty folder to be in, a sixth of the drawn digits, no figures,
    which take most of the time of a tiny run. A test that is marked with `figures` has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readers, "draw_digits", lambda part, *shape: few_digits(*shape))
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr(common, "import_figures", lambda: None)
