"""examples/flat.py on small generated data in the format of the real one."""

import gzip
import importlib.util
import math
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
    for part, count in (("train", 600), ("t10k", 120)):
        images, labels = random.integers(0, 256, (count, 28, 28), np.uint8), random.integers(0, 10, count, np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    monkeypatch.setattr(module, "FASHION_MNIST", tmp_path)
    return module


def test_overlays_share_no_source_picture(example):
    train, test = example.load("fashion", 40, 30)
    images, labels = example.fashion()
    assert train.images.shape == (40, 1, 36, 36)
    assert images.shape == (720, 28, 28)
    assert labels.max() < 10
    raw = train.images * 0.35 + 0.2
    corner = raw[:, 0, :8, :28]  # of the left picture alone
    sources = images[:, :8, :].float() / 255
    chosen = [{int((sources - c[:8]).abs().flatten(1).sum(1).argmin()) for c in part} for part in (
        corner, (test.images * 0.35 + 0.2)[:, 0, :8, :28]
    )]  # fmt: skip
    assert not chosen[0] & chosen[1]


@pytest.mark.parametrize("trunk", ["lenet", "resnet"])
def test_the_page(example, tmp_path, monkeypatch, trunk):
    runs_file = tmp_path / "runs.jsonl"
    arguments = ("--trunks", trunk, "--methods", "cagrad", "--rho", "0.5,2", "--resume", str(runs_file))
    options = example.parse(["--data", "fashion", "--steps", "8", "--batch", "8", "--seeds", "2", *arguments])
    options.sizes = (40, 300)
    runs = example.all_runs(options)
    assert list(runs) == [(trunk, "fashion", *of) for of in ((example.SINGLE, 0.0), *(("cagrad", r) for r in (0.0, 0.5, 2.0)))]
    for (_, _, method, _), done in runs.items():
        assert len(done) == 2
        for run in done:
            assert len(run.accuracy) == 2
            assert all(0 <= value <= 100 for value in (*run.accuracy, run.calibration))
            assert math.isnan(run.conflicts[0]) == (method == example.SINGLE)
    text = example.report(options, runs)
    assert "| F-cagrad, rho 2 |" in text
    assert text.count("| 87.82 |") == 2
    assert text.count("| 86.51 |") == 1
    assert "--resume" not in text

    monkeypatch.setattr(example, "train", None)  # nothing is trained again
    assert example.report(options, example.all_runs(options)) == text
    runs_file.write_text("".join(runs_file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(TypeError):
        example.all_runs(options)


def test_numbers_of_the_page_by_hand(example):
    def run(accuracy, conflicts=(40.0, 50.0), calibration=1.0):
        return example.Run(accuracy, conflicts, 0.1, calibration)

    runs = {
        (example.SINGLE, 0.0): [run([80.0, 50.0]), run([80.0, 50.0])],
        ("mgda", 0.0): [run([76.0, 50.0]), run([76.0, 55.0])],
        ("mgda", 2.0): [run([78.0, 52.0], (30.0, 10.0), 1.0), run([78.0, 57.0], (50.0, 14.0), 2.0)],
        ("cagrad", 0.0): [run([76.0, 50.0])] * 2,
        ("cagrad", 2.0): [run([10.0, 11.0], (90.0, 90.0))] * 2,
    }
    lines = example.table(runs, "mnist").splitlines()
    row = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    # Delta m: (78 / 80 + 52 / 50) / 2 - 1 and (78 / 80 + 57 / 50) / 2 - 1.
    assert row == [
        "F-mgda, rho 2", "78.0 ± 0.0", "54.5 ± 3.5", "66.25 ± 1.77", "95.68", "+3.25 ± 3.54", "40, then 12", "0.100 ± 0.000",
        "1.50 ± 0.71",
    ]  # fmt: skip
    told = example.verdict(runs)
    assert "Accuracy with F- of rho 2, against without: higher for mgda (+2.00); lower for cagrad (-52.50)." in told
    assert (
        "Conflicts of the last quarter with F- of rho 2, against without: higher for cagrad (+40.00); lower for mgda (-38.00)"
        in told
    )
    assert "ECE with F- of rho 2, against without: not told apart for mgda (+0.50), cagrad (+0.00)." in told
    assert "Below 20 % accuracy, so that nothing follows from their other columns: F-cagrad, rho 2." in told
    assert example.conflicts(runs) == "40, then 50; with F- of rho 2 40, then 12"


def test_committed_page_is_what_the_full_command_writes(example):
    page = (PATH.parent.parent / "docs/flat_results.md").read_text()
    assert "\n    python examples/flat.py\n" in page
    for trunk in example.STEPS:
        for data, title in example.TITLES.items():
            part = page.split(f"## {title}, {trunk} trunk\n")[1].split("\n## ")[0]
            for method, paper in example.PAPER.items():
                assert f"\n| {method} |" in part
                assert all(part.count(f"\n| F-{method}, rho {r} |") == (method != example.SINGLE) for r in ("0.5", "2"))
                assert all(f"| {value:.2f} |" in part for value in paper[data])


def test_calibration_error(example):
    logits = torch.log(torch.tensor([[0.85, 0.15], [0.85, 0.15], [0.35, 0.65]]))
    labels = torch.tensor([0, 1, 1])
    # In the bin of 0.85: confidence 0.85, accuracy 0.5; of 0.65: confidence 0.65, accuracy 1.
    assert abs(example.calibration_error(logits, labels) - (2 * 0.35 + 0.35) / 3) < 1e-6
