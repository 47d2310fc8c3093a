"""What selective task group updates add to the forward and backward passes and the steps of a batch: Yeast, 14 tasks.

Trains the network of ``examples/groups.py`` at its own size and wider, by :class:`mtlkernels.SelectiveGroupOptimizer` and by a
loop written out by hand for the same visits, a batch of each in turn. A clock runs in the losses, the backward passes and the
inner optimizer's steps of both. What is left of a batch by the optimizer: checking losses, bookkeeping of the affinity, forming
the groups, drawing the order, clearing gradients; by hand: clearing gradients and adding losses; of both: freeing the graphs.
"Added" is the difference of the two in percent of a batch by hand. Medians; the times of whole batches are thread times, so
that other processes do not count.

    python -m benchmarks.groups
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import mtlkernels as mtl
from mtlkernels.tabular import Table, batches, load_yeast

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from groups import BATCH, DECAY, LEARNING_RATE, WIDTH, Net, loss_of  # the script beside the package

SIZES = ((WIDTH, BATCH), (256, 256), (512, 512), (1024, 1024))
"""Width of the trunk's two layers and rows of a batch; first those of the example."""
GROUPS = [[0, 1, 2], [3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13]]
SECONDS = 20.0
"""Of each size."""
WARM_UP = 5


class Clock:
    """Seconds spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return run


def by_hand(losses_fn: Callable[[], dict[str, torch.Tensor]], inner: torch.optim.Optimizer, tasks: list[str]) -> None:
    """One batch of the same visits, written out."""
    for group in GROUPS:
        losses = losses_fn()
        inner.zero_grad()
        torch.stack([losses[tasks[k]] for k in group]).sum().backward()
        inner.step()


def measure(data: Table, width: int, rows: int) -> tuple[float, float, float, float]:
    """Of a batch by hand and by the optimizer: milliseconds, and microseconds that are in no pass and no step."""
    tasks = list(data.targets)
    inputs, targets = data.inputs, data.targets  # replaced by those of a batch
    clock = Clock()

    def prepared() -> tuple[Callable[[], dict[str, torch.Tensor]], torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = Net(inputs.shape[1], tasks, width)
        inner = torch.optim.Adam(net.parameters(), LEARNING_RATE)
        inner.step = clock.timed(inner.step)  # type: ignore[method-assign]
        return clock.timed(lambda: {task: loss_of(out, targets[task], True) for task, out in net(inputs).items()}), inner

    def grouping(affinity: mtl.ProximalAffinity, groups: list[list[int]]) -> list[list[int]]:
        affinity.groups(groups)  # formed as ever, and replaced, so that both loops visit the same
        return GROUPS

    (losses_fn, inner), (own_losses_fn, own_inner) = prepared(), prepared()
    optimizer = mtl.SelectiveGroupOptimizer(
        own_inner, affinity=mtl.ProximalAffinity(len(tasks), DECAY), warmup=0, grouping=grouping
    )
    loops = (lambda: by_hand(losses_fn, inner, tasks), lambda: optimizer.step(own_losses_fn))
    times: list[list[float]] = []
    end = time.monotonic() + SECONDS
    with mock.patch("torch.autograd.backward", clock.timed(torch.autograd.backward)):
        for chosen in batches(len(data), rows, 10**6, seed=0):
            if time.monotonic() > end and len(times) >= 3 * WARM_UP:
                break
            inputs, targets = data.inputs[chosen], {task: values[chosen] for task, values in data.targets.items()}
            row = []
            for loop in loops:
                clock.seconds, start, thread = 0.0, time.perf_counter(), time.thread_time()
                loop()
                whole, elapsed = time.thread_time() - thread, time.perf_counter() - start
                row += [1e3 * whole, 1e6 * (elapsed - clock.seconds)]
            times.append(row)
    hand_ms, hand_us, ours_ms, ours_us = (statistics.median(column) for column in zip(*times[WARM_UP:], strict=True))
    return hand_ms, ours_ms, hand_us, ours_us


def measure_alone(repeats: int = 300) -> tuple[float, float]:
    """Microseconds of an update of the affinity and of forming the groups, called again and again; medians."""
    generator = torch.Generator().manual_seed(0)
    affinity = mtl.ProximalAffinity(14)
    affinity.matrix.copy_(torch.rand(14, 14, generator=generator) + torch.eye(14))
    losses = list(torch.rand(14, generator=generator))
    calls: tuple[Callable[[], Any], ...] = (lambda: affinity.update([1, 2, 3], losses), affinity.groups)
    times = []
    for call in calls:
        column = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            column.append(time.perf_counter() - start)
        times.append(1e6 * statistics.median(column))
    return times[0], times[1]


def main() -> None:
    torch.set_num_threads(1)
    data, _ = load_yeast()
    columns = ("width", "rows", "by hand, ms", "ours, ms", "ours / by hand", "left by hand, %", "left of ours, %", "added, %")
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for width, rows in SIZES:
        hand_ms, ours_ms, hand_us, ours_us = measure(data, width, rows)
        shares = [us / ms / 10 for us, ms in ((hand_us, hand_ms), (ours_us, ours_ms), (ours_us - hand_us, hand_ms))]
        cells = [f"{hand_ms:.2f}", f"{ours_ms:.2f}", f"{ours_ms / hand_ms:.3f}", *(f"{share:.2f}" for share in shares)]
        print(f"| {width} | {rows} | {' | '.join(cells)} |", flush=True)
    update, groups = measure_alone()
    print(
        f"\nThe K x K work alone: {update:.0f} us a visit to update the affinity, {groups:.0f} us a batch to form the groups."
    )


if __name__ == "__main__":
    main()
