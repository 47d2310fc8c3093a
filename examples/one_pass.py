"""The weights of the step before: what does a method lose that applies them, and what does the one read save?

Trains methods on the two problems of compare.py in both modes of ``weights_from``, from the same weights and on the same
batches, and times the op of one read beside the two that it joins. Writes a page.

    python examples/one_pass.py            docs/one_pass.md
    python examples/one_pass.py --quick    seconds: a look, not a result
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from compare import BATCH, LEARNING_RATE, PROBLEMS, Problem, parse_page, table, weighting_of  # the example beside this one
from groups import delta_m

import mtlkernels as mtl
from mtlkernels.demo import spread
from mtlkernels.gram_combine import gram_combine_
from mtlkernels.optim.previous import WeightsFrom

METHODS = ("pcgrad", "mgda", "cagrad", "nash_mtl", "upgrad")
SIZES = (3, 8)
"""Tasks of the gradients that are timed."""


@dataclass(frozen=True)
class Run:
    """What one method did from one seed in one mode."""

    errors: dict[str, float]
    change: float
    """Mean |w_t - w_(t-1)| over the steps and tasks, in percent of the mean |w_t|."""
    step_ms: float


def train(problem: Problem, method: str, weights_from: WeightsFrom, steps: int, seed: int) -> Run:
    net = problem.net(problem.tasks, seed)
    optimizer = mtl.MultiTaskOptimizer(
        torch.optim.Adam(net.parameters(), LEARNING_RATE),
        weighting_of(method, net, seed),
        shared=net.trunk.parameters(),
        tasks=problem.tasks,
        weights_from=weights_from,
    )
    seconds, weights = 0.0, []
    for inputs, targets in problem.batches(steps, seed):
        start = time.thread_time()
        weights.append(optimizer.step(problem.losses(net, inputs, targets)).weights)
        seconds += time.thread_time() - start
    seen = torch.stack(weights)
    change = 100 * float((seen[1:] - seen[:-1]).abs().mean() / seen.abs().mean())
    return Run(problem.errors(net), change, 1e3 * seconds / steps)


def rows_of(problems: Sequence[Problem], steps: int) -> list[list[str]]:
    """Header, and of each method a row for each mode; Delta m is of one seed's two runs."""
    result = [["method", "weights of", "mean test error", "Delta m to the exact mode, %", "mean change of a weight, %"]]
    for method in METHODS:
        runs: dict[WeightsFrom, list[Run]] = {"current": [], "previous": []}
        for seed, problem in enumerate(problems):
            for mode, done in runs.items():
                done.append(train(problem, method, mode, steps, seed))
        for mode, done in runs.items():
            pairs = zip(done, runs["current"], strict=True)
            lost = "-" if mode == "current" else spread([delta_m(run.errors, exact.errors) for run, exact in pairs], 2)
            errors = spread([statistics.mean(run.errors.values()) for run in done], 4)
            result.append([f"`{method}`", f"this step (`{mode}`)" if mode == "current" else f"the step before (`{mode}`)"])
            result[-1] += [errors, lost, spread([run.change for run in done], 0)]
    return result


def timings(elements: int, repeats: int) -> list[list[str]]:
    """CPU seconds of one thread, interleaved; medians. All in times of ``gram`` alone."""
    result = [["tasks", "`gram`", "`combine`", "both", "`gram_combine_`", "of both"]]
    for num_tasks in SIZES:
        grads = [[torch.randn(elements // num_tasks)] for _ in range(num_tasks)]
        out, weights = [torch.empty_like(grads[0][0])], torch.rand(num_tasks, dtype=torch.float64)
        calls: list[Callable[[], object]] = [
            lambda: mtl.gram(grads),  # noqa: B023
            lambda: mtl.combine(grads, weights, out=out),  # noqa: B023
            lambda: gram_combine_(out, grads, weights),  # noqa: B023
        ]
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(repeats):
            for call, own in zip(calls, times, strict=True):
                start = time.thread_time()
                call()
                own.append(time.thread_time() - start)
        gram, combine, one = map(statistics.median, times)
        columns = (1.0, combine / gram, 1 + combine / gram, one / gram, one / (gram + combine))
        result.append([str(num_tasks), *(f"{value:.2f}" for value in columns)])
    return result


def report(tables: dict[str, list[list[str]]], times: list[list[str]], options: argparse.Namespace) -> str:
    text = (
        f"Written by `python examples/one_pass.py{' --quick' if options.quick else ''}`: {options.seeds} seeds of "
        f"{options.steps} batches of {BATCH} rows, Adam at {LEARNING_RATE}, mean ± standard deviation over the seeds. Each "
        "seed has its own split, initial weights and batches, the same in both modes; nothing was tuned. Delta m: mean "
        "relative change of the tasks' errors from the exact mode's of the same seed, lower is better. Change of a weight: "
        "mean |w_t - w_(t-1)| over the steps and tasks, in percent of the mean |w_t|."
    )
    read = (
        f"CPU time of one thread for {options.elements:,} float32 gradient elements in all, interleaved, medians of "
        f"{options.repeats}, in times of `gram`. The exact mode is both ops, the one-pass mode `gram_combine_`; a step also "
        "has K backward passes, which are the same in both."
    )
    parts = ["# Weights of the step before", text]
    for title, rows in tables.items():
        parts += [f"## {title}", table(rows)]
    return "\n\n".join([*parts, "## One read for two", read, table(times)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_page(argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]), argv)
    options.elements, options.repeats = (300_000, 3) if options.quick else (24_000_000, 15)
    torch.set_num_threads(1)  # fastest for networks this small
    tables = {}
    for make in PROBLEMS.values():
        problems = [make(seed) for seed in range(options.seeds)]
        tables[problems[0].title] = rows_of(problems, options.steps)
    text = report(tables, timings(options.elements, options.repeats), options)
    (options.output / "one_pass.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
