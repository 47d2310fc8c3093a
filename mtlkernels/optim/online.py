"""Each task's gradient against the sum of those before it, so that two gradients are there at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .. import ops
from ..gradients import Rows, Source, check_dense, task_gradients, update_buffers
from ..granularity import Problems
from ..random import random_orders
from ..weightings import PCGrad
from .gram_source import GramSource
from .held import HeldWeights
from .info import StepInfo, UpdateNorm
from .roles import Task
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer


class OnlineGram(GramSource):
    """PCGrad of pairs: each gradient g that arrives and the sum d of those before it, in random order.

    With c = min(0, <g, d>) both are taken off each other, d <- (1 - c / |d|^2) d + (1 - c / |g|^2) g, as PCGrad (Yu et al.
    2020, Algorithm 1) does with two tasks. This is the package's own approximation of it: of two tasks it is PCGrad; of more, a
    gradient is taken off what the earlier ones have become together instead of off each of them. The sum never opposes the
    last gradient nor the sum before it, but it may oppose an earlier gradient. Every step is linear, so that d = sum_k w_k g_k
    with weights that are known; the Gram of all tasks is not.
    """

    differentiates_heads = False

    def __init__(self, optimizer: "MultiTaskOptimizer", kept: Snapshot) -> None:
        super().__init__(optimizer, kept)
        generator = cast(PCGrad, optimizer.weighting).generator
        self.seed = cast(PCGrad, optimizer.weighting).draw_seed(torch.device("cpu"))  # the host runs the passes in its order
        self.host_reads = int(generator is not None and generator.device.type != "cpu")

    def weigh(
        self, tasks: tuple[Task, ...], losses: list[Tensor | None], scaled: list[Tensor | None], scale: Tensor | None
    ) -> None:
        optimizer = self.optimizer
        own, own_of_task = optimizer._roles.own(tasks)
        self.tasks, self.params = tasks, [p for p in optimizer._roles.shared if p.requires_grad]
        self.live = [[own[m] for m in indices if own[m].requires_grad] for indices in own_of_task]
        values, self.present = optimizer._loss_values(losses)
        self.finite, self.weights = self.present.clone(), torch.zeros_like(values)
        self.total: list[Tensor | None] = [None] * len(self.params)
        self.own: Rows = [[None] * len(params) for params in self.live]
        self.left = [k for k in random_orders(self.seed, 1, len(tasks))[0, 0].tolist() if losses[k] is not None]
        order, inputs = list(self.left), [self.params + self.live[k] for k in self.left]
        task_gradients([scaled[k] for k in order], inputs, optimizer.gradients, self._received)
        nothing = UpdateNorm(values.new_zeros(1, 1), values.new_zeros(1), None, values.new_zeros(1))
        self.info = StepInfo(tasks, values, None, self.weights, self._active(), nothing)
        self.info.host_reads = self.host_reads
        if optimizer.on_nonfinite == "raise":
            self.info.host_reads += 1
            verdict = torch.cat([self.finite | ~self.present, self._usable().unsqueeze(0)])
            optimizer._raise_nonfinite(self.info, verdict.tolist())
        optimizer._held = HeldWeights(1, self.weights)

    def _received(self, row: list[Tensor | None], _: Sequence[Tensor]) -> list[Tensor | None]:
        """Adds the next task's gradients to the sum, and keeps nothing but those of its head."""
        optimizer, params, k = self.optimizer, self.params, self.left.pop(0)
        task, live = self.tasks[k], self.live[k]
        check_dense([task], [row], [*params, *live], optimizer.name_of)
        self.own[k] = row[len(params) :]
        del row[len(params) :]
        with torch.no_grad():
            gram = optimizer._gram(Problems("model", params), [self.total, row], params, ["the sum", task])
            finite = gram[1, 1] < torch.inf
            if live and optimizer.on_nonfinite == "drop_task":
                finite &= optimizer._gram(Problems("model", live), [self.own[k]], live, [task])[0, 0] < torch.inf
            self.finite[k] = finite
            factors = pair_weights(gram, torch.stack([torch.ones_like(finite), finite]))
            self.weights.mul_(factors[0])
            self.weights[k] = factors[1]
            if not self.left:
                factors = torch.where(self._usable(), factors, torch.nan)  # shows in .grad, as in any step that is skipped
            buffers = update_buffers([self.total, row], params)
            self.total = ops.combine([self.total, row], factors, out=buffers)
        return []

    def _active(self) -> Tensor:
        return self.finite if self.optimizer.on_nonfinite == "drop_task" else self.present

    def _usable(self) -> Tensor:
        """Whether the sum of the tasks so far is one to step along, a bool scalar."""
        return self.finite.any() if self.optimizer.on_nonfinite == "drop_task" else (self.finite == self.present).all()

    def gradients(
        self,
        losses: Sequence[Tensor | None],
        weights: Tensor,
        shared: Sequence[Tensor],
        own: Sequence[Sequence[Tensor]],
        source: Source,
        hidden: bool = False,
    ) -> tuple[list[Tensor | None], Rows]:
        total, self.total = self.total, []
        heads, self.own = self.own, []  # so that the update can be written where they are
        with torch.no_grad():
            return total, self._without_dropped(heads)


def pair_weights(gram: Tensor, active: Tensor) -> Tensor:
    """The factors of two gradients that are taken off each other where they conflict, and added: PCGrad's weights of the two.

    Args:
        gram: float64 [2, 2].
        active: bool [2]; the factor of one that is not is 0, and the other's is 1.

    Returns:
        float64 [2].
    """
    order = torch.arange(2, device=gram.device).expand(2, 2).contiguous()
    clean = torch.where(active.unsqueeze(-1) & active, gram, 0.0)
    return torch.where(active, torch.ops.mtlkernels.projection_coefficients(clean, order, True).sum(-2), 0.0)
