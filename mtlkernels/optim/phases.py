"""Which of its two phases task priority is in: drawn on the host, from a seed that every rank has alike."""

from typing import Any, Literal, get_args

import torch

Mode = Literal["mixed", "phase1", "phase2", "sequential"]
Draw = Literal["batch", "epoch"]


class Phases:
    """Phase 1 if P >= e / E, else phase 2, with P uniform in [0, 1) (Jeong and Yoon 2024, Algorithm 1).

    Args:
        mode: ``"mixed"``; ``"phase1"`` or ``"phase2"`` alone; ``"sequential"``: phase 1 for e < E / 2.
        draw: whether P is drawn for each ``"batch"`` or each ``"epoch"``.
        epochs: E; None where the mode needs none.
        seed: of the draws.

    Raises:
        ValueError: an argument that does not fit.
    """

    def __init__(self, mode: Mode, draw: Draw, epochs: int | None, seed: int) -> None:
        for name, value, known in (("mode", mode, get_args(Mode)), ("draw", draw, get_args(Draw))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, known))}.")
        if epochs is None and mode in ("mixed", "sequential"):
            raise ValueError(f'epochs is None; mode="{mode}" needs the number of epochs, and set_epoch(epoch) in each.')
        if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
            raise ValueError(f"epochs is {epochs!r}; pass a positive integer.")
        self.mode, self.draw, self.epochs, self.epoch = mode, draw, epochs, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_draw = 1.0

    def set_epoch(self, epoch: int) -> None:
        """Begins epoch e; draws P for it where P is drawn for epochs, unless it is the one already."""
        if not isinstance(epoch, int) or epoch < 0 or (self.epochs is not None and epoch >= self.epochs):
            last = "" if self.epochs is None else f" to {self.epochs - 1}"
            raise ValueError(f"epoch is {epoch!r}; pass an integer from 0{last}.")
        if self.draw == "epoch" and self.mode == "mixed" and epoch != self.epoch:
            self._epoch_draw = self._uniform()
        self.epoch = epoch

    def next(self) -> int:
        """Phase of the next batch, 1 or 2."""
        if self.mode in ("phase1", "phase2"):
            return 1 if self.mode == "phase1" else 2
        assert self.epochs is not None
        if self.mode == "sequential":
            return 1 if 2 * self.epoch < self.epochs else 2
        drawn = self._uniform() if self.draw == "batch" else self._epoch_draw
        return 1 if drawn >= self.epoch / self.epochs else 2

    def _uniform(self) -> float:
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()  # a tensor of the host

    def state_dict(self) -> dict[str, Any]:
        """Epoch, its P, and the generator's state."""
        return {"epoch": self.epoch, "draw": self._epoch_draw, "generator": self._generator.get_state()}

    def check(self, state: dict[str, Any]) -> None:
        """Raises a ``ValueError`` for a state that :meth:`load_state_dict` cannot go on from."""
        if self.epochs is not None and state["epoch"] >= self.epochs:
            raise ValueError(f"the state dict is of epoch {state['epoch']}; pass epochs={state['epoch'] + 1} or more.")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self.epoch, self._epoch_draw = state["epoch"], state["draw"]
        self._generator.set_state(state["generator"].cpu())  # a checkpoint may have been mapped to another device
