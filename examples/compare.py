"""Every method on the same two problems: what does each gain over equal weights and single tasks, and what does it cost?

MultiDigits has two tasks that compete for a small trunk, Yeast fourteen binary ones. All methods start from the same weights
and see the same batches. Conflicts are measured apart from training, every few steps, at each method's own parameters: the
share of task pairs whose gradients on the trunk have a negative cosine. Writes a page with a table for each problem.

    python examples/compare.py                               both problems: docs/compare.md
    python examples/compare.py --methods mean famo cagrad    some methods
    python examples/compare.py --quick                       seconds instead of minutes: a look, not a result
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from groups import average_precision, delta_m  # the example beside this one
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import mtlkernels as mtl
from mtlkernels._optional import MissingPackageError
from mtlkernels.data import CANVAS, MultiDigits
from mtlkernels.demo import spread
from mtlkernels.tabular import load_yeast
from mtlkernels.weightings import CROSS, ELEMENTWISE, LOSS_ONLY, MEMORY, REGISTRY

LEFT_OUT = {
    "constant": "weights that somebody has to choose",
    "ngdiff": "unlearning",
    "krum": "against corrupt gradients, and not defined for two tasks",
    "trimmed_mean": "the same",
}
"""Methods that answer another question."""
OPTIONS: dict[str, dict[str, Any]] = {"cr_mogm": {"weighting": "cagrad"}, "stch": {"warmup": 50}}
REGISTERED = (*REGISTRY, *LOSS_ONLY, *MEMORY, *CROSS, *ELEMENTWISE)
METHODS = ["single", "mean", *(name for name in REGISTERED if name not in (*LEFT_OUT, "mean"))]
BATCH = 128
LEARNING_RATE = 2e-3
PROBE = 10
"""Steps from one measurement of conflicts to the next."""


class Net(nn.Module):
    """A shared trunk of two layers, a linear head for each task."""

    def __init__(self, features: int, tasks: Sequence[str], widths: tuple[int, int], outputs: int) -> None:
        super().__init__()
        first, second = widths
        self.trunk = nn.Sequential(nn.Linear(features, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(second, outputs) for task in tasks})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {task: head(features) for task, head in self.heads.items()}


@dataclass(frozen=True)
class Problem:
    """Rows with a target for each task; a loss and an error that all tasks share."""

    title: str
    inputs: tuple[Tensor, Tensor]
    """Training and test rows, [N, F]."""
    targets: tuple[dict[str, Tensor], dict[str, Tensor]]
    widths: tuple[int, int]
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], float]

    @property
    def tasks(self) -> list[str]:
        return list(self.targets[0])

    def net(self, tasks: Sequence[str], seed: int) -> Net:
        torch.manual_seed(seed)
        return Net(self.inputs[0].shape[1], tasks, self.widths, self.outputs)

    def batches(self, steps: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(len(self.inputs[0]), (BATCH,), generator=generator)
            yield self.inputs[0][rows], {task: values[rows] for task, values in self.targets[0].items()}

    def losses(self, net: Net, inputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        return {task: self.loss(output, targets[task]) for task, output in net(inputs).items()}

    @torch.no_grad()
    def errors(self, net: Net) -> dict[str, float]:
        return {task: self.error(output, self.targets[1][task]) for task, output in net(self.inputs[1]).items()}


def accuracy_error(output: Tensor, target: Tensor) -> float:
    return float((output.argmax(1) != target).double().mean())


def precision_error(output: Tensor, target: Tensor) -> float:
    return 1 - average_precision(output[:, 0], target)


def multi_digits(seed: int) -> Problem:
    parts = MultiDigits.load(seed=seed)
    inputs = tuple(part.images.view(-1, CANVAS * CANVAS) for part in parts)
    title = "MultiDigits: 2 tasks, error = share of wrong answers"
    return Problem(title, inputs, tuple(p.labels for p in parts), (64, 32), 10, cross_entropy, accuracy_error)  # type: ignore[arg-type]


def yeast(seed: int) -> Problem:
    parts = load_yeast(seed)
    title = "Yeast: 14 tasks, error = 1 - average precision"

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(output[:, 0], target)

    inputs, targets = tuple(p.inputs for p in parts), tuple(p.targets for p in parts)
    return Problem(title, inputs, targets, (128, 128), 1, loss, precision_error)  # type: ignore[arg-type]


PROBLEMS = {"digits": multi_digits, "yeast": yeast}


@dataclass(frozen=True)
class Run:
    """What one method did from one seed."""

    errors: dict[str, float]
    conflicts: float
    """Share of conflicting pairs of tasks in percent; NaN of single-task training, which has a trunk for each."""
    step_ms: float
    """CPU milliseconds a step; of single-task training, of all networks together."""


def weighting_of(method: str, net: Net, seed: int) -> mtl.Weighting | mtl.Elementwise:
    options = dict(OPTIONS.get(method, {}))
    if method in ("gradnorm", "emtl"):
        options["layer"] = net.trunk[2].parameters()
    torch.manual_seed(seed)  # of methods that draw
    return mtl.get_weighting(method, **options)


def conflicts(problem: Problem, net: Net, inputs: Tensor, targets: dict[str, Tensor]) -> float:
    trunk = list(net.trunk.parameters())
    losses = problem.losses(net, inputs, targets).values()
    grads = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]
    return 100 * float(mtl.conflict_rate(cast(Tensor, mtl.gram(grads))))


def train(problem: Problem, method: str, tasks: Sequence[str], steps: int, seed: int) -> Run:
    """One network for ``tasks``, each of which weighs its own loss alone where the method is ``single``."""
    if method == "single" and len(tasks) > 1:
        runs = [train(problem, "single", [task], steps, seed) for task in tasks]
        return Run({t: run.errors[t] for t, run in zip(tasks, runs, strict=True)}, float("nan"), sum(r.step_ms for r in runs))
    net = problem.net(tasks, seed)
    weighting = weighting_of("mean" if method == "single" else method, net, seed)
    inner = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    optimizer = mtl.MultiTaskOptimizer(inner, weighting, shared=net.trunk.parameters(), tasks=list(tasks))
    second = islice(problem.batches(2 * steps, seed), steps, None)  # what the generator draws after the first ones
    epoch, seconds, measured = len(problem.inputs[0]) // BATCH, 0.0, []
    for step, (inputs, targets) in enumerate(problem.batches(steps, seed)):
        other = next(second) if method in CROSS else None
        if len(tasks) > 1 and step % PROBE == 0:
            measured.append(conflicts(problem, net, inputs, targets))
        start = time.thread_time()
        optimizer.step(
            lambda: problem.losses(net, inputs, targets),  # noqa: B023
            other=None if other is None else problem.losses(net, *other),
        )
        seconds += time.thread_time() - start
        if isinstance(weighting, mtl.DWA) and (step + 1) % epoch == 0:
            weighting.end_epoch()
    return Run(problem.errors(net), statistics.mean(measured) if measured else float("nan"), 1e3 * seconds / steps)


def compare(
    problems: Sequence[Problem], methods: Sequence[str], steps: int, advance: Callable[[], None]
) -> dict[str, list[Run]]:
    """Every method on the problem of every seed, interleaved so that a busy machine slows all of them alike."""
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    for seed, problem in enumerate(problems):
        for method in methods:
            runs[method].append(train(problem, method, problem.tasks, steps, seed))
            advance()
    return runs


def rows_of(runs: dict[str, list[Run]]) -> list[list[str]]:
    """Header and a row for each method, the lowest Delta m first after single task and equal weights."""
    single, equal = runs["single"], runs["mean"]
    gains = {m: [delta_m(r.errors, s.errors) for r, s in zip(done, single, strict=True)] for m, done in runs.items()}
    rest = sorted((m for m in runs if m not in ("single", "mean")), key=lambda m: statistics.mean(gains[m]))
    result = [["method", "mean test error", "Delta m, %", "conflicts, %", "step, of equal weights'"]]
    for method in ("single", "mean", *rest):
        done = runs[method]
        times = [r.step_ms / e.step_ms for r, e in zip(done, equal, strict=True)]
        result.append(
            [
                "single task" if method == "single" else f"`{method}`",
                spread([statistics.mean(run.errors.values()) for run in done], 4),
                "-" if method == "single" else spread(gains[method], 2),
                "-" if method == "single" else spread([run.conflicts for run in done], 0),
                spread(times, 2),
            ]
        )
    return result


def report(tables: dict[str, list[list[str]]], options: argparse.Namespace) -> str:
    left_out = "; ".join(f"`{name}` ({why})" for name, why in LEFT_OUT.items())
    text = (
        f"Written by `python examples/compare.py{options.changed}`: {options.seeds} seeds of {options.steps} batches of "
        f"{BATCH} rows, Adam at {LEARNING_RATE}, mean ± standard deviation. Every seed has its own split, initial weights and "
        "batches, the same for all methods; no method was tuned. "
        f"{' and '.join(f'`{name}`' for name in CROSS)} see a second batch in every step, and `m_config`, which is made for "
        "plain SGD and one task a step, has all tasks and Adam as the others. Delta m: mean relative change of the error "
        "against single task, lower is better. Conflicts: pairs of tasks with a negative cosine on the trunk. Step: CPU time "
        "of one thread over that of `mean`, which takes K backward passes as every weighting of gradients does here; "
        f"loss-only methods take one, those of two batches 2 K. Left out: {left_out}."
    )
    parts = ["# All methods on two problems", text]
    for title, rows in tables.items():
        parts += [f"## {title}", table(rows)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first row is the head."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))


def parse_page(parser: argparse.ArgumentParser, argv: Sequence[str] | None, steps: int = 400) -> argparse.Namespace:
    """The parser's options, and those of a page about training runs: seeds, steps, output and quick."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.steps = 2, 20
    if options.seeds < 1 or options.steps < 1:
        parser.error("--seeds and --steps are 1 or more")
    if not options.output.is_dir():
        parser.error(f"--output: {options.output} is not a directory; create it first")
    return options


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    options = parse_page(parser, argv)
    options.changed = " --quick" if options.quick else ""
    for name in ("data", "methods"):
        if getattr(options, name) != parser.get_default(name):
            options.changed += f" --{name} {' '.join(getattr(options, name))}"
    options.methods = list(dict.fromkeys(["single", "mean", *options.methods]))  # what the others are compared with
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(1)  # fastest for networks this small
    tables = {}
    try:
        for name in options.data:
            problems = [PROBLEMS[name](seed) for seed in range(options.seeds)]
            with Progress() as progress:
                bar = progress.add_task(name, total=len(problems) * len(options.methods))
                runs = compare(problems, options.methods, options.steps, lambda: progress.advance(bar))  # noqa: B023
            tables[problems[0].title] = rows_of(runs)
    except MissingPackageError as error:
        print(f"examples/compare.py: {error}", file=sys.stderr)
        return 1
    text = report(tables, options)
    (options.output / "compare.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
