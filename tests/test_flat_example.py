"""examples/flat.py on small generated data in the format of the real one."""

import argparse
import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).parent.parent / "examples/flat.py"


@pytest.fixture
def example(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("flat_example", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "flat_example", module)
    spec.loader.exec_module(module)
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 12)):
        images, labels = random.integers(0, 256, (count, 28, 28), np.uint8), random.integers(0, 10, count, np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    monkeypatch.setattr(module, "FASHION", tmp_path)
    return module


def test_overlays_share_no_source_picture(example):
    train, test = example.load("fashion", 40, 30)
    images, labels = example.fashion()
    assert train.images.shape == (40, 1, 36, 36)
    assert images.shape == (72, 28, 28)
    assert labels.max() < 10
    raw = train.images * 0.35 + 0.2
    corner = raw[:, 0, :8, :28]  # of the left picture alone
    sources = images[:, :8, :].float() / 255
    chosen = [{int((sources - c[:8]).abs().flatten(1).sum(1).argmin()) for c in part} for part in (
        corner, (test.images * 0.35 + 0.2)[:, 0, :8, :28]
    )]  # fmt: skip
    assert not chosen[0] & chosen[1]


@pytest.mark.parametrize("trunk", ["lenet", "resnet"])
def test_a_table(example, trunk):
    options = argparse.Namespace(
        data="fashion", trunk=trunk, methods="sum", steps=4, batch=8, seeds=2, rho=0.5, quick=True, out=None
    )
    data = example.load("fashion", 40, 30)
    results = {
        ("cagrad", flat): [example.train(options, "cagrad", flat, data, seed) for seed in range(2)] for flat in (False, True)
    }
    for runs in results.values():
        for run in runs:
            assert 0 <= run.accuracy <= 100
            assert 0 <= run.conflicts <= 100
            assert 0 <= run.calibration <= 100
    text = example.report(options, results)
    assert "| F-cagrad |" in text
    assert "87.82" in text


def test_calibration_error(example):
    logits = torch.log(torch.tensor([[0.85, 0.15], [0.85, 0.15], [0.35, 0.65]]))
    labels = torch.tensor([0, 1, 1])
    # In the bin of 0.85: confidence 0.85, accuracy 0.5; of 0.65: confidence 0.65, accuracy 1.
    assert abs(example.calibration_error(logits, labels) - (2 * 0.35 + 0.35) / 3) < 1e-6
