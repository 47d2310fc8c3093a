"""What a multi-task step tells about itself, read lazily."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..task_losses import stack_losses
from .roles import Task


class StepInfo:
    """Tensors of one update, on the device. Nothing is computed or copied to the host until it is read.

    Attributes:
        tasks: the K task names, in the order of every [K] below.
        losses: float64 [K], unscaled; NaN for a task that was absent.
        gram: float64 [K, K] of the shared parameters' gradients, unscaled. Per tensor [N, K, K]; per channel [M, K, K], those
            of one parameter after those of the other; per group [M, K, K], in the order of the groups, shared parameters in
            none last. Not finite in the row and column of a task whose gradient was not. None between two updates of the
            weights (``update_every``), with ``rows="online"``, and with an element-wise method and ``on_nonfinite="skip"``:
            nobody has computed it; so are ``cosine`` and ``conflicts``. With ``representation`` or ``gram_losses`` of what they
            say.
        weights: float64 [K], or [M, K] as the Gram, before clipping: those of this update, whether computed for it or held;
            with ``weights_from="previous"`` those of an earlier Gram. 0 for a task that was absent or dropped. NaN [K] with an
            element-wise method, which has none.
        active: bool [K], the tasks that were present and not dropped.
        skipped: bool scalar, whether the update had to be skipped because it was not finite.
        host_reads: how many times this layer read the device, in ``backward`` and the ``step`` that followed.
        gram_error: float64 [K, K], with ``gram_losses`` of two halves: the standard error of each entry of ``gram`` as an
            estimate for all data, to first order and from one pair of halves; its square is right on average.
        gram_bias: float64 [K, K], with the same: what noise adds to ``gram``, right on average; ``gram - gram_bias`` is
            unbiased, and need not be positive semidefinite.
    """

    gram_error: Tensor | None = None
    gram_bias: Tensor | None = None

    def __init__(
        self,
        tasks: tuple[Task, ...],
        losses: Tensor,
        gram: Tensor | None,
        weights: Tensor,
        active: Tensor,
        update: "UpdateNorm",
    ) -> None:
        self.tasks = tasks
        self.losses = losses
        self.gram = gram
        self.weights = weights
        self.active = active
        self.skipped = torch.zeros((), dtype=torch.bool, device=weights.device)
        self.host_reads = 0
        self._update = update

    @property
    def cosine(self) -> Tensor | None:
        """Cosines of the task gradients, as :func:`mtlkernels.cosine`."""
        return None if self.gram is None else ops.cosine(self.gram)

    @property
    def conflicts(self) -> Tensor | None:
        """Share of task pairs in conflict, as :func:`mtlkernels.conflict_rate`."""
        return None if self.gram is None else ops.conflict_rate(self.gram)

    @property
    def norm(self) -> Tensor:
        """Norm of the update over all parameters before clipping, as ``clip_grad_norm_`` returns it. float64 scalar."""
        return self._update.norm()

    def __repr__(self) -> str:
        return f"StepInfo(tasks={self.tasks}, weights={tuple(self.weights.shape)}, host_reads={self.host_reads})"


class PriorityInfo:
    """What the visits of one batch of :class:`TaskPriorityOptimizer` did. Tensors on the device, not read until asked for.

    Attributes:
        tasks: the K task names.
        phase: 1 or 2.
        visits: the tasks of each of the V visits: one each in phase 1, all of the one in phase 2.
        host_reads: how many times this layer read the device.
    """

    def __init__(self, tasks: tuple[Task, ...], phase: int) -> None:
        self.tasks, self.phase = tasks, phase
        self.visits: list[tuple[Task, ...]] = []
        self.host_reads = 0
        self._losses: dict[Task, Tensor] = {}
        self._norms: list[Tensor] = []
        self._skipped: list[Tensor] = []

    def add_visit(self, visit: tuple[Task, ...], losses: Sequence[Tensor | None], norm: Tensor, skipped: Tensor) -> None:
        """Notes a visit that was completed; ``losses`` are in the order of ``tasks``."""
        self.visits.append(visit)
        self._losses |= {task: loss for task, loss in zip(self.tasks, losses, strict=True) if loss is not None}
        self._norms.append(norm)
        self._skipped.append(skipped)

    @property
    def losses(self) -> Tensor:
        """float64 [K], each when it was computed, unweighted; NaN for a task that was absent."""
        return stack_losses([self._losses.get(task) for task in self.tasks])

    @property
    def norms(self) -> Tensor:
        """float64 [V], the norm of each visit's update over all parameters before clipping."""
        return torch.stack(self._norms)

    @property
    def skipped(self) -> Tensor:
        """bool [V], whether a visit changed nothing because its update was not finite."""
        return torch.stack(self._skipped)

    def __repr__(self) -> str:
        return f"PriorityInfo(tasks={self.tasks}, phase={self.phase}, visits={self.visits}, host_reads={self.host_reads})"


class GroupsInfo:
    """What a batch of group visits did. Tensors stay on the device until they are read.

    Attributes:
        tasks: the K task names.
        groups: the tasks that each of the M visits stepped, in the order of the visits.
        host_reads: how many times this layer read the device: one where groups were formed, and those of the steps.
        steps: the info of each visit's step; empty without a weighting.
    """

    def __init__(self, tasks: tuple[Task, ...], groups: list[list[Task]], host_reads: int) -> None:
        self.tasks, self.groups, self.host_reads = tasks, groups, host_reads
        self.steps: list[StepInfo] = []
        self._losses: list[Tensor] = []
        self._skipped: list[Tensor] = []

    @property
    def completed(self) -> int:
        """How many visits were completed."""
        return len(self._losses)

    def add(self, losses: Tensor, skipped: Tensor) -> None:
        """Takes in one visit: its losses [K] and whether its step was skipped."""
        self._losses.append(losses)
        self._skipped.append(skipped)

    @property
    def losses(self) -> Tensor:
        """float64 [M, K]: all losses before each visit's step, unweighted; NaN for a task that was absent."""
        return torch.stack(self._losses)

    @property
    def skipped(self) -> Tensor:
        """bool [M]: the visits that stepped nothing, because their gradient was not finite."""
        return torch.stack(self._skipped)

    def __repr__(self) -> str:
        return f"GroupsInfo(groups={self.groups}, host_reads={self.host_reads})"


class UpdateNorm:
    """|update|^2 = w' G w over the shared parameters + a' H a over the others.

    Summed over tensors, channels or groups where there are weights for each. G and H are the Grams of the shared and of the
    other parameters, without the tasks that are not finite.
    """

    def __init__(self, gram: Tensor, weights: Tensor, own_gram: Tensor | None, own_weights: Tensor) -> None:
        self.gram, self.weights, self.own_gram, self.own_weights = gram, weights, own_gram, own_weights

    def norm(self) -> Tensor:
        square = _quadratic(self.gram, self.weights)
        if self.own_gram is not None:
            square = square + _quadratic(self.own_gram, self.own_weights)
        return square.clamp(min=0).sqrt()


def _quadratic(gram: Tensor, weights: Tensor) -> Tensor:
    return (weights.unsqueeze(-1) * gram * weights.unsqueeze(-2)).sum()
