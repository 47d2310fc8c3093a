"""Proximal inter-task affinity (Jeong and Yoon 2025), measured while training in groups."""

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._library import define
from .grouping.common import Groups, Matrix, groups_of_labels, host_matrix
from .grouping.propagation import affinity_propagation

Credit = Literal["previous", "current"]
Normalize = Literal["column", "released"]


def proximal_affinity_reference(
    affinity: Tensor, previous: Tensor, losses: Tensor, group: Sequence[int], decay: float, skipped: Tensor | None
) -> None:
    """One visit, in place, as :meth:`ProximalAffinity.update` describes it.

    With r_k = (1 - losses_k / previous_k) / n, n the size of the group, and ema(a, v) = (1 - decay) a + decay v, for s in the
    group: A_st <- ema(A_st, r_t) for t outside it; within it the same where r_s r_t >= 0, else ema(A_st, -max(r_t, r_s)); A_ss
    only where r_s >= 0. Nothing moves where the loss of t (within the group also of s) was not positive, or is not finite.

    Args:
        affinity: float64 [K, K].
        previous: float64 [K], the losses before the group's step, NaN for those that are not known; afterwards ``losses``, or
            NaN where ``skipped``.
        losses: float64 [K], the losses after it.
        group: task indices; none for the first visit.
        decay: beta.
        skipped: bool scalar, whether the step that follows these losses was skipped; None: it was not.
    """
    size = affinity.shape[0]
    member = torch.zeros(size, dtype=torch.bool, device=affinity.device)
    for task in group:
        member[task].fill_(True)  # not from a list, which would be a copy to the device that the host waits for
    change = (1 - losses / previous) / max(len(group), 1)
    usable = (previous > 0) & previous.isfinite() & change.isfinite()
    source, target = change.unsqueeze(-1), change.unsqueeze(-2)
    inside = member.unsqueeze(-1) & member.unsqueeze(-2)
    value = torch.where(inside & (source * target < 0), -torch.maximum(source, target), target)
    own = torch.eye(size, dtype=torch.bool, device=affinity.device)
    moves = member.unsqueeze(-1) & usable.unsqueeze(-2)
    moves = moves & (~inside | (usable.unsqueeze(-1) & (~own | (target >= 0))))
    affinity.copy_(torch.where(moves, (1 - decay) * affinity + decay * value, affinity))
    previous.copy_(losses if skipped is None else torch.where(skipped.reshape(()), torch.nan, losses))


define(
    "proximal_affinity_(Tensor(a!) affinity, Tensor(b!) previous, Tensor losses, int[] group, float decay, Tensor? skipped)"
    " -> ()",
    fake=lambda *_: None,
    reference=proximal_affinity_reference,
)


class ProximalAffinity(torch.nn.Module):
    """Moving average of what a step of one task's group does to each task's loss, a by-product of training in groups.

    A batch is visited group by group. Before each visit's step the losses of all tasks are known; two visits in a row tell what
    the first one's step did: B_{G -> k} = 1 - L_k(after) / L_k(before), of the shared parameters and the heads of G together,
    divided by the size of G, is credited to the tasks of G. The effect of a batch's last visit is not measured.

    State lives in float64 buffers on the device it is moved to; :meth:`update` reads nothing on the host.

    Args:
        num_tasks: K.
        decay: beta of the moving average, above 0 and up to 1.
        credit: who is credited with what two visits tell. ``"previous"``: the group that stepped in between, as the definition
            says. ``"current"``: the group of the second visit, as the released code does.
        normalize: how the similarity is formed from the matrix. ``"column"``: each column divided by its diagonal entry.
            ``"released"``: as the released code, which divides on and above the diagonal only.

    Attributes:
        matrix: float64 [K, K], row s: the task that stepped, column t: the task whose loss fell by that share.

    Raises:
        ValueError: an argument out of range.
    """

    matrix: Tensor
    previous: Tensor

    def __init__(
        self, num_tasks: int, decay: float = 1e-3, credit: Credit = "previous", normalize: Normalize = "column"
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"num_tasks is {num_tasks}; pass 1 or more.")
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}; pass a number above 0 and up to 1.")
        for name, value, known in (("credit", credit, get_args(Credit)), ("normalize", normalize, get_args(Normalize))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, known))}.")
        self.num_tasks, self.decay, self.credit, self.normalize = num_tasks, decay, credit, normalize
        self.register_buffer("matrix", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))
        self.register_buffer("previous", torch.full((num_tasks,), torch.nan, dtype=torch.float64), persistent=False)
        self._last: list[int] | None = None

    def start_batch(self) -> None:
        """Forgets the losses of the batch before: losses of two batches are not compared."""
        self._last = None

    @torch.no_grad()
    def update(self, group: Sequence[int], losses: Tensor | Sequence[Tensor | None], *, skipped: Tensor | None = None) -> None:
        """Takes in one visit of a batch.

        Args:
            group: the indices of the tasks that the visit steps.
            losses: the losses [K] of all tasks, unweighted, as they were before that step; NaN, or None in a sequence of
                scalars, for a task that is absent. A loss that is not positive or not finite measures nothing.
            skipped: bool scalar on the losses' device: whether that step was skipped, so that what follows is not its effect.

        Raises:
            ValueError: a group that is empty or names a task twice or one that does not exist, or other than K losses.
        """
        tasks, matrix = list(group), self.matrix
        if not tasks or len(set(tasks)) != len(tasks) or min(tasks) < 0 or max(tasks) >= self.num_tasks:
            raise ValueError(f"group is {tasks}; pass at least one index from 0 to {self.num_tasks - 1}, each once.")
        values = losses if isinstance(losses, Tensor) else stack_losses(losses, matrix.device)
        if values.shape != (self.num_tasks,):
            raise ValueError(f"losses has shape {tuple(values.shape)}; {self.num_tasks} tasks take [{self.num_tasks}].")
        credited = self._last if self.credit == "previous" else tasks
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.mtlkernels.proximal_affinity_.default(
                matrix, self.previous, values.to(matrix), [] if self._last is None else credited, self.decay, skipped
            )
        self._last = tasks

    @property
    def similarity(self) -> Tensor:
        """float64 [K, K] on the host: what groups are formed from, :attr:`matrix` normalised, the mean with its transpose.

        A task whose own effect was never measured (diagonal entry not above rounding of its column) has a column of zeros.
        """
        return torch.from_numpy(_similarity(host_matrix(self.matrix, "matrix"), self.normalize)[0])

    def groups(self, previous: Groups | None = None, **options: Any) -> Groups:
        """Groups of tasks by affinity propagation on :attr:`similarity`.

        Host work on one copy of the matrix, which is the only read of the device. A task whose own effect was never measured is
        left out and forms a group of its own. Two tasks whose similarity is below 1 never share a group, and three or more
        whose similarities are all equal form one.

        Args:
            previous: the result where the clustering does not converge; None: every task on its own.
            **options: of :func:`mtlkernels.grouping.affinity_propagation`.

        Returns:
            Task indices, ascending, the groups by their first task.

        Raises:
            ValueError: the matrix is not finite, or an option out of range.
        """
        similarity, measured = _similarity(host_matrix(self.matrix, "matrix"), self.normalize)
        known = np.flatnonzero(measured)
        if len(known) < self.num_tasks:
            similarity = np.ascontiguousarray(similarity[np.ix_(known, known)])
        labels, converged = affinity_propagation(torch.from_numpy(similarity), **options)
        if not bool(converged):
            return [[task] for task in range(self.num_tasks)] if previous is None else [list(group) for group in previous]
        label_of = dict(zip(known.tolist(), labels.tolist(), strict=True))
        return groups_of_labels([label_of.get(task, -1 - task) for task in range(self.num_tasks)])

    def extra_repr(self) -> str:
        return f"{self.num_tasks}, decay={self.decay}, credit={self.credit!r}, normalize={self.normalize!r}"


def _similarity(matrix: Matrix, normalize: Normalize) -> tuple[Matrix, NDArray[np.bool_]]:
    """[K, K] and bool [K], which tasks have a measured effect on themselves."""
    own = matrix.diagonal()
    measured = own > np.finfo(np.float64).eps * np.abs(matrix).max(0)
    scaled = matrix / np.where(measured, own, 1.0)
    if normalize == "released":
        scaled = np.where(np.tri(len(matrix), k=-1, dtype=bool), matrix, scaled)
    if not measured.all():
        scaled = np.where(measured, scaled, 0.0)
    return (scaled + scaled.T) / 2, measured


def stack_losses(losses: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """float64 [K] on a device, NaN for an absent task, without a host read."""
    absent = None if all(loss is not None for loss in losses) else torch.full((), torch.nan, device=device)
    there = [cast(Tensor, absent if loss is None else loss) for loss in losses]
    there = [loss if loss.device == device else loss.to(device) for loss in there]
    return torch.stack([loss.reshape(()) if loss.dim() else loss for loss in there]).detach().double()
