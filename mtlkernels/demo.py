"""Two-task training on real digits: single-task, equal weights and gradient surgery side by side.

``python -m mtlkernels demo`` trains every method from the same initial weights on the same batches, prints a table and writes a
picture. Nothing is downloaded: the digits come with scikit-learn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import plot
from ._optional import require
from .data import CANVAS, MultiDigits
from .ops import combine, cosine, gram
from .optim import MultiTaskOptimizer
from .weightings import get_weighting

if TYPE_CHECKING:
    from rich.console import Console

TASKS = ("left", "right")
SINGLE = "single"
METHODS = {SINGLE: "Single task", "mean": "Equal weights", "pcgrad": "PCGrad", "mgda": "MGDA", "cagrad": "CAGrad"}
"""What can be compared: a weighting's registry string, or ``single`` -> name in the table."""
LEARNING_RATE = 2e-3
BATCH = 256
CAPTION = (
    "Accuracy on test pictures. Delta m: mean relative accuracy gain over single task, seed by seed. Conflicts: steps whose "
    "task gradients have a negative cosine. Step: forward, backward and update on one thread; for single task both networks. "
    "Our ops: gram, weighting and combine, timed apart on the gradients of one batch (median of 50), as a share of the step."
)


class TwoTaskNet(nn.Module):
    """A shared trunk of two layers and a linear head for each task, small enough for the tasks to compete for it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(CANVAS * CANVAS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(32, 10) for task in TASKS})

    def losses(self, images: Tensor, labels: dict[str, Tensor], tasks: Iterable[str] = TASKS) -> dict[str, Tensor]:
        """Cross-entropy of each task, a scalar each."""
        features = self.trunk(images)
        return {task: cross_entropy(self.heads[task](features), labels[task]) for task in tasks}

    @torch.no_grad()
    def accuracy(self, data: MultiDigits, task: str) -> float:
        """Share of right answers in percent."""
        right: Tensor = self.heads[task](self.trunk(data.images)).argmax(1) == data.labels[task]
        return 100.0 * right.double().mean().item()


@dataclass(frozen=True)
class Run:
    """What one method did from one seed."""

    losses: Tensor
    """[T, 2], of each training batch."""
    cosine: Tensor
    """[T, 3, 3], of the task gradients on the trunk and, last, the update they were combined to; [0, 3, 3] for single-task
    training, which has two trunks."""
    accuracy: tuple[float, float]
    """Test accuracy of each task in percent."""
    step_ms: float
    """Milliseconds per training step, forward and backward passes included; for single-task training of both networks."""
    ops_ms: float
    """Milliseconds of a step in gram, weighting and combine; 0 for single-task training."""

    @property
    def conflicts(self) -> float:
        """Share of steps whose task gradients conflict, in percent."""
        return 100.0 * (self.cosine[:, 0, 1] < 0).double().mean().item()


def batches(data: MultiDigits, steps: int, seed: int) -> list[Tensor]:
    """Index tensors of the batches: the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(data), (BATCH,), generator=generator) for _ in range(steps)]


def train_single(train: MultiDigits, test: MultiDigits, steps: int, seed: int, advance: Callable[[], None]) -> Run:
    """Each task alone, with a trunk of the same size of its own."""
    losses, accuracy = [], []
    seconds = 0.0
    for task in TASKS:
        torch.manual_seed(seed)
        net = TwoTaskNet()
        optimizer = torch.optim.Adam([*net.trunk.parameters(), *net.heads[task].parameters()], LEARNING_RATE)
        history = []
        for index in batches(train, steps, seed):
            start = time.perf_counter()
            loss = net.losses(train.images[index], {task: train.labels[task][index]}, [task])[task]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds += time.perf_counter() - start
            history.append(loss.detach())
            advance()
        losses.append(torch.stack(history))
        accuracy.append(net.accuracy(test, task))
    left, right = accuracy
    return Run(torch.stack(losses, 1), torch.empty(0, 3, 3), (left, right), 1e3 * seconds / steps, 0.0)


def train_multi(method: str, train: MultiDigits, test: MultiDigits, steps: int, seed: int, advance: Callable[[], None]) -> Run:
    """Both tasks on one trunk, whose task gradients the method combines."""
    torch.manual_seed(seed)
    net = TwoTaskNet()
    optimizer = MultiTaskOptimizer(
        torch.optim.Adam(net.parameters(), LEARNING_RATE),
        method,
        shared=net.trunk.parameters(),
        heads={task: list(net.heads[task].parameters()) for task in TASKS},
    )
    losses, products = [], []
    seconds = 0.0
    for index in batches(train, steps, seed):
        start = time.perf_counter()
        batch = net.losses(train.images[index], {task: labels[index] for task, labels in train.labels.items()})
        info = optimizer.step(batch)
        seconds += time.perf_counter() - start
        losses.append(torch.stack([batch[task].detach() for task in TASKS]))
        assert info.gram is not None  # weights are computed in every step
        products.append(with_update(info.gram, info.weights))
        advance()
    accuracy = (net.accuracy(test, "left"), net.accuracy(test, "right"))
    return Run(
        torch.stack(losses), cosine(torch.stack(products)), accuracy, 1e3 * seconds / steps, time_ops(method, net, train)
    )


def with_update(gram: Tensor, weights: Tensor) -> Tensor:
    """Gram [K + 1, K + 1] of the task gradients and the update d = sum_k w_k g_k; <g_k, d> = (G w)_k and |d|^2 = w'Gw."""
    basis = torch.cat([torch.eye(len(weights), dtype=gram.dtype), weights.to(gram.dtype).unsqueeze(0)])
    return basis @ gram @ basis.T


def time_ops(method: str, net: TwoTaskNet, data: MultiDigits, repeats: int = 50) -> float:
    """Milliseconds of gram, weighting and combine on the gradients of one batch: the median of ``repeats``.

    Timed apart from training, so that no hook or profiler slows the steps that are timed there.
    """
    batch = net.losses(data.images[:BATCH], {task: labels[:BATCH] for task, labels in data.labels.items()})
    trunk = list(net.trunk.parameters())
    grads = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in batch.values()]
    weighting = get_weighting(method)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        combine(grads, weighting(gram(grads)))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def train(
    methods: Sequence[str], seeds: int, steps: int, sizes: tuple[int, int], advance: Callable[[], None]
) -> dict[str, list[Run]]:
    """Trains every method from ``seeds`` seeds, interleaved so that a busy machine slows all of them alike."""
    data = MultiDigits.load(*sizes)
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    for seed in range(seeds):
        for method in methods:
            one = train_single if method == SINGLE else partial(train_multi, method)
            runs[method].append(one(*data, steps, seed, advance))
    return runs


def delta_m(accuracy: Sequence[float], single: Sequence[float]) -> float:
    """Mean relative gain over single-task accuracy in percent, sum_k (M_k - S_k) / S_k / K: higher is better.

    Delta_m of Maninis et al. (2019, Eq. 4) for metrics of which more is better.
    """
    return 100.0 * statistics.mean((m - s) / s for m, s in zip(accuracy, single, strict=True))


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean and sample standard deviation; a single value has no deviation."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def rows(runs: dict[str, list[Run]]) -> list[list[str]]:
    """The table's cells, one row for each method; a dash where a column does not apply."""
    single = runs.get(SINGLE)
    table = []
    for method, done in runs.items():
        cells = [METHODS[method], *(spread([run.accuracy[k] for run in done]) for k in range(len(TASKS)))]
        if method == SINGLE:
            cells += ["-", "-", f"{statistics.mean(run.step_ms for run in done):.2f}", "-"]
        else:
            gains = [delta_m(run.accuracy, alone.accuracy) for run, alone in zip(done, single or [], strict=bool(single))]
            step, ops = (statistics.mean(values) for values in zip(*((run.step_ms, run.ops_ms) for run in done), strict=True))
            cells += [spread(gains, sign="+") if gains else "-", spread([run.conflicts for run in done], 0)]
            cells += [f"{step:.2f}", f"{100.0 * ops / step:.0f}"]
        table.append(cells)
    return table


def picture(runs: dict[str, list[Run]], steps: int) -> plot.Figure:
    """The page of :func:`mtlkernels.plot.training_summary` for these runs."""
    names = {method: METHODS[method] for method in runs}
    seeds = len(next(iter(runs.values())))
    return plot.training_summary(
        {names[m]: torch.stack([run.losses for run in done]).numpy() for m, done in runs.items()},
        {names[m]: torch.stack([run.cosine for run in done]).numpy() for m, done in runs.items() if m != SINGLE},
        {names[m]: [run.accuracy for run in done] for m, done in runs.items()},
        TASKS,
        title=f"Two digits in one picture, two tasks: {steps} steps, {seeds} seed{'s' * (seeds > 1)}",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mtlkernels demo", description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    parser.add_argument("--seeds", type=_positive, default=5, help="runs of each method (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=600, help="training steps of a run (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to compare (default: all)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two seeds of 60 steps on fewer pictures: a look, not a result")
    options = parser.parse_args(argv)
    options.methods = list(dict.fromkeys(options.methods))
    if options.quick:
        options.seeds, options.steps = 2, 60
    if not options.output.parent.is_dir():
        parser.error(f"--output: {options.output.parent} is not a directory; create it first")
    if options.output.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--output: {options.output.name} ends in none of .png, .pdf, .svg")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive; pass 1 or more")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table and writes the picture; on one thread, which these small networks are fastest on."""
    options = parse(argv)
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich")):
        require(module, package, "mtlkernels demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _compare(options)
    finally:
        torch.set_num_threads(threads)
    return 0


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    start = time.perf_counter()
    console = Console()
    total = options.seeds * options.steps * sum(len(TASKS) if method == SINGLE else 1 for method in options.methods)
    columns = (TextColumn("training"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        sizes = (2_000, 500) if options.quick else (20_000, 4_000)
        runs = train(options.methods, options.seeds, options.steps, sizes, lambda: progress.advance(task))
    _print_table(runs, options, console)
    picture(runs, options.steps).savefig(options.output, dpi=110)
    console.print(f"Picture: {options.output}   ({time.perf_counter() - start:.0f} s in all)", highlight=False)


def _print_table(runs: dict[str, list[Run]], options: argparse.Namespace, console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    spread_over = f"mean ± standard deviation of {options.seeds} seeds" if options.seeds > 1 else "1 seed"
    title = f"MultiDigits, {options.steps} steps, {spread_over}"
    table = Table(title=title, caption=CAPTION, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for heading in ("left\n%", "right\n%", "Delta m\n%", "conflicts\n%", "step\nms", "our ops\n%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in rows(runs):
        table.add_row(*cells)
    console.print(table)
