"""Accelerate: its loop, with ``joint_loss`` for the loss. On one process or several.

python examples/trainer_accelerate.py
python -m torch.distributed.run --standalone --nproc-per-node 2 examples/trainer_accelerate.py
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from trainer_task import EPOCHS, Digits, Net, Result, Settings, main, optimizer_of, schedule_of

from mtlkernels.trainers import joint_loss, metrics


class History(GeneralTracker):
    """A tracker that keeps what is logged; Accelerate's own write it to where you look at it."""

    name = "history"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def tracker(self) -> list[dict[str, float]]:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append({name: float(value) for name, value in values.items()})


def train(settings: Settings, folder: Path, resume: bool) -> Result:
    """Writes the folder ``half`` between the epochs, or starts from it."""
    history = History()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=settings.parts,
        log_with=history,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # a batch is divided among the processes
    )
    accelerator.init_trackers("digits")
    group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    net = Net(settings.seed)
    optimizer = optimizer_of(net, settings, process_group=group)
    model, optimizer, loader, schedule = accelerator.prepare(
        net, optimizer, Digits(settings).loader(settings), schedule_of(optimizer, settings)
    )
    half = broadcast_object_list([str(folder / "half")])[0]  # the main process's
    if resume:
        accelerator.load_state(half)
    infos: list[Any] = []
    for epoch in range(1 if resume else 0, EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = model(**batch)["losses"]
                accelerator.backward(joint_loss(optimizer, losses, report=infos.append))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), settings.max_norm)
                    accelerator.log({"learning_rate": schedule.get_last_lr()[0], **metrics(infos.pop())})
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if epoch == 0:
            accelerator.save_state(half)
    return Result(net, history.rows)


if __name__ == "__main__":
    text = main(train, __doc__)
    accelerator = Accelerator(cpu=True)
    accelerator.print(text)
    accelerator.end_training()
