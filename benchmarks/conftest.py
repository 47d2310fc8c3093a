"""Options of the benchmarks and the table they end with: medians in units of one read of the same gradients in the same run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shapes import resnet50
from torch import Tensor

Rows = list[list[Tensor]]


@pytest.fixture(scope="module")
def grads(num_tasks: int, dtype: torch.dtype) -> Rows:
    torch.manual_seed(0)
    return [[torch.randn(shape).to(dtype) for shape in resnet50()] for _ in range(num_tasks)]


@pytest.fixture(scope="module")
def buffers(dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in resnet50()]


@pytest.fixture
def measure(benchmark, num_tasks: int, dtype: torch.dtype) -> Callable[[str, Callable[[], object]], None]:
    def run(op: str, call: Callable[[], object]) -> None:
        num_elements = sum(torch.Size(shape).numel() for shape in resnet50())
        size = num_tasks * num_elements * torch.finfo(dtype).bits // 8
        benchmark.extra_info.update(op=op, num_tasks=num_tasks, dtype=str(dtype)[6:], bytes=size)
        benchmark.pedantic(call, warmup_rounds=1, rounds=7)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mtlkernels")
    group.addoption("--threads", type=int, default=1, help="threads of torch, 1 unless given")
    group.addoption("--tasks", default="2,3,8,11,16,40", help="numbers of tasks, comma-separated")
    group.addoption("--dtypes", default="float32,bfloat16", help="dtypes of the gradients, comma-separated")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "num_tasks" in metafunc.fixturenames:
        values = [int(k) for k in metafunc.config.getoption("--tasks").split(",")]
        metafunc.parametrize("num_tasks", values, ids=lambda k: f"K={k}", scope="module")
    if "dtype" in metafunc.fixturenames:
        names = metafunc.config.getoption("--dtypes").split(",")
        metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=lambda d: str(d)[6:], scope="module")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    medians: dict[tuple[str, int], dict[str, tuple[float, int]]] = {}
    for bench in session.benchmarks:
        if not bench.has_error and "op" in bench.extra_info:
            info = bench.extra_info
            medians.setdefault((info["dtype"], info["num_tasks"]), {})[info["op"]] = (bench.stats.median, info["bytes"])
    if not medians:
        return
    write = terminalreporter.write_line
    write("")
    threads = config.getoption("--threads")
    write(f"ResNet-50's 159 tensors, {threads} thread(s), medians in units of one read of the same gradients in the same run")
    write("(the faster of torch's sum and amax over every tensor)")
    for (dtype, num_tasks), ops in medians.items():
        reads = [ops[name] for name in ("read: sum", "read: amax") if name in ops]
        if not reads:
            continue
        read, read_bytes = min(reads)
        write(f"{dtype}, K = {num_tasks}: one read {read * 1e3:.1f} ms, {read_bytes / read / 1e9:.1f} GB/s")
        for name, (median, _) in ops.items():
            if not name.startswith("read"):
                write(f"  {name:<34}{median / read:8.2f}")
