"""bench.py measures every part; how fast is for no test to say."""

import json

from conftest import ENVIRONMENT, slow, start


def numbers(figures):
    """All numbers in nested dicts."""
    return [n for one in figures.values() for n in (numbers(one) if isinstance(one, dict) else [one])]


@slow
def parts_are_measured_and_nothing_is_left(cwd):
    tiny = ["--rounds", "0", "--batches", "1", "--threads", "1", "--json", "speed.json"]
    parts = ("training", "accuracy")  # the others take seconds to start processes
    flags = ["lenet_cifar", *tiny, "--only", *parts, "--", "--data", "drawn"]
    process = start("bench.py", *flags, cwd=cwd, env=ENVIRONMENT)
    return cwd, process, *process.communicate(timeout=200)


def test_parts_are_measured_and_nothing_is_left(done):
    cwd, process, out, err = done
    assert process.returncode == 0 and err == "", err
    results = json.loads((cwd / "speed.json").read_text())
    assert min(numbers(results["training"])) > 0, results["training"]
    assert "skipped" in str(results["accuracy"])
    assert {"cpu", "cores", "threads", "torch", "torchvision", "cv2", "python", "date"} <= {
        *results["machine"]
    }
    assert max(map(len, out.splitlines())) <= 80
    assert [file.name for file in cwd.iterdir()] == ["speed.json"]
