"""The CPU ops against plain PyTorch and other libraries, in units of one read of the same gradients in the same run.

make bench                                                  # everything; writes build/bench.json and docs/benchmarks.md
make bench ARGS="--tasks 2,8 --threads 1 --ops gram"        # some; prints only
make bench ARGS="--seconds 1 --no-scaling"                  # a first look

All calls of an op take turns, so that a busy machine slows them alike; ratios are medians over the rounds of a call's time over
that of the fastest read of the same round: torch's sum and amax over every tensor, and a plain loop over their memory.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mtlkernels._optional import require

from . import document
from .baselines import COMPILED_MOVES, OPS
from .machine import ROOT, facts, peak_flops, reader
from .race import count, race, timings
from .scaling import ELEMENTS, TASKS, TENSORS, as_json, measure
from .shapes import resnet50

JSON = ROOT / "build/bench.json"
NUM_TASKS, DTYPES = (2, 3, 8, 11, 16, 40), ("float32", "bfloat16")
COPIES = 4.5
"""Of the gradients, that are there at once: as they are, flat, stacked for TorchJD, and what a call makes."""
SMALL_TENSORS, SMALL_ELEMENTS = 20, 5_000
COLUMNS = (
    "K",
    "dtype",
    "call",
    "median",
    "least",
    "reads",
    "best other",
    "moved",
    "of bandwidth",
    "launches",
    "host reads",
    "peak",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mtlkernels bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--tasks", default=",".join(map(str, NUM_TASKS)), help="numbers of tasks, comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="dtypes of the gradients, comma-separated")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, comma-separated")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each op, K, dtype and number of threads")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the sweeps over elements, tasks and tensors")
    parser.add_argument("--no-baselines", action="store_true", help="time mtlkernels alone")
    parser.add_argument("--json", type=Path, default=JSON, help="where every figure goes; build/bench.json unless given")
    options = parser.parse_args(argv)
    ops, dtypes = options.ops.split(","), options.dtypes.split(",")
    num_tasks, threads = ([int(n) for n in text.split(",")] for text in (options.tasks, options.threads))
    require("rich", "rich", "python -m mtlkernels bench")
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"unknown ops {', '.join(unknown)}; known are {', '.join(OPS)}.")

    console = Console(width=None if sys.stdout.isatty() else 150)
    record: dict[str, Any] = {"machine": facts(), "peak_flops": peak_flops(), "results": [], "small": [], "scaling": []}
    about = record["machine"]
    console.print(f"{about['processor']}, {about['capability']}; torch {about['torch']}, mtlkernels {about['commit']}")
    if about["load"] > 0.5:
        console.print(f"[bold]The load is {about['load']:.1f}[/bold]: ratios stand, times and two threads do not.")
    for count_, op in itertools.product(threads, ops):
        rows = []
        for dtype, k in itertools.product(dtypes, num_tasks):
            if COPIES * gradient_bytes(k, dtype) > available():
                console.print(
                    f"{op}, K = {k}, {dtype}: left out, there is too little memory for it beside the baselines' copies."
                )
                continue
            rows += measure_op(op, k, dtype, count_, options.seconds, not options.no_baselines)
        record["results"] += rows
        console.print(table_of(op, count_, rows, box.SIMPLE_HEAD))
    record["small"] = measure_small(num_tasks, options.seconds)
    console.print(table_of_small(record["small"], box.SIMPLE_HEAD))
    if not options.no_scaling:
        sizes = {"elements": ELEMENTS, "tasks": TASKS, "tensors": TENSORS}
        points = list(measure(sizes, options.seconds / 4, memory=available() // 2))
        record["scaling"] = as_json(points)
        console.print(document.explain_scaling(points))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1))
    complete = {**vars(options), "json": JSON, "seconds": 8.0} == {**vars(parser.parse_args([])), "seconds": 8.0}
    if complete:
        document.write(record, points, markdown(record))
        console.print("Wrote docs/benchmarks.md, its pictures, and build/bench.json.")
    else:
        console.print(
            f"Wrote {options.json}; docs/benchmarks.md stays as it is: that takes all ops, tasks, dtypes and threads."
        )
    return 0


def gradient_bytes(num_tasks: int, dtype: str) -> int:
    """Of ResNet-50."""
    return num_tasks * sum(torch.Size(shape).numel() for shape in resnet50()) * getattr(torch, dtype).itemsize


def measure_op(op: str, num_tasks: int, dtype: str, threads: int, seconds: float, others: bool) -> list[dict[str, Any]]:
    """A row for each call of an op on ResNet-50's shapes."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    shapes = resnet50()
    grads = [[torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes] for _ in range(num_tasks)]
    out = [torch.zeros_like(t) for t in grads[0]]
    tensors = [t for row in grads for t in row]
    size = sum(t.nbytes for t in tensors)
    calls = OPS[op][0](grads, out)
    if not others:
        calls = {"mtlkernels": calls["mtlkernels"]}
    reads = {
        "read: sum": lambda: [t.sum() for t in tensors],
        "read: amax": lambda: [t.amax() for t in tensors],
        "read: plain": reader(tensors, threads),
    }
    timed = timings(race({**reads, **calls}, threads, seconds))
    best = min((t.reads for name, t in timed.items() if name != "mtlkernels"), default=None)
    rows = []
    for name, timing in timed.items():
        done = None if "compiled" in name else count(calls[name])
        moved = done.moved / size if done else COMPILED_MOVES[op] + (0 if op == "gram" else 1 / num_tasks)
        rows.append({
            "op": op, "tasks": num_tasks, "dtype": dtype, "threads": threads, "call": name, "median": timing.median,
            "minimum": timing.minimum, "reads": timing.reads, "read_seconds": timing.read_seconds, "bytes": size,
            "over_best_other": None if best is None else timing.reads / best, "moved": moved,
            "share_of_bandwidth": moved / timing.reads, "launches": done and done.launches,
            "host_reads": done and done.host_reads, "peak": done and done.peak / size,
        })  # fmt: skip
    return rows


def measure_small(num_tasks: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Microseconds of a call on a small model, where nothing but overhead is left. One thread."""
    torch.set_num_threads(1)
    rows = []
    for k in num_tasks:
        grads = [[torch.randn(SMALL_ELEMENTS // SMALL_TENSORS) for _ in range(SMALL_TENSORS)] for _ in range(k)]
        out = [torch.zeros_like(t) for t in grads[0]]
        calls = {
            f"{op} {name}": call
            for op, (prepare, _) in OPS.items()
            for name, call in prepare(grads, out).items()
            if name == "mtlkernels" or (op == "aggregate" and "compiled" not in name)
        }
        for name, own in race(calls, 1, seconds / 4, most_rounds=1_000).items():
            op, _, call = name.partition(" ")
            row = {"tasks": k, "op": op, "call": call, "median": statistics.median(own), "minimum": min(own)}
            rows.append(row)
    return rows


def table_of(op: str, threads: int, rows: Sequence[dict[str, Any]], style: box.Box) -> Table:
    """One op on some threads, a line for each K, dtype and call."""
    title = f"{op}: {OPS[op][1]}; ResNet-50's 159 tensors, {threads} thread{'s' * (threads > 1)}"
    table = Table(title=title, box=style, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("dtype", "call") else "right")
    for (_, _), group in itertools.groupby(rows, key=lambda row: (row["dtype"], row["tasks"])):
        for row in group:
            own = row["call"] == "mtlkernels"
            cells = [
                f"{1e3 * row['median']:.1f} ms", f"{1e3 * row['minimum']:.1f} ms", f"{row['reads']:.2f}",
                cell(row["over_best_other"], ".2f"), f"{row['moved']:.2f}", f"{100 * row['share_of_bandwidth']:.0f} %",
                cell(row["launches"]), cell(row["host_reads"]), cell(row["peak"], ".2f"),
            ]  # fmt: skip
            table.add_row(str(row["tasks"]), row["dtype"], row["call"], *cells, style="bold" if own else None)
    return table


def table_of_small(rows: Sequence[dict[str, Any]], style: box.Box) -> Table:
    title = f"{SMALL_ELEMENTS:,} elements in {SMALL_TENSORS} tensors, one thread: microseconds of a call"
    table = Table(title=title, box=style, title_justify="left")
    for column in ("K", "op", "call", "median", "least"):
        table.add_column(column, justify="left" if column in ("op", "call") else "right")
    for row in rows:
        table.add_row(str(row["tasks"]), row["op"], row["call"], f"{1e6 * row['median']:.0f}", f"{1e6 * row['minimum']:.0f}")
    return table


def cell(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables for docs/benchmarks.md."""
    tables = []
    for (threads, op), group in itertools.groupby(record["results"], key=lambda row: (row["threads"], row["op"])):
        tables.append(table_of(op, threads, list(group), box.MARKDOWN))
    tables.append(table_of_small(record["small"], box.MARKDOWN))
    texts = []
    for table in tables:
        title, table.title = table.title, None
        console = Console(file=io.StringIO(), width=200)
        console.print(table)
        lines = (line.rstrip() for line in console.file.getvalue().splitlines())
        texts.append(f"### {title}\n\n" + "\n".join(line for line in lines if line) + "\n")
    return texts


def available() -> int:
    """Bytes of memory that are free to use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


if __name__ == "__main__":
    sys.exit(main())
