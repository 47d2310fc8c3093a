"""What ranks that train together must have in common before a step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..distributed.agreement import Entries, checksum
from ..dtensor import local
from .roles import Task

if TYPE_CHECKING:
    from ..distributed import Ranks
    from .wrapper import WrappedOptimizer


def step_entries(
    optimizer: "WrappedOptimizer",
    ranks: "Ranks",
    tasks: Sequence[Task],
    present: Sequence[object],
    modules: Mapping[str, torch.nn.Module],
) -> Entries:
    """{what: (place, value)} of the tasks, the parameters and the state of modules. Reads the device.

    Args:
        optimizer: whose parameters are meant.
        ranks: that train them.
        tasks: K names.
        present: K objects, None for a task that is absent.
        modules: {what a message calls it: a module whose buffers must be the same}.
    """
    there = ", ".join(repr(task) for task, value in zip(tasks, present, strict=True) if value is not None)
    entries: dict[str, tuple[object, str | int]] = {
        "tasks": (None, ", ".join(map(repr, tasks))),
        "tasks present": (None, there),
    }
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"param_groups[{g}]['params'][{n}]" for n in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            frozen = "" if param.requires_grad else ", frozen"
            entries[f"kind of {name}"] = None, f"{param.dtype} of shape {tuple(param.shape)}{frozen}"
            entries[f"checksum of {name}"] = ranks.place_of(param), checksum(local(param))
    for owner, module in modules.items():
        for name, buffer in module.named_buffers():
            entries[f"checksum of the {owner}'s {name}"] = None, checksum(buffer)
    return entries
