"""Monitoring of task priority: counts, shares and trends against NumPy, and the pictures of them."""

import numpy as np
import pytest
import torch
from priority_models import TASKS, Separate, closures, plain_top, task_net
from test_no_host_read import HostReads, empty, recorder  # noqa: F401  recorder is a fixture

import mtlkernels as mtl
from mtlkernels import monitor, plot
from mtlkernels.monitor import PriorityMonitor, count_tops, percentage, trend_correlation
from mtlkernels.optim import TaskPriorityOptimizer


def test_records_are_the_priorities_after_each_step():
    model = task_net()
    optimizer = TaskPriorityOptimizer(torch.optim.SGD(model.parameters(), 2.0), model, epochs=2)
    optimizer.set_epoch(1)
    watch = PriorityMonitor(optimizer)
    infos, expected = [], []
    for step in range(6):
        infos.append(optimizer.step(closures(model, step)))
        watch.record(infos[-1])
        tops = [plain_top(*pair) for pair in Separate(model).norm_pairs()]
        expected.append([[top.count(k) for k in range(3)] for top in tops])
    counts = np.array(expected)
    assert watch.layers == ["encoder.0.weight", "encoder.3.weight"]
    assert watch.phases == [info.phase for info in infos]
    assert set(watch.phases) == {1, 2}
    assert torch.equal(watch.losses, torch.stack([info.losses for info in infos]))
    np.testing.assert_allclose(watch.depth_share.numpy(), 100 * counts / counts.sum(2, keepdims=True), rtol=1e-12)
    over_all = counts.sum(1)
    np.testing.assert_allclose(watch.share.numpy(), 100 * over_all / over_all.sum(1, keepdims=True), rtol=1e-12)
    assert len({tuple(c.ravel()) for c in counts}) > 1


def test_records_need_layers():
    model = task_net()
    optimizer = TaskPriorityOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, epochs=2)
    info = optimizer.step(closures(model, tasks=TASKS[:2]))
    with pytest.raises(ValueError, match="knows no layers with task norms yet"):
        PriorityMonitor(optimizer).record(info)


def test_counts_by_hand():
    tops = {"x": torch.tensor([0, 2, 2, 2]), "y": torch.tensor([1, 1])}
    counts = count_tops(tops, 3)
    assert counts.tolist() == [[1, 0, 3], [0, 2, 0]]
    assert percentage(counts).tolist() == [[25.0, 0.0, 75.0], [0.0, 100.0, 0.0]]


@pytest.mark.parametrize(("steps", "window"), [(30, 1), (31, 5), (60, 20)])
def test_trend_correlation_is_pearsons_of_the_changes_of_window_means(steps, window):
    losses = np.random.default_rng(0).normal(size=(steps, 3)).cumsum(0)
    losses[:, 2] = 5 - 2 * losses[:, 0]
    means = np.stack([losses[n * window : (n + 1) * window].mean(0) for n in range(steps // window)])
    expected = np.corrcoef(np.diff(means, axis=0).T)
    actual = trend_correlation(torch.from_numpy(losses), window)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(actual[0, 2], -1, atol=1e-12)


def test_trends_that_do_not_vary_or_are_too_few():
    losses = torch.stack([torch.arange(9.0), torch.randn(9)], 1)  # the first falls evenly
    assert trend_correlation(losses, 1).tolist() == [[0.0, 0.0], [0.0, pytest.approx(1.0)]]
    with pytest.raises(ValueError, match=r"window is 4; pass \[T, K\] with T of three windows"):
        trend_correlation(losses, 4)
    with pytest.raises(ValueError, match=r"losses has shape \(9,\)"):
        trend_correlation(losses[:, 0], 1)


def test_nothing_is_read_on_the_host(recorder: HostReads):  # noqa: F811
    tops = {"x": empty(4, dtype=torch.int64), "y": empty(2, dtype=torch.int64)}
    percentage(count_tops(tops, 3))
    trend_correlation(empty(12, 3), 2)
    assert recorder.reads == []


# --- pictures -------------------------------------------------------------------------------------------------------------


def test_shares_over_time_show_the_mean_of_the_seeds():
    shares = np.random.default_rng(0).random((3, 20, 2))
    (axes,) = plot.priority_over_time(shares, ("a", "b")).axes
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == ["a", "b"]
    for k, line in enumerate(lines):
        np.testing.assert_allclose(line.get_ydata(), shares[..., k].mean(0))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_bars_by_depth_stack_to_100():
    shares = np.array([[25.0, 75.0], [100.0, 0.0], [40.0, 60.0]])
    (axes,) = plot.priority_by_depth(shares, ("a", "b"), ["stem", "conv1", "conv2"]).axes
    heights = np.array([bar.get_height() for bar in axes.patches]).reshape(2, 3)
    np.testing.assert_allclose(heights.T, shares)
    assert [bar.get_y() for bar in axes.patches][3:] == [25.0, 100.0, 40.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem", "conv1", "conv2"]
    (axes,) = plot.priority_by_depth(shares, ("a", "b")).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]


def test_pictures_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"shares has shape \(4, 2\); 2 tasks take \[seeds, steps, 2\]"):
        plot.priority_over_time(np.ones((4, 2)), ("a", "b"))
    with pytest.raises(ValueError, match=r"shares has shape \(4, 2\); pass \[3, 2\]"):
        plot.priority_by_depth(np.ones((4, 2)), ("a", "b"), ["x", "y", "z"])
    assert mtl.monitor is monitor
