"""Small models and weightings that the tests of the optimizer layer share."""

import io

import torch
from torch import Tensor, nn

from mtlkernels.weightings import Weighting

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """A shared encoder of four tensors, a linear head per task."""

    def __init__(self, tasks: tuple[str, ...] = TASKS, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        return {task: head(z) for task, head in self.heads.items()}

    def head_parameters(self) -> dict[str, list[Tensor]]:
        return {task: list(head.parameters()) for task, head in self.heads.items()}


def batch(step: int = 0) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def task_losses(model: nn.Module, step: int = 0, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Losses with different targets, so that the task gradients disagree."""
    outputs = model(batch(step).to(next(model.parameters()).dtype))
    targets = {task: float(i - 1) for i, task in enumerate(outputs)}
    return {
        task: (output - targets[task]).square().mean() for task, output in outputs.items() if tasks is None or task in tasks
    }


def grads_of(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def values_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def load_checkpoint(
    twin: nn.Module, resumed: torch.optim.Optimizer, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Loads what a file with the states of a model and its optimizer holds into another model and its own."""
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    for loads, state in zip((twin, resumed), torch.load(file, weights_only=True), strict=True):
        loads.load_state_dict(state)


def assert_equal(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Equal bits, None where None."""
    assert [a is None for a in actual] == [e is None for e in expected]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True) if a is not None)


def assert_near(actual: list[Tensor | None], expected: list[Tensor | None], dtype: torch.dtype = torch.float32) -> None:
    """Equal up to the rounding of a few sums of tens of terms in ``dtype``."""
    assert [a is None for a in actual] == [e is None for e in expected]
    eps = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, e, rtol=16 * eps, atol=16 * eps * max(float(e.abs().max()), 1e-3))


class Ones(Weighting):
    """w_k = 1: the gradient of the sum of the losses."""

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.ones_like(gram[..., 0])


class Given(Weighting):
    """Weights that the test chose."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values, dtype=torch.float64), persistent=False)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return self.values.expand(gram.shape[:-1]).clone()


class Tracking(Weighting):
    """1 / running norm of each task, with a buffer that takes its shape in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", None)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        before = torch.ones_like(norms) if self.norms is None else self.norms
        after = 0.5 * before + 0.5 * norms
        self.norms = after if active is None else torch.where(active, after, before)
        self.calls += 1
        return 1 / self.norms
