"""What a loss-only weighting is: weights from the losses, so that one backward pass of their weighted sum is enough."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..state import StatefulWeighting


class LossWeighting(StatefulWeighting):
    """Weights [K] from the losses; the update is the gradient of sum_k w_k L_k, heads included.

    :class:`MultiTaskOptimizer` takes one backward pass a step. Anywhere else it is a :class:`Weighting` that must be given
    ``losses``; every problem of a batch of Grams gets the same weights. A loss that is not finite gives NaN weights and leaves
    the state as it is; a task that is not active has weight 0 and leaves its own.

    Subclasses implement :meth:`of_losses`. One that reads gradient norms names the parameters they are of in ``layer``: the
    Gram is then that of the tasks' gradients with respect to these alone.
    """

    loss_only = True

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        if losses is None:
            raise ValueError(f"losses is None, from which {type(self).__name__} has its weights; pass losses=, a tensor [K].")
        num_tasks = gram.shape[-1]
        losses = losses.to(gram.device)
        mask = losses.new_ones(num_tasks, dtype=torch.bool) if active is None else active.reshape(-1, num_tasks).any(0)
        usable = (losses.isfinite() | ~mask).all()
        found = self.of_losses(torch.where(mask & usable, losses, 1.0), mask & usable, gram, seed)
        return torch.where(usable, found, torch.nan).expand(gram.shape[:-1])

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        """The method itself.

        Args:
            losses: float64 [K], finite; 1 where not active.
            active: bool [K]: tasks that count. None of them does where a loss is not finite; the result is then ignored.
            gram: float64 [..., K, K]; [K, K] of ``layer`` for methods that have one.
            seed: int64, one element, or None.

        Returns:
            float64 [K]; what it says of inactive tasks is ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement of_losses(losses, active, gram, seed).")

    def read(self, name: str, like: Tensor) -> Tensor:
        """A copy of a state of K numbers."""
        return self.read_state(name, like.shape, like.device).clone()

    def write(self, name: str, value: Tensor, counted: Tensor) -> Tensor:
        """Replaces those elements of a state of K numbers that are ``counted``; the state."""
        after = torch.where(counted, value, self.read(name, value))
        self.write_state(name, after)
        return after


class LearnedWeighting(LossWeighting):
    """A loss-only weighting with K learned numbers, which Adam moves once a call, after the weights were taken from them.

    The state is the numbers ``learned``, Adam's moments ``first`` and ``second`` and its ``steps``, all [K].

    Args:
        lr: Adam's learning rate for the numbers.
        initial: what each of them starts from.
        weight_decay: Adam's, added to the gradient.

    Raises:
        ValueError: ``lr`` or ``weight_decay`` is negative.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, lr: float, initial: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; pass a finite number, 0 or more.")
        self.lr, self.weight_decay = float(lr), float(weight_decay)
        self.add_state("learned", initial)
        for name in ("first", "second", "steps"):
            self.add_state(name, 0.0)

    def descend(self, gradient: Tensor, counted: Tensor) -> Tensor:
        """One Adam step of the ``counted`` numbers against ``gradient`` [K]; all numbers after it."""
        learned = self.read("learned", gradient)
        gradient = gradient + self.weight_decay * learned
        steps = self.write("steps", self.read("steps", gradient) + 1, counted)
        moments = []
        for name, beta, value in zip(("first", "second"), self.BETAS, (gradient, gradient.square()), strict=True):
            moment = self.write(name, torch.lerp(value, self.read(name, value), beta), counted)
            moments.append(moment / (1 - beta ** steps.clamp(min=1)))
        return self.write("learned", learned - self.lr * moments[0] / (moments[1].sqrt() + self.EPS), counted)

    def extra_repr(self) -> str:
        return f"lr={self.lr}"


def parameters_of(layer: Iterable[Tensor], method: str) -> tuple[Tensor, ...]:
    """The parameters of a last shared layer; a ``ValueError`` unless there is one and each is a tensor."""
    params = (layer,) if isinstance(layer, Tensor) else tuple(layer)
    if not params or not all(isinstance(p, Tensor) for p in params):
        raise ValueError(f"layer is {layer!r}; pass the parameters whose gradients {method} measures, as layer.parameters().")
    return params


def positive_vector(value: object, name: str) -> Tensor:
    """float64, a number or [K]; a ``ValueError`` unless all of it is positive and finite."""
    vector = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if vector.dim() > 1 or not bool(((vector > 0) & vector.isfinite()).all()):
        raise ValueError(f"{name} is {value}; pass positive numbers, one for each task.")
    return vector


def for_tasks(value: Tensor, losses: Tensor, name: str) -> Tensor:
    """A number or [K] as [K] on the losses' device; a ``ValueError`` for another length."""
    if value.dim() == 1 and value.shape != losses.shape:
        raise ValueError(f"{name} lists {value.shape[0]} tasks, the losses are {losses.shape[0]}; pass one for each.")
    return value.to(losses.device).expand(losses.shape)
