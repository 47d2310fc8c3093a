"""Selective task group updates: several steps a batch, one for each group of tasks, in groups that training itself finds."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..distributed import ranks_of
from ..gradients import Source, weighted_gradients
from ..granularity import Problems
from ..grouping.common import Groups, check_partition
from ..proximal import ProximalAffinity
from ..weightings import Weighting
from .compare import step_entries
from .info import GroupsInfo
from .losses import Losses, by_task, loaded_names, order_losses, task_names
from .multitask import MultiTaskOptimizer, Nonfinite
from .roles import Roles, Task
from .scaler import enabled_scaler
from .undo import Snapshot, load_buffers
from .visits import BatchSnapshot, note_visit
from .wrapper import WrappedOptimizer, with_step_hooks

Grouping = Callable[[ProximalAffinity, Groups], Sequence[Sequence[int]]]
"""The affinity and the groups so far -> the groups of the next batch. :meth:`ProximalAffinity.groups` is one."""

SingleGroup = Literal["twice", "once"]

STATE_KEY = "groups"
"""Entry of the state dict that holds the affinity, the groups and what the next order is drawn from."""


class SelectiveGroupOptimizer(WrappedOptimizer):
    """A torch optimizer that visits a batch once for each group of tasks and forms the groups from their affinity.

    Jeong and Yoon 2025. For each group, in random order: all losses at the current parameters, one backward pass of the sum of
    the group's weighted losses, one step of the shared parameters and the group's heads. The heads of other groups stay as they
    are: their ``.grad`` is None. How the losses change from visit to visit updates :class:`ProximalAffinity`, from which the
    groups of the next batch are formed. M groups cost M forward passes, M backward passes and M steps a batch.

    Args:
        optimizer: the torch optimizer that applies each step; ``.optimizer`` afterwards.
        weighting: how the gradients within a group are combined. None: the plain gradient of the weighted sum, one backward
            pass. A :class:`Weighting` or its name: one backward pass for each task of the group, as of
            :class:`MultiTaskOptimizer` with the other tasks absent.
        loss_weights: {task: number}, w_k of L_k in the steps; 1 for a task that is not named. Affinities are of L_k itself.
        group_norm: divide w_k by the number of tasks in the group, so that a step does not grow with it (as the released code's
            option of that name).
        shared, heads: as of :class:`MultiTaskOptimizer`; without a weighting and a ``head_lr_factor`` neither is needed.
        head_lr_factor: the heads' learning rate, as a multiple of their group's (the number of tasks, in the released code).
            Splits the optimizer's parameter groups at construction, where ``heads`` name them; make schedulers afterwards.
        tasks: the task names. None: fixed by the first losses.
        affinity: the affinity to update and group by; ``.affinity`` afterwards. None: ``ProximalAffinity(K)``.
        groups: the groups to start from, of task names. None: every task on its own.
        warmup: batches that keep the first groups. (The released code's batches 0 to 100 are 101.)
        grouping: forms the groups of every batch from then on; None: the first groups stay. The default reads the K x K matrix
            on the host, once a batch; groups have to be known there.
        single_group: what a batch with one group of two or more tasks does. ``"twice"``: two visits, two steps, as the released
            code does; without the second nothing is measured. ``"once"``: one step; the affinity stays as it is.
        seed: of the visiting orders. The order of a batch is a function of the seed and of how many batches were before it.
        max_norm: clips each visit's gradient, over all parameters; ``math.inf`` only looks whether it is finite.
        on_nonfinite: what a visit that is not finite does. ``"skip"``: it steps nothing, and nothing is credited to it.
            ``"raise"``: a ``RuntimeError``. ``"drop_task"``: with a weighting only. With neither weighting nor ``max_norm`` nor
            a scaler the group's losses decide, as a look at the gradient would be a read of it; otherwise the gradient.
        transactional: copy parameters and the inner state before each batch, and put them back when anything in it raises.
            Costs their memory and one read and write a batch. Without, the visits that were completed stay.
        module: the model, whose buffers (batch-norm statistics) ``transactional`` puts back, too.
        process_group, mesh, check_ranks: as of :class:`MultiTaskOptimizer`. Affinities are of the losses' means over the ranks,
            so that every rank forms the same groups, and a loss that is not finite on one rank skips the visit on all.
        **options: further options of :class:`MultiTaskOptimizer`, with a weighting.

    Attributes:
        groups: the groups of the last batch, as indices into ``tasks``; those to start from before the first.
        batches: how many batches were stepped.

    Raises:
        ValueError: an argument that does not fit; the message names it and the fix.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weighting: str | Weighting | None = None,
        *,
        loss_weights: Mapping[Any, float] | None = None,
        group_norm: bool = False,
        shared: Iterable[Tensor] | None = None,
        heads: Mapping[Any, Iterable[Tensor]] | None = None,
        head_lr_factor: float = 1.0,
        tasks: Sequence[Task] | None = None,
        affinity: ProximalAffinity | None = None,
        groups: Sequence[Sequence[Task]] | None = None,
        warmup: int = 101,
        grouping: Grouping | None = ProximalAffinity.groups,
        single_group: SingleGroup = "twice",
        seed: int = 0,
        max_norm: float | None = None,
        on_nonfinite: Nonfinite = "skip",
        transactional: bool = False,
        module: torch.nn.Module | None = None,
        process_group: object = None,
        mesh: object = None,
        check_ranks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(optimizer)
        for name, value, known in (
            ("single_group", single_group, get_args(SingleGroup)),
            ("on_nonfinite", on_nonfinite, get_args(Nonfinite)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, known))}.")
        if warmup < 0:
            raise ValueError(f"warmup is {warmup}; pass 0 or more batches.")
        if not head_lr_factor > 0:
            raise ValueError(f"head_lr_factor is {head_lr_factor}; pass a positive number.")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm is {max_norm!r}; pass a positive number, or None not to clip.")
        if affinity is not None and not isinstance(affinity, ProximalAffinity):
            raise ValueError(f"affinity is a {type(affinity).__name__}; pass a mtlkernels.ProximalAffinity(num_tasks).")
        if weighting is None and options:
            raise ValueError(f"{', '.join(options)} belongs to a weighting; pass one, or leave it out.")
        if weighting is not None and shared is None and heads is None:
            raise ValueError("a weighting needs shared=parameters or heads={task: parameters}: no visit has every task.")
        if weighting is None and on_nonfinite == "drop_task":
            raise ValueError('on_nonfinite="drop_task" needs a gradient for each task; pass a weighting, or "skip" or "raise".')
        shared = None if shared is None else list(shared)
        heads = {task: list(params) for task, params in heads.items()} if isinstance(heads, Mapping) else heads
        self._heads = Roles(self.params, shared, heads).heads
        self._multi: MultiTaskOptimizer | None = None
        if weighting is not None:
            self._multi = MultiTaskOptimizer(
                optimizer,
                weighting,
                shared=shared,
                heads=heads,
                max_norm=max_norm,
                on_nonfinite=on_nonfinite,
                process_group=process_group,
                mesh=mesh,
                check_ranks=check_ranks,
                **options,
            )
            self.ranks = self._multi.ranks
        else:
            self.ranks = ranks_of(self.params, process_group, mesh, self.name_of)
        self._source: Source | None = None  # loss.backward() into .grad, which DistributedDataParallel would take part in
        if self.ranks.hides_leaves:
            self._source = "backward"
        elif process_group is not None or mesh is not None:
            self._source = "autograd"
        self.check_ranks, self._compares = check_ranks, self.ranks.size > 1
        if head_lr_factor != 1:
            self._split_heads(head_lr_factor)
        self.tasks = None
        self.affinity, self.groups = affinity, []
        self.loss_weights, self.group_norm = dict(loss_weights or {}), group_norm
        self.warmup, self.grouping, self.single_group, self.seed = warmup, grouping, single_group, seed
        self.max_norm, self.on_nonfinite, self.transactional, self.module = max_norm, on_nonfinite, transactional, module
        self.batches = 0
        self._first_groups = groups
        self._tasks_given = tasks is not None
        if tasks is not None:
            self._fix_tasks(task_names(tasks))

    tasks: tuple[Task, ...] | None
    groups: Groups

    def _split_heads(self, factor: float) -> None:
        """Moves the heads of each parameter group into one of its own, with ``factor`` times its learning rate."""
        in_heads = {id(p) for params in self._heads.values() for p in params}
        if not in_heads:
            raise ValueError("head_lr_factor needs heads={task: parameters}, to know which parameters it is for.")
        for group in list(self.param_groups):
            moved = [n for n, p in enumerate(group["params"]) if id(p) in in_heads]
            if moved and "initial_lr" in group:
                raise ValueError("head_lr_factor changes learning rates that a scheduler has taken over; make it afterwards.")
            if not moved:
                continue
            if len(moved) == len(group["params"]):
                group["lr"] = group["lr"] * factor
                continue
            own = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            for name in {"params", "param_names"} & set(group):
                own[name] = [group[name][n] for n in moved]
                group[name] = [value for n, value in enumerate(group[name]) if n not in moved]
            self.param_groups.append(own | {"lr": group["lr"] * factor})

    def _fix_tasks(self, names: tuple[Task, ...]) -> None:
        """Takes over the task names, and sets up what has their number. Changes nothing when it raises."""
        for argument, keys in (("heads", self._heads), ("loss_weights", self.loss_weights)):
            for task in keys:
                if task not in names:
                    raise ValueError(
                        f"{argument} names the unknown task {task!r}; the tasks are {', '.join(map(repr, names))}."
                    )
        if self._first_groups is None:
            groups = [[k] for k in range(len(names))]
        else:
            unknown = [task for group in self._first_groups for task in group if task not in names]
            if unknown:
                raise ValueError(f"groups names the unknown task {unknown[0]!r}; the tasks are {', '.join(map(repr, names))}.")
            groups = check_partition([[names.index(task) for task in group] for group in self._first_groups], len(names))
        affinity = ProximalAffinity(len(names)) if self.affinity is None else self.affinity
        if affinity.num_tasks != len(names):
            raise ValueError(f"affinity is of {affinity.num_tasks} tasks instead of {len(names)}; pass a ProximalAffinity.")
        self.affinity = affinity.to(self.device)
        self.tasks, self.groups = names, groups

    # --- a batch ---------------------------------------------------------------------------------------------------------

    @with_step_hooks
    def step(  # type: ignore[override]  # a closure that returns losses instead of a number
        self, losses_fn: Callable[[], Losses], *, scaler: torch.amp.GradScaler | None = None
    ) -> GroupsInfo:
        """Visits one batch. Call a learning-rate scheduler once after it, as after any step.

        Args:
            losses_fn: the losses of this batch at the current parameters, {task: scalar} or a sequence, unscaled; called once a
                visit. A task that is missing or None is absent: it is no member of its group in this batch, and its
                affinities stay. The same tasks must be there in every visit of a batch.
            scaler: scales each visit's loss, and is updated after each visit.

        Raises:
            ValueError: losses that do not fit, or other than the first visit's.
            RuntimeError: ``on_nonfinite="raise"`` and a visit's gradient is not finite.
            Whatever is raised, by ``losses_fn`` too, a note on the exception tells the visit. That visit changed nothing
            (except for what an exception of the inner optimizer's step leaves, and ``.grad``, which is None when a visit after
            the first fails in its backward pass), those before it stay, with what the affinity has measured of them, or none
            with ``transactional``.
        """
        if not callable(losses_fn):
            raise ValueError(
                f"losses_fn is a {type(losses_fn).__name__}; pass a function without arguments that returns losses."
            )
        scaler = enabled_scaler(scaler, self.on_nonfinite)
        self.ranks.check()
        before = self._snapshot() if self.transactional else None
        own = self.tasks, self.groups, self.affinity
        info = group = None
        try:
            with torch.enable_grad():
                tasks, ordered = order_losses(losses_fn(), self.tasks)
                if self._compares:
                    self._compare(tasks, ordered)
                if self.tasks is None:
                    self._fix_tasks(tasks)
                present = _present(ordered)
                reads = self._regroup()
                assert self.affinity is not None
                params, visits, skipped = self.params, self._visits(present), None
                info = GroupsInfo(tasks, [[tasks[k] for k in group] for group in visits], reads)
                self.affinity.start_batch()
                for group in visits:
                    if info.completed:
                        _, ordered = by_task(losses_fn(), tasks)
                        if _present(ordered) != present:
                            raise ValueError("losses_fn returned other tasks than in the first visit of the batch.")
                    values, nonfinite = self.affinity.update(group, self._means(ordered), skipped=skipped)
                    if self._multi is None:
                        skipped = self._step_sum(self._weighted(ordered, group), params, nonfinite, scaler, info)
                    else:
                        skipped = self._step_multi(self._weighted(ordered, group), group, scaler, info)
                    info.add(values, skipped)
                    del ordered  # and with it what the graphs of other groups hold, before the next losses
        except BaseException as error:
            number = 0 if info is None else info.completed
            name = "before its group was chosen" if group is None else f"of the group {[tasks[k] for k in group]}"
            note_visit(error, number, name, self.transactional)
            if before is not None:
                before.restore()
            if before is not None or not number:
                self.tasks, self.groups, self.affinity = own
            raise
        self.batches += 1
        self._compares = self.check_ranks and self.ranks.size > 1
        return info

    def _compare(self, tasks: tuple[Task, ...], losses: Sequence[Tensor | None]) -> None:
        """Raises a ``RuntimeError`` where the ranks do not start the batch alike."""
        self.ranks.check(self.params)
        modules = {} if self.affinity is None else {"affinity": self.affinity}
        entries = dict(step_entries(self, self.ranks, tasks, losses, modules))
        entries["batches before, and the seed"] = None, f"{self.batches}, {self.seed}"
        entries["groups"] = None, str(self._first_groups if self.tasks is None else self.groups)
        self.ranks.require_equal(entries)

    @torch.no_grad()
    def _means(self, losses: Sequence[Tensor | None]) -> Tensor | Sequence[Tensor | None]:
        """The losses' means over the ranks, which what is decided from them must be the same on."""
        return losses if self.ranks.size == 1 else self.ranks.mean(self._loss_values(losses)[0])[0]

    def _regroup(self) -> int:
        """Forms this batch's groups; returns how many host reads it took."""
        if self.grouping is None or self.batches < self.warmup:
            return 0
        assert self.affinity is not None
        groups = self.grouping(self.affinity, self.groups)
        if groups != self.groups:
            self.groups = check_partition(groups, self.affinity.num_tasks)
        return 1

    def _visits(self, present: list[int]) -> Groups:
        """The groups to visit in their order, of the tasks that are there."""
        there = set(present)
        groups = [here for group in self.groups if (here := [k for k in group if k in there])]
        draw = random.Random((self.seed << 32) + self.batches).random  # the same in every version of Python, and on every rank
        keys = [draw() for _ in groups]
        visits = [group for _, group in sorted(zip(keys, groups, strict=True))]
        return visits * 2 if len(visits) == 1 and len(present) > 1 and self.single_group == "twice" else visits

    def _weighted(self, losses: Sequence[Tensor | None], group: list[int]) -> list[Tensor]:
        """w_k L_k of the tasks in the group."""
        assert self.tasks is not None
        share = 1 / len(group) if self.group_norm else 1.0
        result = []
        for k in group:
            loss, weight = losses[k], share * self.loss_weights.get(self.tasks[k], 1.0)
            assert loss is not None
            result.append(loss if weight == 1 else loss * weight)
        return result

    def _step_multi(
        self, losses: list[Tensor], group: list[int], scaler: torch.amp.GradScaler | None, info: GroupsInfo
    ) -> Tensor:
        """A step along the weighting's combination; returns whether it was skipped, a bool scalar."""
        assert self._multi is not None
        assert self.tasks is not None
        chosen = {self.tasks[k]: loss for k, loss in zip(group, losses, strict=True)}
        self._multi.tasks = self.tasks
        step = self._multi.step(chosen, scaler=scaler)
        info.host_reads += step.host_reads
        info.steps.append(step)
        return step.skipped

    def _step_sum(
        self,
        losses: list[Tensor],
        params: list[Tensor],
        nonfinite: Tensor,
        scaler: torch.amp.GradScaler | None,
        info: GroupsInfo,
    ) -> Tensor:
        """A step along the gradient of the sum of the losses; ``nonfinite``: whether one of them is, a bool scalar."""
        before = [None if info.completed else p.grad for p in params]  # held, it would cost the memory of a gradient
        try:
            for param in params:
                param.grad = None
            grads = self._parts(losses if scaler is None else scaler.scale(losses), params)
            by_gradient = scaler is not None or self.max_norm is not None
            skipped = self._check_and_clip(grads, params, scaler) if by_gradient else nonfinite
            if self.on_nonfinite == "raise":
                info.host_reads += 1
                if bool(skipped):
                    raise RuntimeError("the losses or gradients of this visit are not finite; it changed nothing.")
            if self._source is not None:
                with torch.no_grad():
                    for param, grad in zip(params, self.ranks.gather(grads, params), strict=True):
                        param.grad = grad
            del grads
            if scaler is None:
                info.host_reads += self._step_inner(None if self.on_nonfinite == "raise" else skipped)
            else:
                scaler.step(self.optimizer)
                scaler.update()
        except BaseException:
            for param, grad in zip(params, before, strict=True):
                param.grad = grad
            raise
        return skipped

    def _parts(self, losses: list[Tensor], params: list[Tensor]) -> list[Tensor | None]:
        """This rank's part of the gradient of the sum of the losses' means over the ranks; of one process its ``.grad``."""
        ranks = self.ranks
        if self._source is None:
            torch.autograd.backward(losses)
            return [p.grad for p in params]
        live = [n for n, p in enumerate(params) if p.requires_grad]
        inputs = [params[n] for n in live]
        weights = torch.full((len(losses),), ranks.scale, dtype=torch.float64, device=self.device)
        row, _ = weighted_gradients(losses, weights, inputs, [[] for _ in losses], self._source)
        result: list[Tensor | None] = [None] * len(params)
        with torch.no_grad():
            if self._compares:
                ranks.compare_row(row, inputs)
            for n, part in zip(live, ranks.scatter(row, inputs), strict=True):
                result[n] = part
            del row
            ranks.wait()
        return result

    @torch.no_grad()
    def _check_and_clip(
        self, grads: Sequence[Tensor | None], params: list[Tensor], scaler: torch.amp.GradScaler | None
    ) -> Tensor:
        """Whether the gradient is not finite, in one read of it; scales it to ``max_norm``."""
        known = [(p, g._values() if g.is_sparse else g) for p, g in zip(params, grads, strict=True) if g is not None]
        if not known:
            raise ValueError("the losses of this group reach no parameter of the optimizer; add the model's to it.")
        dense = [grad for _, grad in known]
        square = self.ranks.gram(Problems("model", dense), [dense], [param for param, _ in known])
        (square,) = self.ranks.sum(square.reshape(()))
        skipped = ~(square < torch.inf)
        if self.max_norm is not None:
            norm = square.sqrt()
            if scaler is not None:
                norm = norm / scaler.scale(torch.ones((), device=self.device)).double()
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
            torch._foreach_mul_(dense, factor)
        return skipped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer; with a weighting its parameters find their role as there."""
        (self.optimizer if self._multi is None else self._multi).add_param_group(param_group)
        self._compares = self.ranks.size > 1

    # --- failing and checkpoints ------------------------------------------------------------------------------------------

    def _snapshot(self) -> BatchSnapshot:
        modules = [self.module, self.affinity, None if self._multi is None else self._multi.weighting]
        return BatchSnapshot(self.optimizer, [module for module in modules if module is not None])

    def _extra_state(self) -> dict[str, Any]:
        """``{"groups": {...}}``: task names, affinity, groups, and what the next order is drawn from."""
        weighting = None if self._multi is None else dict(self._multi.weighting.state_dict())
        return {
            STATE_KEY: {
                "tasks": None if self.tasks is None else list(self.tasks),
                "groups": [list(group) for group in self.groups],
                "batches": self.batches,
                "seed": self.seed,
                "affinity": None if self.affinity is None else dict(self.affinity.state_dict()),
                "weighting": weighting,
            }
        }

    def _load(self, state_dict: dict[str, Any]) -> None:
        """A state dict without the entry of its own leaves groups, affinity and order as they are."""
        own = state_dict.pop(STATE_KEY, None)
        before = self.tasks, self.groups, self.affinity, self.batches, self.seed
        modules = [self.affinity, None if self._multi is None else self._multi.weighting]
        snapshots = [Snapshot([], module) for module in modules if module is not None]
        try:
            if own is not None:
                self._load_own(own)
            super()._load(state_dict)
        except BaseException:
            for snapshot in snapshots:
                snapshot.restore()
            self.tasks, self.groups, self.affinity, self.batches, self.seed = before
            raise

    def _load_own(self, own: dict[str, Any]) -> None:
        if own["tasks"] is not None:
            names = loaded_names(own["tasks"], self.tasks, self._tasks_given)
            assert names is not None
            self._fix_tasks(names)
            assert self.affinity is not None
            self.groups = check_partition(own["groups"], len(names))
            load_buffers(self.affinity, own["affinity"], self.device)
        if (own["weighting"] is None) != (self._multi is None):
            raise ValueError("the state dict was saved with a weighting and this optimizer has none, or the other way round.")
        if self._multi is not None:
            load_buffers(self._multi.weighting, own["weighting"], self.device)
        self.batches, self.seed = own["batches"], own["seed"]


def _present(losses: Sequence[Tensor | None]) -> list[int]:
    """The tasks that are there."""
    return [k for k, loss in enumerate(losses) if loss is not None]
