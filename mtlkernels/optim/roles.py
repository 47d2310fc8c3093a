"""Which parameters are shared, which are heads, and which the graph tells apart."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

Task = Hashable
"""A task's name; its index where losses come as a sequence."""


class Roles:
    """The role of every parameter an optimizer holds.

    Attributes:
        shared: N parameters that get the combined gradient.
        heads: task -> parameters that get that task's gradient.
        found: the others. Each gets the gradient of the task that reaches it, the sum where several do.
    """

    def __init__(
        self, held: Sequence[Tensor], shared: Iterable[Tensor] | None, heads: Mapping[Task, Iterable[Tensor]] | None
    ) -> None:
        """Raises a ``ValueError`` for a parameter that the optimizer does not hold, or one that is both shared and a head."""
        if heads is not None and not isinstance(heads, Mapping):
            raise ValueError(f"heads is a {type(heads).__name__}; pass a dict {{task: parameters}}.")
        self.heads = {task: _parameters(params, f"heads[{task!r}]", held) for task, params in (heads or {}).items()}
        in_heads = {id(p) for params in self.heads.values() for p in params}
        self.by_default_shared = shared is None
        self.shared = [p for p in held if id(p) not in in_heads] if shared is None else _parameters(shared, "shared", held)
        for n, param in enumerate(self.shared):
            if id(param) in in_heads:
                raise ValueError(f"shared[{n}], of shape {tuple(param.shape)}, is also in heads; list it in one of them.")
        known = in_heads | {id(p) for p in self.shared}
        self.found = [p for p in held if id(p) not in known]
        self.num_held = len(held)
        self._own: dict[tuple[Task, ...], tuple[list[Tensor], list[list[int]]]] = {}  # by task names

    def add(self, held: Sequence[Tensor], shared: bool | None = None) -> None:
        """Gives the parameters of ``held`` that are new a role: shared, or found from the graph. None: as at construction."""
        known = {id(p) for params in (self.shared, self.found, *self.heads.values()) for p in params}
        new = [p for p in held if id(p) not in known]
        (self.shared if shared or (shared is None and self.by_default_shared) else self.found).extend(new)
        self.num_held = len(held)
        self._own.clear()

    def own(self, tasks: tuple[Task, ...]) -> tuple[list[Tensor], list[list[int]]]:
        """The M parameters that are not shared, and for each task which of them may get its gradient."""
        if tasks not in self._own:
            self._own[tasks] = self._find_own(tasks)
        return self._own[tasks]

    def _find_own(self, tasks: tuple[Task, ...]) -> tuple[list[Tensor], list[list[int]]]:
        params = list({id(p): p for group in (self.found, *self.heads.values()) for p in group}.values())
        index = {id(p): m for m, p in enumerate(params)}
        return params, [list(dict.fromkeys(index[id(p)] for p in (*self.found, *self.heads.get(task, ())))) for task in tasks]


def _parameters(params: Iterable[Tensor], argument: str, held: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise ValueError(f"{argument} is a {type(params).__name__}; pass an iterable of parameters, as module.parameters().")
    known = {id(p) for p in held}
    unique: dict[int, Tensor] = {}
    for n, param in enumerate(params):
        if not isinstance(param, torch.Tensor):
            raise ValueError(f"{argument}[{n}] is a {type(param).__name__}, not a parameter; pass module.parameters().")
        if id(param) not in known:
            raise ValueError(
                f"{argument}[{n}], of shape {tuple(param.shape)}, is not a parameter that the optimizer holds; add it to the "
                f"optimizer, or leave it out of {argument}."
            )
        unique[id(param)] = param
    return list(unique.values())
