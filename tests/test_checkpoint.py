"""What a user may rely on who has a checkpoint from before: it still opens."""

import csv

import common

import cv2
import pytest
from conftest import ROOT, run


def test_a_checkpoint_from_before_classifies(tmp_path):
    """It is best.pt of lenet_cifar.py --data drawn --size 16 --epochs 1 --limit-batches 20, to be made again
    when `common.FORMAT` goes up."""
    image, _ = common.draw_digits("test", common.Spec([], 16))[0]
    cv2.imwrite(str(tmp_path / "digit.png"), image[..., ::-1])
    args = (ROOT / "tests/data/checkpoint.pt", "digit.png", "--top", 10, "--csv", "table.csv")
    out, err = run("predict.py", *args, cwd=tmp_path)
    assert out.startswith("digit.png: ") and err == ""
    with open(tmp_path / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    probabilities = [float(row["probability"]) for row in table]
    assert sorted(row["class"] for row in table) == list("0123456789")
    assert all(0 <= one <= 1 for one in probabilities) and sum(probabilities) == pytest.approx(1, abs=1e-4)
