"""What a multi-task optimizer adds to a checkpoint."""

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from .batches import Batches
from .held import HeldWeights
from .losses import loaded_names
from .roles import Task
from .undo import Snapshot, load_buffers

STATE_KEY = "multitask"
"""Entry of the state dict that holds the task names and the weighting's state; optimizers of torch ignore it."""


class SavedState(Batches):
    """The part of :class:`MultiTaskOptimizer` that writes and reads its entry of the state dict."""

    _tasks_given: bool

    @abstractmethod
    def _forget(self) -> None:
        """Drops what belongs to the update in progress."""

    @abstractmethod
    def _undone_on_error(self) -> AbstractContextManager[Snapshot]:
        """Puts everything back when the block raises."""

    def _extra_state(self) -> dict[str, Any]:
        """``{"multitask": {"tasks": names or None, "weighting": its state dict}}``; optimizers of torch ignore the entry.

        Where later steps use its weights also ``"held"``: ``left``, the calls until the next update of the weights, and
        ``weights``.
        """
        tasks = None if self.tasks is None else list(self.tasks)
        held = {"held": self._held.state()} if self._holds else {}
        return {STATE_KEY: {"tasks": tasks, "weighting": dict(self.weighting.state_dict()), **held}}

    def _load(self, state_dict: dict[str, Any]) -> None:
        """A state dict without the entry of its own leaves the task names and the weighting's state as they are."""
        own = state_dict.pop(STATE_KEY, None)
        with self._undone_on_error():
            if own is not None:
                self._load_tasks(own["tasks"])
                load_buffers(self.weighting, own["weighting"], self.device)
                held = own.get("held") if self._holds else None
                self._held = HeldWeights() if held is None else HeldWeights.from_state(held, self.device)
            super()._load(state_dict)
        self._forget()

    def _load_tasks(self, saved: list[Task] | None) -> None:
        """Takes over the saved order of the tasks, by which the weighting's state is laid out."""
        names = loaded_names(saved, self.tasks, self._tasks_given)
        if names is not None:
            self._check_heads(names)
        self.tasks = names
