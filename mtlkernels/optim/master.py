"""Training of 16-bit parameters with float32 copies of them and float32 optimizer state."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .wrapper import WrappedOptimizer, with_step_hooks

LOW = (torch.bfloat16, torch.float16)
MASTER = "master"
"""Entry of a parameter's state that holds its float32 copy."""


class MasterWeights(WrappedOptimizer):
    """A torch optimizer that steps float32 copies of bfloat16 and float16 parameters (Micikevicius et al. 2018, section 3.1).

    An update smaller than half a unit in a parameter's last place is lost when it is added in 16 bits: below 2^-9 of the
    parameter in bfloat16. Here the inner optimizer gets the copies and float32 gradients in place of the parameters, so its
    state is float32, too; then the parameters get the rounded copies. Other parameters are stepped as they are. Give it to any
    optimizer of this package as the torch optimizer that applies the update.

    A copy is ``state[parameter]["master"]``, made by the first step and part of the state dict. An element that somebody else
    has written since the last step (a loaded model, an average of weights) is taken over into the copy. Costs 4 bytes an
    element, and 4 more during a step for the gradients.

    Args:
        optimizer: the torch optimizer; ``.optimizer`` afterwards.

    Raises:
        ValueError: not an optimizer, or already wrapped.
    """

    wraps_alone = False

    @with_step_hooks
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from ``.grad``. ``closure``: evaluated before, with grad enabled; its result is returned."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        masters = {p: self._master(p) for p in self.params if p.dtype in LOW and p.grad is not None}
        try:
            with self._exchanged(masters):
                self.optimizer.step()
        finally:
            for param, master in masters.items():
                master.grad = None
                param.copy_(master)
                self.state[param][MASTER] = master
        return result

    def _master(self, param: Tensor) -> Tensor:
        """The float32 copy, with its gradient, taken out of the state, as optimizers fill a state that is empty."""
        value = param.float()
        master: Tensor | None = self.state[param].pop(MASTER, None)
        if master is None:
            master = value
        else:
            master.copy_(torch.where(master.to(param.dtype) == param, master, value))
        assert param.grad is not None
        master.grad = param.grad.float()
        return master

    @contextmanager
    def _exchanged(self, masters: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Lets the inner optimizer hold the copies in place of the parameters, in its groups and its state."""
        self._exchange(masters)
        try:
            yield
        finally:
            self._exchange({master: param for param, master in masters.items()})

    def _exchange(self, table: Mapping[Tensor, Tensor]) -> None:
        for group in self.param_groups:
            group["params"][:] = [table.get(p, p) for p in group["params"]]
        for old, new in table.items():
            if old in self.state:
                self.state[new] = self.state.pop(old)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Torch casts what it loads to the dtype of what the optimizer holds."""
        like = {p: torch.empty(0, dtype=torch.float32, device=p.device) for p in self.params if p.dtype in LOW}
        with self._exchanged(like):
            self.optimizer.load_state_dict(state_dict)
