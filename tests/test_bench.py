"""bench.py measures every part; how fast is for no test to say."""

import json
from types import SimpleNamespace

import bench
import predict

import pytest

TINY = SimpleNamespace(rounds=1, batches=1, quick=True, flags=["--data=drawn"])


def numbers(rows):
    """All figures of a table."""
    found = []
    for row in rows.values():
        for value in row.values():
            found.extend(value if isinstance(value, list) else [value])
    return found


@pytest.fixture
def in_process(monkeypatch):
    """Recipes and predict.py run here, which saves seconds of starting each of them."""

    def run_here(script, *args):
        if script.stem == "predict":
            with pytest.raises(SystemExit) as stop:
                predict.main([str(arg) for arg in args])
            assert not stop.value.code
        else:
            predict.import_recipe(script.stem).main(args)
        return 1.0

    monkeypatch.setattr(bench, "run_python", run_here)


def test_quick_is_offline_prints_80_columns_and_writes_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "WORKERS", (0,))
    bench.main(["--quick", "--recipes", "lenet_cifar", "--only", "training", "--json", "a.json"])
    out, err = capsys.readouterr()
    assert err == ""
    assert "no MNIST and CIFAR-10 in data/: --data drawn\n" in out
    assert max(map(len, out.splitlines())) <= 80
    results = json.loads((tmp_path / "a.json").read_text())
    rows = results["training, lenet_cifar"]
    assert {"recipe", "recipe --tuned", "compute alone", "textbook, 0 workers"} <= rows.keys()
    assert min(numbers(rows)) > 0
    for name, row in rows.items():
        assert f"  {name} " in out
        assert f" {bench.show(row['images/s'])} " in out
    capabilities = bench.torch.cpu.get_capabilities()
    for name in ("avx2", "avx512_f", "amx_bf16"):
        assert (name in results["machine"][0]) == capabilities.get(name, False)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_streaming_is_compared_with_reading_and_with_the_device_alone(monkeypatch):
    monkeypatch.setattr(bench, "WORKERS", (1,))
    rows = bench.streaming("5 ms", TINY)
    assert min(numbers(rows)) > 0
    device = rows["device alone"]["images/s"][0]
    assert device <= 64 / 0.005
    assert {"recipe", "textbook, 1 workers"} <= rows.keys()


def test_accuracy_ends_where_the_target_is_reached_or_after_the_limit(monkeypatch):
    monkeypatch.setattr(bench, "CORES", 0)
    monkeypatch.setattr(bench, "LIMIT", 0.01)
    tiny = SimpleNamespace(flags=["--data=drawn", "--limit-batches=3"])
    for target in (0.05, 1.0):
        monkeypatch.setitem(bench.TARGETS, "lenet_cifar", target)
        rows = bench.accuracy("lenet_cifar", tiny)
        for way in ("recipe --tuned", "textbook, 0 workers"):
            assert rows[way]["epochs"] == 1
            assert rows[way]["seconds"] > 0.01
            assert target == rows[way]["target"]
            assert 0.05 < rows[way]["accuracy"] < 1


def test_prediction_and_growth(in_process):
    rows = bench.prediction("lenet_cifar", TINY)
    assert min(numbers(rows)) > 0
    row = bench.grow("lenet_cifar", 300, [])
    assert row["s per 1,000"] == pytest.approx(row["seconds"] / 0.3)
    assert row.get("memory, MiB", 100) >= 100
