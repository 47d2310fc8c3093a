"""The two pictures of docs/benchmarks.md."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator

from mtlkernels.plot import COLOURS, FAINT, INK, MARKERS, _new_figure, _style

from .scaling import ELEMENTS, MIDDLE, OPS, Point, moved

COLOUR = dict(zip(OPS, COLOURS[1:], strict=False))
MARKER = dict(zip(OPS, MARKERS[1:], strict=False))


def intensity(op: str, num_tasks: int) -> float:
    """Floating-point operations a byte that an op moves, of float32: the upper triangle's pairs, one product a gradient."""
    pairs, size = num_tasks * (num_tasks + 1), 4 * num_tasks
    flops = {"gram": pairs, "combine": 2 * num_tasks, "aggregate": pairs + 2 * num_tasks}[op]
    return flops / (size * moved(op, num_tasks))


def roofline(results: Sequence[dict[str, Any]], flops: float) -> Any:
    """Bytes a second against operations a byte: one point for each op and K, under what memory and registers allow.

    Args:
        results: of mtlkernels in float32 on one thread.
        flops: operations a second in registers.
    """
    figure = _new_figure((7.6, 5.0))
    axes = _style(figure.subplots(), "Bytes a second against arithmetic intensity: float32, one thread")
    bandwidth = float(np.median([r["bytes"] / r["read_seconds"] for r in results]))
    x = np.geomspace(0.1, 40.0, 400)
    roof = np.minimum(bandwidth, flops / x) / 1e9
    axes.plot(x, roof, color=INK, linewidth=1.6)
    axes.fill_between(x, roof, 1e4, color=FAINT, alpha=0.45, linewidth=0)
    axes.annotate(f"one read, measured: {bandwidth / 1e9:.0f} GB/s", (0.115, bandwidth / 1e9 * 1.15), fontsize=9, color=INK)
    label = f"multiply-adds in registers, measured:\n{flops / 1e9:.0f} GFLOP/s"
    axes.annotate(label, (38.0, bandwidth / 1e9 * 1.15), ha="right", fontsize=9, color=INK)
    for op in OPS:
        own = sorted((r for r in results if r["op"] == op), key=lambda r: r["tasks"])
        xs = [intensity(op, r["tasks"]) for r in own]
        ys = [bandwidth * moved(op, r["tasks"]) / r["reads"] / 1e9 for r in own]
        axes.plot(xs, ys, color=COLOUR[op], marker=MARKER[op], linewidth=1.0, markersize=7, label=op)
        for r, px, py in zip(own, xs, ys, strict=True):
            axes.annotate(str(r["tasks"]), (px, py), xytext=(5, -11), textcoords="offset points", fontsize=8, color=COLOUR[op])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.1, 40.0)
    axes.set_ylim(bandwidth / 1e9 / 12, bandwidth / 1e9 * 2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("floating-point operations a byte; numbers at the points: tasks K")
    axes.set_ylabel("GB/s moved")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def scaling(points: Sequence[Point]) -> Any:
    """Time of a call against elements (to 10^9, the top by counting), tasks and tensors."""
    figure = _new_figure((14.0, 4.6))
    titles = {
        "elements": f"Elements P, of K = {MIDDLE['tasks']} tasks in {MIDDLE['tensors']} tensors",
        "tasks": f"Tasks K, of {MIDDLE['elements'] / 1e6:g}M elements in {MIDDLE['tensors']} tensors",
        "tensors": f"Tensors N, of {MIDDLE['elements'] / 1e6:g}M elements and K = {MIDDLE['tasks']} tasks",
    }
    for axes, (varied, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        _style(axes, title)
        own = [p for p in points if p.varied == varied]
        for op in OPS:
            line = sorted((p for p in own if p.op == op), key=lambda p: p.x)
            if not line:
                continue
            axes.plot(
                [p.x for p in line], [1e3 * p.seconds for p in line], color=COLOUR[op], marker=MARKER[op], markersize=5,
                linewidth=1.6, label=op,
            )  # fmt: skip
            if varied == "elements":
                last = line[-1]
                above = np.array([x for x in ELEMENTS if x >= last.x])
                if len(above) > 1:
                    axes.plot(above, 1e3 * counted(line, above), color=COLOUR[op], linestyle=":", linewidth=1.6)
        reads = {p.x: p.read_seconds for p in own}
        axes.plot(
            sorted(reads), [1e3 * reads[x] for x in sorted(reads)], color=INK, linewidth=1.0, linestyle="--", label="one read"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(varied)
        axes.set_ylabel("milliseconds")
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def counted(line: Sequence[Point], elements: np.ndarray) -> np.ndarray:
    """Seconds of sizes beyond the largest measured one: what a call costs however small, and bytes at the largest's rate."""
    first, last = line[0], line[-1]
    rate = (last.seconds - first.seconds) / last.size
    return first.seconds + rate * 4 * last.tasks * elements
