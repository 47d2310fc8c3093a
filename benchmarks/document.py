"""docs/benchmarks.md: what `make bench` measured, beside what was aimed at, and where cost stops being linear."""

from collections.abc import Sequence
from typing import Any

from .machine import ROOT
from .pictures import roofline, scaling
from .scaling import MIDDLE, Point

DOCUMENT = ROOT / "docs/benchmarks.md"
TARGETS = {
    "gram": {2: 1.1, 3: 1.1, 8: 1.15, 11: 1.4, 16: 1.6, 40: 3.5},
    "combine": {2: 1.4, 3: 1.25, 8: 1.15, 11: 1.15, 16: 1.15, 40: 1.15},
    "aggregate": {2: 2.5, 3: 2.4, 8: 2.3, 11: 2.6, 16: 2.8, 40: 4.7},
}
"""Reads of the gradients, float32 on one thread."""
SMALL_TARGET = 60e-6
"""Seconds of `aggregate` on a small model."""
BFLOAT16_TARGET = 1.3
"""Times that float32's bytes a second may be those of bfloat16."""
THREADS_TARGET = 0.9
"""Least share of what a read gains from a second thread that an op gains."""

HEAD = """# Benchmarks of the CPU ops

Written by `make bench`; do not edit. {processor} ({capability}, {cores} cores), torch {torch}, TorchJD {torchjd}, {compiler},
mtlkernels {commit}, {time}, load {load:.1f} when it began. Every figure is in `build/bench.json`, too.

All calls of an op take turns. *reads* is the median over the rounds of a call's time over that of the fastest read of the same
gradients in the same round: torch's `sum` and `amax` over every tensor, and a plain loop over their memory. *best other* is the
same over the fastest of the other calls. *moved* counts the bytes of all ops' inputs and outputs, in units of the gradients'
(a compiled call's are those it cannot do without); *of bandwidth* is that over the time, as a share of the read's bytes a
second. *launches* are ops that touch elements, *host reads* the values that the host waits for, *peak* the memory allocated on
the way, in units of the gradients'. *flat* calls start from one [K, P] matrix, which is made for free. On one thread times are
the thread's own; on two they are the clock's, and mean something on an idle machine only.
"""


def write(record: dict[str, Any], points: Sequence[Point], tables: Sequence[str]) -> None:
    """The page and its pictures."""
    text = HEAD.format(**record["machine"]) + "\n" + aims(record)
    own = [r for r in record["results"] if r["call"] == "mtlkernels" and r["dtype"] == "float32" and r["threads"] == 1]
    roofline(own, record["peak_flops"]).savefig(ROOT / "docs/roofline.png", dpi=110)
    scaling(points).savefig(ROOT / "docs/scaling.png", dpi=100)
    text += "\n## Roofline\n\n![Bytes a second against arithmetic intensity](roofline.png)\n\n" + ROOFLINE
    text += "\n## Scaling\n\n![Time against elements, tasks and tensors](scaling.png)\n\n" + explain_scaling(points)
    text += "\n## Tables\n\n" + "\n".join(tables)
    DOCUMENT.write_text(text)


ROOFLINE = """\
A Gram of K tasks does (K + 1) / 4 operations a byte of float32, a combination about a half. Below the ridge, memory
bounds an op, and the distance to the roof is what its arithmetic and its reads do not overlap. Past it products would bound
the Gram. It stays below that roof because a float32 sum ends after eight products and goes on in float64, for accuracy
(csrc/cpu/gram_tile.h): adding up the lanes of all those sums is work that the roof does not count.
"""


def aims(record: dict[str, Any]) -> str:
    """What was aimed at, beside what was measured."""
    own = [r for r in record["results"] if r["call"] == "mtlkernels"]
    found = {(r["op"], r["tasks"], r["dtype"], r["threads"]): r for r in own}
    tasks = list(TARGETS["gram"])
    lines = ["## Aims\n", "float32, one thread, reads: measured / aimed at; bold where it is missed.\n"]
    lines += ["|  | " + " | ".join(f"K = {k}" for k in tasks) + " |", "| --- |" + " --- |" * len(tasks)]
    for op, aimed in TARGETS.items():
        cells = []
        for k in tasks:
            row = found.get((op, k, "float32", 1))
            cells.append(f"- / {aimed[k]}" if row is None else held(row["reads"], aimed[k], ".2f"))
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    lines.append("")
    for op in TARGETS:
        pairs = [(found.get((op, k, "float32", 1)), found.get((op, k, "bfloat16", 1)), k) for k in tasks]
        slower = [(2 * half["median"] / full["median"], k) for full, half, k in pairs if full and half]
        if slower:
            cells = ", ".join(f"K = {k}: {held(ratio, BFLOAT16_TARGET, '.2f')}" for ratio, k in slower)
            lines.append(f"- {op}, float32's bytes a second over bfloat16's: {cells}.")
    for op in TARGETS:
        pairs = [(found.get((op, k, "float32", 1)), found.get((op, k, "float32", 2)), k) for k in tasks]
        gains = [(one["reads"] / two["reads"], k) for one, two, k in pairs if one and two]
        if gains:
            cells = ", ".join(
                f"K = {k}: {gain:.2f}" if gain >= THREADS_TARGET else f"K = {k}: **{gain:.2f}**" for gain, k in gains
            )
            lines.append(f"- {op}, what a second thread gains over what it gains a read (at least {THREADS_TARGET}): {cells}.")
    small = [r for r in record["small"] if (r["op"], r["call"]) == ("aggregate", "mtlkernels")]
    cells = ", ".join(f"K = {r['tasks']}: {held(1e6 * r['median'], 1e6 * SMALL_TARGET, '.0f')}" for r in small)
    lines.append(f"- aggregate on a small model, microseconds: {cells}.\n")
    return "\n".join(lines)


def held(value: float, aimed: float, form: str) -> str:
    text = format(value, form)
    return f"{text if value <= aimed else f'**{text}**'} / {aimed:g}"


def explain_scaling(points: Sequence[Point]) -> str:
    """Where cost stops being linear in elements, tasks and tensors, and why, with the run's own figures."""
    by = {(p.varied, p.op, p.x): p for p in points}
    paragraphs = []

    line = [p for p in points if p.varied == "elements" and p.op == "aggregate"]
    first, last = line[0], line[-1]
    rate = (last.seconds - first.seconds) / last.elements
    cached = min(line, key=lambda p: (p.seconds - first.seconds) / p.elements if p.elements >= 100_000 else float("inf"))
    paragraphs.append(
        f"**Elements.** A call of `aggregate` costs {1e6 * first.seconds:.0f} us on {first.elements:,} elements in "
        f"{first.tensors} tensors: checks, handing over {first.tasks * first.tensors} tensors, and the K x K work. Elements "
        f"cost as much from {first.seconds / rate:,.0f} on; below, cost does not depend on them. Up to {cached.elements:,} "
        f"elements ({cached.size / 1e6:.0f} MB) the gradients of all calls stay in the caches, and one element costs "
        f"{(cached.seconds - first.seconds) / cached.elements / rate:.2f} times what it costs in memory. From there on cost is "
        f"linear: {1e9 * rate:.2f} ns an element and call at {last.elements:,}, the largest measured. The dotted lines to 10^9 "
        "are counted: the cost of the smallest call, and bytes at the rate of the largest."
    )

    for op in ("gram", "combine"):
        own = [p for p in points if p.varied == "tasks" and p.op == op]
        line = ", ".join(f"{p.x}: {p.reads:.2f}" for p in own)
        paragraphs.append(f"**Tasks**, `{op}` in reads by K: {line}." + TASKS[op])

    few = by["tensors", "aggregate", 1]
    many = max((p for p in points if p.varied == "tensors" and p.op == "aggregate"), key=lambda p: p.x)
    own = (many.seconds - few.seconds) / (many.tensors - few.tensors)
    equal = few.seconds / own
    paragraphs.append(
        f"**Tensors.** Each tensor of K = {MIDDLE['tasks']} tasks adds {1e6 * own:.2f} us to `aggregate`: Python's lists, the "
        f"dispatcher's and ours of pointers and sizes, once for the Gram and once for the combination. {MIDDLE['elements']:,} "
        f"elements cost {1e3 * few.seconds:.2f} ms in one tensor, as much as {equal:,.0f} tensors do; with more, that is what "
        "a call costs, and it is linear in them."
    )
    return "\n\n".join(paragraphs) + "\n"


TASKS = {
    "gram": " A read of all rows is linear in K; the products are K (K + 1) / 2. Past 8 rows a tile of 4 x 4 pairs no longer "
    "sees all of them, rows are taken from the first-level cache again, and the products cost more than the read.",
    "combine": " One result is written for K rows read, (K + 1) / K of the bytes, which is why few tasks cost more of a read "
    "each. Past 8 rows a block's sums go through the first-level cache once for every 8 of them.",
}
