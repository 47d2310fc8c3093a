"""Task gradients to one update direction in a call: Gram, weights, combination."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .checks import check_lengths
from .granularity import KINDS, Problems, groups_of
from .ops import Gradients, _rows
from .reference import Granularity, like
from .weightings import Elementwise, MemoryWeighting, Weighting, as_method
from .weightings.cross.base import cross_of, of_both, takes_cross


def aggregate(
    grads: Gradients,
    weighting: str | Weighting | Elementwise,
    out: Sequence[Tensor | None] | None = None,
    *,
    per: Granularity | Mapping[str, Sequence[int]] = "model",
    losses: Tensor | None = None,
    other: Gradients | None = None,
) -> list[Tensor | None]:
    """One update direction from task gradients: ``combine(grads, weighting(gram(grads)), out)``.

    Two reads of the gradients and one write of the result, whatever the number of problems; nothing returns to the host. A
    weighting with a memory of gradients reads that twice, too, and writes it once. Of an :class:`Elementwise` method
    ``weighting(grads, out)``, in one read.

    Args:
        grads: K sequences of N tensors, as in :func:`mtlkernels.gram`.
        weighting: a :class:`Weighting`, an :class:`Elementwise` method, or its registry string.
        out: N buffers for the result, as in :func:`mtlkernels.combine`.
        per: one problem for the whole ``"model"``, or an independent one for each ``"tensor"``, for each ``"channel"`` (row of
            a tensor viewed as [out, rest]), or for each group of tensors, {name: indices of tensors}. Tensors in no group form
            one more, the last. An elementwise method has one for each element: ``"model"`` only.
        losses: [K], for weightings that read them.
        other: the gradients of a second, independent batch, for the weightings that take a cross Gram (``"modo"``,
            ``"sdmgrad"``): the update is the weighted mean of both batches' gradients.

    Returns:
        N tensors, None where every task is None.

    Raises:
        ValueError: as in :func:`mtlkernels.gram` and :func:`mtlkernels.combine`, an unknown weighting, ``per``, or ``other``.
    """
    rows = _rows(grads, "grads")
    weighting = as_method(weighting)
    if isinstance(weighting, (Elementwise, MemoryWeighting)) and other is None:
        if per != "model":
            raise ValueError(f'{type(weighting).__name__} takes the model as a whole; pass per="model".')
        if isinstance(weighting, MemoryWeighting):
            return weighting.aggregate(rows, out, losses)
        result: list[Tensor | None] = weighting(rows, out)
        return result
    crosses = takes_cross(weighting)
    if crosses != (other is not None):
        name = type(weighting).__name__
        raise ValueError(
            f"{name} takes the gradients of two independent batches; pass other=gradients of the second."
            if crosses
            else f"other is given, but {name} takes one batch; leave it out."
        )
    if other is not None:
        num_tasks, rows = len(rows), [*rows, *_rows(other, "other")]
        names = [f"{argument}[{k}]" for argument in ("grads", "other") for k in range(num_tasks)]
        if len(rows) != 2 * num_tasks:
            raise ValueError(f"other lists {len(rows) - num_tasks} tasks, grads list {num_tasks}; pass as many of both.")
        check_lengths(rows, names=names)
    if not isinstance(per, Mapping) and per not in KINDS:
        raise ValueError(f'per is {per!r}; pass "model", "tensor", "channel" or {{name: tensor indices}}.')
    # Only independent problems ask what the gradients are of; small models notice that.
    models = [] if per == "model" else [like(column) for column in zip(*rows, strict=True)]
    problems = Problems(groups_of(per, len(models)) if isinstance(per, Mapping) else per, models)
    gram = problems.gram(rows)
    weights = of_both(weighting(cross_of(gram), losses=losses)) if crosses else weighting(gram, losses=losses)
    if weights.requires_grad or torch.compiler.is_compiling():
        return problems.combine(rows, weights, out)
    with torch.no_grad():  # none of the gradients requires grad, or there were no Gram: a small model notices a second look
        return problems.combine(rows, weights, out)
