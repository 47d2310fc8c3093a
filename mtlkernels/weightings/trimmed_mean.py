"""An element's mean gradient without the extreme ones."""

from collections.abc import Sequence

from torch import Tensor

from ..elementwise import trimmed_mean
from .elementwise import Elementwise


class TrimmedMean(Elementwise):
    """Coordinate-wise trimmed mean (Yin et al. 2018, Definition 2): of an element's gradients the extreme ones do not count.

    d = 1 / (K - 2 b) sum_{r = b}^{K - b - 1} g_(r), with an element's K gradients in ascending order, NaN last. Withstands up
    to b tasks whose gradients are corrupt, in each element and whichever they are; resolves no conflict. A task without a
    gradient of a tensor counts as zeros there; a task that is not active does not count.

    Args:
        trim: b, the number of the smallest and of the largest that are left out; K >= 2 b + 1. 0 gives the mean, (K - 1) / 2
            the median of an odd K.

    Raises:
        ValueError: a negative trim; in the call, one that leaves no task.
    """

    def __init__(self, trim: int = 1) -> None:
        super().__init__()
        if isinstance(trim, bool) or not isinstance(trim, int) or trim < 0:
            raise ValueError(f"trim is {trim!r}; pass how many tasks to leave out on each side, an integer from 0 on.")
        self.trim = trim

    def combine(
        self,
        rows: Sequence[Sequence[Tensor | None]],
        out: Sequence[Tensor | None] | None,
        active: Tensor | None,
        seed: Tensor | None,
    ) -> list[Tensor | None]:
        return trimmed_mean(rows, self.trim, active, out)
