"""An element's positive or its negative gradients, by chance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..elementwise import graddrop
from ..reference import device_of
from .elementwise import Elementwise
from .seeded import Seeded


class GradDrop(Seeded, Elementwise):
    """Gradient sign dropout (Chen et al. 2020, Algorithm 1): of an element's gradients, those of one sign, drawn at random.

    The positive ones with probability P = 1/2 (1 + sum_k g_k / sum_k |g_k|), else the negative ones, one draw for each
    element: d = sum_k (leak_k + (1 - leak_k) M_k) g_k, where M_k tells whether g_k has the sign that was drawn. Of the size of
    the summed gradients, which d is on average without a leak; with a leak of 1, always. Resolves conflicts within an element,
    gives no guarantee for the whole direction. An element with a gradient that is not finite is NaN.

    Random numbers are functions of a seed, the tensor's index in the list and the element's index in the tensor's logical
    order (:func:`mtlkernels.elementwise.graddrop`): the same, and so the same update to the last bit, on every backend.

    Args:
        leak: the share of what is dropped that comes through, in [0, 1]; one for all tasks, or one for each of K.
        generator: draws one seed per call, as :class:`~mtlkernels.weightings.seeded.Seeded` says.

    Raises:
        ValueError: a leak outside of [0, 1].
    """

    def __init__(self, leak: float | Sequence[float] = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        self.leak = float(leak) if isinstance(leak, (int, float)) else tuple(map(float, leak))
        values = [self.leak] if isinstance(self.leak, float) else self.leak
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"leak is {leak}; pass a number from 0 to 1, or one for each task.")

    def combine(
        self,
        rows: Sequence[Sequence[Tensor | None]],
        out: Sequence[Tensor | None] | None,
        active: Tensor | None,
        seed: Tensor | None,
    ) -> list[Tensor | None]:
        device = device_of(rows)
        seed = self.draw_seed(device) if seed is None else seed.to(device)
        return graddrop(rows, self._leak_of(len(rows), device), seed, active, out)

    def _leak_of(self, num_tasks: int, device: torch.device) -> Tensor:
        """float64 [K], filled on the device: a copy from the host would make it wait."""
        if isinstance(self.leak, float):
            return torch.full((num_tasks,), self.leak, dtype=torch.float64, device=device)
        if len(self.leak) != num_tasks:
            raise ValueError(f"leak has {len(self.leak)} values, there are {num_tasks} tasks; pass one each, or one for all.")
        return torch.cat([torch.full((1,), value, dtype=torch.float64, device=device) for value in self.leak])
