"""Small models with task norms, their closures, and the plain definition of both phases, for the tests of task priority."""

import copy
from collections.abc import Callable

import torch
from multitask_models import assert_equal
from torch import Tensor, nn

import mtlkernels as mtl

TASKS = ("a", "b", "c")


class ConvNet(nn.Module):
    """A shared encoder of two convolutions with batch norms and a plain linear layer; a linear head for each task."""

    def __init__(self, tasks: tuple[str, ...] = TASKS, seed: int = 0, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(
            nn.Conv2d(2, width, 3, bias=False),  # one before a batch norm has no gradient but rounding
            nn.BatchNorm2d(width),
            nn.Tanh(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * width, 5),
            nn.Tanh(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in tasks})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](self.encoder(x))


def batch(step: int = 0) -> Tensor:
    return torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(step))


def task_loss(model: nn.Module, task: str, step: int = 0) -> Tensor:
    """Losses with different targets, so that the task gradients disagree."""
    x = batch(step).to(next(model.parameters()).dtype)
    return (model(x, task) - float(ord(task) - ord("b"))).square().mean()


def closures(model: nn.Module, step: int = 0, tasks: tuple[str, ...] = TASKS) -> dict[str, Callable[[], Tensor]]:
    return {task: lambda task=task: task_loss(model, task, step) for task in tasks}


def task_net(dtype: torch.dtype = torch.float32, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> ConvNet:
    """A net whose norms differ from task to task, so that its channels have different top tasks."""
    model = ConvNet(tasks, seed).to(dtype)
    mtl.nn.to_task_norms(model.encoder, tasks)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, norm in mtl.nn.task_norms(model):
            for scale in norm.weight:
                scale.copy_(1 + 0.5 * torch.randn(scale.shape, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=generator))
    return model


class Separate(nn.Module):
    """The same net with K torch batch norms in each place, as users write it without this package."""

    def __init__(self, model: ConvNet) -> None:
        super().__init__()
        self.tasks = model.encoder[1].tasks
        self.layers = nn.ModuleList()
        for module in model.encoder:
            if isinstance(module, mtl.nn.TaskNorm):
                copies = [mtl.nn.from_task_norms(copy.deepcopy(module), task) for task in self.tasks]
                self.layers.append(nn.ModuleList(copies))
            else:
                self.layers.append(copy.deepcopy(module))
        self.heads = copy.deepcopy(model.heads)

    def forward(self, x: Tensor, task: str) -> Tensor:
        for layer in self.layers:
            x = layer[self.tasks.index(task)](x) if isinstance(layer, nn.ModuleList) else layer(x)
        return self.heads[task](x)

    def norm_pairs(self) -> list[tuple[Tensor, nn.ModuleList]]:
        """Weight of each convolution and the K norms behind it."""
        return [
            (conv.weight, norms)
            for conv, norms in zip(self.layers, list(self.layers)[1:], strict=False)
            if isinstance(norms, nn.ModuleList)
        ]


def assert_same_model(model: ConvNet, plain: Separate) -> None:
    """Equal bits of every parameter and statistic."""
    for ours, theirs in zip(model.encoder, plain.layers, strict=True):
        if isinstance(theirs, nn.ModuleList):
            for k, norm in enumerate(theirs):
                assert_equal([ours.weight[k], ours.bias[k]], [norm.weight, norm.bias])
                assert_equal([ours.running_mean[k], ours.running_var[k]], [norm.running_mean, norm.running_var])
                assert ours.num_batches_tracked[k] == norm.num_batches_tracked
        else:
            assert_equal(list(ours.parameters()), list(theirs.parameters()))
    assert_equal(list(model.heads.parameters()), list(plain.heads.parameters()))


def plain_top(weight: Tensor, norms: nn.ModuleList) -> list[int]:
    """Top task of every channel by Eq. 4, 6, 7 and 10, number by number."""
    strengths = []
    for norm in norms:
        row = []
        for p in range(weight.shape[0]):
            square = sum(float(w) ** 2 for w in weight[p].detach().flatten())
            row.append(square * norm.weight[p].item() ** 2 / (norm.running_var[p].item() + 1e-5))
        strengths.append([s / sum(row) for s in row])
    return [max(range(len(norms)), key=lambda i: (strengths[i][p], -i)) for p in range(weight.shape[0])]


def plain_combine(grads: list[Tensor], top: list[int], skip_degenerate: bool = True) -> Tensor:
    """Algorithm 1's double loop over reference task and other task, on the channels of each group."""
    if skip_degenerate and len(set(top)) == 1:
        return sum(grads)
    grads = [g.clone() for g in grads]
    for i in range(len(grads)):
        group = [p for p, task in enumerate(top) if task == i]
        if not group:
            continue
        reference = grads[i][group].flatten()
        for j in range(len(grads)):
            other = grads[j][group].flatten()
            dot = reference @ other
            if j != i and dot < 0:
                projected = other - dot / (reference @ reference) * reference
                grads[j][group] = projected.view_as(grads[j][group])
    return sum(grads)


def plain_phase1(model: Separate, optimizer: torch.optim.Optimizer, step: int, weights: dict[str, float] | None = None) -> None:
    for task in model.tasks:
        optimizer.zero_grad()
        ((weights or {}).get(task, 1.0) * task_loss(model, task, step)).backward()
        optimizer.step()


def plain_phase2(
    model: Separate,
    optimizer: torch.optim.Optimizer,
    step: int,
    weights: dict[str, float] | None = None,
    max_norm: float | None = None,
    skip_degenerate: bool = True,
) -> None:
    grads = []
    for task in model.tasks:
        optimizer.zero_grad()
        ((weights or {}).get(task, 1.0) * task_loss(model, task, step)).backward()
        grads.append([p.grad for p in model.parameters()])
    layers = {id(weight): norms for weight, norms in model.norm_pairs()}
    for n, param in enumerate(model.parameters()):
        rows = [g[n] for g in grads if g[n] is not None]
        norms = layers.get(id(param))
        param.grad = sum(rows) if norms is None else plain_combine(rows, plain_top(param, norms), skip_degenerate)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
