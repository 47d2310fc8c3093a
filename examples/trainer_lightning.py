"""Lightning: the mixin and automatic optimisation, so that everything else is the Trainer's own.

python examples/trainer_lightning.py
"""

import csv
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from trainer_task import EPOCHS, Digits, Net, Result, Settings, main, optimizer_of, schedule_of

from mtlkernels.trainers import LightningMixin


class Module(LightningMixin, lightning.LightningModule):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings, self.net = settings, Net(settings.seed)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.joint_loss(self.net(**batch)["losses"])

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = optimizer_of(self.net, self.settings)
        schedule = {"scheduler": schedule_of(optimizer, self.settings), "interval": "step", "name": "learning_rate"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def train(settings: Settings, folder: Path, resume: bool, **options: Any) -> Result:
    """Writes a checkpoint after each epoch, or starts from the first. ``options`` are more of the Trainer's."""
    logger = CSVLogger(folder, version="resumed" if resume else "whole")
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        gradient_clip_val=settings.max_norm,
        accumulate_grad_batches=settings.parts,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1), LearningRateMonitor("step")],
        logger=logger,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Module(settings)
    trainer.fit(module, Digits(settings).loader(settings), ckpt_path=folder / "epoch=0.ckpt" if resume else None)
    rows: dict[int, dict[str, float]] = {}
    if trainer.is_global_zero:  # which has the log
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            for row in csv.DictReader(file):
                values = {name: float(value) for name, value in row.items() if value}
                rows.setdefault(int(values["step"]), {}).update(values)
    return Result(module.net, list(rows.values()))


if __name__ == "__main__":
    print(main(train, __doc__))
