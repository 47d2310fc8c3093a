"""Training in groups of tasks on real many-task data: does it help, which groups form, and what does it cost?

Compares, from the same initial weights and on the same batches: a network for each task, equal weights (the sum of all losses,
one step a batch), random groups drawn anew for each batch, fixed groups of unlike tasks (heterogeneous), and selective task
group updates (Jeong and Yoon 2025), which group tasks by measured affinity. Prints a table with the spread over seeds, and
writes it with a picture. A batch with M groups takes M steps, so that the group methods also step more often; the column
"visits" says how much more.

    python examples/groups.py                     Yeast, 14 tasks: docs/groups_yeast.md and .png
    python examples/groups.py --data qm9          QM9, 12 tasks
    python examples/groups.py --quick             seconds instead of minutes: a look, not a result
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels import plot
from mtlkernels._optional import MissingPackageError, require
from mtlkernels.demo import spread
from mtlkernels.grouping import Groups
from mtlkernels.tabular import Table, batches, load_qm9, load_yeast

METHODS = {
    "single": "Single task",
    "equal": "Equal weights",
    "random": "Random groups",
    "heterogeneous": "Heterogeneous groups",
    "selective": "Selective groups",
}
BATCH, WIDTH = 128, 128
LEARNING_RATE = 1e-3
DECAY = 1e-2
NUM_GROUPS = 4


class Net(nn.Module):
    """A shared trunk of two layers, a head of two for each task, a quarter as wide."""

    def __init__(self, features: int, tasks: Sequence[str], width: int = WIDTH) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, 1)) for task in tasks}
        )

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {task: head(features).squeeze(-1) for task, head in self.heads.items()}


@dataclass
class Run:
    """What one method did from one seed."""

    scores: dict[str, float]
    """Error of each task on the test rows: 1 - average precision of classes, mean absolute error of numbers."""
    visits: float
    """Steps a batch; of single-task training, of one of its networks."""
    step_ms: float
    """CPU milliseconds a batch, of single-task training for all networks."""
    groups: list[Groups] = field(default_factory=list)
    """The groups of each batch."""
    affinity: Tensor | None = None
    similarity: Tensor | None = None


def loss_of(output: Tensor, target: Tensor, classes: bool) -> Tensor:
    if classes:
        return nn.functional.binary_cross_entropy_with_logits(output, target)
    return nn.functional.l1_loss(output, target)


def average_precision(score: Tensor, target: Tensor) -> float:
    """Mean precision at the rank of each positive row."""
    ranked = target[score.argsort(descending=True, stable=True)]
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    return float((precision * ranked).sum() / ranked.sum())


@torch.no_grad()
def errors(net: Net, test: Table, classes: bool) -> dict[str, float]:
    outputs = net(test.inputs)
    if classes:
        return {task: 1 - average_precision(outputs[task], test.targets[task]) for task in outputs}
    return {task: float(nn.functional.l1_loss(outputs[task], test.targets[task])) for task in outputs}


def heterogeneous(num_tasks: int, similarity: Tensor) -> Groups:
    """Groups of unlike tasks: the tasks in their order of similarity, dealt out one by one."""
    order = mtl.grouping.task_order(similarity)
    return [sorted(order[g::NUM_GROUPS]) for g in range(min(NUM_GROUPS, num_tasks))]


def random_groups(num_tasks: int, seed: int) -> Callable[[mtl.ProximalAffinity, Groups], Groups]:
    """A partition into groups of equal size, drawn anew for each batch."""
    generator = random.Random(seed)

    def draw(affinity: mtl.ProximalAffinity, groups: Groups) -> Groups:
        tasks = generator.sample(range(num_tasks), num_tasks)
        return [tasks[g::NUM_GROUPS] for g in range(min(NUM_GROUPS, num_tasks))]

    return draw


def train(method: str, data: tuple[Table, Table], classes: bool, steps: int, seed: int, similarity: Tensor | None) -> Run:
    """Trains one network (of ``single``, one for each task)."""
    train_rows, test = data
    tasks = list(train_rows.targets)
    if method == "single":
        runs = [train("equal", _one_task(data, task), classes, steps, seed, None) for task in tasks]
        scores = {task: run.scores[task] for task, run in zip(tasks, runs, strict=True)}
        return Run(scores, 1.0, sum(run.step_ms for run in runs))
    torch.manual_seed(seed)
    net = Net(train_rows.inputs.shape[1], tasks)
    inner = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    options: dict[str, object] = {"tasks": tasks, "seed": seed, "affinity": mtl.ProximalAffinity(len(tasks), DECAY)}
    if method == "equal":
        options |= {"groups": [tasks], "grouping": None, "single_group": "once"}
    elif method == "random":
        options |= {"warmup": 0, "grouping": random_groups(len(tasks), seed)}
    elif method == "heterogeneous":
        assert similarity is not None
        fixed = heterogeneous(len(tasks), similarity)
        options |= {"groups": [[tasks[k] for k in group] for group in fixed], "grouping": None}
    else:
        options |= {"warmup": min(101, steps // 3)}
    optimizer = mtl.SelectiveGroupOptimizer(inner, **options)  # type: ignore[arg-type]
    groups, visits, seconds = [], 0, 0.0
    for rows in batches(len(train_rows), BATCH, steps, seed):
        inputs, targets = train_rows.inputs[rows], {task: values[rows] for task, values in train_rows.targets.items()}
        start = time.thread_time()
        info = optimizer.step(lambda: {t: loss_of(o, targets[t], classes) for t, o in net(inputs).items()})  # noqa: B023
        seconds += time.thread_time() - start
        visits += len(info.groups)
        groups.append([list(group) for group in optimizer.groups])
    affinity = optimizer.affinity
    assert affinity is not None
    return Run(errors(net, test, classes), visits / steps, 1e3 * seconds / steps, groups, affinity.matrix, affinity.similarity)


def _one_task(data: tuple[Table, Table], task: str) -> tuple[Table, Table]:
    first, second = (Table(part.inputs, {task: part.targets[task]}) for part in data)
    return first, second


def compare(name: str, seeds: int, steps: int, rows: int | None) -> tuple[dict[str, list[Run]], list[str]]:
    """Every method from every seed; the split of the data changes with the seed, too."""
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    tasks: list[str] = []
    for seed in range(seeds):
        data = load_yeast(seed) if name == "yeast" else load_qm9(rows, seed)
        tasks = list(data[0].targets)
        for method in ("single", "equal", "random", "selective", "heterogeneous"):  # the last needs selective's similarity
            similarity = runs["selective"][seed].similarity if method == "heterogeneous" else None
            runs[method].append(train(method, data, name == "yeast", steps, seed, similarity))
    return runs, tasks


def delta_m(scores: dict[str, float], single: dict[str, float]) -> float:
    """Mean relative change of the error against single task in percent: lower is better."""
    return 100 * statistics.mean((scores[task] - single[task]) / single[task] for task in single)


def table(runs: dict[str, list[Run]], tasks: Sequence[str]) -> list[list[str]]:
    """Header and a row for each method."""
    rows = [["method", "mean test error", "Delta m, %", "visits a batch", "CPU ms a batch"]]
    for method, done in runs.items():
        means = [statistics.mean(run.scores[task] for task in tasks) for run in done]
        gains = [delta_m(run.scores, alone.scores) for run, alone in zip(done, runs["single"], strict=True)]
        rows.append(
            [
                METHODS[method],
                spread(means, 4),
                "-" if method == "single" else spread(gains, 2),
                spread([run.visits for run in done], 1),
                spread([run.step_ms for run in done], 1),
            ]
        )
    return rows


def picture(run: Run, tasks: Sequence[str], title: str) -> plot.Figure:
    assert run.affinity is not None
    assert run.similarity is not None
    return plot.groups_summary(run.affinity.numpy(), run.similarity.numpy(), run.groups, tasks, title=title)


def report(name: str, runs: dict[str, list[Run]], tasks: Sequence[str], options: argparse.Namespace) -> str:
    header, *rows = table(runs, tasks)
    cells = "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))
    measure = "1 - average precision" if name == "yeast" else "mean absolute error in standard deviations"
    command = f"python examples/groups.py --data {name}{' --quick' if options.quick else ''}"
    text = (
        f"Written by `{command}`: {options.seeds} seeds of {options.steps} batches of {BATCH} rows, mean ± standard deviation. "
        f"Error: {measure}, lower is better. Delta m: mean relative change of the error against single task, lower is better. "
        "Every seed has its own split and initial weights, the same for all methods. Times: CPU time of one thread. "
        f"Random and heterogeneous groups: {NUM_GROUPS}."
    )
    title = f"# Training in groups on {'Yeast, 14 tasks' if name == 'yeast' else 'QM9, 12 tasks'}"
    return "\n\n".join([title, text, cells, f"![Affinity and groups](groups_{name}.png)"]) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", choices=("yeast", "qm9"), default="yeast")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=20_000, help="molecules of QM9 (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page and the picture")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.steps, options.rows = 2, 30, 500
    if options.seeds < 1 or options.steps < 1:
        parser.error("--seeds and --steps are 1 or more")
    if not options.output.is_dir():
        parser.error(f"--output: {options.output} is not a directory; create it first")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    torch.set_num_threads(1)  # fastest for networks this small
    try:
        require("matplotlib.figure", "matplotlib", "examples/groups.py")
        runs, tasks = compare(options.data, options.seeds, options.steps, options.rows)
    except MissingPackageError as error:
        print(f"examples/groups.py: {error}", file=sys.stderr)
        return 1
    text = report(options.data, runs, tasks, options)
    (options.output / f"groups_{options.data}.md").write_text(text)
    title = f"Selective task group updates on {options.data}, seed 0"
    picture(runs["selective"][0], tasks, title).savefig(options.output / f"groups_{options.data}.png", dpi=80)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
