"""The ops on a GPU against the bandwidth of a copy in the same run: `make bench-gpu`, or

python benchmarks/gpu.py [--tasks 2,8] [--dtypes float32] [--models resnet50] [--json results.json]

Each call runs from a cold L2 cache, replayed from a CUDA graph, so that the device's time is measured and not the host's;
the host's time for one call is a column of its own. Times are medians with the 20 % and 80 % quantiles. "% of copy" is the
op's least traffic over its time, as a share of the bytes per second of a large device-to-device copy (read + write).
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a plain checkout serves, built in place

import torch
from shapes import resnet50
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.dispatch import backend

Rows = list[list[Tensor]]
Quantiles = tuple[float, float, float]


def llm() -> list[tuple[int, ...]]:
    """A transformer of 24 blocks of width 1024 with four times as wide layers between: 302M elements in 288 tensors."""
    width = 1024
    block: list[tuple[int, ...]] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)] + [(width,)] * 4
    return block * 24


MODELS = {"resnet50": resnet50, "llm": llm}


class Timer:
    """Seconds of a call: 20 %, 50 % and 80 % quantiles."""

    def __init__(self, device: torch.device, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions

    def __call__(self, call: Callable[[], object]) -> Quantiles:
        if self.device.type != "cuda":  # only to check this program
            times = sorted(self._wall(call) for _ in range(self.repetitions))
            return times[0], statistics.median(times), times[-1]
        from triton.testing import do_bench  # clears the L2 cache before every run

        low, median, high = do_bench(self._captured(call), quantiles=[0.2, 0.5, 0.8])
        return low / 1e3, median / 1e3, high / 1e3

    def host(self, call: Callable[[], object]) -> float:
        """Seconds that the host is busy with a call while the device is idle."""
        times = []
        for _ in range(self.repetitions):
            self._synchronize()
            times.append(self._wall(call))
        self._synchronize()
        return statistics.median(times)

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _wall(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def copy_bandwidth(timer: Timer, size: int) -> float:
    """Bytes per second of a copy of `size` bytes, read and written."""
    source = torch.empty(size, dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / timer(lambda: target.copy_(source))[1]


def calls(grads: Rows, buffers: list[Tensor]) -> dict[str, tuple[Callable[[], object], float]]:
    """Name -> call, and the least it must move in units of all gradients' bytes."""
    num_tasks = len(grads)
    device = grads[0][0].device
    weights = torch.rand(num_tasks, dtype=torch.float64, device=device)
    square = torch.rand(num_tasks, num_tasks, dtype=torch.float64, device=device)
    cagrad = mtl.CAGrad(c=0.4)
    seed = torch.tensor(0, device=device)
    ops = torch.ops.mtlkernels
    one = 1 / num_tasks
    return {
        "gram": (lambda: mtl.gram(grads), 1),
        "combine": (lambda: mtl.combine(grads, weights, out=buffers), 1 + one),
        "mix": (lambda: mtl.mix(grads, square), 2),
        "aggregate pcgrad": (lambda: mtl.combine(grads, ops.pcgrad_weights(mtl.gram(grads), seed), out=buffers), 2 + one),
        "aggregate cagrad": (lambda: mtl.aggregate(grads, cagrad, out=buffers), 2 + one),
    }


def flat_calls(grads: Rows) -> dict[str, tuple[Callable[[], object], float]]:
    """The baseline: matrix products of gradients that lie in one [K, P] tensor already, and per-tensor dots."""
    flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in grads])
    weights = torch.rand(len(grads), dtype=flat.dtype, device=flat.device)
    return {
        "flat G @ G.T": (lambda: flat @ flat.T, 1),
        "flat w @ G": (lambda: weights @ flat, 1 + 1 / len(grads)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu checks this program and measures nothing of use")
    parser.add_argument("--models", default="resnet50,llm")
    parser.add_argument("--tasks", default="2,3,8,16,40")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repetitions", type=int, default=30, help="of a call whose time on the host is measured")
    parser.add_argument("--json", help="also write every figure to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU; `make bench` measures the CPU.")
    timer = Timer(device, options.repetitions)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, not a measurement"
    copy = copy_bandwidth(timer, 1 << 30 if device.type == "cuda" else 1 << 20)
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}; a copy moves {copy / 1e12:.3f} TB/s")
    print(f"{'':42}{'median us':>11}{'20 %':>10}{'80 %':>10}{'% of copy':>11}{'host us':>9}")

    results = []
    triton = device.type == "cuda" and backend("gram", "cuda") != "triton"
    for model, dtype_name, num_tasks in itertools.product(
        options.models.split(","), options.dtypes.split(","), map(int, options.tasks.split(","))
    ):
        dtype = getattr(torch, dtype_name)
        shapes = MODELS[model]()
        size = num_tasks * sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
        if device.type == "cuda" and 4 * size > torch.cuda.get_device_properties(device).total_memory:
            print(f"{model} {dtype_name} K={num_tasks}: left out, {size / 1e9:.0f} GB of gradients")
            continue
        grads = [[torch.randn(shape, device=device, dtype=dtype) for shape in shapes] for _ in range(num_tasks)]
        buffers = [torch.empty_like(t) for t in grads[0]]
        own = calls(grads, buffers)
        rows = [(backend("gram", device.type), op, call, traffic) for op, (call, traffic) in own.items()]
        rows += [
            ("triton", op, call, traffic) for op, (call, traffic) in own.items() if triton and op in ("gram", "combine", "mix")
        ]
        rows += [("torch", op, call, traffic) for op, (call, traffic) in flat_calls(grads).items()]
        for kind, op, call, traffic in rows:
            if kind == "triton":
                with mtl.use_backend("triton"):
                    low, median, high = timer(call)
                    host = timer.host(call)
            else:
                low, median, high = timer(call)
                host = timer.host(call)
            share = 100 * traffic * size / median / copy
            label = f"{model} {dtype_name} K={num_tasks} {op} ({kind})"
            print(
                f"{label:42}{median * 1e6:11.1f}{low * 1e6:10.1f}{high * 1e6:10.1f}{share:11.1f}{host * 1e6:9.1f}", flush=True
            )
            results.append(
                {
                    "model": model, "dtype": dtype_name, "tasks": num_tasks, "op": op, "backend": kind, "seconds": median,
                    "low": low, "high": high, "percent_of_copy": share, "host_seconds": host,
                }
            )  # fmt: skip
        del grads, buffers, own, rows, call
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        Path(options.json).write_text(json.dumps({"device": name, "copy_bytes_per_second": copy, "results": results}, indent=1))


if __name__ == "__main__":
    main()
