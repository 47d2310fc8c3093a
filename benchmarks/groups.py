"""What selective task group updates add to the forward and backward passes and the steps: Yeast, 14 tasks.

Prints, for networks of several sizes, the CPU time of a batch of :class:`mtlkernels.SelectiveGroupOptimizer` and the share of
it that is not in the losses, the backward passes and the inner optimizer's steps: bookkeeping of the affinity, forming the
groups, drawing the order, checks. Also what a loop written out by hand takes for the same visits, interleaved in the same run;
both are thread times, so that other processes do not count.

    python -m benchmarks.groups
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.tabular import Table, load_yeast

SIZES = ((64, 64), (256, 256), (512, 512), (1024, 1024))
"""Width of the trunk's two layers and rows of a batch."""
GROUPS = [[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13]]
REPEATS = 40


class Network(nn.Module):
    def __init__(self, width: int, tasks: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(103, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})

    def losses(self, inputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {
            task: nn.functional.binary_cross_entropy_with_logits(head(features)[:, 0], targets[task])
            for task, head in self.heads.items()
        }


class Clock:
    """Thread time spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return run


def measure(data: Table, width: int, rows: int) -> tuple[float, float, float]:
    """Milliseconds of a batch by hand and by the optimizer, and the share of ours of the latter in percent; medians."""
    tasks = list(data.targets)
    inputs, targets = data.inputs[:rows], {task: values[:rows] for task, values in data.targets.items()}
    plain, ours = Network(width, tasks), Network(width, tasks)
    by_hand, inner = (torch.optim.Adam(net.parameters(), 1e-4) for net in (plain, ours))

    def grouping(affinity: mtl.ProximalAffinity, groups: list[list[int]]) -> list[list[int]]:
        affinity.groups(groups)  # formed as ever, and replaced, so that both loops visit the same
        return GROUPS

    optimizer = mtl.SelectiveGroupOptimizer(inner, warmup=0, grouping=grouping)
    clock = Clock()
    losses_fn = clock.timed(lambda: ours.losses(inputs, targets))
    inner.step = clock.timed(inner.step)  # type: ignore[method-assign]

    def hand() -> None:
        for group in GROUPS:
            losses = plain.losses(inputs, targets)
            by_hand.zero_grad()
            torch.stack([losses[tasks[k]] for k in group]).sum().backward()
            by_hand.step()

    times: list[tuple[float, float, float]] = []
    backward = Tensor.backward
    for _ in range(REPEATS):
        start = time.thread_time()
        hand()
        written_out = time.thread_time() - start
        Tensor.backward = clock.timed(backward)  # type: ignore[method-assign]
        clock.seconds, start = 0.0, time.thread_time()
        try:
            optimizer.step(losses_fn)
        finally:
            Tensor.backward = backward  # type: ignore[method-assign]
        whole = time.thread_time() - start
        times.append((written_out, whole, (whole - clock.seconds) / whole))
    hand_s, ours_s, share = (statistics.median(column) for column in zip(*times[5:], strict=True))
    return 1e3 * hand_s, 1e3 * ours_s, 100 * share


def measure_alone(repeats: int = 300) -> tuple[float, float]:
    """Microseconds of an update of the affinity and of forming the groups, called again and again; medians."""
    generator = torch.Generator().manual_seed(0)
    affinity = mtl.ProximalAffinity(14)
    affinity.matrix.copy_(torch.rand(14, 14, generator=generator) + torch.eye(14))
    losses = torch.rand(14, generator=generator).double()
    calls: tuple[Callable[[], Any], ...] = (lambda: affinity.update([1, 2, 3], losses), affinity.groups)
    times = []
    for call in calls:
        column = []
        for _ in range(repeats):
            start = time.thread_time()
            call()
            column.append(time.thread_time() - start)
        times.append(1e6 * statistics.median(column))
    return times[0], times[1]


def main() -> None:
    torch.set_num_threads(1)
    data, _ = load_yeast()
    print(
        "| width | rows | by hand, ms | ours, ms | ours / by hand | share of ours, % |\n| --- | --- | --- | --- | --- | --- |"
    )
    for width, rows in SIZES:
        hand, ours, share = measure(data, width, rows)
        print(f"| {width} | {rows} | {hand:.1f} | {ours:.1f} | {ours / hand:.3f} | {share:.2f} |", flush=True)
    update, groups = measure_alone()
    print(f"The K x K work alone: {update:.0f} us a visit to update the affinity, {groups:.0f} us a batch to form the groups.")


if __name__ == "__main__":
    main()
