"""Flatness-seeking multi-task learning: sharpness-aware minimisation for each task, gradients and flat parts combined apart."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from .. import ops
from ..checks import TaskGradients
from ..flat import FlatGram, paired_gram
from ..gradients import Rows, Source, check_reached, combine_own
from ..granularity import Problems
from ..reference import Granularity
from ..weightings import CrossWeighting, MemoryWeighting, Weighting, as_weighting
from .accumulated import Accumulated, MicroBatch
from .decide import Batch
from .flat_weights import Aggregation, FlatWeightings
from .info import StepInfo, UpdateNorm
from .losses import Losses
from .multitask import MultiTaskOptimizer, Nonfinite
from .perturbed import Inputs, LossesFn, Passes, Settings, call, check_function
from .roles import Task
from .skip import first_written
from .statistics import RunningStatistics
from .undo import Snapshot, load_buffers
from .wrapper import eager

Perturbation = Literal["task", "samo"]

STATE_KEY = "flat"
"""Entry of the state dict that holds the state of the weightings besides the first."""


class FlatInfo(StepInfo):
    """As :class:`StepInfo`, of the update sum_k w_k g_k + v_k f_k.

    ``gram`` and ``weights`` are those of the gradients g, in ``"direct"`` aggregation of the gradients at perturbed parameters.

    Attributes:
        flat_gram: float64 [K, K], or [N, K, K] per tensor, of the flat parts f, unscaled; None in ``"direct"`` aggregation.
        flat_weights: float64 [K] or [N, K], v before clipping; None in ``"direct"`` aggregation.
        perturbed_losses: float64 [K], each task's loss at its own perturbed parameters; NaN for a task that was absent.
    """

    flat_gram: Tensor | None = None
    flat_weights: Tensor | None = None
    perturbed_losses: Tensor

    @property
    def sharpness(self) -> Tensor:
        """How much each task's loss rises along its perturbation, float64 [K]."""
        return self.perturbed_losses - self.losses

    @property
    def flat_conflicts(self) -> Tensor | None:
        """Share of task pairs whose flat parts conflict, as :func:`mtlkernels.conflict_rate`."""
        return None if self.flat_gram is None else ops.conflict_rate(self.flat_gram)


class FlatMinimaOptimizer(MultiTaskOptimizer):
    """A torch optimizer that seeks minima that are flat for every task (Phan et al. 2025, Algorithm 1).

    Of each task it takes the gradient g_k, and the gradient s_k at parameters moved by that task's own perturbation
    (:func:`mtlkernels.perturb_`), of the shared parameters and of its head. Shared parameters get sum_k w_k g_k + v_k f_k,
    with f_k = s_k - g_k the flat part and w, v from two weightings; heads get s_k. One step costs 1 + K forward and 2 K
    backward passes (two forward passes a task where each task has a function of its own). The K flat parts are never in memory.

    The inner optimizer steps from the parameters as they were: they are never written. In perturbed passes the running
    statistics of norms stay as the clean pass left them. Dropout draws a new mask in every pass. Code that holds a parameter's
    address (a captured CUDA graph) does not see a perturbation.

    Args:
        optimizer: the torch optimizer that applies the update; ``.optimizer`` afterwards.
        weighting: gives w; a :class:`Weighting` or its registry string.
        flat_weighting: gives v. None: an independent copy of ``weighting``.
        pair_weighting: weighs a gradient and a flat part against each other, in the aggregations ``"second"`` and ``"each"``.
            None: an independent copy of ``weighting``.
        aggregation: ``"separate"``: as above. ``"direct"``: the weighting on the s_k alone. ``"second"``: the pair
            sum w_k g_k and sum v_k f_k is weighed once more. ``"each"``: the pair of every task is weighed, then the results.
        rho: radius of the perturbation of the shared parameters, and of the heads unless ``head_rho`` is given.
        head_rho: radius of the perturbation of a head.
        adaptive: whether perturbations are in units of the parameters (Kwon et al. 2021).
        joint: one norm over the shared parameters and the head, instead of one for each.
        perturbation: ``"task"``: along each task's own gradient. ``"samo"``: along the gradient of the mean loss, mixed with a
            zeroth-order estimate of the task's (SAMO, 2025), for one clean backward pass and two forward passes more instead of
            K backward passes; with ``"direct"`` aggregation only.
        beta: share of the zeroth-order estimate in ``"samo"``.
        probe: distance of its two forward passes from the parameters, per standard normal.
        module: the model, whose running statistics are looked after. None: its norms are found while they run, which a compiled
            model's cannot.
        shared, heads, tasks, max_norm, on_nonfinite, gradients, process_group, mesh, check_ranks: as of
            :class:`MultiTaskOptimizer`. A gradient that is not finite at perturbed parameters counts as the task's. Of several
            ranks all perturb alike, along the gradient of the losses' means over them: the step is that of one process with
            the whole batch. ``"samo"`` is for one process.
        per: ``"model"`` or ``"tensor"``, as there.

    Raises:
        ValueError: an argument that does not fit; the message names it and the fix.
    """

    _takes_loss_only = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weighting: str | Weighting = "mean",
        *,
        flat_weighting: str | Weighting | None = None,
        pair_weighting: str | Weighting | None = None,
        aggregation: Aggregation = "separate",
        rho: float = 0.05,
        head_rho: float | None = None,
        adaptive: bool = False,
        joint: bool = False,
        perturbation: Perturbation = "task",
        beta: float = 0.5,
        probe: float = 1e-2,
        module: torch.nn.Module | None = None,
        shared: Iterable[Tensor] | None = None,
        heads: Mapping[Any, Iterable[Tensor]] | None = None,
        tasks: Sequence[Task] | None = None,
        per: Literal["model", "tensor"] = "model",
        max_norm: float | None = None,
        on_nonfinite: Nonfinite = "skip",
        gradients: Source | None = None,
        process_group: object = None,
        mesh: object = None,
        check_ranks: bool = False,
    ) -> None:
        for name, value, known in (
            ("aggregation", aggregation, get_args(Aggregation)),
            ("perturbation", perturbation, get_args(Perturbation)),
            ("per", per, ("model", "tensor")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; pass one of {', '.join(map(repr, known))}.")
        for name, radius in (("rho", rho), ("head_rho", head_rho)):
            if radius is not None and not 0 <= radius < float("inf"):
                raise ValueError(f"{name} is {radius!r}; pass a radius, 0 or more.")
        if joint and head_rho is not None:
            raise ValueError("head_rho is given, but joint=True has one norm and one radius; pass rho alone.")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta!r}; pass a number from 0 to 1.")
        if not 0 < probe < float("inf"):
            raise ValueError(f"probe is {probe!r}; pass a positive number.")
        if perturbation == "samo" and aggregation != "direct":
            raise ValueError(
                'perturbation="samo" has no gradient of each task to take flat parts from; pass aggregation="direct".'
            )
        if flat_weighting is not None and aggregation not in ("separate", "second"):
            raise ValueError(f"flat_weighting is given, which aggregation={aggregation!r} has no use for; leave it out.")
        if pair_weighting is not None and aggregation not in ("second", "each"):
            raise ValueError(f"pair_weighting is given, which aggregation={aggregation!r} has no use for; leave it out.")
        if module is not None and not isinstance(module, torch.nn.Module):
            raise ValueError(f"module is a {type(module).__name__}; pass the model, a torch.nn.Module.")
        loss_weighting = as_weighting(weighting)
        super().__init__(
            optimizer,
            loss_weighting,
            shared=shared,
            heads=heads,
            tasks=tasks,
            per=per,
            max_norm=max_norm,
            on_nonfinite=on_nonfinite,
            gradients=gradients,
            process_group=process_group,
            mesh=mesh,
            check_ranks=check_ranks,
        )
        if perturbation == "samo" and (self.ranks.size > 1 or self.ranks.hides_leaves):
            raise ValueError(
                'perturbation="samo" needs losses at parameters without a backward pass after them, which several ranks do not '
                'have; pass perturbation="task".'
            )
        self.weightings = FlatWeightings(aggregation, loss_weighting, flat_weighting, pair_weighting).to(self.device)
        for part in self.weightings.modules():
            if isinstance(part, (CrossWeighting, MemoryWeighting)):
                raise ValueError(
                    f"{type(part).__name__} takes a second batch or a memory of gradients, which flat parts lack; pass a "
                    "weighting of a Gram."
                )
        self.aggregation, self.perturbation, self.adaptive, self.joint = aggregation, perturbation, adaptive, joint
        self.rho, self.head_rho, self.beta, self.probe, self.module = rho, head_rho, beta, probe, module

    _statistics: RunningStatistics
    """Of the call in progress."""

    @property
    def flat_weighting(self) -> Weighting | None:
        """The weighting of the flat parts; None where the aggregation has none."""
        return self.weightings.flat

    @property
    def pair_weighting(self) -> Weighting | None:
        """The weighting of pairs of a gradient and a flat part; None where the aggregation has none."""
        return self.weightings.pair

    # --- the update ------------------------------------------------------------------------------------------------------

    @eager
    def backward(  # type: ignore[override]  # a function instead of losses
        self, losses_fn: LossesFn, scaler: torch.amp.GradScaler | None = None
    ) -> FlatInfo:
        """Fills ``.grad``; adds to what is there, as ``loss.backward()`` does. Follow with ``step()``.

        Gradient accumulation: each call perturbs along, and combines, the gradients of its own part of the batch (the
        m-sharpness of Foret et al. 2021), and the updates are added. With :meth:`accumulate` each part still is perturbed on
        its own, but gradients and flat parts are added up before they are combined, once.

        Args:
            losses_fn: the losses at the current parameters, {task: scalar loss} or a sequence, unscaled; called 1 + K times. Or
                {task: a function that returns its loss}, each called twice. A task that is missing or None is absent.
            scaler: as of :meth:`MultiTaskOptimizer.backward`.

        Raises:
            As :meth:`MultiTaskOptimizer.backward`, and whatever ``losses_fn`` raises. Parameters, running statistics, ``.grad``
            and the weightings' state are as before then.
        """
        with self._undone_on_error() as before:
            return self._backward(losses_fn, scaler, accumulate=True, kept=before)

    def accumulate(  # type: ignore[override]
        self, losses_fn: LossesFn, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Adds a part of the batch to the next update, as :meth:`MultiTaskOptimizer.accumulate`: K gradients and K flat parts.

        Args:
            losses_fn: as in :meth:`backward`; perturbed along the gradients of this part.
            scaler: as there.

        Raises:
            As :meth:`backward`.
        """
        super().accumulate(losses_fn, scaler)  # type: ignore[arg-type]

    def step(  # type: ignore[override]
        self,
        losses_fn: LossesFn | None = None,
        *,
        closure: LossesFn | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> FlatInfo | None:
        """One optimization step.

        Args:
            losses_fn: as in :meth:`backward`, whose result then replaces ``.grad``. None: steps from ``.grad``.
            closure: ``losses_fn`` under the name that callers of torch optimizers use.
            scaler: as of :meth:`MultiTaskOptimizer.step`.

        Returns:
            The update's info; None without ``losses_fn``.

        Raises:
            As :meth:`backward`. An exception of the inner optimizer's step leaves what that had changed by then changed.
        """
        inherited: Any = super().step
        return inherited(losses_fn, closure=closure, scaler=scaler)

    step.hooked = True  # type: ignore[attr-defined]  # the inherited one runs the step hooks

    def _evaluated(self, closure: Callable[[], Losses]) -> Any:
        return closure  # called by _backward, several times

    def _backward(  # type: ignore[override]
        self,
        losses_fn: LossesFn,
        scaler: torch.amp.GradScaler | None,
        accumulate: bool,
        kept: Snapshot,
        other: None = None,
        source: None = None,
    ) -> FlatInfo:
        batch = self._micro_batch(losses_fn, scaler, accumulate)
        with torch.no_grad():
            batch = self._accumulated.added_to(batch)
            tasks, losses, rows, params, scale = batch
            count, shared, own = len(tasks), params[0], params[-1]
            losses, perturbed = losses[:count], losses[count:]
            shared_rows, own_rows = rows[:-count], rows[-count:]
            if all(loss is not None for loss in losses):
                check_reached(shared_rows[-count:], shared, self.name_of)
            ranks = self.ranks
            grads = _FlatRows(self.per, shared, split=len(shared_rows) > count)
            gram, own_gram = self._squares(tasks, grads, shared_rows, own_rows, own, scale)
            values, present = self._loss_values([*losses, *perturbed])
            seeds = self.weightings.draw_seeds(self.device) if ranks.size > 1 else None
            gram, own_gram, values, seeds = ranks.decisive(gram, own_gram, values, seeds)
            complete = all(loss is not None for loss in losses)
            facts = Batch(tasks, values[:count], present[:count], complete, seeds)
            info, applied, own_weights = self._solve_flat(facts, gram, own_gram, self._cut(shared_rows[-count:]), kept)
            info.perturbed_losses = values[count:]
            weighted = self.max_norm is not None or self.on_nonfinite == "drop_task" or ranks.scale != 1
            if scale is not None and not accumulate:
                applied, own_weights, weighted = applied / scale, own_weights / scale, True
            buffers = ranks.buffers(shared_rows, shared)
            ops.combine(shared_rows, ranks.scaled(applied), out=buffers)
            shows_nan = first_written(shared, buffers)
            own_buffers = ranks.buffers(own_rows, own)
            own_buffers = combine_own(own_rows, own_buffers, ranks.scaled(own_weights), weighted or shows_nan is None)
            shows_nan = first_written(own, own_buffers) if shows_nan is None else shows_nan
            every = [*shared, *own]
            self._fill(every, ranks.gather([*buffers, *own_buffers], every), accumulate)
        self._accumulated = Accumulated()
        self._note(info, shows_nan, scaled=scale is not None and accumulate)
        return info

    def _micro_batch(  # type: ignore[override]
        self,
        losses_fn: LossesFn,
        scaler: torch.amp.GradScaler | None,
        accumulate: bool,
        other: None = None,
        last: bool = False,
    ) -> MicroBatch:
        """The rows are K at the parameters, unless ``"direct"``, and K at perturbed ones; the losses 2K likewise."""
        check_function(losses_fn)
        statistics = self._statistics
        tasks, losses, scaled, scale = self._begin(call(losses_fn), scaler, accumulate)
        statistics.keep()
        inputs = self._inputs(tasks)
        scales = None if scale is None else scaler
        passes = Passes(self._settings(), losses_fn, tasks, inputs, statistics, scales, self.ranks, received=self._scatter_row)
        loss_rows, sam_rows, own_rows, perturbed = (
            passes.along_tasks(scaled) if self.perturbation == "task" else passes.samo(losses)
        )
        shared_rows = sam_rows if loss_rows is None else [*loss_rows, *sam_rows]
        there = [None if loss is None else value for loss, value in zip(losses, perturbed.unbind(), strict=True)]
        params = [inputs.shared for _ in shared_rows] + [inputs.own for _ in own_rows]
        return MicroBatch(tasks, [*losses, *there], [*shared_rows, *own_rows], params, scale)

    def _inputs(self, tasks: tuple[Task, ...]) -> Inputs:
        own, own_of_task = self._roles.own(tasks)
        live = [m for m, p in enumerate(own) if p.requires_grad]
        place = {m: i for i, m in enumerate(live)}
        return Inputs(
            [p for p in self._roles.shared if p.requires_grad],
            [own[m] for m in live],
            [[place[m] for m in indices if m in place] for indices in own_of_task],
        )

    def _settings(self) -> Settings:
        return Settings(
            rho=self.rho,
            head_rho=self.rho if self.head_rho is None else self.head_rho,
            adaptive=self.adaptive,
            joint=self.joint,
            beta=self.beta,
            probe=self.probe,
            keeps=self.aggregation != "direct",
            gradients=self.gradients,
            device=self.device,
        )

    # --- weights ---------------------------------------------------------------------------------------------------------

    def _solve_flat(
        self, batch: Batch, gram: Tensor, own_gram: Tensor | None, cut: float, kept: Snapshot
    ) -> tuple[FlatInfo, Tensor, Tensor]:
        """On the device: the info, the weights to apply to the rows, [2K] or [N, 2K] (K if direct), and the heads', [K].

        Args:
            batch: what is known of the losses, with the weightings' seeds.
            gram: of the gradients at perturbed parameters if direct, otherwise as :meth:`FlatGram.of_pairs` takes it.
            own_gram: of the other parameters' gradients.
            cut: as of :class:`FlatWeightings`.
            kept: the weightings' buffers as they go back where the update is not finite.
        """
        tasks, values, present, complete, seeds = batch[:5]
        grams = [gram] if self.aggregation == "direct" else list(FlatGram.of_pairs(gram))
        finite = torch.ones(len(tasks), dtype=torch.bool, device=self.device)
        for gram in grams[:2]:  # squared norms: false for inf and NaN
            now = gram.diagonal(dim1=-2, dim2=-1) < torch.inf
            finite = finite & (now if self.per == "model" else now.all(0))
        if own_gram is not None:
            finite = finite & (own_gram.diagonal() < torch.inf)
        pair = finite.unsqueeze(-1) & finite
        clean = [torch.where(pair, gram, 0.0) for gram in grams]
        own_clean = None if own_gram is None else torch.where(pair, own_gram, 0.0)
        drops = self.on_nonfinite == "drop_task"
        active = present & finite if drops else present
        mask = active if drops or not complete else None
        known = values if mask is None else torch.where(active, values, 0.0)
        if self.aggregation == "direct":
            w, v = self.weighting(clean[0], active=mask, losses=known, seed=None if seeds is None else seeds[:1]), None
            square_form, applied = clean[0], w
        else:
            w, v = self.weightings(FlatGram(*clean), cut, mask, known, seeds)
            square_form, applied = _blocks(*clean), torch.cat([w, v], -1)
        own_weights = active.double()
        update = UpdateNorm(square_form, applied, own_clean, own_weights)
        info = FlatInfo(tasks, values, grams[0], w, active, update)
        if v is not None:
            info.flat_gram, info.flat_weights = grams[1], v
            applied = torch.cat([w - v, v], -1)
        usable = applied.isfinite().all() & (active.any() if drops else finite.all())
        weights = self._checked(info, update, (applied, own_weights), finite, usable)
        if self.on_nonfinite != "raise":
            kept.restore_buffers_unless(usable)
        return info, *weights

    def _cut(self, rows: Rows) -> float:
        """What a flat part must exceed, over the norm of its gradient: the unit roundoff of the finest dtype of the rows."""
        return min((torch.finfo(t.dtype).eps / 2 for row in rows for t in row if t is not None), default=0.0)

    # --- failing and checkpoints -------------------------------------------------------------------------------------------

    @contextmanager
    def _undone_on_error(self) -> Iterator[Snapshot]:
        before = Snapshot(self.params, self.weightings)
        try:
            with super()._undone_on_error(), RunningStatistics(self.module).watched() as self._statistics:
                yield before
        except BaseException:
            before.restore()
            raise
        finally:
            self.__dict__.pop("_statistics", None)  # it holds the model

    def _extra_state(self) -> dict[str, Any]:
        """As of :class:`MultiTaskOptimizer`, and ``{"flat": {"flat": state dict, "pair": state dict}}``."""
        others = {"flat": self.flat_weighting, "pair": self.pair_weighting}
        states = {name: dict(w.state_dict()) for name, w in others.items() if w is not None}
        return super()._extra_state() | {STATE_KEY: states}

    def _load(self, state_dict: dict[str, Any]) -> None:
        own = state_dict.pop(STATE_KEY, None)
        with self._undone_on_error():
            for name, state in (own or {}).items():
                weighting = getattr(self.weightings, name, None)
                if weighting is None:
                    raise ValueError(
                        f"the state dict holds the state of a {name}_weighting, which aggregation={self.aggregation!r} does "
                        "not have; pass the aggregation that it was saved with."
                    )
                load_buffers(weighting, state, self.device)
            super()._load(state_dict)


class _FlatRows(Problems):
    """Rows of gradients and, if ``split``, as many at perturbed parameters after them, whose flat parts the Gram is of."""

    def __init__(self, per: Granularity | None, tensors: Sequence[Tensor], split: bool) -> None:
        super().__init__(per or "model", tensors)
        self.split = split

    def gram(self, rows: TaskGradients) -> Tensor:
        if not self.split:
            return super().gram(rows)
        half = len(rows) // 2
        return paired_gram(rows[:half], rows[half:], cast(Literal["model", "tensor"], self.per))


def _blocks(loss: Tensor, flat: Tensor, cross: Tensor) -> Tensor:
    """The Gram [..., 2K, 2K] of the gradients and the flat parts after them."""
    return torch.cat([torch.cat([loss, cross], -1), torch.cat([cross.mT, flat], -1)], -2)
