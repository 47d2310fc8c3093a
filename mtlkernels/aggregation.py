"""Task gradients to one update direction in a call: Gram, weights, combination."""

from collections.abc import Sequence
from typing import Literal, cast

from torch import Tensor

from .ops import Gradients, combine, gram
from .weightings import Weighting, as_weighting


def aggregate(
    grads: Gradients,
    weighting: str | Weighting,
    out: Sequence[Tensor | None] | None = None,
    *,
    per: Literal["model", "tensor"] = "model",
    losses: Tensor | None = None,
) -> list[Tensor | None]:
    """One update direction from task gradients: ``combine(grads, weighting(gram(grads)), out)``.

    Two reads of the gradients and one write of the result; nothing returns to the host.

    Args:
        grads: K sequences of N tensors, as in :func:`mtlkernels.gram`.
        weighting: a :class:`Weighting`, or its registry string.
        out: N buffers for the result, as in :func:`mtlkernels.combine`.
        per: one problem for the whole ``"model"``, or an independent one for each ``"tensor"``.
        losses: [K], for weightings that read them.

    Returns:
        N tensors, None where every task is None.

    Raises:
        ValueError: as in :func:`mtlkernels.gram` and :func:`mtlkernels.combine`, an unknown weighting, or ``per``.
    """
    if per not in ("model", "tensor"):
        raise ValueError(f'per is {per!r}; pass "model" or "tensor".')
    return combine(grads, as_weighting(weighting)(cast(Tensor, gram(grads, per=per)), losses=losses), out)
