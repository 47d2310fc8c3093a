"""What ranks that train together must have in common before a step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..distributed.agreement import Entries, checksum
from ..dtensor import local
from .roles import Task

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer


def step_entries(optimizer: "MultiTaskOptimizer", tasks: Sequence[Task], losses: Sequence[Tensor | None]) -> Entries:
    """{what: (place, value)} of the tasks, the parameters and the weighting's state. Reads the device.

    Args:
        optimizer: whose parameters and weighting are meant.
        tasks: K names.
        losses: K scalars, None for a task that is absent.
    """
    present = ", ".join(repr(task) for task, loss in zip(tasks, losses, strict=True) if loss is not None)
    entries: dict[str, tuple[object, str | int]] = {
        "tasks": (None, ", ".join(map(repr, tasks))),
        "tasks present": (None, present),
    }
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"param_groups[{g}]['params'][{n}]" for n in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            frozen = "" if param.requires_grad else ", frozen"
            entries[f"kind of {name}"] = None, f"{param.dtype} of shape {tuple(param.shape)}{frozen}"
            entries[f"checksum of {name}"] = optimizer.ranks.place_of(param), checksum(local(param))
    for name, buffer in optimizer.weighting.named_buffers():
        entries[f"checksum of the weighting's {name}"] = None, checksum(buffer)
    return entries
