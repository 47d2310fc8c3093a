"""``transformers.Trainer`` with a loss for each task."""

from typing import Any

import torch
from torch import Tensor

from ..optim import StepInfo
from ..optim.losses import Losses
from .joint import joint_loss, metrics, total


class HuggingFaceMixin:
    """Comes before ``transformers.Trainer`` in the bases, and makes a loss of :meth:`compute_losses`.

    Pass ``optimizers=(MultiTaskOptimizer(...), None)``, or wrap what ``trainer.create_optimizer()`` made before ``train()``.
    Clipping, accumulation, schedules, mixed precision, checkpoints and callbacks stay the Trainer's own. ``loss`` is the sum
    of the losses; every log of it has also the :func:`metrics` of the updates since the last one, in the mean.
    """

    loss_is_scaled_for_ga = False  # each loss is the mean of its micro-batch, so that the Trainer divides
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._updates: list[StepInfo] = []
        super().__init__(*args, **kwargs)

    def compute_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Losses, Any]:
        """{task: the mean loss of a micro-batch} and the outputs that evaluation takes.

        Override it, or have the model return a dict with ``"losses"``.
        """
        outputs = model(**inputs)
        return outputs["losses"], {name: value for name, value in outputs.items() if name != "losses"}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        losses, outputs = self.compute_losses(model, inputs)
        if torch.is_grad_enabled():
            loss = joint_loss(self.optimizer, losses, report=self._updates.append)
        else:
            loss = total(losses)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            rows = [metrics(info) for info in self._updates]
            self._updates.clear()
            for name in dict.fromkeys(name for row in rows for name in row):
                logs[name] = torch.stack([row[name] for row in rows if name in row]).nanmean().item()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # of the Trainer
