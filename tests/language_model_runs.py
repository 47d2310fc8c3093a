"""Short runs of examples/language_model.py, as functions that ranks of the tests can be sent."""

import sys
from pathlib import Path
from typing import Any

from distributed_models import whole
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import language_model as example

TINY: dict[str, Any] = {
    "lr": 0.1,  # so that gradients conflict within eight steps
    "steps": 8,
    "warmup": 2,
    "batch": 4,
    "context": 16,
    "width": 16,
    "layers": 1,
    "max_bytes": 100_000,
    "eval_every": 4,
    "eval_rows": 4,
    "save_every": 3,
}


def trained(
    options: dict[str, Any], folder: str | None = None, stop: int | None = None, without: str = ""
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Parameters and log at the end, or before the step that is ``stop``, which keeps checkpoints as they are then.

    ``without``: a part of the state that is not loaded.
    """

    class Stopped(example.Trainer):
        def step(self) -> dict[str, Any]:
            if self.step_number == stop:
                raise KeyboardInterrupt
            return super().step()

        def _state(self) -> dict[str, Any]:
            return {name: part for name, part in super()._state().items() if name != without}

    trainer = Stopped(example.Config(**{**TINY, **options}), Path(folder) if folder else None)
    try:
        trainer.train()
    except KeyboardInterrupt:
        return [], []
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in trainer.lines]
    for line in lines:
        line.update({name: value.tolist() for name, value in line.items() if isinstance(value, Tensor)})
    return [whole(param.detach()).clone() for param in trainer.params], lines
