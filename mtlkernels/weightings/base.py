"""What a weighting is: a module that maps Gram matrices to task weights, on the Gram's device, without a host read."""

import torch
from torch import Tensor

from .. import solvers  # noqa: F401  defines the ops that the weightings call
from ..ops import check_gram


class Weighting(torch.nn.Module):
    """Maps Gram matrices of task gradients to weights, [..., K, K] -> [..., K].

    Subclasses implement :meth:`weights`. State lives in buffers, keyed by task index, so that it saves, loads and resumes.
    """

    loss_only: bool = False
    """Whether losses alone give the weights: one backward pass of the weighted losses, heads included, is the update."""
    layer: tuple[Tensor, ...] = ()
    """Parameters of which a loss-only method reads the Gram; empty where it reads none."""
    observes: bool = False
    """Whether :meth:`observe` learns from the losses of the last call's batch after the step."""

    def forward(
        self, gram: Tensor, *, active: Tensor | None = None, losses: Tensor | None = None, seed: Tensor | None = None
    ) -> Tensor:
        """Weights of the update sum_k w_k g_k.

        Args:
            gram: [..., K, K], float64 or float32.
            active: bool [K] or [..., K]; a task that is not active gets weight 0, changes no other weight and no state. A
                device tensor: it is never read on the host. None: all tasks.
            losses: [K], for methods that read them.
            seed: int64, one element, for random methods; the others ignore it. None: drawn from the method's generator.

        Returns:
            float64 [..., K].

        Raises:
            ValueError: ``gram`` is not [..., K, K], ``active``, ``losses`` or ``seed`` does not fit it, a method's own
                requirement is not met, or a subclass returned anything else than [..., K].
        """
        check_gram(gram)
        num_tasks = gram.shape[-1]
        gram = gram.detach().double()
        if losses is not None:
            if losses.shape != (num_tasks,):
                raise ValueError(f"losses has shape {tuple(losses.shape)}; a Gram of {num_tasks} tasks takes [{num_tasks}].")
            losses = losses.detach().double()
        if seed is not None and (seed.numel() != 1 or seed.dtype != torch.int64):
            raise ValueError(
                f"seed is {seed.dtype} of shape {tuple(seed.shape)}; pass one int64, for example torch.tensor([0])."
            )
        if active is None:
            return self._checked(self.weights(gram, None, losses, seed), gram)
        active = _check_active(active, gram)
        gram = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), gram, 0.0)
        return torch.where(active, self._checked(self.weights(gram, active, losses, seed), gram), 0.0)

    def observe(self, losses: Tensor) -> None:
        """Takes the losses [K] of the last call's batch at the new parameters; NaN where a task is absent."""

    def _checked(self, weights: Tensor, gram: Tensor) -> Tensor:
        name, shape = type(self).__name__, tuple(gram.shape[:-1])
        if not isinstance(weights, Tensor):
            raise ValueError(f"{name} returned a {type(weights).__name__} as weights; return a tensor of shape {shape}.")
        if weights.shape != shape:
            raise ValueError(
                f"{name} returned weights of shape {tuple(weights.shape)}; a Gram of shape {tuple(gram.shape)} takes {shape}."
            )
        return weights.double()

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        """The method itself.

        Args:
            gram: float64 [..., K, K]; rows and columns of inactive tasks are 0.
            active: bool [..., K] with the Gram's leading dimensions, or None.
            losses: float64 [K], or None.
            seed: int64, one element, or None.

        Returns:
            float64 [..., K]; what it says of inactive tasks is ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement weights(gram, active, losses, seed).")


def _check_active(active: Tensor, gram: Tensor) -> Tensor:
    shape, num_tasks = gram.shape[:-1], gram.shape[-1]
    if active.dtype != torch.bool:
        raise ValueError(f"active is {active.dtype}; pass a bool tensor, for example active != 0.")
    if active.shape not in (shape, (num_tasks,)):
        raise ValueError(
            f"active has shape {tuple(active.shape)}; a Gram of shape {tuple(gram.shape)} takes [{num_tasks}] or {list(shape)}."
        )
    return active.expand(shape)
