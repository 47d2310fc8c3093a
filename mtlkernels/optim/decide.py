"""From Grams to what is applied: the weights of a step, clipped, or NaN where it is not finite. Nothing is read on the host."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..gradients import Rows, check_dense, update_buffers
from ..granularity import Problems
from ..weightings import Elementwise, MemoryWeighting, Weighting
from ..weightings.cross.base import cross_of, of_both, takes_cross
from ..weightings.seeded import drawn_seed
from .held import HeldWeights
from .info import StepInfo, UpdateNorm
from .one_pass import check_loss_only
from .previous import WeightsFrom, check_previous
from .roles import Roles, Task
from .skip import first_written
from .tracked import Tracked
from .undo import Snapshot
from .wrapper import WrappedOptimizer


class Batch(NamedTuple):
    """What a step knows of its losses: the K names, their values [K], which are present, bool [K], and whether all are."""

    tasks: tuple[Task, ...]
    losses: Tensor
    present: Tensor
    complete: bool
    seed: Tensor | None
    """Of a random weighting; None: it draws its own."""
    tracked: Tracked | None = None
    """The gradients beside the weighting's memories of them."""
    previous: Tensor | None = None
    """Weights [K] with which the update is written already; None: it takes those of this Gram."""


def check_options(method: Weighting | Elementwise, one_pass: bool, options: Mapping[str, object]) -> None:
    """Raises a ``ValueError`` for an option of :class:`MultiTaskOptimizer` that the method rules out."""
    if one_pass and isinstance(method, Weighting):
        check_loss_only(method, options)
    if options["weights_from"] == "previous":
        check_previous(method, one_pass, options)
    name = type(method).__name__
    whole = isinstance(method, (Elementwise, MemoryWeighting))
    if whole and options["per"] != "model":
        raise ValueError(f'{name} takes all shared parameters as one; pass per="model".')
    if (whole or takes_cross(method)) and options["update_every"] != 1:
        raise ValueError(f"{name} needs the gradients of all tasks in every step; pass update_every=1.")


class Decisions(WrappedOptimizer):
    """The part of :class:`MultiTaskOptimizer` between the gradients of a step and their combination."""

    weighting: Weighting | Elementwise
    ranks: Ranks
    update_every: int
    weights_from: WeightsFrom
    max_norm: float | None
    on_nonfinite: str
    _crosses: bool
    """Whether the weighting takes two batches."""
    _roles: Roles
    _held: HeldWeights

    @property
    def _holds(self) -> bool:
        """Whether later steps use the weights of this one."""
        return self.update_every > 1 or self.weights_from == "previous"

    def _seed(self, computes: bool) -> Tensor | None:
        """The seed of a random weighting where it must be the same on other ranks, too."""
        return drawn_seed(self.weighting, self.device) if computes and self.ranks.size > 1 else None

    def _squares(
        self,
        tasks: tuple[Task, ...],
        problems: Problems,
        shared_rows: Rows,
        own_rows: Rows,
        own: list[Tensor],
        scale: Tensor | None,
        tracked: Tracked | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Grams of the shared and of the other parameters' rows, unscaled, on the first parameter's device.

        No rows' worth of reading is done for an element-wise method that needs no Gram; it has zeros.
        """
        if tracked is not None:
            gram = tracked.gram().to(self.device)
        elif isinstance(self.weighting, Elementwise) and self.on_nonfinite == "skip":
            gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device=self.device)
        else:
            gram = self._unscaled(self._gram(problems, shared_rows, cast(list[Tensor], problems.tensors), tasks), scale)
        own_gram = self._unscaled(self._gram(Problems("model", own), own_rows, own, tasks), scale) if own else None
        return gram, own_gram

    def _gram(self, problems: Problems, rows: Rows, params: list[Tensor], tasks: Sequence[Task]) -> Tensor:
        try:
            return self.ranks.gram(problems, rows, params).to(self.device)
        except Exception:
            check_dense(tasks, rows, params, self.name_of)
            raise

    def _unscaled(self, gram: Tensor, scale: Tensor | None) -> Tensor:
        return gram if scale is None else gram / scale.double().square()

    def _solve(self, batch: Batch, gram: Tensor, own_gram: Tensor | None, kept: Snapshot) -> tuple[StepInfo, Tensor, Tensor]:
        """Weights on the device: the info, those to apply ([K] or [M, K], of two batches 2K) and those of the heads.

        Where the update is written already, [1] to multiply it by is what is to be applied.
        """
        weighting, tracked, count = self.weighting, batch.tracked, len(batch.tasks)
        assert isinstance(weighting, Weighting)
        crosses = self._crosses
        rows = 2 * count if crosses else count
        finite = gram.diagonal(dim1=-2, dim2=-1) < torch.inf  # squared norms: false for inf and NaN
        finite = (finite if finite.dim() == 1 else finite.all(0))[:rows]
        if own_gram is not None:
            finite = finite & (own_gram.diagonal() < torch.inf)
        finite = finite.unflatten(0, (rows // count, count)).all(0) if crosses else finite
        both = finite.repeat(2) if crosses else finite
        # A memory's rows come after those of the gradients, and are finite.
        every = both if len(both) == gram.shape[-1] else torch.cat([both, torch.ones_like(both)])
        clean = torch.where(every.unsqueeze(-1) & every, gram, 0.0)
        own_clean = None if own_gram is None else torch.where(both.unsqueeze(-1) & both, own_gram, 0.0)
        drops = self.on_nonfinite == "drop_task"
        active = batch.present & finite if drops else batch.present
        masked = drops or not batch.complete
        mask, losses = (active, torch.where(active, batch.losses, 0.0)) if masked else (None, batch.losses)
        own_weights = active.double()
        if tracked is not None:
            weights, row_weights = tracked.weigh(clean, mask, losses)
        elif crosses:
            weights = weighting(cross_of(clean), active=mask, losses=losses, seed=batch.seed)
            row_weights, own_weights = of_both(weights), of_both(own_weights)
        else:
            row_weights = weights = weighting(clean, active=mask, losses=losses, seed=batch.seed)
        computed, applied_weights = weights, row_weights if tracked is None else weights
        if batch.previous is not None:  # applied already; what is left is a factor
            weights = batch.previous
            row_weights = of_both(weights) if crosses else weights
            applied_weights = torch.ones_like(weights[:1])
        update = UpdateNorm(clean, row_weights, own_clean, own_weights)
        info = StepInfo(batch.tasks, batch.losses, gram[..., :count, :count], weights, active, update)
        usable = computed.isfinite().all() & (active.any() if drops else finite.all())
        applied = self._checked(info, update, (applied_weights, own_weights), finite, usable)
        if self.on_nonfinite != "raise":
            kept.restore_buffers_unless(usable)
        if self._holds:
            self._held = self._held.updated(computed, active & usable, self.update_every)
        return info, *applied

    def _keep(self, batch: Batch, square: Tensor, own_gram: Tensor | None, kept: Snapshot) -> tuple[StepInfo, Tensor, Tensor]:
        """As :meth:`_solve`, between updates of the weights: of the weighted gradient, whose ``square`` is [1, 1]."""
        present = batch.present
        weights = torch.where(present, self._held.of_tasks(batch.losses), 0.0)
        finite = torch.ones_like(present) if own_gram is None else own_gram.diagonal() < torch.inf
        usable = finite.all() & (square[0, 0] < torch.inf)
        ones, own_weights = torch.ones_like(square[0]), present.double()
        update = UpdateNorm(square, ones, own_gram, own_weights)
        info = StepInfo(batch.tasks, batch.losses, None, weights, present, update)
        applied = self._checked(info, update, (ones, own_weights), finite, usable)
        self._held = self._held.used()
        return info, *applied

    def _by_element(
        self,
        batch: Batch,
        rows: Rows,
        gram: Tensor,
        own_gram: Tensor | None,
        scale: Tensor | None,
        factor: Tensor | None,
        kept: Snapshot,
    ) -> tuple[StepInfo, list[Tensor | None], Tensor]:
        """As :meth:`_solve`, of an element-wise method: the info, the shared update and the weights of the heads.

        The update's norm, and whether it is finite, take a read of the update. Tasks are told apart by the Gram of their
        gradients, where ``on_nonfinite`` asks for it. The update is divided by ``factor``.
        """
        method, model, shared = self.weighting, Problems("model", self._roles.shared), self._roles.shared
        told_apart, drops = self.on_nonfinite != "skip", self.on_nonfinite == "drop_task"
        finite = torch.ones_like(batch.present)
        for matrix in (gram, own_gram):
            finite = finite if matrix is None else finite & (matrix.diagonal() < torch.inf)
        active = batch.present & finite if drops else batch.present
        mask = active if drops or not batch.complete else None
        try:
            buffers: list[Tensor | None] = method(rows, update_buffers(rows, shared), active=mask)
        except Exception:
            check_dense(batch.tasks, rows, shared, self.name_of)
            raise
        own_clean = None if own_gram is None else torch.where(finite.unsqueeze(-1) & finite, own_gram, 0.0)
        ones, own_weights = torch.ones(1, dtype=torch.float64, device=self.device), active.double()
        square = self._unscaled(self._gram(model, [buffers], shared, batch.tasks), scale)
        update = UpdateNorm(square, ones, own_clean, own_weights)
        nan = torch.full_like(batch.losses, torch.nan)
        info = StepInfo(batch.tasks, batch.losses, gram if told_apart else None, nan, active, update)
        usable = (square[0, 0] < torch.inf) & (active.any() if drops else finite.all())
        applied, own_weights = self._checked(info, update, (ones, own_weights), finite, usable)
        if self.on_nonfinite != "raise":
            kept.restore_buffers_unless(usable)
        # Without clipping or unscaling one tensor is enough to show that the update is skipped.
        shows_nan = None if self.max_norm is not None or factor is not None else first_written(shared, buffers)
        written = [b if shows_nan is None or p is shows_nan else None for p, b in zip(shared, buffers, strict=True)]
        model.combine([written], applied if factor is None else applied / factor, written)
        return info, buffers, own_weights

    def _checked(
        self, info: StepInfo, update: UpdateNorm, weights: tuple[Tensor, Tensor], finite: Tensor, usable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weights of the shared and of the other parameters, clipped; NaN, or an error, where they are not ``usable``."""
        if self.on_nonfinite == "raise":
            info.host_reads = 1
            self._raise_nonfinite(info, torch.cat([finite, usable.unsqueeze(0)]).tolist())
        applied, own = weights
        if self.max_norm is not None:
            factor = (self.max_norm / (update.norm() + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
            applied, own = applied * factor, own * factor
        if self.on_nonfinite != "raise":
            info.skipped = ~usable
            # A skipped update shows in .grad, where a GradScaler and SkipFlag look.
            applied, own = (torch.where(usable, w, torch.nan) for w in (applied, own))
        return applied, own

    def _raise_nonfinite(self, info: StepInfo, verdict: list[bool]) -> None:
        """``verdict``: whether each task's gradients are finite, and whether the update is."""
        named = ", ".join(repr(task) for task, finite in zip(info.tasks, verdict, strict=False) if not finite)
        if named:
            raise RuntimeError(f"gradients of task {named} are not finite; nothing was changed.")
        if not verdict[-1] and isinstance(self.weighting, Elementwise):
            raise RuntimeError(f"the update of {type(self.weighting).__name__} is not finite; nothing was changed.")
        if not verdict[-1] and info.gram is None:
            raise RuntimeError("the gradient of the weighted losses is not finite; nothing was changed.")
        if not verdict[-1]:
            raise RuntimeError(f"{type(self.weighting).__name__} returned weights that are not finite; nothing was changed.")
