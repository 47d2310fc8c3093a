"""Affinity propagation. The kernel is in csrc/common/kxk_affinity.h."""

import torch
from torch import Tensor

from .._library import define

TIE = 1e-12
"""By how much of the largest similarity the first task is a better exemplar than the last: what decides between equal ones."""


def _perturbed(similarity: Tensor) -> Tensor:
    """Similarities [B, K, K] to later tasks a little lower, so that equal choices go to the first."""
    size = similarity.shape[-1]
    later = torch.arange(size, dtype=torch.float64, device=similarity.device) / size
    return similarity - TIE * similarity.abs().flatten(1).amax(-1)[:, None, None] * later


def _nearest(similarity: Tensor, exemplar: Tensor) -> Tensor:
    """int64 [B, K]: the most similar exemplar of each task, an exemplar's own index; -1 where there is none."""
    task = torch.arange(exemplar.shape[-1], device=exemplar.device)
    best = torch.where(exemplar.unsqueeze(-2), similarity, -torch.inf).max(-1, keepdim=True).values
    hit = exemplar.unsqueeze(-2) & (similarity == best)
    labels = torch.where(hit, task, len(task)).min(-1).values
    labels = torch.where(exemplar, task, labels)
    return torch.where(exemplar.any(-1, keepdim=True), labels, -1)


def _refined(similarity: Tensor, labels: Tensor) -> Tensor:
    """bool [B, K]: of each cluster the member with the largest sum of the members' similarities to it."""
    together = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    sums = torch.where(together, similarity, 0.0).sum(-2)
    best = torch.where(together, sums.unsqueeze(-2), -torch.inf).max(-1, keepdim=True).values
    task = torch.arange(labels.shape[-1], device=labels.device)
    first = torch.where(together & (sums.unsqueeze(-2) == best), task, len(task)).min(-1).values
    return first == task


def affinity_propagation_reference(
    similarity: Tensor, preference: float | None, damping: float, max_iter: int, convergence_iter: int
) -> tuple[Tensor, Tensor]:
    """Exemplars of a batch of similarity matrices, as :func:`affinity_propagation` describes them.

    With S the similarities, the preference on their diagonal, R and A from 0, each message damped:
    R(i,k) <- S(i,k) - max_{k' != k} (A(i,k') + S(i,k')); A(i,k) <- min(0, R(k,k) + sum_{i' not i, k} max(0, R(i',k)));
    A(k,k) <- sum_{i' != k} max(0, R(i',k)). Exemplars: A(k,k) + R(k,k) > 0. Off the CPU all ``max_iter`` iterations run, so
    that no value is read on the host.
    """
    size, device = similarity.shape[-1], similarity.device
    if similarity.numel() == 0:
        labels = torch.zeros(similarity.shape[:-1], dtype=torch.int64, device=device)
        return labels, torch.ones(similarity.shape[:-2], dtype=torch.bool, device=device)
    flat = similarity.reshape(-1, size, size)
    labels = torch.zeros(flat.shape[:-1], dtype=torch.int64, device=device)
    task = torch.arange(size, device=device)
    diagonal = torch.eye(size, dtype=torch.bool, device=device)
    if preference is None:
        ordered = flat.flatten(1).sort(-1).values
        pivot = (ordered[:, (size * size - 1) // 2] + ordered[:, size * size // 2]) / 2
        pivot = torch.where(ordered.isnan().any(-1), torch.nan, pivot)
    else:
        pivot = torch.full_like(flat[:, 0, 0], preference)
    raw = torch.where(diagonal, pivot[:, None, None], flat)
    finite = raw.isfinite().flatten(1).all(-1)
    first = flat[:, 0, 1] if size > 1 else pivot
    equal = finite & (diagonal | (flat == first[:, None, None])).flatten(1).all(-1)
    matrix = _perturbed(torch.where(finite[:, None, None], raw, 0.0))

    responsibility, availability = torch.zeros_like(matrix), torch.zeros_like(matrix)
    exemplar = torch.zeros_like(labels, dtype=torch.bool)
    unchanged, converged = torch.zeros_like(labels[:, 0]), equal | ~finite
    for iteration in range(max_iter):
        total = availability + matrix
        best = total.max(-1, keepdim=True)
        at = task == best.indices
        second = torch.where(at, -torch.inf, total).max(-1, keepdim=True).values
        target = matrix - torch.where(at, second, best.values)
        new_responsibility = damping * responsibility + (1 - damping) * target
        positive = torch.where(diagonal, new_responsibility, new_responsibility.clamp(min=0))
        support = positive.sum(-2, keepdim=True) - positive
        new_availability = damping * availability + (1 - damping) * torch.where(diagonal, support, support.clamp(max=0))
        now = (new_responsibility + new_availability).diagonal(dim1=-2, dim2=-1) > 0
        changes = (now != exemplar).any(-1) if iteration else torch.ones_like(converged)
        running = ~converged
        responsibility = torch.where(running[:, None, None], new_responsibility, responsibility)
        availability = torch.where(running[:, None, None], new_availability, availability)
        exemplar = torch.where(running[:, None], now, exemplar)
        unchanged = torch.where(changes, 1, unchanged + 1)
        if iteration >= convergence_iter:
            converged = converged | ((unchanged >= convergence_iter) & now.any(-1))
        if device.type == "cpu" and bool(converged.all()):
            break
    labels = _nearest(matrix, exemplar)
    labels = torch.where(exemplar.any(-1, keepdim=True), _nearest(matrix, _refined(matrix, labels)), -1)
    alone = torch.where((pivot > first).unsqueeze(-1), task, torch.zeros_like(task))
    labels = torch.where(equal.unsqueeze(-1), alone, labels)
    labels = torch.where(finite.unsqueeze(-1), labels, -1)
    return labels.view(similarity.shape[:-1]), (converged & finite).view(similarity.shape[:-2])


define(
    "affinity_propagation(Tensor similarity, float? preference, float damping, int max_iter, int convergence_iter)"
    " -> (Tensor, Tensor)",
    fake=lambda similarity, *_: (
        similarity.new_empty(similarity.shape[:-1], dtype=torch.int64),
        similarity.new_empty(similarity.shape[:-2], dtype=torch.bool),
    ),
    reference=affinity_propagation_reference,
)


def affinity_propagation(
    similarity: Tensor,
    *,
    preference: float | None = None,
    damping: float = 0.5,
    max_iter: int = 200,
    convergence_iter: int = 50,
) -> tuple[Tensor, Tensor]:
    """Clusters by affinity propagation (Frey and Dueck 2007), as scikit-learn's but without a random number.

    Equal similarities are told apart in their last bit by a fixed number of each pair, so that equal inputs give equal labels
    in every run and on every device. Where all similarities are equal nothing iterates: one cluster, or every task its own
    where the preference is larger.

    Args:
        similarity: float64 [..., K, K], row i: how well each task would represent task i. The diagonal counts in the median
            only.
        preference: how willing each task is to be an exemplar, in units of the similarity; more gives more clusters. None: the
            median of all K^2 similarities.
        damping: from 0.5 to below 1, how much of a message stays.
        max_iter: iterations at most. Off the CPU all of them run.
        convergence_iter: for how many iterations the exemplars must stay the same. From ``max_iter`` on nothing converges.

    Returns:
        int64 [..., K], the exemplar of each task, equal within a cluster; -1 where no task is an exemplar. And bool [...],
        whether it has converged; where not, the labels are those of the last iteration. A matrix that is not finite: -1 and
        False.

    Raises:
        ValueError: an argument out of range.
    """
    if not isinstance(similarity, Tensor) or similarity.dim() < 2 or similarity.shape[-1] != similarity.shape[-2]:
        raise ValueError(f"similarity is {_described(similarity)}; pass a tensor [..., K, K].")
    options = checked_options(preference, damping, max_iter, convergence_iter)
    matrix = similarity.detach().double()
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor] = torch.ops.mtlkernels.affinity_propagation.default(matrix, *options)
    return result


def checked_options(
    preference: float | None = None, damping: float = 0.5, max_iter: int = 200, convergence_iter: int = 50
) -> tuple[float | None, float, int, int]:
    """The options of :func:`affinity_propagation`; a ``ValueError`` for one out of range."""
    if not 0.5 <= damping < 1:
        raise ValueError(f"damping is {damping}; pass a number from 0.5 to below 1.")
    for name, value in (("max_iter", max_iter), ("convergence_iter", convergence_iter)):
        if value < 1:
            raise ValueError(f"{name} is {value}; pass 1 or more.")
    return preference, damping, max_iter, convergence_iter


def _described(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
