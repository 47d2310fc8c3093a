"""What combines task gradients element by element, in the place of a weighting."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Gradients, _rows


class Elementwise(torch.nn.Module):
    """Combines task gradients element by element, where a :class:`Weighting` gives each gradient one weight.

    Subclasses implement :meth:`combine`. One read of the gradients and no Gram.
    """

    def forward(
        self,
        grads: Gradients,
        out: Sequence[Tensor | None] | None = None,
        *,
        active: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> list[Tensor | None]:
        """The update.

        Args:
            grads: K sequences of N tensors, as in :func:`mtlkernels.gram`; None counts as zero.
            out: N buffers for the result, as in :func:`mtlkernels.combine`.
            active: bool [K] on the gradients' device; a task that is not active has no part. Never read on the host. None: all
                tasks.
            seed: int64, one element, for random methods; the others ignore it. None: drawn from the method's generator.

        Returns:
            N tensors with the dtype and layout of the gradients, None where every task is None.

        Raises:
            ValueError: as in :func:`mtlkernels.combine`, or ``active`` or ``seed`` does not fit.
            RuntimeError: an input requires grad; pass ``.detach()``ed tensors.
        """
        rows = _rows(grads, "grads")
        if active is not None and (active.dtype != torch.bool or active.shape != (len(rows),)):
            raise ValueError(
                f"active is {active.dtype} of shape {tuple(active.shape)}; {len(rows)} tasks take bool [{len(rows)}], for "
                "example active != 0."
            )
        if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64):
            raise ValueError(
                f"seed is {seed.dtype} of shape {tuple(seed.shape)}; pass one int64, for example torch.tensor([0])."
            )
        return self.combine(rows, out, active, seed)

    def combine(
        self,
        rows: Sequence[Sequence[Tensor | None]],
        out: Sequence[Tensor | None] | None,
        active: Tensor | None,
        seed: Tensor | None,
    ) -> list[Tensor | None]:
        """The method itself, with the arguments of :meth:`forward`; ``rows`` are K lists of N tensors."""
        raise NotImplementedError(f"{type(self).__name__} must implement combine(rows, out, active, seed).")
