"""Which parameters are shared, which are heads, and which the graph tells apart."""

import copy
import operator
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..gradients import graph_leaves

Task = Hashable
"""A task's name; its index where losses come as a sequence."""


class Roles:
    """The role of every parameter an optimizer holds. Methods that change roles return a new object.

    Attributes:
        held: the parameters of the optimizer, in the order of its groups.
        shared: N parameters that get the combined gradient.
        heads: task -> parameters that get that task's gradient.
        found: the others. Each gets the gradient of the task that reaches it, the sum where several do.
        undecided: to become shared or found by the graphs of the next batch, see :meth:`decided`.
        groups: name -> parameters that, as far as they are shared, get one set of weights.
    """

    def __init__(
        self,
        held: Sequence[Tensor],
        shared: Iterable[Tensor] | None,
        heads: Mapping[Task, Iterable[Tensor]] | None,
        groups: Mapping[str, Iterable[Tensor]] | None = None,
    ) -> None:
        """Raises a ``ValueError`` for a parameter that the optimizer does not hold, or that is in two roles or two groups."""
        if heads is not None and not isinstance(heads, Mapping):
            raise ValueError(f"heads is a {type(heads).__name__}; pass a dict {{task: parameters}}.")
        self.held = list(held)
        self.heads = {task: _parameters(params, f"heads[{task!r}]", held) for task, params in (heads or {}).items()}
        in_heads = {id(p) for params in self.heads.values() for p in params}
        self.shared = [] if shared is None else _parameters(shared, "shared", held)
        for n, param in enumerate(self.shared):
            if id(param) in in_heads:
                raise ValueError(f"shared[{n}], of shape {tuple(param.shape)}, is also in heads; list it in one of them.")
        self.groups = {name: _parameters(params, f"per[{name!r}]", held) for name, params in (groups or {}).items()}
        _check_groups(self.groups)
        self.found: list[Tensor] = []
        self.undecided: list[Tensor] = []
        if shared is not None:
            self._of_others = "found"
        else:
            self._of_others = "undecided" if heads is None else "shared"
        self._own: dict[tuple[Task, ...], tuple[list[Tensor], list[list[int]]]] = {}  # by task names
        self._add_others(self._of_others)

    def refreshed(self, held: Sequence[Tensor], shared: bool | None = None) -> "Roles":
        """The roles of the parameters held now; this object where nothing changed.

        A parameter in the place of one that is gone, among as many as before, takes its role. Any other new one is shared,
        found from the graph, or (None) what one that the arguments do not name is at construction.
        """
        if len(held) == len(self.held) and all(map(operator.is_, held, self.held)):
            return self
        result = copy.copy(self)
        now, before = {id(p) for p in held}, {id(p) for p in self.held}
        kept = {id(p): p for p in self.held if id(p) in now}
        if len(held) == len(self.held):
            pairs = zip(self.held, held, strict=True)
            kept |= {id(old): new for old, new in pairs if id(old) not in now and id(new) not in before}
        result.held, result._own = list(held), {}
        result.heads = {task: _kept(params, kept) for task, params in self.heads.items()}
        result.groups = {name: _kept(params, kept) for name, params in self.groups.items()}
        result.shared, result.found, result.undecided = (_kept(p, kept) for p in (self.shared, self.found, self.undecided))
        result._add_others(self._of_others if shared is None else "shared" if shared else "found")
        return result

    def pending(self) -> list[Tensor]:
        """The undecided parameters that require grad; a frozen one has no place in a graph and stays undecided."""
        return [p for p in self.undecided if p.requires_grad]

    def decided(self, losses: Sequence[Tensor | None]) -> "Roles":
        """Decides the pending parameters: shared where two or more tasks reach them or there is only one task, else found.

        Raises:
            ValueError: a task is absent.
        """
        pending = self.pending()
        if not pending:
            return self
        if any(loss is None for loss in losses):
            raise ValueError(
                "losses lacks a task, and shared parameters are told from heads by the first batch, which must have every task "
                "(and so must the next one after parameters are added or unfrozen); pass shared=parameters or "
                "heads={task: parameters}, or start with a full batch, with tasks=[...] to name its tasks."
            )
        reached = Counter(leaf for loss in losses if loss is not None for leaf in graph_leaves(loss))
        result = copy.copy(self)
        to_share = {id(p) for p in pending if len(losses) == 1 or reached[id(p)] > 1}
        result.shared = self.shared + [p for p in pending if id(p) in to_share]
        result.found = self.found + [p for p in pending if id(p) not in to_share]
        result.undecided = [p for p in self.undecided if not p.requires_grad]
        result._own = {}
        return result

    def group_of_shared(self) -> tuple[int, ...]:
        """The group of each shared parameter, in the order of the names; those in none form one more, the last."""
        place = {id(p): index for index, params in enumerate(self.groups.values()) for p in params}
        return tuple(place.get(id(p), len(self.groups)) for p in self.shared)

    def own(self, tasks: tuple[Task, ...]) -> tuple[list[Tensor], list[list[int]]]:
        """The M parameters that are not shared, and for each task which of them may get its gradient."""
        if tasks not in self._own:
            self._own[tasks] = self._find_own(tasks)
        return self._own[tasks]

    def _add_others(self, role: str) -> None:
        """Gives the held parameters that have no role yet one: ``"shared"``, ``"found"`` or ``"undecided"``."""
        known = {id(p) for params in (self.shared, self.found, self.undecided, *self.heads.values()) for p in params}
        others = {id(p): p for p in self.held if id(p) not in known}
        setattr(self, role, [*getattr(self, role), *others.values()])

    def _find_own(self, tasks: tuple[Task, ...]) -> tuple[list[Tensor], list[list[int]]]:
        params = list({id(p): p for group in (self.found, *self.heads.values()) for p in group}.values())
        index = {id(p): m for m, p in enumerate(params)}
        return params, [list(dict.fromkeys(index[id(p)] for p in (*self.found, *self.heads.get(task, ())))) for task in tasks]


def _check_groups(groups: Mapping[str, Sequence[Tensor]]) -> None:
    owner: dict[int, str] = {}
    for name, params in groups.items():
        for n, param in enumerate(params):
            if id(param) in owner:
                raise ValueError(
                    f"per[{name!r}][{n}], of shape {tuple(param.shape)}, is also in per[{owner[id(param)]!r}]; list it in one."
                )
            owner[id(param)] = name


def _kept(params: Sequence[Tensor], kept: Mapping[int, Tensor]) -> list[Tensor]:
    return [kept[id(p)] for p in params if id(p) in kept]


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
