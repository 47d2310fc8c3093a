"""``transformers.Trainer``: the mixin, and everything else is the Trainer's own.

python examples/trainer_huggingface.py
"""

from pathlib import Path

import transformers
from trainer_task import EPOCHS, TASKS, Digits, Net, Result, Settings, main, optimizer_of

from mtlkernels.trainers import HuggingFaceMixin


class Trainer(HuggingFaceMixin, transformers.Trainer):
    """Takes the losses from the model, which returns a dict with ``"losses"``."""


def trainer_of(settings: Settings, folder: Path) -> Trainer:
    net = Net(settings.seed)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.parts,
        max_grad_norm=settings.max_norm,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        save_strategy="epoch",
        logging_steps=1,
        train_sampling_strategy="sequential",
        label_names=list(TASKS),
        use_cpu=True,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(net, arguments, train_dataset=Digits(settings), optimizers=(optimizer_of(net, settings), None))


def train(settings: Settings, folder: Path, resume: bool) -> Result:
    """Writes a checkpoint after each epoch, or starts from the first."""
    trainer = trainer_of(settings, folder)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{settings.updates // EPOCHS}") if resume else None)
    return Result(trainer.model, [row for row in trainer.state.log_history if "loss" in row])


if __name__ == "__main__":
    print(main(train, __doc__))
