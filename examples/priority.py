"""Task priority on real pictures: two articles of clothing in one picture, a small ResNet with task norms.

``python examples/priority.py`` trains equal weights, each phase alone, both in sequence, both mixed as the paper does, and the
baseline of phase 1 with PCGrad, from the same initial weights on the same batches, and each task alone. It writes a table to
docs/priority_results.md and two pictures beside it. ``--quick`` is a look in half a minute, not a result.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mtlkernels as mtl
from mtlkernels import plot
from mtlkernels.data import MultiDigits, MultiFashion
from mtlkernels.demo import delta_m, spread
from mtlkernels.monitor import PriorityMonitor

TASKS = ("left", "right")
SINGLE = "single"
METHODS = {
    SINGLE: "Single task",
    "equal": "Equal weights",
    "equal_half": "Equal weights, half batches",
    "phase1": "Phase 1 only",
    "phase2": "Phase 2 only",
    "sequential": "Sequential",
    "mixed": "Mixed (the paper's)",
    "phase1_pcgrad": "Phase 1 + PCGrad",
}
OPTIONS = {
    "equal": {"mode": "phase2", "weighting": "sum"},
    "equal_half": {"mode": "phase2", "weighting": "sum"},
    "phase1": {"mode": "phase1"},
    "phase2": {"mode": "phase2"},
    "sequential": {"mode": "sequential"},
    "mixed": {"mode": "mixed"},
    "phase1_pcgrad": {"mode": "mixed", "weighting": "pcgrad"},
}
"""Of the optimizer; every multi-task method has the same task norms. Phase 1 takes two inner steps for each batch of two tasks,
as many as equal weights on the halves of it, which see the same pictures."""
BATCH = 128
DOCS = Path(__file__).parent.parent / "docs"
Data = MultiFashion | MultiDigits


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A ResNet of three blocks, and a linear head for each task on its 3 x 3 (or 2 x 2) map of features."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        first = 2 if size > 16 else 1
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, first, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width, 2),
            Block(width, 2 * width, 2),
            Block(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(18 * width, 10) for task in TASKS})

    def forward(self, images: Tensor, task: str) -> Tensor:
        return self.heads[task](self.encoder(images))


@dataclass(frozen=True)
class Run:
    """What one method did from one seed."""

    accuracy: tuple[float, ...]
    """Test accuracy of each task in percent, in evaluation mode."""
    losses: Tensor
    """[T, K], of each batch."""
    shares: Tensor
    """[T', L, K], percentage of each layer's channels with each top task, every few batches; empty for single tasks."""
    layers: list[str]
    step_ms: float


def train(method: str, data: tuple[Data, Data], seed: int, options: argparse.Namespace) -> Run:
    """One method from one seed; ``single`` trains a network for each task."""
    if method == SINGLE:
        runs = [_train((task,), {"mode": "phase1"}, data, seed, options) for task in TASKS]
        losses = torch.cat([run.losses for run in runs], 1)
        return Run(tuple(run.accuracy[0] for run in runs), losses, torch.empty(0), [], sum(run.step_ms for run in runs))
    return _train(TASKS, OPTIONS[method], data, seed, options, halves=method == "equal_half")


def _train(
    tasks: tuple[str, ...], how: dict, data: tuple[Data, Data], seed: int, options: argparse.Namespace, halves: bool = False
) -> Run:
    train_set, test_set = data
    torch.manual_seed(seed)
    net = SmallResNet(options.width, train_set.images.shape[-1])
    mtl.nn.to_task_norms(net.encoder, tasks)
    inner = torch.optim.Adam(net.parameters(), options.lr)
    optimizer = mtl.TaskPriorityOptimizer(inner, net, epochs=options.epochs, seed=seed, **how)
    parts = 2 if halves else 1
    per_epoch = options.steps * parts
    steps = options.epochs * per_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    monitor = PriorityMonitor(optimizer)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        optimizer.set_epoch(step // per_epoch)
        index = torch.randint(len(train_set), (BATCH // parts,), generator=generator)
        images, labels = train_set.images[index], {task: train_set.labels[task][index] for task in tasks}
        info = optimizer.step(
            {task: lambda task=task: cross_entropy(net(images, task), labels[task]) for task in tasks}  # noqa: B023
        )
        scheduler.step()
        losses.append(info.losses)
        if step % options.every == 0 and len(tasks) > 1:
            monitor.record(info)
    seconds = time.perf_counter() - start
    accuracy = tuple(test_accuracy(net, test_set, task) for task in tasks)
    shares = monitor.depth_share if monitor.phases else torch.empty(0)
    return Run(accuracy, torch.stack(losses), shares, monitor.layers, 1e3 * seconds / steps)


@torch.no_grad()
def test_accuracy(net: SmallResNet, data: Data, task: str) -> float:
    net.eval()
    with mtl.nn.task(task):
        right = [net(images, task).argmax(1) for images in data.images.split(1000)]
    net.train()
    return 100.0 * (torch.cat(right) == data.labels[task]).double().mean().item()


def rows(runs: dict[str, list[Run]]) -> list[list[str]]:
    """The table's cells, a row for each method."""
    table = []
    for method, done in runs.items():
        cells = [METHODS[method], *(spread([run.accuracy[k] for run in done]) for k in range(len(TASKS)))]
        gains = [delta_m(run.accuracy, alone.accuracy) for run, alone in zip(done, runs[SINGLE], strict=True)]
        final = [run.losses[-len(run.losses) // 10 :].mean().item() for run in done]
        cells += ["-" if method == SINGLE else spread(gains, 2, "+"), spread(final, 3)]
        table.append(cells)
    return table


def report(runs: dict[str, list[Run]], options: argparse.Namespace, name: str) -> str:
    """The page of docs/, in Markdown."""
    head = ["method", *(f"{task}, %" for task in TASKS), "Delta m, %", "training loss"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows(runs))]
    command = "python examples/priority.py" + (" --quick" if options.quick else "")
    where = "MultiFashion" if name == "fashion" else "MultiDigits"
    about = f"""# Task priority on {where}

Written by `{command}`: {options.epochs} epochs of {options.steps} batches of {BATCH}, Adam with a cosine schedule from
{options.lr:g}, mean ± standard deviation of {options.seeds} seeds. Every multi-task method has the same ResNet with task norms,
the same initial weights and the same batches. Delta m is the mean relative gain in test accuracy over single-task training,
seed by seed, more is better. Training loss is the mean over tasks of the last tenth of the batches. Phase 1 takes one inner
step for each task of a batch, phase 2 one in all; "half batches" takes as many steps as phase 1, on as many pictures.
"""
    images = [
        "![Test accuracy, and the share of top-priority channels over time and by depth](priority_results.png)",
        "![Correlation of the loss trends of the two tasks](priority_trends.png)",
    ]
    return "\n".join([about, *lines, "", _verdict(runs), "", images[0], "", images[1], ""])


def _verdict(runs: dict[str, list[Run]]) -> str:
    """What the numbers say, by a rule: differences seed by seed against two standard errors of their mean."""
    names = [m for m in runs if m not in (SINGLE, "mixed")]
    parts = []
    for other in names:
        gaps = [
            delta_m(a.accuracy, s.accuracy) - delta_m(b.accuracy, s.accuracy)
            for a, b, s in zip(runs["mixed"], runs[other], runs[SINGLE], strict=True)
        ]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
        mean = statistics.mean(gaps)
        word = "not told apart from" if abs(mean) < 2 * error else "above" if mean > 0 else "below"
        parts.append(f"{word} {METHODS[other].lower().replace('pcgrad', 'PCGrad')} ({mean:+.2f})")
    return "Mixed, in Delta m and by two standard errors of the differences seed by seed: " + "; ".join(parts) + "."


def pictures(runs: dict[str, list[Run]], folder: Path) -> None:
    """priority_results.png: accuracies, Figures 4 and 5 of the paper; priority_trends.png: Figure 3."""
    figure = plot._new_figure((14.0, 8.4))
    top, bottom = figure.subfigures(2, 1)
    plane, over_time, _ = (axes := top.subplots(1, 3, width_ratios=(1.0, 1.2, 0.35)))
    axes[2].set_axis_off()
    plot.accuracy_plane({METHODS[m]: [run.accuracy for run in done] for m, done in runs.items()}, TASKS, axes=plane)
    axes[2].legend(*plane.get_legend_handles_labels(), frameon=False, fontsize=9, loc="center")
    every = torch.stack([run.shares.mean(1) for run in runs["mixed"]])
    plot.priority_over_time(every, TASKS, title="Top-priority channels over records, mixed", axes=over_time)
    over_time.set_xlabel("record")
    shown = ("phase1", "phase2", "mixed")
    for method, axes in zip(shown, bottom.subplots(1, len(shown), sharey=True), strict=True):
        last = torch.stack([run.shares[-1] for run in runs[method]]).mean(0)
        layers = [name.removeprefix("encoder.").removesuffix(".weight") for name in runs[method][0].layers]
        plot.priority_by_depth(last, TASKS, layers, title=f"By depth at the end: {METHODS[method]}", axes=axes)
        if axes is not bottom.axes[-1]:
            axes.get_legend().remove()
    figure.savefig(folder / "priority_results.png", dpi=80)

    figure = plot._new_figure((3.2 * (len(runs) - 1), 3.4))
    methods = [method for method in runs if method != SINGLE]
    for method, axes in zip(methods, figure.subplots(1, len(methods)), strict=True):
        window = max(1, len(runs[method][0].losses) // 60)
        matrices = [mtl.monitor.trend_correlation(run.losses, window) for run in runs[method]]
        plot.cosine_matrix(torch.stack(matrices).mean(0), TASKS, title=METHODS[method], axes=axes)
    figure.savefig(folder / "priority_trends.png", dpi=80)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python examples/priority.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", choices=("fashion", "digits"), default="fashion", help="pictures (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each method (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="E of the schedule (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="batches of an epoch (default: %(default)s)")
    parser.add_argument("--width", type=int, default=8, help="channels of the first block (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="initial learning rate (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the page and the pictures (default: docs)")
    parser.add_argument("--quick", action="store_true", help="two seeds of 4 epochs of 10 batches: a look, not a result")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.epochs, options.steps = 2, 4, 10
        options.output = Path() if options.output == DOCS else options.output
    if min(options.seeds, options.epochs, options.steps, options.width) < 1:
        parser.error("--seeds, --epochs, --steps and --width take positive numbers")
    if not options.output.is_dir():
        parser.error(f"--output: {options.output} is not a directory; create it first")
    options.every = max(1, options.epochs * options.steps // 100)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on one thread, which these small networks are fastest on; prints the table and writes page and pictures."""
    options = parse(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    sizes = (2_000, 500) if options.quick else (20_000, 10_000)
    data = (MultiFashion if options.data == "fashion" else MultiDigits).load(*sizes)
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        for method in METHODS:
            runs[method].append(train(method, data, seed, options))
            run = runs[method][-1]
            print(f"seed {seed}  {METHODS[method]:20s} {run.accuracy}  {run.step_ms:.1f} ms a step", flush=True)
    text = report(runs, options, options.data)
    (options.output / "priority_results.md").write_text(text)
    pictures(runs, options.output)
    print(text)
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
