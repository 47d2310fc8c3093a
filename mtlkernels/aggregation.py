"""Task gradients to one update direction in a call: Gram, weights, combination."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .granularity import KINDS, Problems, groups_of
from .ops import Gradients, _rows
from .reference import Granularity, like
from .weightings import MemoryWeighting, Weighting, as_weighting


def aggregate(
    grads: Gradients,
    weighting: str | Weighting,
    out: Sequence[Tensor | None] | None = None,
    *,
    per: Granularity | Mapping[str, Sequence[int]] = "model",
    losses: Tensor | None = None,
) -> list[Tensor | None]:
    """One update direction from task gradients: ``combine(grads, weighting(gram(grads)), out)``.

    Two reads of the gradients and one write of the result, whatever the number of problems; nothing returns to the host. A
    weighting with a memory of gradients reads that twice, too, and writes it once.

    Args:
        grads: K sequences of N tensors, as in :func:`mtlkernels.gram`.
        weighting: a :class:`Weighting`, or its registry string.
        out: N buffers for the result, as in :func:`mtlkernels.combine`.
        per: one problem for the whole ``"model"``, or an independent one for each ``"tensor"``, for each ``"channel"`` (row of
            a tensor viewed as [out, rest]), or for each group of tensors, {name: indices of tensors}. Tensors in no group form
            one more, the last.
        losses: [K], for weightings that read them.

    Returns:
        N tensors, None where every task is None.

    Raises:
        ValueError: as in :func:`mtlkernels.gram` and :func:`mtlkernels.combine`, an unknown weighting, or ``per``.
    """
    rows = _rows(grads, "grads")
    weighting = as_weighting(weighting)
    if isinstance(weighting, MemoryWeighting):
        if per != "model":
            raise ValueError(f'{type(weighting).__name__} has one memory and one set of weights; pass per="model".')
        return weighting.aggregate(rows, out, losses)
    models = [like(column) for column in zip(*rows, strict=True)]
    if isinstance(per, Mapping):
        problems = Problems(groups_of(per, len(models)), models)
    elif per in KINDS:
        problems = Problems(per, models)
    else:
        raise ValueError(f'per is {per!r}; pass "model", "tensor", "channel" or {{name: tensor indices}}.')
    return problems.combine(rows, weighting(problems.gram(rows), losses=losses), out)
