"""A model with batch norm, and the plain implementation of flatness-seeking steps that the optimizer is compared with."""

import torch
from multitask_models import TASKS, task_losses
from torch import Tensor, nn

from mtlkernels.weightings import Weighting


class NormNet(nn.Module):
    """A shared encoder with batch norm, a linear head per task."""

    def __init__(self, tasks: tuple[str, ...] = TASKS, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        return {task: head(z) for task, head in self.heads.items()}


def statistics_of(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


class Plain:
    """Perturb by hand, differentiate, subtract, aggregate twice: K x P matrices of everything, and copies of the parameters."""

    def __init__(
        self, model: nn.Module, loss: Weighting, flat: Weighting | None, pair: Weighting | None = None, aggregation="separate",
        rho=0.1, head_rho=None, adaptive=False, joint=False,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.flat, self.pair, self.aggregation = model, loss, flat, pair, aggregation
        self.rho, self.head_rho, self.adaptive, self.joint = rho, rho if head_rho is None else head_rho, adaptive, joint

    def backward(self, step: int = 0) -> list[Tensor]:
        """Fills ``.grad``; returns each task's perturbed parameters, one vector each."""
        model = self.model
        shared, seen, rows, sams, heads = list(model.encoder.parameters()), [], [], [], {}
        losses = task_losses(model, step)
        values = torch.stack([loss.detach() for loss in losses.values()]).double()
        statistics = statistics_of(model)
        clean = {
            task: torch.autograd.grad(loss, [*shared, *model.heads[task].parameters()], retain_graph=True)
            for task, loss in losses.items()
        }
        for task, grads in clean.items():
            own = list(model.heads[task].parameters())
            params = [*shared, *own]
            before = [p.detach().clone() for p in params]
            groups = [range(len(params))] if self.joint else [range(len(shared)), range(len(shared), len(params))]
            with torch.no_grad():
                for group, rho in zip(groups, [self.rho, self.head_rho], strict=False):
                    scaled = [before[n].abs() * grads[n] if self.adaptive else grads[n] for n in group]
                    norm = torch.sqrt(sum((s**2).sum() for s in scaled))
                    for n in group:
                        direction = before[n] ** 2 * grads[n] if self.adaptive else grads[n]
                        params[n].copy_(before[n] + rho * direction / (norm + 1e-12))
            seen.append(torch.cat([p.detach().flatten().clone() for p in params]))
            sam = torch.autograd.grad(task_losses(model, step)[task], params)
            with torch.no_grad():
                for p, value in zip(params, before, strict=True):
                    p.copy_(value)
                for buffer, value in zip(model.buffers(), statistics, strict=True):
                    buffer.copy_(value)
            rows.append(torch.cat([g.flatten() for g in grads[: len(shared)]]))
            sams.append(torch.cat([g.flatten() for g in sam[: len(shared)]]))
            heads[task] = sam[len(shared) :]
        update = self.update(torch.stack(rows), torch.stack(sams), values)
        for p, part in zip(shared, update.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        for task, grads in heads.items():
            for p, g in zip(model.heads[task].parameters(), grads, strict=True):
                p.grad = g
        return seen

    def update(self, g: Tensor, s: Tensor, losses: Tensor) -> Tensor:
        """The shared parameters' update from rows [K, P]."""

        def combined(weighting: Weighting, rows: Tensor, **options: Tensor) -> Tensor:
            return weighting((rows @ rows.T).double(), **options).to(rows.dtype) @ rows

        f = s - g
        if self.aggregation == "direct":
            return combined(self.loss, s, losses=losses)
        if self.aggregation == "each":
            pairs = torch.stack([g, f], 1)
            weights = self.pair((pairs @ pairs.mT).double()).to(g.dtype)
            return combined(self.loss, (weights.unsqueeze(-1) * pairs).sum(1), losses=losses)
        loss, flat = combined(self.loss, g, losses=losses), combined(self.flat, f, losses=losses)
        return loss + flat if self.aggregation == "separate" else combined(self.pair, torch.stack([loss, flat]))
