"""Any weighting, smoothed over the steps."""

import torch
from torch import Tensor

from ..solvers.common import finite_problems
from .base import Weighting
from .state import StatefulWeighting


class CRMOGM(StatefulWeighting):
    """CR-MOGM (Zhou et al. 2022): a moving average of another method's weights, lam <- alpha lam + (1 - alpha) what.

    A task's first weight is what the method gave it, or ``initial_weights``. Weights or Grams that are not finite give NaN and
    leave the average as it was, and so does a task that is not active leave its own. The state is ``average`` [..., K].

    Args:
        weighting: the method, a :class:`Weighting` or its registry string.
        alpha: share of the previous average, from 0 (no smoothing) to 1 (weights stay what they were first). The paper lets it
            approach 1 as the learning rate falls, for example 1 - lr / lr_0: set ``weighting.alpha`` between steps.
        initial_weights: K finite numbers to begin with.

    Raises:
        ValueError: ``alpha`` is not from 0 to 1, ``initial_weights`` is not K finite numbers, or an unknown ``weighting``.
    """

    average: Tensor

    def __init__(self, weighting: str | Weighting, alpha: float = 0.9, initial_weights: Tensor | None = None) -> None:
        super().__init__()
        from . import as_weighting  # the registry lists this class

        self.weighting = as_weighting(weighting)
        self.alpha = alpha
        if initial_weights is not None and not (initial_weights.dim() == 1 and bool(initial_weights.isfinite().all())):
            raise ValueError(f"initial_weights is {initial_weights}; pass a tensor of one finite number per task.")
        self.add_state("average", torch.nan if initial_weights is None else initial_weights)  # NaN: no weight yet

    @property
    def loss_only(self) -> bool:  # type: ignore[override]
        return self.weighting.loss_only

    @property
    def layer(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.weighting.layer

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.weighting.observes

    def observe(self, losses: Tensor) -> None:
        self.weighting.observe(losses)

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; pass a number from 0 to 1.")
        self._alpha = float(alpha)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        found = self.weighting(gram, active=active, losses=losses, seed=seed)
        previous = self.read_state("average", found.shape, found.device)
        average = torch.where(previous.isnan(), found, self.alpha * previous + (1 - self.alpha) * found)
        usable = (finite_problems(gram) & found.isfinite().all(-1)).unsqueeze(-1)
        counted = usable if active is None else usable & active
        self.write_state("average", torch.where(counted, average, previous))
        return torch.where(usable, average, torch.nan)

    def reset(self) -> None:
        """Forgets everything, the method's state included; the next call is the first."""
        super().reset()
        if isinstance(self.weighting, StatefulWeighting):
            self.weighting.reset()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
