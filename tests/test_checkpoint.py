"""What a user may rely on who has a checkpoint from before: it opens, and classifies alike."""

import common
import predict

import pytest
from conftest import ROOT

CHECKPOINT = ROOT / "tests/data/checkpoint.pt"


def test_a_checkpoint_from_before_classifies_as_it_did():
    """It is best.pt of lenet_cifar.py --data drawn --size 16 --tuned --no-amp --epochs 3, to be
    made again when `common.FORMAT` goes up."""
    args = common.settings(data="drawn", size=16)
    _, test_set = common.load_data(args, "CIFAR10")
    model, spec = predict.load_model(CHECKPOINT)
    row, _ = common.evaluate(model, test_set, args)
    saved = common.load_checkpoint(CHECKPOINT)["history"][-1]
    assert spec.classes == [*"0123456789"]
    assert row["test_accuracy"] == pytest.approx(saved["test_accuracy"], abs=0.01)
    assert row["test_loss"] == pytest.approx(saved["test_loss"], abs=0.01)
