"""Pictures of multi-task training: arrays in, ``matplotlib`` figure out.

Every function draws into ``axes`` when they are given and into a new figure otherwise, and returns the figure. Colours are
those of Okabe and Ito (2008), which stay apart for colour-blind readers; the n-th entry of a mapping has the n-th colour.
No display is needed: figures belong to no window and are saved with ``figure.savefig(path)``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._optional import require

Figure = Any
Axes = Any
Array = NDArray[np.float64]

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
TASK_COLOURS = COLOURS[1:]
"""Of tasks, where no method is black."""
MARKERS = ("X", "o", "s", "^", "D", "v", "P", "*")
INK, FAINT = "#333333", "#D9D9D9"


def loss_curves(
    losses: Mapping[str, ArrayLike], *, title: str = "Training loss", window: int | None = None, axes: Axes | None = None
) -> Figure:
    """Loss over steps on a logarithmic scale: the mean over seeds, with the range of the seeds as a band.

    Args:
        losses: name -> [S, T], S seeds of T steps. A name without steps ([S, 0]) keeps its colour and draws nothing.
        title: above the axes.
        window: steps averaged for each point of a curve; None: a thirtieth of the run.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: an array that is not [S, T].
        MissingPackageError: matplotlib is not installed.
    """
    axes = _new_axes(title) if axes is None else _style(axes, title)
    _curves(axes, losses, "losses", window)
    axes.set_yscale("log")
    axes.set_ylabel("cross-entropy")
    ticker = require("matplotlib.ticker", "matplotlib", "mtlkernels.plot")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    return axes.figure


def cosine_over_time(
    cosines: Mapping[str, ArrayLike],
    *,
    title: str = "Cosine of two task gradients",
    window: int | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Cosine of two task gradients over steps, as :func:`loss_curves` draws it; below the line the tasks conflict.

    Args:
        cosines: name -> [S, T], S seeds of T steps.
        title: above the axes.
        window: as in :func:`loss_curves`.
        axes: where to draw; None: a new figure.
    """
    axes = _new_axes(title) if axes is None else _style(axes, title)
    _curves(axes, cosines, "cosines", window)
    axes.axhline(0.0, color=INK, linewidth=1.0, zorder=1)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05), max(high, 0.05))
    axes.axhspan(min(low, -0.05), 0.0, color="#F4F4F4", zorder=0)
    axes.annotate("tasks conflict below 0", (0.985, 0.03), xycoords="axes fraction", ha="right", fontsize=9, color=INK)
    axes.set_ylabel("cosine")
    return axes.figure


def cosine_matrix(
    matrix: ArrayLike, tasks: Sequence[str], *, title: str = "Cosine of task gradients", axes: Axes | None = None
) -> Figure:
    """A matrix of cosines with its values written in: blue agrees, red conflicts.

    Args:
        matrix: [K, K] in [-1, 1].
        tasks: K names.
        title: above the axes.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: ``matrix`` is not [K, K] for K names.
    """
    values = _square(matrix, tasks)
    axes = _new_axes(title, size=(4.2, 4.2)) if axes is None else _style(axes, title)
    axes.imshow(values, cmap="RdBu", vmin=-1.0, vmax=1.0)
    ticks = range(len(tasks))
    axes.set_xticks(ticks, tasks)
    axes.set_yticks(ticks, tasks)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if len(tasks) <= 12:  # more numbers than that are unreadable
        for i, j in np.ndindex(values.shape):
            dark = abs(values[i, j]) > 0.5
            axes.text(j, i, f"{values[i, j]:+.2f}", ha="center", va="center", fontsize=9, color="white" if dark else INK)
    return axes.figure


def loss_landscape(values: ArrayLike, axis: ArrayLike, tasks: Sequence[str], *, title: str = "Loss landscape") -> Figure:
    """Contours of every task's loss in a plane through the parameters, which are marked in the middle.

    Args:
        values: [K, S, S], as :func:`mtlkernels.landscape.loss_slice` returns them.
        axis: [S].
        tasks: K names.
        title: above the panels.

    Raises:
        ValueError: ``values`` is not [K, S, S] for the axis and names given.
    """
    losses, places = np.asarray(values, dtype=np.float64), np.asarray(axis, dtype=np.float64)
    if losses.shape != (len(tasks), len(places), len(places)):
        raise ValueError(f"values has shape {losses.shape}; pass [{len(tasks)}, {len(places)}, {len(places)}].")
    figure = _new_figure((3.4 * len(tasks) + 0.6, 3.6))
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    for task, loss, axes in zip(tasks, losses, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        _style(axes, task)
        drawn = axes.contourf(places, places, np.log10(np.maximum(loss.T, 1e-12)), levels=14, cmap="viridis")
        axes.contour(drawn, colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0.0, 0.0, marker="+", color="white", markersize=9)
        axes.set_aspect("equal")
        axes.grid(False)
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="log10 loss")
    return figure


def accuracy_plane(
    points: Mapping[str, ArrayLike], tasks: Sequence[str], *, title: str = "Test accuracy", axes: Axes | None = None
) -> Figure:
    """Accuracy of one task against the other's: a faint mark for each seed, a full one for their mean.

    Args:
        points: name -> [S, 2], in percent.
        tasks: the two names.
        title: above the axes.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: an array that is not [S, 2].
    """
    axes = _new_axes(title, size=(5.0, 5.0)) if axes is None else _style(axes, title)
    for n, (name, values) in enumerate(points.items()):
        colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
        seeds = np.asarray(values, dtype=np.float64)
        if seeds.ndim != 2 or seeds.shape[1] != 2:
            raise ValueError(f"points[{name!r}] has shape {seeds.shape}; pass [seeds, 2].")
        mean = seeds.mean(0)
        axes.scatter(seeds[:, 0], seeds[:, 1], s=22, color=colour, marker=marker, alpha=0.3, linewidths=0)
        size = max(70, 150 - 20 * n)  # a mark on top leaves the edge of the one below in sight
        axes.scatter(*mean, s=size, color=colour, marker=marker, edgecolors="white", linewidths=0.8, zorder=3, label=name)
    axes.set_xlabel(f"{tasks[0]}, %")
    axes.set_ylabel(f"{tasks[1]}, %")
    axes.margins(0.12)
    return axes.figure


def priority_over_time(
    shares: ArrayLike, tasks: Sequence[str], *, title: str = "Top-priority channels", axes: Axes | None = None
) -> Figure:
    """Percentage of all channels whose top task is each task over recorded steps: the mean over seeds, their range as a band.

    Args:
        shares: [S, T, K] in percent, S seeds of T steps.
        tasks: K names.
        title: above the axes.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: ``shares`` is not [S, T, K] for K names.
    """
    values = np.asarray(shares, dtype=np.float64)
    if values.ndim != 3 or values.shape[2] != len(tasks):
        raise ValueError(f"shares has shape {values.shape}; {len(tasks)} tasks take [seeds, steps, {len(tasks)}].")
    axes = _new_axes(title) if axes is None else _style(axes, title)
    _curves(axes, {task: values[..., k] for k, task in enumerate(tasks)}, "shares", None, TASK_COLOURS)
    axes.set_ylabel("channels, %")
    axes.legend(frameon=False, fontsize=9)
    return axes.figure


def priority_by_depth(
    shares: ArrayLike,
    tasks: Sequence[str],
    layers: Sequence[str] | None = None,
    *,
    title: str = "Top-priority channels by depth",
    axes: Axes | None = None,
) -> Figure:
    """Percentage of each layer's channels whose top task is each task, as one bar a layer from the input on.

    Args:
        shares: [L, K] in percent.
        tasks: K names.
        layers: L names; None: their numbers.
        title: above the axes.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: ``shares`` is not [L, K] for the names given.
    """
    values = np.asarray(shares, dtype=np.float64)
    names = [str(n + 1) for n in range(len(values))] if layers is None else list(layers)
    if values.ndim != 2 or values.shape != (len(names), len(tasks)):
        raise ValueError(f"shares has shape {values.shape}; pass [{len(names)}, {len(tasks)}].")
    axes = _new_axes(title) if axes is None else _style(axes, title)
    places = np.arange(len(names))
    below = np.zeros(len(names))
    for k, task in enumerate(tasks):
        colour = TASK_COLOURS[k % len(TASK_COLOURS)]
        axes.bar(places, values[:, k], bottom=below, color=colour, width=0.85, label=task)
        below = below + values[:, k]
    long = layers is not None and max(map(len, names), default=0) > 3
    axes.set_xticks(places, names, rotation=60 if long else 0, ha="right" if long else "center", fontsize=8)
    axes.set_ylim(0, 100)
    axes.grid(False)
    axes.set_ylabel("channels, %")
    axes.set_xlabel("layer, from the input on")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return axes.figure


def training_summary(
    losses: Mapping[str, ArrayLike],
    cosines: Mapping[str, ArrayLike],
    accuracy: Mapping[str, ArrayLike],
    tasks: Sequence[str],
    *,
    title: str,
) -> Figure:
    """One page on a two-task comparison: losses, accuracies, cosine over time and the final cosine matrices.

    Args:
        losses: method -> [S, T, 2], S seeds of T steps. Its order fixes colours and marks.
        cosines: method -> [S, T, 3, 3] of the two task gradients and the update, for the methods that combine task gradients.
        accuracy: method -> [S, 2], in percent.
        tasks: the two names.
        title: of the page.

    Raises:
        ValueError: other than two tasks, or arrays of other shapes.
        MissingPackageError: matplotlib is not installed.
    """
    if len(tasks) != 2:
        raise ValueError(f"tasks lists {len(tasks)} names; the summary compares two tasks.")
    curves = {name: np.asarray(values, dtype=np.float64) for name, values in losses.items()}
    matrices = {name: np.asarray(values, dtype=np.float64) for name, values in cosines.items()}
    for name, values in (*curves.items(), *matrices.items()):
        if values.shape[2:] not in ((2,), (3, 3)):
            raise ValueError(f"the array of {name!r} has shape {values.shape}; pass losses [S, T, 2] and cosines [S, T, 3, 3].")
    figure = _new_figure((14.0, 8.6))
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    legend_row, top, bottom = figure.subfigures(3, 1, height_ratios=(0.07, 1.0, 1.0))
    left, right, plane = top.subplots(1, 3)
    for k, (task, axes) in enumerate(zip(tasks, (left, right), strict=True)):
        loss_curves({name: values[..., k] for name, values in curves.items()}, title=f"Training loss, {task}", axes=axes)
    right.sharey(left)
    right.set_ylabel("")
    accuracy_plane(
        {name: accuracy[name] for name in curves if name in accuracy},
        tasks,
        title="Test accuracy (up and right is better)",
        axes=plane,
    )
    time_part, matrix_part = bottom.subfigures(1, 2, width_ratios=(2.0, 1.0))
    pairs = {name: matrices[name][..., 0, 1] if name in matrices else np.empty((1, 0)) for name in curves}
    cosine_over_time(pairs, title="Cosine of the two task gradients on the shared parameters", axes=time_part.subplots())
    _final_matrices(matrix_part, matrices, (*tasks, "update"))
    handles, labels = plane.get_legend_handles_labels()
    legend_row.legend(handles, labels, loc="center", ncols=len(labels), frameon=False, fontsize=11)
    return figure


def _final_matrices(figure: Figure, matrices: Mapping[str, Array], names: Sequence[str]) -> None:
    """Small multiples of the cosine matrices [S, T, K, K], each the mean over seeds and the last tenth of the steps."""
    if not matrices:
        return
    final = max(1, next(iter(matrices.values())).shape[1] // 10)
    figure.suptitle(f"Cosine matrix, mean of the last {final} steps", fontsize=11, fontweight="bold", color=INK)
    columns = min(2, len(matrices))
    grid = figure.subplots(-(-len(matrices) // columns), columns, squeeze=False)
    for n, axes in enumerate(grid.flat):
        if n >= len(matrices):
            axes.set_axis_off()
            continue
        name, values = list(matrices.items())[n]
        cosine_matrix(values[:, -final:].mean((0, 1)), names, title=name, axes=axes)
        if n % columns:  # names once a row and once a column
            axes.set_yticklabels([])
        if n + columns < len(matrices):
            axes.set_xticklabels([])


def _curves(
    axes: Axes, curves: Mapping[str, ArrayLike], argument: str, window: int | None, colours: Sequence[str] = COLOURS
) -> None:
    length = 1
    for n, (name, values) in enumerate(curves.items()):
        colour = colours[n % len(colours)]
        seeds = np.asarray(values, dtype=np.float64)
        if seeds.ndim != 2:
            raise ValueError(f"{argument}[{name!r}] has shape {seeds.shape}; pass [seeds, steps].")
        if seeds.size == 0:
            continue
        width = min(seeds.shape[1], window or max(1, seeds.shape[1] // 30))
        steps, smooth = moving_average(seeds, width)
        length = max(length, seeds.shape[1])
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.12, linewidth=0)
        axes.plot(steps, smooth.mean(0), color=colour, linewidth=1.8, label=name)
    axes.set_xlabel("step")
    axes.set_xlim(0, length)


def moving_average(values: Array, window: int) -> tuple[NDArray[Any], Array]:
    """Means over ``window`` steps, [S, T] -> the windows' middles [T - window + 1] and means [S, T - window + 1]."""
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    means = (sums[:, window:] - sums[:, :-window]) / window
    return np.arange(means.shape[1]) + (window - 1) / 2.0, means


def _new_figure(size: tuple[float, float]) -> Figure:
    module = require("matplotlib.figure", "matplotlib", "mtlkernels.plot")
    return module.Figure(figsize=size, layout="constrained", facecolor="white")


def _new_axes(title: str, size: tuple[float, float] = (6.4, 4.2)) -> Axes:
    return _style(_new_figure(size).subplots(), title)


def _style(axes: Axes, title: str) -> Axes:
    axes.set_title(title, fontsize=11, fontweight="bold", color=INK, loc="left" if title else "center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


# --- groups of tasks ----------------------------------------------------------------------------------------------------------


def affinity_matrix(
    matrix: ArrayLike,
    tasks: Sequence[str],
    groups: Sequence[Sequence[int]] | None = None,
    *,
    title: str = "Affinity",
    axes: Axes | None = None,
) -> Figure:
    """An affinity matrix as a heat map: blue where row helps column, red where it harms; frames around groups.

    The colour scale ends at the largest magnitude off the diagonal, so that the effect of tasks on themselves does not hide the
    rest.

    Args:
        matrix: [K, K], row: the task that stepped, column: the task it did something to.
        tasks: K names.
        groups: task indices; the tasks are shown in their order. None: as they are.
        title: above the axes.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: ``matrix`` is not [K, K] for K names, or ``groups`` do not hold each task once.
    """
    values = _square(matrix, tasks)
    order = _order_of(groups, len(tasks))
    axes = _new_axes(title, size=(6.2, 5.2)) if axes is None else _style(axes, title)
    off_diagonal = values[~np.eye(len(tasks), dtype=bool)]
    limit = float(np.nanmax(np.abs(off_diagonal), initial=0.0)) or 1.0
    image = axes.imshow(values[np.ix_(order, order)], cmap="RdBu", vmin=-limit, vmax=limit)
    names = [tasks[k] for k in order]
    axes.set_xticks(range(len(tasks)), names, rotation=90)
    axes.set_yticks(range(len(tasks)), names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("a step of")
    axes.set_xlabel("does to")
    patches = require("matplotlib.patches", "matplotlib", "mtlkernels.plot")
    start = 0
    for group in groups or []:
        size = len(group)
        axes.add_patch(patches.Rectangle((start - 0.5, start - 0.5), size, size, fill=False, edgecolor=INK, linewidth=1.8))
        start += size
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    return axes.figure


def group_graph(
    similarity: ArrayLike,
    tasks: Sequence[str],
    groups: Sequence[Sequence[int]],
    *,
    title: str = "Groups",
    axes: Axes | None = None,
) -> Figure:
    """Tasks on a circle, group by group, in the colour of their group; the more similar two tasks, the stronger their line.

    Args:
        similarity: [K, K], symmetric, as :attr:`mtlkernels.ProximalAffinity.similarity`. The upper third of the pairs is drawn.
        tasks: K names.
        groups: task indices.
        title: above the axes.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: as of :func:`affinity_matrix`.
    """
    values = _square(similarity, tasks)
    order = _order_of(groups, len(tasks))
    axes = _new_axes(title, size=(5.4, 5.4)) if axes is None else _style(axes, title)
    angle = 2 * np.pi * np.argsort(order) / len(tasks)
    places = np.stack([np.cos(angle), np.sin(angle)], 1)
    rows, columns = np.triu_indices(len(tasks), 1)
    strength = values[rows, columns]
    if len(strength):
        low, high = float(np.nanquantile(strength, 2 / 3)), float(np.nanmax(strength))
        for i, j, value in zip(rows, columns, strength, strict=True):
            share = (value - low) / (high - low) if high > low else 1.0
            if share >= 0:
                axes.plot(*places[[i, j]].T, color=INK, alpha=0.1 + 0.7 * share, linewidth=0.5 + 2.5 * share, zorder=1)
    for g, group in enumerate(groups):
        axes.scatter(*places[list(group)].T, s=170, color=COLOURS[g % len(COLOURS)], edgecolors="white", zorder=2)
    for task, (x, y) in zip(tasks, places * 1.13, strict=True):
        axes.text(x, y, task, ha="left" if x > 0.2 else "right" if x < -0.2 else "center", va="center", fontsize=9, color=INK)
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-1.6, 1.6)
    axes.set_ylim(-1.45, 1.45)
    return axes.figure


def groups_over_time(
    groups: Sequence[Sequence[Sequence[int]]],
    tasks: Sequence[str],
    *,
    title: str = "Groups over time",
    axes: Axes | None = None,
) -> Figure:
    """Which tasks share a group in each batch: a line of colour for each task; tasks of one colour in a column are a group.

    A group has the colour of its first task, so that a group that stays keeps its colour.

    Args:
        groups: T partitions, task indices, as :attr:`mtlkernels.SelectiveGroupOptimizer.groups` was in each batch.
        tasks: K names.
        title: above the axes.
        axes: where to draw; None: a new figure.

    Raises:
        ValueError: a partition that does not hold each task once.
    """
    axes = _new_axes(title, size=(8.0, 4.2)) if axes is None else _style(axes, title)
    first = np.empty((len(tasks), len(groups)), dtype=np.int64)
    for step, partition in enumerate(groups):
        _order_of(partition, len(tasks))
        for group in partition:
            first[list(group), step] = min(group)
    colors = require("matplotlib.colors", "matplotlib", "mtlkernels.plot")
    matplotlib = require("matplotlib", "matplotlib", "mtlkernels.plot")
    palette = matplotlib.colormaps["tab20"](np.arange(len(tasks)) % 20)
    axes.imshow(
        first,
        aspect="auto",
        interpolation="nearest",
        cmap=colors.ListedColormap(palette),
        vmin=-0.5,
        vmax=len(tasks) - 0.5,
        extent=(0, max(len(groups), 1), len(tasks) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(tasks)), tasks)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_xlabel("batch")
    return axes.figure


def groups_summary(
    affinity: ArrayLike,
    similarity: ArrayLike,
    groups: Sequence[Sequence[Sequence[int]]],
    tasks: Sequence[str],
    *,
    title: str,
) -> Figure:
    """One page on a run in groups: the affinity and the groups at its end, and the groups over time.

    Args:
        affinity: [K, K], as :func:`affinity_matrix` takes it.
        similarity: [K, K], as :func:`group_graph` takes it.
        groups: T partitions, the last one at least.
        tasks: K names.
        title: of the page.
    """
    figure = _new_figure((13.0, 10.5))
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.35, 1.0))
    left, right = top.subplots(1, 2)
    affinity_matrix(affinity, tasks, groups[-1], title="Affinity at the end, in the order of the groups", axes=left)
    group_graph(similarity, tasks, groups[-1], title="Groups at the end, and the most similar pairs", axes=right)
    groups_over_time(groups, tasks, title="Groups over time: tasks of one colour share a group", axes=bottom.subplots())
    return figure


def _square(matrix: ArrayLike, tasks: Sequence[str]) -> Array:
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (len(tasks), len(tasks)):
        raise ValueError(f"matrix has shape {values.shape}; {len(tasks)} tasks take [{len(tasks)}, {len(tasks)}].")
    return values


def _order_of(groups: Sequence[Sequence[int]] | None, num_tasks: int) -> list[int]:
    """The tasks in the order of their groups."""
    order = list(range(num_tasks)) if groups is None else [task for group in groups for task in group]
    if sorted(order) != list(range(num_tasks)):
        raise ValueError(f"groups hold the tasks {sorted(order)}; put each of the {num_tasks} tasks into exactly one.")
    return order
