"""What the trainer examples beside this file share: two tasks on real digits, options, and the table that they print.

Every example trains the same network from the same weights on the same batches, with accumulation, clipping, a schedule and a
checkpoint after half of the updates, from which it trains a second time. So all of them print the same numbers, up to
rounding, and ``tests/test_trainers.py`` compares their parameters.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare import table  # the example beside this one
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import mtlkernels as mtl
from mtlkernels.data import CANVAS, MultiDigits

TASKS = ("left", "right")
EPOCHS = 2
"""The checkpoint is written between them."""


@dataclass
class Settings:
    method: str = "cagrad"
    updates: int = 400
    batch: int = 32
    """Rows of a micro-batch."""
    parts: int = 4
    """Micro-batches of an update."""
    max_norm: float = 1.0
    learning_rate: float = 3e-3
    warmup: int = 20
    """Updates until the learning rate is reached; it falls to 0 from there."""
    seed: int = 0


@dataclass
class Result:
    net: nn.Module
    history: list[dict[str, float]]
    """What was logged of each update, as the trainer logs it."""


class Digits(Dataset[dict[str, Tensor]]):
    """Half of the updates' rows of MultiDigits, which are drawn at random and so are taken in order; seen in both epochs."""

    def __init__(self, settings: Settings) -> None:
        rows = settings.updates // EPOCHS * settings.parts * settings.batch
        self.train, self.test = MultiDigits.load(rows, 2000, settings.seed)

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"images": self.train.images[row], **{task: labels[row] for task, labels in self.train.labels.items()}}

    def loader(self, settings: Settings) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self, settings.batch)


class Net(nn.Module):
    """A shared trunk, a linear head for each task. Returns the losses beside the outputs, as models of transformers do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(CANVAS * CANVAS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(32, 10) for task in TASKS})

    def forward(self, images: Tensor, **labels: Tensor) -> dict[str, dict[str, Tensor]]:
        features = self.trunk(images)
        outputs = {task: head(features) for task, head in self.heads.items()}
        return {"losses": {task: cross_entropy(outputs[task], labels[task]) for task in labels}, "outputs": outputs}


def optimizer_of(net: Net, settings: Settings, **options: Any) -> mtl.MultiTaskOptimizer:
    adamw = torch.optim.AdamW(net.parameters(), settings.learning_rate, weight_decay=0.01)
    return mtl.MultiTaskOptimizer(adamw, settings.method, shared=net.trunk.parameters(), tasks=TASKS, **options)


def schedule_of(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear up and down, as the ``"linear"`` schedule of transformers."""

    def factor(update: int) -> float:
        if update < settings.warmup:
            return update / max(settings.warmup, 1)
        return max(0.0, (settings.updates - update) / max(settings.updates - settings.warmup, 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def accuracy(net: nn.Module, data: Digits) -> dict[str, float]:
    outputs = net.eval()(data.test.images)["outputs"]
    return {task: 100 * float((outputs[task].argmax(1) == labels).double().mean()) for task, labels in data.test.labels.items()}


def report(result: Result, again: Result, settings: Settings) -> str:
    data, tenth = Digits(settings), max(settings.updates // 10, 1)
    right = accuracy(result.net, data)
    rows = [["task", "loss, first tenth", "last tenth", "mean weight", "test accuracy, %"]]
    for task in TASKS:
        losses, weights = ([row[f"{kind}/{task}"] for row in result.history] for kind in ("loss", "weight"))
        figures = [statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:]), statistics.mean(weights)]
        rows.append([task, *(f"{figure:.3f}" for figure in figures), f"{right[task]:.1f}"])
    conflicts = 100 * statistics.mean(row["conflicts"] for row in result.history)
    rates = [row["learning_rate"] for row in result.history]
    pairs = zip(result.net.state_dict().values(), again.net.state_dict().values(), strict=True)
    return (
        f"{table(rows)}\n\n{len(result.history)} updates, {conflicts:.0f} % of them with a conflict; learning rate from "
        f"{rates[0]:.2g} over {max(rates):.2g} to {rates[-1]:.2g}. Resumed from the checkpoint after half of the updates: "
        f"{'the same bits' if all(torch.equal(*pair) for pair in pairs) else 'OTHER PARAMETERS'}."
    )


def main(train: Callable[[Settings, Path, bool], Result], description: str | None, argv: Sequence[str] | None = None) -> str:
    """Trains twice, the second time from the checkpoint of the first, and returns the report."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    defaults = Settings()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    settings = Settings(**vars(parser.parse_args(argv)))
    if settings.updates < EPOCHS or settings.updates % EPOCHS:
        parser.error(f"--updates is {settings.updates}; pass an even number: half come before the checkpoint")
    torch.set_num_threads(1)  # fastest for networks this small
    with tempfile.TemporaryDirectory() as folder:
        whole, again = (train(settings, Path(folder), resume) for resume in (False, True))
        return report(whole, again, settings) if whole.history else ""  # one process has the log
