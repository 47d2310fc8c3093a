"""What a step for one task does to the others: from the Gram to first order, and measured by looking ahead."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .gradients import Source, task_gradients
from .ops import check_gram, cosine
from .optim.losses import Losses, order_losses
from .optim.undo import Snapshot
from .task_losses import stack_losses


def affinity(gram: Tensor, losses: Tensor, lr: float | Tensor) -> Tensor:
    """First-order look-ahead affinity: the relative fall of L_j under a gradient step of task i, lr <g_i, g_j> / L_j.

    TAG's inter-task affinity 1 - L_j(theta - lr g_i) / L_j(theta) (Fifty et al. 2021, equation 3) to first order in the
    learning rate; :func:`lookahead_affinity` measures it. Two elementwise ops: no kernel, no host read, differentiable.

    Args:
        gram: [..., K, K] of the shared parameters' gradients.
        losses: [K] or [..., K] of the Gram's leading dimensions, in the units of the losses whose gradients they are.
        lr: the learning rate; a scalar, or a tensor that broadcasts with the leading dimensions.

    Returns:
        [..., K, K] in the Gram's dtype; row i: the task that steps, column j: the task whose loss changes. NaN in the column of
        a loss that is not positive, where a relative fall means nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_gram(gram)
    if not isinstance(losses, Tensor) or losses.shape not in (gram.shape[:-1], gram.shape[-1:]):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"losses is {shape}; a Gram of shape {tuple(gram.shape)} takes a tensor {tuple(gram.shape[:-1])}.")
    rate = lr[..., None, None] if isinstance(lr, Tensor) and lr.dim() else lr
    losses = losses.to(gram.dtype)
    return gram * rate / torch.where(losses > 0, losses, torch.nan).unsqueeze(-2)


def curvature_bound(gram: Tensor) -> Tensor:
    """Multi-task curvature bounding measure (1 - cos^2) |g_i - g_j|^2 / |g_i + g_j|^2 (Yu et al. 2020, Theorem 2).

    Curvature above this share of the gradient's Lipschitz constant is what PCGrad's projection helps against. The curvature
    itself is no function of a Gram.

    Args:
        gram: [..., K, K].

    Returns:
        [..., K, K] in the Gram's dtype; 0 for parallel gradients, 1 where one of two gradients is 0, inf where two
        cancel (g_i = -g_j, or both are 0). NaN in the row and column of a gradient that is not finite.
    """
    angle = cosine(gram)
    square = gram.diagonal(dim1=-2, dim2=-1)
    left, right = square.unsqueeze(-1), square.unsqueeze(-2)
    largest = torch.maximum(left, right)
    safe = torch.where(largest > 0, largest, 1.0)
    total, inner = left / safe + right / safe, 2 * gram / safe
    apart, together = (total - inner).clamp(min=0), (total + inner).clamp(min=0)
    return torch.where(together == 0, torch.inf, (1 - angle) * (1 + angle) * apart / torch.where(together == 0, 1.0, together))


def lookahead_affinity(
    losses_fn: Callable[[], Losses],
    shared: Iterable[Tensor],
    lr: float,
    *,
    module: torch.nn.Module | None = None,
    gradients: Source = "autograd",
) -> Tensor:
    """Measured look-ahead affinity of TAG (Fifty et al. 2021, equation 3): Z_ij = 1 - L_j(theta - lr g_i) / L_j(theta).

    Takes a gradient step of each task on the shared parameters, evaluates all losses there, and goes back. K backward passes
    and K + 1 forward passes; every forward pass starts from the same random state, so that dropout is no part of the
    difference. Afterwards parameters, ``.grad``, the module's buffers (batch-norm statistics) and the random state are what
    they were to the bit, also when ``losses_fn`` raises.

    Args:
        losses_fn: returns the K losses of one batch, {task: scalar} or a sequence, from the parameters as they are. It runs
            once with and K times without grad.
        shared: the parameters that step.
        lr: the learning rate.
        module: the model, whose buffers the forward passes change; None: nothing but ``shared`` is put back.
        gradients: how gradients are obtained, as of :class:`mtlkernels.MultiTaskOptimizer`.

    Returns:
        float64 [K, K] on the losses' device, without a host read; row i: the task that stepped. NaN in the rows and columns of
        absent tasks, and in the column of a loss that is not positive.

    Raises:
        ValueError: losses that do not fit, or parameters that are no tensors.
    """
    params = list(shared)
    if not all(isinstance(p, Tensor) for p in params):
        raise ValueError("shared holds something that is no parameter; pass module.parameters().")
    live = [p for p in params if p.requires_grad]
    device = live[0].device if live else torch.device("cpu")
    with _put_back(live, module), torch.random.fork_rng([device] if device.type == "cuda" else []):
        random_state = _random_state(device)
        with torch.enable_grad():
            tasks, ordered = order_losses(losses_fn(), None)
        known = {id(p) for p in live}
        others = [] if module is None else [p for p in module.parameters() if p.requires_grad and id(p) not in known]
        inputs = [*live, *others] if gradients == "backward" else live  # so that the .grad of all of them is kept
        rows = [row[: len(live)] for row in task_gradients(ordered, [inputs] * len(tasks), gradients)]
        with torch.no_grad():
            before = stack_losses(ordered)
            base = torch.where(before > 0, before, torch.nan)
            values = [p.detach().clone() for p in live]
            effects = []
            for loss, row in zip(ordered, rows, strict=True):
                if loss is None:
                    effects.append(torch.full_like(before, torch.nan))
                    continue
                for param, value, grad in zip(live, values, row, strict=True):
                    param.copy_(value if grad is None else value - lr * grad)
                _set_random_state(device, random_state)
                effects.append(1 - stack_losses(_same_tasks(losses_fn(), tasks)) / base)
            return torch.stack(effects)


@contextmanager
def _put_back(params: list[Tensor], module: torch.nn.Module | None) -> Iterator[None]:
    before = Snapshot(params, torch.nn.Module() if module is None else module)
    values = [p.detach().clone() for p in params]
    try:
        yield
    finally:
        before.restore()
        with torch.no_grad():
            for param, value in zip(params, values, strict=True):
                param.copy_(value)


def _same_tasks(losses: Losses, tasks: tuple[object, ...]) -> list[Tensor | None]:
    ordered = [losses.get(task) for task in tasks] if isinstance(losses, dict) else list(losses)
    if len(ordered) != len(tasks) or len(losses) > len(tasks):
        raise ValueError(f"losses_fn returned {len(losses)} losses after {len(tasks)}; return the same tasks in every call.")
    return ordered


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
