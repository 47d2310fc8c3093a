"""Large losses get more weight."""

from torch import Tensor

from .base import LossWeighting


class BMTL(LossWeighting):
    """Balanced multi-task learning (Liang and Zhang 2020): the gradient of sum_k h(L_k), h increasing and convex.

    h(z) = T exp(z / T), so that w_k = exp(L_k / T): 1 at a loss of 0 and more for larger losses. The paper's own h was not at
    hand; the exponential, its scale and the default are this package's choice.

    Args:
        temperature: T, in units of the losses; they should be of its size or below.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; pass a positive number.")
        self.temperature = float(temperature)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        return (losses / self.temperature).exp()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
