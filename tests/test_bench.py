"""The benchmarks measure what they say: all ways give one update, counts are the known ones, and a run leaves its files."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchjd.aggregation
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.__main__ import main

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import __main__ as bench  # noqa: E402
from benchmarks import baselines, document, pictures  # noqa: E402
from benchmarks.race import LEAST_ROUNDS, count, race, timings  # noqa: E402
from benchmarks.scaling import Point, measure  # noqa: E402

SHAPES = [(8, 3, 3, 3), (8,), (5, 8)]


@pytest.fixture
def grads() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(2)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results(call: Any, out: list[Tensor]) -> Tensor:
    """What a call returned, or left in the buffers, flat."""
    for buffer in out:
        buffer.zero_()
    value = call()
    if value is None or isinstance(value, list):
        value = torch.cat([t.flatten() for t in out])
    return value.double().flatten()


@pytest.mark.parametrize("op", baselines.OPS)
def test_every_way_gives_the_same(op: str, grads: list[list[Tensor]]) -> None:
    grads[1] = [b - a for a, b in zip(grads[0], grads[1], strict=True)]  # conflicting; of two tasks no order matters
    assert mtl.gram(grads)[0, 1] < 0
    out = [torch.zeros_like(t) for t in grads[0]]
    calls = {name: call for name, call in baselines.OPS[op][0](grads, out).items() if "TorchJD" not in name}
    found = {name: results(call, out) for name, call in calls.items() if "compiled" not in name}
    assert len(found) >= 2
    for name, value in found.items():
        torch.testing.assert_close(
            value, found["mtlkernels"], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_torchjd_is_asked_for_the_same(grads: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    weighting = torchjd.aggregation.PCGrad().gramian_weighting
    original = type(weighting).forward
    monkeypatch.setattr(type(weighting), "forward", lambda self, gram, *rest: seen.append(gram) or original(self, gram, *rest))
    for name, call in baselines.aggregate(grads, [torch.zeros_like(t) for t in grads[0]]).items():
        if "TorchJD" in name:
            call()
    assert len(seen) == 2
    for gram in seen:
        torch.testing.assert_close(gram.double(), mtl.gram(grads), rtol=1e-5, atol=1e-5)


def test_counts(cpu_library: str, grads: list[list[Tensor]]) -> None:
    flat = baselines.flat_matrix(grads)
    size = flat.nbytes
    own = count(lambda: mtl.gram(grads))
    assert (own.launches, own.host_reads) == (1, 0)
    assert own.moved == size + 4 * 8
    product = count(lambda: flat @ flat.T)
    assert (product.launches, product.moved) == (1, size + 4 * 4)
    copied = count(lambda: flat.clone() + 1)
    assert (copied.launches, copied.moved) == (2, 4 * size)
    assert copied.peak == pytest.approx(2 * size, rel=0.01)  # and the number 1
    assert count(lambda: flat.sum().item()).host_reads == 1
    buffers = [torch.zeros_like(t) for t in grads[0]]
    weights = torch.ones(2).double()
    combined = count(lambda: mtl.combine(grads, weights, out=buffers))
    assert combined.moved == size + size // 2 + 2 * 8


def test_calls_take_turns_and_slow_ones_leave() -> None:
    order: list[str] = []

    def spin() -> None:
        order.append("slow")
        sum(range(300_000))

    times = race({"read": lambda: order.append("read"), "slow": spin}, 1, seconds=1e-6, most_rounds=50)
    assert order[:4] == ["read", "slow", "read", "slow"]
    assert len(times["slow"]) == LEAST_ROUNDS == len(times["read"])
    assert timings(times)["slow"].reads > 1


def test_a_run_prints_and_writes(cpu_library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench, "resnet50", lambda: SHAPES)
    target = tmp_path / "bench.json"
    options = ["--tasks", "9", "--dtypes", "float32", "--threads", "1,2", "--seconds", "0.05", "--no-scaling"]
    assert main(["bench", *options, "--json", str(target)]) == 0
    record = json.loads(target.read_text())
    assert {"torch", "commit", "capability", "processor"} <= set(record["machine"])
    assert record["peak_flops"] > 1e8
    names = {row["call"] for row in record["results"] if row["op"] == "aggregate"}
    assert {"mtlkernels", "flat G @ G.T; w @ G", "TorchJD", "as LibMTL does it", "as nash-mtl does it"} <= names
    assert {row["threads"] for row in record["results"]} == {1, 2}
    assert "as nash-mtl does it" in capsys.readouterr().out


def test_the_page(cpu_library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(document, "ROOT", tmp_path)
    monkeypatch.setattr(document, "DOCUMENT", tmp_path / "docs/benchmarks.md")
    monkeypatch.setattr(bench, "resnet50", lambda: SHAPES)
    monkeypatch.setitem(baselines.OPS, "gram", baselines.OPS["gram"])
    points = list(measure({"elements": [1_000, 200_000], "tasks": [2, 9], "tensors": [1, 50]}, 0.02, 1 << 30))
    rows = [row for op in baselines.OPS for row in bench.measure_op(op, 2, "float32", 1, 0.05, False)]
    record = {"machine": bench.facts(), "peak_flops": 1e11, "results": rows, "small": bench.measure_small([2], 0.05)}
    document.write(record, points, bench.markdown(record))
    text = (tmp_path / "docs/benchmarks.md").read_text()
    assert "| gram | " in text
    assert "**Elements.**" in text
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"benchmarks.md", "roofline.png", "scaling.png"}


def test_beyond_the_largest_the_top_is_counted() -> None:
    line = [Point("elements", p, 3, 20, "gram", 1e-5 + 1e-9 * p, 0.0, 1.0, 0.0) for p in (0, 1_000_000)]
    assert pictures.counted(line, torch.tensor([10.0**9]).numpy()) == pytest.approx(1.00001)


def test_without_the_folder_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("mtlkernels.__main__.__file__", str(tmp_path / "mtlkernels/__main__.py"))
    assert main(["bench"]) == 1
    assert "checkout of the repository" in capsys.readouterr().err
