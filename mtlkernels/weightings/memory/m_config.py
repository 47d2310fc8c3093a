"""ConFIG of momenta, which takes one task a step."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ... import ops
from ...reference import like
from ..config import ConFIG
from ..spectral import RANK_EPSILON
from .base import MemoryUpdate, MemoryWeighting, Rows, gram_after, widened

EPSILON = 1e-8
# Before, writes into a tensor of which an op has written other rows are lost in a graph.
TRACES = torch.torch_version.TorchVersion(torch.__version__) >= "2.14"


class MomentumConFIG(MemoryWeighting):
    """M-ConFIG (Liu et al. 2024): ConFIG of the tasks' momenta, over the root of its own second moment.

    The authors' ``PseudoMomentumOperator``: m_i <- beta1 m_i + (1 - beta1) g_i of active tasks; c is the :class:`ConFIG` of all
    m_i / (1 - beta1^t_i), active or not, t_i the steps of task i. With F = c (1 - beta1^t), t the calls since every task has
    been seen, the gradient that would have made this a momentum is h = (F - beta1 f) / (1 - beta1), f the last F. Then
    s <- beta2 s + (1 - beta2) h^2, and the update is c / (sqrt(s / (1 - beta2^t)) + 1e-8). While a task has not been seen, the
    update is 0, and momenta are kept.

    When to use: a step costs one backward pass if it has one task alone, round robin: ``step({task: loss})`` with ``tasks``,
    ``shared`` and ``heads`` given to ``MultiTaskOptimizer``. Use plain SGD with Adam's learning rate after it; heads get the
    gradient of their loss as it is, so that a head takes a parameter group with a rate of its own. In ``MultiTaskOptimizer``
    ``info.weights`` are of the m_i, ``info.norm`` is that of c with the heads' gradients, and ``max_norm`` clips it, before the
    second moment. A tensor that the tasks of a call do not touch has no update in it.

    The states are ``steps`` [K] and ``calls``, and in each ``memory.n`` [K + 2, ...] the momenta, s and f.

    Args:
        beta1, beta2: decay of first and second moments, from 0 to below 1; the authors' 0.9 and 0.999.
        preference, epsilon: as in :class:`ConFIG`.

    Raises:
        ValueError: an option out of its range, or ``preference`` of another number of tasks.
    """

    weighs_absent = True
    more_rows = 2
    steps: Tensor
    calls: Tensor

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        preference: Sequence[float] | Tensor | None = None,
        *,
        epsilon: float = RANK_EPSILON,
    ) -> None:
        super().__init__()
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; pass a number from 0 to below 1.")
        self.beta1, self.beta2 = float(beta1), float(beta2)
        self.config = ConFIG(preference, epsilon=epsilon)
        self.add_state("steps", 0.0)
        self.add_state("calls", 0.0)

    def decide(self, gram: Tensor, mask: Tensor, losses: Tensor | None, excess: Tensor | None) -> MemoryUpdate:
        steps = self.read_state("steps", mask.shape, gram.device) + mask
        scale = (1 - self.beta1) * mask.double()
        keep = 1 - scale
        seen = steps > 0
        correction = torch.where(seen, 1 / (1 - self.beta1 ** steps.clamp(min=1)), 0.0)
        moments = correction.unsqueeze(-1) * gram_after(gram, keep, scale) * correction
        weights = correction * self.config.weights(moments, None, None, None)
        self.write_state("steps", steps)
        self.write_state("calls", self.calls.to(gram.device) + (mask.any() & seen.all()))
        return MemoryUpdate(keep, scale, torch.where(seen.all(), weights, 0.0))

    def combine(
        self,
        update: MemoryUpdate,
        rows: Rows,
        memory: Rows,
        out: Sequence[Tensor | None] | None = None,
        loss_scale: Tensor | None = None,
        result_scale: Tensor | None = None,
    ) -> list[Tensor | None]:
        """As there, and the second moment of what is combined. One row each, in the dtype of the memories."""
        if torch.compiler.is_compiling() and not TRACES:
            raise ValueError(
                "torch before 2.14 traces MomentumConFIG wrongly; leave it out of the compiled graph, or update torch."
            )
        combined = super().combine(update, widened(rows), memory, None, loss_scale)
        moves = (update.scale != 0).any() & update.weights.isfinite().all()
        calls = self.calls.to(moves.device).clamp(min=1)  # 0 while c, s and f are 0
        for n, c in enumerate(combined):
            if c is None:
                continue
            second, first = (cast(Tensor, self._memory[n])[row] for row in (-2, -1))
            moment = c * (1 - self.beta1**calls).to(c.dtype)
            square = ((moment - self.beta1 * first) / (1 - self.beta1)).square()
            second.copy_(torch.where(moves, second.lerp(square, 1 - self.beta2), second))
            first.copy_(torch.where(moves, moment, first))
            value = c / ((second / (1 - self.beta2**calls).to(c.dtype)).sqrt() + EPSILON)
            value = value if result_scale is None else value * result_scale.to(c.dtype)
            combined[n] = value.to(cast(Tensor, like([row[n] for row in rows])).dtype)
        return combined if out is None else ops.combine([combined], calls.new_ones(1), out)

    def extra_repr(self) -> str:
        return f"beta1={self.beta1}, beta2={self.beta2}"
