"""A loop of one's own: accumulation, clipping, a schedule, checkpoints and logs around a multi-task optimizer.

python examples/trainer_plain.py
"""

from pathlib import Path

import torch
from trainer_task import EPOCHS, Digits, Net, Result, Settings, main, optimizer_of, schedule_of

from mtlkernels.trainers import metrics


def train(settings: Settings, folder: Path, resume: bool) -> Result:
    """Writes ``half.pt`` between the epochs, or starts from it."""
    net = Net(settings.seed)
    optimizer = optimizer_of(net, settings)
    schedule = schedule_of(optimizer, settings)
    kept = {"net": net, "optimizer": optimizer, "schedule": schedule}
    if resume:
        for name, state in torch.load(folder / "half.pt").items():
            kept[name].load_state_dict(state)
    loader, history = Digits(settings).loader(settings), []
    for epoch in range(1 if resume else 0, EPOCHS):
        for number, batch in enumerate(loader, start=1):
            losses = {task: loss / settings.parts for task, loss in net(**batch)["losses"].items()}
            if number % settings.parts:
                optimizer.accumulate(losses)
                continue
            info = optimizer.backward(losses)
            torch.nn.utils.clip_grad_norm_(net.parameters(), settings.max_norm)
            optimizer.step()
            optimizer.zero_grad()
            row = {"learning_rate": schedule.get_last_lr()[0], **metrics(info)}
            history.append({name: float(value) for name, value in row.items()})
            schedule.step()
        if epoch == 0:
            torch.save({name: state.state_dict() for name, state in kept.items()}, folder / "half.pt")
    return Result(net, history)


if __name__ == "__main__":
    print(main(train, __doc__))
