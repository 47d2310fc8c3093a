"""What training with task priority looks like from outside: which task holds how many channels, and how losses move together.

Tensors stay on the device; nothing is read on the host until the caller does so.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .optim import PriorityInfo, TaskPriorityOptimizer


class PriorityMonitor:
    """Records losses, phases and the number of top-priority channels of each task while training.

    Args:
        optimizer: the optimizer that is watched. Its layers must be known when :meth:`record` is called: from the first step on
            that had every task.
    """

    def __init__(self, optimizer: TaskPriorityOptimizer) -> None:
        self.optimizer = optimizer
        self.phases: list[int] = []
        """Phase of each recorded batch, T in all."""
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []

    def record(self, info: PriorityInfo) -> None:
        """Records a batch: its losses, and the top tasks as they are now, which costs one read of the shared weights.

        Raises:
            ValueError: the layers are not known yet, or there are none.
        """
        tops = self.optimizer.top_tasks()
        if not tops:
            raise ValueError("the optimizer knows no layers with task norms yet; record after a step that had every task.")
        counts = count_tops(tops, len(info.tasks))
        self.phases.append(info.phase)
        self._losses.append(info.losses)
        self._counts.append(counts)

    @property
    def layers(self) -> list[str]:
        """Names of the L layers, in the order of the forward pass."""
        return list(self.optimizer.layers)

    @property
    def losses(self) -> Tensor:
        """float64 [T, K], NaN where a task was absent."""
        return torch.stack(self._losses)

    @property
    def depth_share(self) -> Tensor:
        """Percentage of each layer's channels whose top task is k, float64 [T, L, K] (Figure 5 of the paper)."""
        return percentage(torch.stack(self._counts))

    @property
    def share(self) -> Tensor:
        """Percentage of all channels whose top task is k, float64 [T, K] (Figure 4 of the paper)."""
        return percentage(torch.stack(self._counts).sum(1))

    def trend_correlation(self, window: int) -> Tensor:
        """:func:`trend_correlation` of the recorded losses."""
        return trend_correlation(self.losses, window)


def count_tops(tops: Mapping[str, Tensor], num_tasks: int) -> Tensor:
    """How many channels of each layer have which top task, int64 [L, K].

    Args:
        tops: layer -> int64 [C], as :meth:`TaskPriorityOptimizer.top_tasks` returns it.
        num_tasks: K.
    """
    tasks = torch.arange(num_tasks, device=next(iter(tops.values())).device)
    return torch.stack([(top.unsqueeze(1) == tasks).sum(0) for top in tops.values()])


def percentage(counts: Tensor) -> Tensor:
    """Counts [..., K] in percent of their sum, float64."""
    return 100.0 * counts.double() / counts.sum(-1, keepdim=True)


def trend_correlation(losses: Tensor, window: int) -> Tensor:
    """Correlation of the tasks' loss trends over training (Figure 3 of the paper), float64 [K, K].

    A trend is the change of a task's mean loss from one window of batches to the next; the result is Pearson's correlation of
    the trends of two tasks over all windows. The windows are our choice, since the paper's text leaves them open. 0 where a
    trend does not vary; NaN where a task was absent.

    Args:
        losses: [T, K].
        window: batches of a window; what does not fill the last one is left out.

    Raises:
        ValueError: ``losses`` is not [T, K], or holds fewer than three windows.
    """
    if losses.dim() != 2 or window < 1 or len(losses) < 3 * window:
        raise ValueError(
            f"losses has shape {tuple(losses.shape)} and window is {window}; pass [T, K] with T of three windows or more."
        )
    means = losses[: len(losses) // window * window].double().unflatten(0, (-1, window)).mean(1)
    trends = means.diff(dim=0)
    centred = trends - trends.mean(0)
    covariance = centred.T @ centred
    scale = covariance.diagonal().sqrt()
    product = scale.unsqueeze(0) * scale.unsqueeze(1)
    return torch.where(product == 0, 0.0, covariance / torch.where(product == 0, 1.0, product))
