"""What a weighting with a memory of each task's gradients is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ... import ops
from ...checks import TaskGradients, check_fit, check_gradients
from ...memory import memory_combine_, memory_dtype
from ...reference import like
from ...solvers.common import finite_problems
from ..state import StatefulWeighting

Rows = Sequence[Sequence[Tensor | None]]
KEY = "memory."


class MemoryUpdate(NamedTuple):
    """What becomes of the memories y_k of K tasks, y_k <- keep_k y_k + scale_k g_k, and the update sum_k weights_k y_k.

    float64 [K] each.
    """

    keep: Tensor
    scale: Tensor
    weights: Tensor

    def unless(self, usable: Tensor) -> "MemoryUpdate":
        """Nothing moves, and the weights are NaN, where the bool scalar is false."""
        return MemoryUpdate(
            torch.where(usable, self.keep, 1.0),
            torch.where(usable, self.scale, 0.0),
            torch.where(usable, self.weights, torch.nan),
        )


class MemoryWeighting(StatefulWeighting):
    """A weighting with a memory y_k of each task's gradients, for :func:`mtlkernels.aggregate` and ``MultiTaskOptimizer``.

    A memory moves by y_k <- keep_k y_k + scale_k g_k, and the update is sum_k w_k y_k. The Gram of the moved memories follows
    from that of the 2K rows [g; y], so that a call reads gradients and memories twice and writes the memories once, after
    everything is decided: where a gradient or a weight is not finite, nothing is written and the update is NaN.

    Memories are zero at first, float32 (float64 of float64 gradients) and laid out like the gradients. They are part of
    ``state_dict`` as ``memory.0``, ``memory.1``, ... [K, ...], one for each tensor, load into a fresh object, and move to the
    gradients' device with the first call there. A task that is not active leaves its memory and its state as they are. A tensor
    of which no task has a gradient in a call has no part in it; where some do, None counts as zero. 16-bit gradients are
    copied to float32 for the Gram.

    Subclasses implement :meth:`decide`, and extend :meth:`combine` where something follows the combination.
    """

    squares: bool = False
    """Whether memories are of squares, y_k <- keep_k y_k + scale_k g_k^2, and the update of the gradients, sum_k w_k g_k."""
    reads_losses: bool = False
    weighs_absent: bool = False
    """Whether a task that is not active has a part in the update, through its memory."""
    more_rows: int = 0
    """Rows that a subclass keeps beside those of the K tasks, the last ones of each saved memory [K + more_rows, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self._memory: list[Tensor | None] = []

    def forward(self, gram: Tensor, **options: Any) -> Tensor:
        """Raises a ``ValueError``: a Gram has no memory in it."""
        name = type(self).__name__
        raise ValueError(
            f"{name} keeps a memory of the gradients, which a Gram does not have; pass it to mtlkernels.aggregate(grads, "
            f"{name}(...)) or MultiTaskOptimizer."
        )

    def decide(self, gram: Tensor, mask: Tensor, losses: Tensor | None, excess: Tensor | None) -> MemoryUpdate:
        """The method itself. Tasks outside ``mask`` keep their state; what it says of their memory is ignored.

        Args:
            gram: float64 [2K, 2K] of the rows [g; y]; finite, rows and columns of gradients outside ``mask`` are 0. With
                ``squares`` [K, K] of the gradients.
            mask: bool [K]: the active tasks; none where something is not finite.
            losses: float64 [K], or None.
            excess: what :meth:`measure` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement decide(gram, mask, losses, excess).")

    def measure(self, rows: Rows, memory: Rows, factor: Tensor) -> Tensor | None:
        """What a method reads of rows ``factor`` g and memories besides their Gram, float64 [K]; None: nothing."""
        return None

    def valid_losses(self, losses: Tensor) -> Tensor:
        """bool [K]: whether a loss is one that the method can use."""
        return losses.isfinite()

    # --- one call, step by step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def aggregate(
        self, rows: Rows, out: Sequence[Tensor | None] | None = None, losses: Tensor | None = None
    ) -> list[Tensor | None]:
        """One update of K lists of N tensors, as :func:`mtlkernels.aggregate` returns it."""
        check_gradients(rows)
        if out is not None:
            check_fit(out, list(zip(*rows, strict=True)))
        num_tasks = len(rows)
        if losses is not None and losses.shape != (num_tasks,):
            raise ValueError(f"losses has shape {tuple(losses.shape)}; {num_tasks} tasks take [{num_tasks}].")
        memory = self.memory_of(rows)
        gram = self.gram(rows, memory)
        excess = self.measure(rows, memory, gram.new_ones(num_tasks))
        update = self.update(gram, losses=None if losses is None else losses.detach().double(), excess=excess)
        return self.combine(update, rows, memory, out)

    def memory_of(self, rows: TaskGradients) -> list[list[Tensor | None]]:
        """The memories as K lists of N tensors; None where no task has a gradient.

        Raises:
            ValueError: memories of other shapes, or of another number of tasks.
        """
        columns: list[Sequence[Tensor | None]] = []
        for n, column in enumerate(zip(*rows, strict=True)):
            model = like(column)
            if model is None:
                columns.append([None] * len(rows))
            else:
                columns.append(self._memory_of_tensor(n, model, len(rows) + self.more_rows).unbind(0)[: len(rows)])
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in rows]

    def _memory_of_tensor(self, n: int, model: Tensor, num_rows: int) -> Tensor:
        self._memory.extend([None] * (n + 1 - len(self._memory)))  # in place: a module's attribute takes 10 us to set
        memory, shape, dtype = self._memory[n], (num_rows, *model.shape), memory_dtype(model.dtype)
        if memory is None:
            strides = torch.empty_like(model, device="meta").stride()
            memory = torch.empty_strided(shape, (model.numel(), *strides), dtype=dtype, device=model.device).zero_()
        elif memory.shape != shape:
            raise ValueError(
                f"{type(self).__name__} keeps a memory of shape {tuple(memory.shape)} of tensor {n}, whose gradients take "
                f"{shape}; call reset() to start over with other tasks or tensors."
            )
        self._memory[n] = memory.to(model.device, dtype)
        return cast(Tensor, self._memory[n])

    def gram(self, rows: Rows, memory: Rows) -> Tensor:
        """float64 [2K, 2K] of the rows [g; y]; with ``squares`` [K, K] of the gradients."""
        return cast(Tensor, ops.gram(rows if self.squares else [*widened(rows), *memory]))

    @torch.no_grad()
    def update(
        self,
        gram: Tensor,
        *,
        active: Tensor | None = None,
        losses: Tensor | None = None,
        excess: Tensor | None = None,
    ) -> MemoryUpdate:
        """Decides what becomes of memories and update, and moves the state that is not a memory.

        Args:
            gram: as :meth:`gram` returns it.
            active: bool [K]; None: all tasks.
            losses: float64 [K].
            excess: what :meth:`measure` returned.

        Raises:
            ValueError: a method that reads losses and none given.
        """
        if self.reads_losses and losses is None:
            raise ValueError(f"{type(self).__name__} reads the losses; pass losses=[K].")
        num_tasks = gram.shape[-1] if self.squares else gram.shape[-1] // 2
        mask = torch.ones(num_tasks, dtype=torch.bool, device=gram.device) if active is None else active
        rows = mask if self.squares else torch.cat([mask, torch.ones_like(mask)])
        gram = torch.where(rows.unsqueeze(-1) & rows, gram, 0.0)
        usable = finite_problems(gram)
        if self.reads_losses:
            usable = usable & (self.valid_losses(cast(Tensor, losses)) | ~mask).all()
        if excess is not None:
            usable = usable & (excess.isfinite() | ~mask).all()
        counted = mask & usable
        keep, scale, weights = self.decide(torch.where(usable, gram, 0.0), counted, losses, excess)
        weights = weights if self.weighs_absent else torch.where(mask, weights, 0.0)
        return MemoryUpdate(torch.where(counted, keep, 1.0), torch.where(counted, scale, 0.0), weights).unless(usable)

    def row_weights(self, update: MemoryUpdate) -> Tensor:
        """float64 [2K], the update's weights of the rows [g; y]; with ``squares`` [K]."""
        keep, scale, weights = update
        return weights if self.squares else torch.cat([weights * scale, weights * keep])

    def combine(
        self,
        update: MemoryUpdate,
        rows: Rows,
        memory: Rows,
        out: Sequence[Tensor | None] | None = None,
        loss_scale: Tensor | None = None,
        result_scale: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Moves the memories and returns the update, N tensors, None where every task is None.

        Args:
            update: from :meth:`update`.
            rows: K lists of N gradients, multiplied by ``loss_scale``.
            memory: from :meth:`memory_of`, of gradients that are not multiplied.
            out: N buffers; a buffer may be one of its own tensor's gradients.
            loss_scale: scalar; None: 1.
            result_scale: scalar that the result is multiplied by; None: 1.
        """
        keep, scale, weights = update
        if loss_scale is not None:
            scale = scale / (loss_scale.square() if self.squares else loss_scale)
            weights = weights / loss_scale if self.squares else weights
        if result_scale is not None:
            weights = weights * result_scale
        models = [like(column) for column in zip(*rows, strict=True)]
        used = {n: model for n, model in enumerate(models) if model is not None}
        buffers = [torch.empty_like(model) if out is None else cast(Tensor, out[n]) for n, model in used.items()]
        if used:
            kept, grads = ([[row[n] for n in used] for row in kind] for kind in (memory, rows))
            factors = torch.stack([keep, scale, weights])
            memory_combine_(buffers, cast(list[list[Tensor]], kept), grads, factors, self.squares)
        written = iter(buffers)
        result = [next(written) if n in used else None for n in range(len(models))]
        return result

    # --- state -----------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets everything, the memories included; the next call is the first."""
        super().reset()
        self._memory = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryWeighting":
        for n, memory in enumerate(self._memory):
            if memory is not None:  # follows to another device, and keeps its dtype
                self._memory[n] = memory.to(fn(memory.new_empty(0)).device)
        return cast(MemoryWeighting, super()._apply(fn, recurse))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for n, memory in enumerate(self._memory):
            if memory is not None:
                destination[f"{prefix}{KEY}{n}"] = memory

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix + KEY)}
        self._memory = []
        for name, memory in saved.items():
            n = int(name[len(prefix + KEY) :])
            self._memory += [None] * (n + 1 - len(self._memory))
            self._memory[n] = memory.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


def widened(rows: Rows) -> list[list[Tensor | None]]:
    """The gradients in the dtype of their memories: copies of 16-bit ones."""
    return [[None if t is None else t.to(memory_dtype(t.dtype)) for t in row] for row in rows]


def gram_after(gram: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """float64 [K, K], the Gram of y' = keep y + scale g from the [2K, 2K] one of [g; y]."""
    rows = torch.cat([scale, keep])
    products = rows.unsqueeze(-1) * gram * rows
    size = len(keep)
    cross = products[:size, size:]
    return products[:size, :size] + cross + cross.mT + products[size:, size:]
