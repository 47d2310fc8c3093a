"""Normalisation layers with a scale, a shift and statistics for each task."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, layer_norm, rms_norm

from ..dtensor import whole
from .context import Task, current_index
from .record import note_call


class TaskNorm(torch.nn.Module):
    """Base of the task norms: K scales and shifts, of which a forward pass uses those of the current task.

    Each task's scale is a parameter of its own, ``weight[k]`` (and ``bias[k]``), rather than a row of one [K, C] tensor: an
    optimizer leaves a parameter without a gradient alone, whereas momentum and weight decay would move every row in every
    task's step. State dicts have the keys ``weight.0``, ``weight.1``, ...; that of a shared norm loads as well, and every
    task starts from it.

    Attributes:
        tasks: the K names.
        weight: K scales, or None.
        bias: K shifts, or None.
    """

    weight: torch.nn.ParameterList | None
    bias: torch.nn.ParameterList | None
    shared_entries: tuple[str, ...] = ("weight", "bias")
    """State dict entries of the shared norm that every task takes over."""

    def __init__(
        self,
        tasks: int | Iterable[Task],
        shape: tuple[int, ...],
        scaled: bool,
        shifted: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.tasks = task_tuple(tasks)
        self.shape = shape

        def per_task(wanted: bool) -> torch.nn.ParameterList | None:
            make = (torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for _ in self.tasks)
            return torch.nn.ParameterList(make) if wanted else None

        self.weight, self.bias = per_task(scaled), per_task(shifted)

    def reset_parameters(self) -> None:
        """Scales 1, shifts 0."""
        for values, start in ((self.weight, torch.nn.init.ones_), (self.bias, torch.nn.init.zeros_)):
            for value in values or ():
                start(value)

    def index(self) -> int:
        """Index of the current task.

        Raises:
            RuntimeError: no task is set.
            ValueError: the current task is not one of this norm.
        """
        return current_index(self.tasks, type(self).__name__)

    def affine_of(self, k: int) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of task k."""
        return (None if self.weight is None else self.weight[k]), (None if self.bias is None else self.bias[k])

    def strength(self) -> tuple[Tensor, Tensor]:
        """Scale gamma and variance of each task and channel, [K, C] each, as connection strength takes them; detached."""
        raise NotImplementedError(f"{type(self).__name__} must implement strength().")

    def _scales(self) -> Tensor:
        if self.weight is None:
            return torch.ones(len(self.tasks), *self.shape)
        return torch.stack([whole(scale.detach()).flatten() for scale in self.weight])

    def forward(self, x: Tensor) -> Tensor:
        k = self.index()
        output = self.normalise(x, k)
        if not torch.compiler.is_compiling():
            note_call(self, x, output)
        return output

    def normalise(self, x: Tensor, k: int) -> Tensor:
        """The norm of task k."""
        raise NotImplementedError(f"{type(self).__name__} must implement normalise(x, k).")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.shared_entries:
            value = state_dict.get(prefix + name)
            if value is None:
                continue
            current = getattr(self, name)
            if isinstance(current, torch.nn.ParameterList):
                for k in range(len(current)):
                    state_dict[f"{prefix}{name}.{k}"] = value.clone()
                del state_dict[prefix + name]
            elif current is not None and value.dim() == current.dim() - 1:
                state_dict[prefix + name] = value.unsqueeze(0).repeat(len(self.tasks), *(1 for _ in value.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, tasks={self.tasks}"


class _TaskBatchNorm(TaskNorm):
    """Batch norm of ``num_features`` channels with the scale, shift and running statistics of each task.

    Options are those of ``torch.nn.BatchNorm2d`` and the result is that of K such layers, of which the current task's runs.

    Args:
        num_features: C, the size of dimension 1 of the input.
        tasks: K names, or K for the names 0 .. K-1.
        eps: added to the variance.
        momentum: of the running statistics; None: their cumulative average.
        affine: whether there are scales and shifts.
        track_running_stats: whether there are running statistics; without them, batch statistics serve in evaluation, too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Attributes:
        running_mean: [K, C], or None.
        running_var: [K, C], or None.
        num_batches_tracked: int64 [K], or None.

    Raises:
        ValueError: names that are not unique, or an input of another number of dimensions.
    """

    input_dims: tuple[int, ...]
    shared_entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        tasks: int | Iterable[Task],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks, (num_features,), affine, affine, device, dtype)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        size = (len(self.tasks), num_features)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(size, device=device, dtype=dtype) if track_running_stats else None)
        batches = torch.empty(size[0], dtype=torch.int64, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", batches)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Means 0, variances 1, no batches."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Scales 1, shifts 0, statistics as :meth:`reset_running_stats`."""
        self.reset_running_stats()
        super().reset_parameters()

    def normalise(self, x: Tensor, k: int) -> Tensor:
        if x.dim() not in self.input_dims:
            wanted = " or ".join(f"{dims}D" for dims in self.input_dims)
            raise ValueError(f"{type(self).__name__} takes {wanted} input, got {x.dim()}D of shape {tuple(x.shape)}.")
        weight, bias = self.affine_of(k)
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or batches is None:
            return batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        if not self.training:
            return batch_norm(x, mean[k], var[k], weight, bias, False, 0.0, self.eps)
        batches[k].add_(1)
        if self.momentum is not None:
            return batch_norm(x, mean[k], var[k], weight, bias, True, self.momentum, self.eps)
        # The cumulative average without reading the number of batches on the host, which torch's own layer does.
        new_mean, new_var = torch.zeros_like(mean[k]), torch.ones_like(var[k])
        output = batch_norm(x, new_mean, new_var, weight, bias, True, 1.0, self.eps)
        with torch.no_grad():
            share = 1 / batches[k].to(mean.dtype)
            mean[k].lerp_(new_mean, share)
            var[k].lerp_(new_var, share)
        return output

    def strength(self) -> tuple[Tensor, Tensor]:
        """gamma and running_var; ones for what the options left out."""
        scale = self._scales()
        if self.running_var is not None:
            return scale.to(self.running_var.device), self.running_var.detach()
        return scale, torch.ones_like(scale)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, tasks={self.tasks}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


class TaskBatchNorm1d(_TaskBatchNorm):
    __doc__ = f"{_TaskBatchNorm.__doc__}\n    Input [B, C] or [B, C, L]."
    input_dims = (2, 3)


class TaskBatchNorm2d(_TaskBatchNorm):
    __doc__ = f"{_TaskBatchNorm.__doc__}\n    Input [B, C, H, W]."
    input_dims = (4,)


class TaskBatchNorm3d(_TaskBatchNorm):
    __doc__ = f"{_TaskBatchNorm.__doc__}\n    Input [B, C, D, H, W]."
    input_dims = (5,)


class TaskLayerNorm(TaskNorm):
    """Layer norm with the scale and shift of each task; an extension of ours, the paper has batch norms only.

    Args:
        normalized_shape: as ``torch.nn.LayerNorm``.
        tasks: K names, or K for the names 0 .. K-1.
        eps: added to the variance.
        elementwise_affine: whether there are scales.
        bias: whether there are shifts, too.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        tasks: int | Iterable[Task],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = shape_tuple(normalized_shape)
        super().__init__(tasks, shape, elementwise_affine, elementwise_affine and bias, device, dtype)
        self.eps: float | None = eps
        self.reset_parameters()

    def normalise(self, x: Tensor, k: int) -> Tensor:
        assert self.eps is not None
        return layer_norm(x, self.shape, *self.affine_of(k), self.eps)

    def strength(self) -> tuple[Tensor, Tensor]:
        """gamma and ones: a layer norm divides all channels of a token by one number, which cancels in Shat (Eq. 7)."""
        scale = self._scales()
        return scale, torch.ones_like(scale)


class TaskRMSNorm(TaskLayerNorm):
    """RMS norm with the scale of each task; an extension of ours, as :class:`TaskLayerNorm`.

    Args:
        normalized_shape: as ``torch.nn.RMSNorm``.
        tasks: K names, or K for the names 0 .. K-1.
        eps: added to the mean square; None: the dtype's machine epsilon.
        elementwise_affine: whether there are scales.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        tasks: int | Iterable[Task],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, tasks, 0.0, elementwise_affine, False, device, dtype)
        self.eps = eps

    def normalise(self, x: Tensor, k: int) -> Tensor:
        return rms_norm(x, self.shape, self.affine_of(k)[0], self.eps)


def task_tuple(tasks: int | Iterable[Task]) -> tuple[Task, ...]:
    """K names, or the names 0 .. K-1; a ``ValueError`` unless there is at least one and each is there once."""
    if isinstance(tasks, int):
        tasks = range(tasks)
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise ValueError(f"tasks is {tasks!r}; pass a list of task names, or their number.")
    names = tuple(tasks)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks is {names}; pass at least one name, each once.")
    return names


def shape_tuple(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)
