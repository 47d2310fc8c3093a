"""A ``torch.optim.Optimizer`` around another one, with nothing copied: the inner optimizer holds groups, state and defaults."""

import functools
import inspect
import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..task_losses import stack_losses

Function = TypeVar("Function", bound=Callable[..., Any])

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""Optimizers whose ``fused=True`` step takes ``found_inf`` and then changes nothing, without a host read."""


def with_step_hooks(step: Function) -> Function:
    """Runs the step hooks registered on the wrapper around ``step``.

    Takes the place of torch's own decorator: hooks registered for all optimizers and the profiler's run in the inner
    optimizer's step, so that each runs once.
    """

    @functools.wraps(step)
    def hooked(self: "WrappedOptimizer", *args: Any, **kwargs: Any) -> Any:
        for hook in list(self._optimizer_step_pre_hooks.values()):
            changed: Any = hook(self, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(f"a step pre hook must return None or (new_args, new_kwargs), but returned {changed!r}.")
                args, kwargs = changed
        result = step(self, *args, **kwargs)
        for after in list(self._optimizer_step_post_hooks.values()):
            after(self, args, kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]  # tells torch not to add its own decorator
    return cast(Function, eager(hooked))


def eager(function: Function) -> Function:
    """Makes torch.compile leave a function that takes gradients as it is: one graph break around it, none inside.

    Traced in pieces, it would see other reference counts and autograd graphs than it needs.
    """
    return cast(Function, _disable_dynamo(function))  # torch.compiler.disable, but imports the compiler on the first call only


class WrappedOptimizer(torch.optim.Optimizer):
    """Base of this package's optimizers.

    ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's own objects at any time, so schedulers, checkpoints
    and loops may hold the wrapper or the inner optimizer. Subclasses decorate ``step`` with :func:`with_step_hooks`.

    Args:
        optimizer: the inner optimizer; its ``step`` must need no closure.

    Raises:
        ValueError: not an optimizer, already wrapped, or one whose step needs a closure.
    """

    wraps_alone = True
    """Whether it must not be the inner optimizer of another one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer, as torch.optim.AdamW(...)."
            )
        if isinstance(optimizer, WrappedOptimizer) and optimizer.wraps_alone:
            raise ValueError(f"optimizer is already a {type(optimizer).__name__}; pass its .optimizer.")
        arguments = inspect.signature(optimizer.step).parameters.values()
        required = [
            a.name for a in arguments if a.default is a.empty and a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)
        ]
        if required:
            raise ValueError(
                f"optimizer is {type(optimizer).__name__}, whose step needs {', '.join(required)}; pass one that needs nothing."
            )
        self.optimizer = optimizer
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    # --- what the inner optimizer holds ----------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    @property
    def params(self) -> list[Tensor]:
        """Every parameter the optimizer holds, in the order of its groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def device(self) -> torch.device:
        """Device of the first parameter, the CPU when there is none."""
        for group in self.optimizer.param_groups:
            if group["params"]:
                return group["params"][0].device
        return torch.device("cpu")

    def name_of(self, param: Tensor) -> str:
        """What messages call a parameter: its name where the optimizer knows it, otherwise its place, and its shape."""
        for g, group in enumerate(self.param_groups):
            for n, other in enumerate(group["params"]):
                if other is param:
                    names = group.get("param_names")
                    place = repr(names[n]) if names else f"param_groups[{g}]['params'][{n}]"
                    return f"parameter {place} of shape {tuple(param.shape)}"
        return f"parameter of shape {tuple(param.shape)}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def _loss_values(self, losses: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """float64 [K], NaN for an absent task, and which are present, bool [K]; without a copy that the host waits for."""
        values = stack_losses(losses, self.device)
        present = torch.ones(len(losses), dtype=torch.bool, device=self.device)
        for k, loss in enumerate(losses):
            if loss is None:
                present[k].fill_(False)
        return values, present

    # --- the inner step --------------------------------------------------------------------------------------------------

    def _step_inner(self, skip: Tensor | None) -> int:
        """Steps the inner optimizer unless ``skip``, or the flag a GradScaler has set, is true.

        Args:
            skip: bool scalar on the device; None: do not skip.

        Returns:
            How many host reads it took: 0 where there is no flag or the inner step takes it on the device, otherwise 1.
        """
        inner: Any = self.optimizer
        before = getattr(inner, "found_inf", None)
        flag = before if skip is None else skip if before is None else torch.maximum(skip.float(), before)
        if flag is None:
            inner.step()
            return 0
        if not self._takes_found_inf():
            if not bool(flag):
                inner.step()
            return 1
        inner.found_inf = flag.float()
        try:
            inner.step()
        finally:
            if before is None:
                del inner.found_inf
            else:
                inner.found_inf = before
        return 0

    def _takes_found_inf(self) -> bool:
        """Whether the inner step can skip itself on the device."""
        if isinstance(self.optimizer, WrappedOptimizer):
            return self.optimizer._takes_found_inf()
        groups = self.param_groups
        if type(self.optimizer) not in FUSED or not all(group.get("fused") for group in groups):
            return False
        if not isinstance(self.optimizer, torch.optim.SGD):
            return True
        # A fused SGD that skips its first step keeps the momentum buffers it has just allocated, uninitialised.
        with_momentum = [p for group in groups if group["momentum"] for p in group["params"] if p.grad is not None]
        return all(self.state.get(p, {}).get("momentum_buffer") is not None for p in with_momentum)

    # --- what GradScaler reads and sets on an optimizer that skips a step on the device ----------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    @property
    def grad_scale(self) -> Any:
        return self.optimizer.grad_scale  # type: ignore[attr-defined]

    @grad_scale.setter
    def grad_scale(self, value: Any) -> None:
        self.optimizer.grad_scale = value  # type: ignore[attr-defined]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self.optimizer.grad_scale  # type: ignore[attr-defined]

    @property
    def found_inf(self) -> Any:
        return self.optimizer.found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, value: Any) -> None:
        self.optimizer.found_inf = value  # type: ignore[attr-defined]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self.optimizer.found_inf  # type: ignore[attr-defined]

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict plus what :meth:`_extra_state` gives. Hooks on both optimizers run."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = {**self.optimizer.state_dict(), **self._extra_state()}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, or a plain state dict of the inner optimizer. Hooks on both optimizers run."""
        if "param_groups" not in state_dict:
            raise ValueError("the state dict has no param_groups; pass one of an optimizer, as optimizer.state_dict().")
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def own_state(self) -> "OwnState":
        """What this optimizer adds to the inner one's state, for a distributed checkpoint (:class:`OwnState`)."""
        return OwnState(self)

    def _extra_state(self) -> dict[str, Any]:
        """Entries that a subclass adds to the state dict."""
        return {}

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict; a subclass takes its own entries out first and fails before the inner optimizer changes.

        With nothing left the inner optimizer stays as it is.
        """
        if state_dict:
            self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. As in plain optimizers, hooks and the step that a scheduler patched stay behind."""
        left = {"step", *(name for name in self.__dict__ if name.startswith("_optimizer_") and name.endswith("_hooks"))}
        return {name: value for name, value in self.__dict__.items() if name not in left}


class OwnState:
    """The entries that an optimizer of this package adds to a state dict: task names, state of weightings, groups, draws.

    ``torch.distributed.checkpoint.state_dict`` takes a state dict apart by parameters and drops everything else. Save and load
    this beside it, under a key of your choice; it is the same on every rank, so any number of them can load it.

    Args:
        optimizer: whose entries are meant.
    """

    def __init__(self, optimizer: WrappedOptimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The entries as bytes, since their shapes are not known before they are loaded."""
        file = io.BytesIO()
        torch.save(self.optimizer._extra_state(), file)
        return {"entries": file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads them and leaves the inner optimizer as it is.

        Raises:
            As the optimizer's ``load_state_dict``.
        """
        self.optimizer._load(torch.load(io.BytesIO(state_dict["entries"]), map_location="cpu", weights_only=True))
