"""How the cost of the ops grows with elements, tasks and tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mtl

from .machine import reader
from .race import race, timings

Rows = list[list[Tensor]]

MIDDLE = {"elements": 4_000_000, "tasks": 3, "tensors": 20}
"""What the two that are not varied are."""
ELEMENTS = [1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000]
ELEMENTS += [300_000_000, 1_000_000_000]
TASKS = [1, 2, 3, 4, 6, 8, 11, 16, 24, 32, 40, 48, 64]
TENSORS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000]
OPS = ("gram", "combine", "aggregate")


@dataclass(frozen=True)
class Point:
    """One op at one size."""

    varied: str
    elements: int
    tasks: int
    tensors: int
    op: str
    seconds: float
    minimum: float
    reads: float
    read_seconds: float

    @property
    def size(self) -> int:
        """Bytes of the gradients."""
        return 4 * self.elements * self.tasks

    @property
    def x(self) -> int:
        return int(getattr(self, self.varied))


def moved(op: str, num_tasks: int) -> float:
    """Least bytes that an op moves, in units of the gradients' bytes."""
    return {"gram": 1.0, "combine": 1.0 + 1 / num_tasks, "aggregate": 2.0 + 1 / num_tasks}[op]


def make(elements: int, tasks: int, tensors: int) -> Rows:
    """K rows of N tensors of equal sizes, as near as can be; of one random row and multiples of it."""
    base, extra = divmod(elements, tensors)
    sizes = [base + (n < extra) for n in range(tensors)]
    first = [torch.randn(size) for size in sizes]
    return [first if k == 0 else [t * (1 + k) for t in first] for k in range(tasks)]


def measure(sizes: dict[str, Sequence[int]], seconds: float, memory: int) -> Iterator[Point]:
    """Of every op: each size varied while the others stay, as far as the gradients fit ``memory`` bytes. One thread."""
    torch.set_num_threads(1)
    for varied, values in sizes.items():
        for value in values:
            shape = {**MIDDLE, varied: value}
            if 4 * shape["elements"] * (shape["tasks"] + 1) > memory:
                continue
            grads = make(**shape)
            out = [torch.zeros_like(t) for t in grads[0]]
            weights, method = torch.rand(len(grads), dtype=torch.float64), mtl.get_weighting("pcgrad")
            calls = {
                "read": reader([t for row in grads for t in row], 1),
                "gram": lambda g=grads: mtl.gram(g),
                "combine": lambda g=grads, o=out, w=weights: mtl.combine(g, w, out=o),
                "aggregate": lambda g=grads, o=out, m=method: mtl.aggregate(g, m, out=o),
            }
            for op, timing in timings(race(calls, 1, seconds, most_rounds=400)).items():
                yield Point(varied, **shape, op=op, seconds=timing.median, minimum=timing.minimum, reads=timing.reads,
                            read_seconds=timing.read_seconds)  # fmt: skip
            del grads, out, calls


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
