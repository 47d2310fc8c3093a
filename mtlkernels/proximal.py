"""Proximal inter-task affinity (Jeong and Yoon 2025), measured while training in groups."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._library import define
from .grouping.common import Groups, groups_of_labels, host_matrix
from .grouping.propagation import affinity_propagation_reference, checked_options
from .task_losses import stack_losses

Credit = Literal["previous", "current"]
Normalize = Literal["column", "released"]


def proximal_affinity_reference(
    affinity: Tensor,
    previous: Tensor,
    losses: Sequence[Tensor | None],
    credited: Sequence[int],
    group: Sequence[int],
    decay: float,
    skipped: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One visit, in place, as :meth:`ProximalAffinity.update` describes it.

    With r_k = (1 - losses_k / previous_k) / n, n the number of ``credited`` tasks, and ema(a, v) = (1 - decay) a + decay v, for
    s among them: A_st <- ema(A_st, r_t) for t not among them; among them the same where r_s r_t >= 0, else
    ema(A_st, -max(r_t, r_s)); A_ss only where r_s >= 0. Nothing moves where the loss of t (among them also of s) was not
    positive, or is not finite.

    Args:
        affinity: float64 [K, K].
        previous: float64 [K], the losses before the step; afterwards ``losses``.
        losses: K scalars, the losses after it; None for an absent task.
        credited: the tasks that stepped; none for the first visit.
        group: the tasks that step next.
        decay: beta.
        skipped: bool scalar, whether the step was skipped and nothing is credited; None: it was not.

    Returns:
        float64 [K], the losses, NaN where absent; and a bool scalar, whether one of the ``group`` is not finite.
    """
    size = affinity.shape[0]
    values = stack_losses(losses, affinity.device)
    member = torch.zeros(size, dtype=torch.bool, device=affinity.device)
    for task in credited:
        member[task].fill_(True)  # not from a list, which would be a copy to the device that the host waits for
    change = (1 - values / previous) / max(len(credited), 1)
    usable = (previous > 0) & previous.isfinite() & change.isfinite()
    if skipped is not None:
        usable = usable & ~skipped.reshape(())
    source, target = change.unsqueeze(-1), change.unsqueeze(-2)
    inside = member.unsqueeze(-1) & member.unsqueeze(-2)
    value = torch.where(inside & (source * target < 0), -torch.maximum(source, target), target)
    own = torch.eye(size, dtype=torch.bool, device=affinity.device)
    moves = member.unsqueeze(-1) & usable.unsqueeze(-2)
    moves = moves & (~inside | (usable.unsqueeze(-1) & (~own | (target >= 0))))
    affinity.copy_(torch.where(moves, (1 - decay) * affinity + decay * value, affinity))
    previous.copy_(values)
    looked_at = [values[k] for k in group]
    finite = torch.stack(looked_at).isfinite().all() if group else torch.ones_like(values[0], dtype=torch.bool)
    return values, ~finite


define(
    "proximal_affinity_(Tensor(a!) affinity, Tensor(b!) previous, Tensor?[] losses, int[] credited, int[] group, float decay,"
    " Tensor? skipped) -> (Tensor, Tensor)",
    fake=lambda affinity, previous, *_: (torch.empty_like(previous), affinity.new_empty((), dtype=torch.bool)),
    reference=proximal_affinity_reference,
)


def proximal_groups_reference(
    affinity: Tensor, released: bool, preference: float | None, damping: float, max_iter: int, convergence_iter: int
) -> tuple[Tensor, Tensor]:
    """Affinity propagation on the similarity of one matrix on the host: int64 [K] labels, bool scalar converged.

    The label of a task is the exemplar's index, -1 where there is none; -1 - t of a task t without a measured effect on itself,
    which is left out. A matrix that is not finite does not converge.

    Args:
        affinity: float64 [K, K].
        released: the normalisation, see :class:`ProximalAffinity`.
        preference: this and the following as of :func:`mtlkernels.grouping.affinity_propagation`.
        damping: how much of a message stays.
        max_iter: iterations at most.
        convergence_iter: for how many iterations the exemplars must stay the same.
    """
    labels = -1 - torch.arange(len(affinity), device=affinity.device)
    if not bool(affinity.isfinite().all()):
        return labels, torch.zeros((), dtype=torch.bool, device=affinity.device)
    similarity, measured = proximal_similarity(affinity, released)
    known = measured.nonzero()[:, 0]
    exemplars, converged = affinity_propagation_reference(
        similarity[known][:, known], preference, damping, max_iter, convergence_iter
    )
    if len(known):
        labels[known] = torch.where(exemplars < 0, -1, known[exemplars])
    return labels, converged


def proximal_similarity(affinity: Tensor, released: bool) -> tuple[Tensor, Tensor]:
    """float64 [K, K] and bool [K]: columns over their diagonal entries, the mean with the transpose, and which are measured."""
    own = affinity.diagonal()
    measured = own > torch.finfo(torch.float64).eps * affinity.abs().amax(0)
    scaled = affinity / torch.where(measured, own, 1.0)
    if released:
        scaled = scaled.triu() + affinity.tril(-1)
    scaled = torch.where(measured, scaled, 0.0)
    return (scaled + scaled.T) / 2, measured


define(
    "proximal_groups(Tensor affinity, bool released, float? preference, float damping, int max_iter, int convergence_iter)"
    " -> (Tensor, Tensor)",
    fake=lambda affinity, *_: (
        affinity.new_empty(affinity.shape[:1], dtype=torch.int64),
        affinity.new_empty((), dtype=torch.bool),
    ),
    reference=proximal_groups_reference,
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
        self._last: list[int] = []  # the group of the visit before, empty where a batch starts

    def start_batch(self) -> None:
        """Forgets the losses of the batch before: losses of two batches are not compared."""
        self._last.clear()

    def update(
        self, group: Sequence[int], losses: Tensor | Sequence[Tensor | None], *, skipped: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Takes in one visit of a batch.

        Args:
            group: the indices of the tasks that the visit steps.
            losses: the losses [K] of all tasks, unweighted, as they are before that step; NaN, or None in a sequence of
                floating-point scalars, for a task that is absent. A loss that is not positive or not finite measures nothing.
            skipped: bool scalar: whether the step of the visit before was skipped, so that these losses are not its effect.

        Returns:
            float64 [K], the losses, NaN where absent; and a bool scalar, whether one of the group's is not finite. Both on the
            matrix's device.

        Raises:
            ValueError: a group that is empty or names a task twice or one that does not exist, or other than K losses.
        """
        tasks, last = list(group), self._last
        if not tasks or len(set(tasks)) != len(tasks) or min(tasks) < 0 or max(tasks) >= self.num_tasks:
            raise ValueError(f"group is {tasks}; pass at least one index from 0 to {self.num_tasks - 1}, each once.")
        if len(losses) != self.num_tasks or (isinstance(losses, Tensor) and losses.dim() != 1):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else (len(losses),)
            raise ValueError(f"losses has shape {shape}; {self.num_tasks} tasks take [{self.num_tasks}].")
        credited = last if self.credit == "previous" or not last else tasks
        scalars = losses.unbind() if isinstance(losses, Tensor) else losses
        try:
            with torch._C._AutoDispatchBelowAutograd():
                result: tuple[Tensor, Tensor] = torch.ops.mtlkernels.proximal_affinity_.default(
                    self.matrix, self.previous, scalars, credited, tasks, self.decay, skipped
                )
        except (RuntimeError, TypeError) as error:
            for k, loss in enumerate(scalars):
                if loss is not None and not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
                    raise ValueError(f"losses[{k}] is {loss!r}; pass a floating-point scalar tensor, or None.") from error
            raise
        last[:] = tasks
        return result

    @property
    def similarity(self) -> Tensor:
        """float64 [K, K] on the host: what groups are formed from, :attr:`matrix` normalised, the mean with its transpose.

        A task whose own effect was never measured (diagonal entry not above rounding of its column) has a column of zeros.
        """
        return proximal_similarity(torch.from_numpy(host_matrix(self.matrix, "matrix")), self.normalize == "released")[0]

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
        matrix = self.matrix.to("cpu", torch.float64)
        labels, converged = torch.ops.mtlkernels.proximal_groups.default(
            matrix, self.normalize == "released", *checked_options(**options)
        )
        if bool(converged):
            return groups_of_labels(labels.tolist())
        host_matrix(matrix, "matrix")  # raises where it is not finite
        return [[task] for task in range(self.num_tasks)] if previous is None else [list(group) for group in previous]

    def extra_repr(self) -> str:
        return f"{self.num_tasks}, decay={self.decay}, credit={self.credit!r}, normalize={self.normalize!r}"
