"""``lightning.LightningModule`` with a loss for each task."""

from typing import Any

from torch import Tensor

from ..optim import StepInfo
from ..optim.losses import Losses
from .joint import joint_loss, metrics


class LightningMixin:
    """Comes before ``lightning.LightningModule`` in the bases; ``training_step`` returns ``self.joint_loss(losses)``.

    Optimisation stays automatic: clipping, accumulation, schedules, precision, checkpoints and callbacks are Lightning's own.
    ``configure_optimizers`` returns one :class:`MultiTaskOptimizer`, alone or with a scheduler. The :func:`metrics` of each
    update go to ``self.log_dict``.
    """

    _steps = False
    """Whether Lightning is in ``optimizer_step``, that is, whether the micro-batch is the last before a step."""

    def joint_loss(self, losses: Losses) -> Tensor:
        """The loss that ``training_step`` returns: :func:`mtlkernels.trainers.joint_loss`."""
        module: Any = self
        return joint_loss(
            module.optimizers(use_pl_optimizer=False),
            losses,
            scaler=getattr(module.trainer.precision_plugin, "scaler", None),
            last=self._steps,
            report=self._log_update,
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._steps = True
        try:
            super().optimizer_step(*args, **kwargs)  # type: ignore[misc]  # of the LightningModule
        finally:
            self._steps = False

    def _log_update(self, info: StepInfo) -> None:
        module: Any = self
        module.log_dict(metrics(info))
