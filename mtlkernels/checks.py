"""Checks at the boundary: what bad input gets is a ``ValueError`` that names the argument, the place and the fix.

The compiled ops check only what memory safety needs. When one of them refuses, the public functions run the checks of
this file to say exactly what is wrong, so that a good call never pays for them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

TaskGradients = Sequence[Sequence[Tensor | None]]
"""K sequences of N tensors, task-major. ``None`` where a task does not touch a tensor: it counts as zero and costs no read."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_gradients(grads: TaskGradients, argument: str = "grads") -> None:
    """Raises a ``ValueError`` for the first task gradient that no op can take.

    Ragged lists, rows of one tensor that differ in shape, dtype or device, tensors on several devices, sparse and complex
    tensors and dtypes outside ``DTYPES`` are refused.
    """
    check_lengths(grads, argument)
    device: torch.device | None = None
    for n, column in enumerate(zip(*grads, strict=True)):
        first: tuple[int, Tensor] | None = None
        for k, row in enumerate(column):
            if row is None:
                continue
            name = f"{argument}[{k}][{n}]"
            if not isinstance(row, Tensor):
                raise ValueError(f"{name} is a {type(row).__name__}, not a tensor; pass None where task {k} has no gradient.")
            check_kind(row, name)
            device = row.device if device is None else device
            if row.device != device:
                raise ValueError(
                    f"{name} (task {k}, tensor {n}) is on {row.device}, earlier tensors are on {device}; "
                    "move all task gradients to one device, or call the op once per device."
                )
            if first is None:
                first = k, row
                continue
            other = f"{argument}[{first[0]}][{n}]"
            if row.shape != first[1].shape:
                raise ValueError(
                    f"{name} (task {k}, tensor {n}) has shape {tuple(row.shape)}, {other} has {tuple(first[1].shape)}; "
                    "all gradients of one tensor must have its shape."
                )
            if row.dtype != first[1].dtype:
                raise ValueError(
                    f"{name} (task {k}, tensor {n}) is {row.dtype}, {other} is {first[1].dtype}; "
                    "cast the gradients of one tensor to one dtype. Different tensors may differ."
                )


def check_lengths(grads: TaskGradients, argument: str = "grads") -> None:
    """Raises a ``ValueError`` when the tasks do not list the same number of tensors."""
    for k, row in enumerate(grads):
        if len(row) != len(grads[0]):
            raise ValueError(
                f"{argument}[{k}] (task {k}) lists {len(row)} tensors, {argument}[0] lists {len(grads[0])}; "
                "list every tensor for every task, None where a task has no gradient."
            )


def check_kind(tensor: Tensor, name: str) -> None:
    """Raises a ``ValueError`` unless the tensor is dense and of a dtype in ``DTYPES``."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is sparse ({tensor.layout}); pass {name}.to_dense(), or build the layer with sparse=False.")
    if tensor.dtype.is_complex:
        raise ValueError(f"{name} is complex ({tensor.dtype}); pass torch.view_as_real({name}).")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} is {tensor.dtype}; task gradients are {names}.")


def check_weights(weights: Tensor, num_tasks: int, num_tensors: int) -> None:
    """Raises a ``ValueError`` unless ``weights`` is real, of shape [K] or [N, K]."""
    if weights.shape not in ((num_tasks,), (num_tensors, num_tasks)):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; {num_tasks} tasks and {num_tensors} tensors take "
            f"[{num_tasks}] or [{num_tensors}, {num_tasks}]."
        )
    if not weights.dtype.is_floating_point:
        raise ValueError(f"weights is {weights.dtype}; pass a floating-point tensor, for example weights.double().")


def check_buffers(buffers: Sequence[Tensor | None], columns: Iterable[Sequence[Tensor | None]]) -> None:
    """Raises a ``ValueError`` unless ``out`` holds one distinct tensor of the right shape, dtype and device per tensor."""
    columns = list(columns)
    if len(buffers) != len(columns):
        raise ValueError(f"out lists {len(buffers)} tensors, grads list {len(columns)}; pass one buffer per tensor.")
    seen: dict[int, int] = {}
    for n, (buffer, column) in enumerate(zip(buffers, columns, strict=True)):
        like = next((row for row in column if row is not None), None)
        if like is None:
            continue
        if not isinstance(buffer, Tensor):
            raise ValueError(f"out[{n}] is {type(buffer).__name__}; tensor {n} has gradients and needs a buffer.")
        if (buffer.shape, buffer.dtype, buffer.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"out[{n}] is {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}, the gradients of tensor {n} are "
                f"{tuple(like.shape)} {like.dtype} on {like.device}; use torch.empty_like(gradient)."
            )
        if buffer.numel() and (buffer.data_ptr() in seen or _overlaps_itself(buffer)):
            raise ValueError(f"out[{n}] shares memory with out[{seen.get(buffer.data_ptr(), n)}]; pass distinct, dense buffers.")
        if buffer.numel():
            seen[buffer.data_ptr()] = n


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may address one element: a stride that does not step over the smaller dimensions."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < extent:
            return True
        extent = stride * (size - 1) + extent
    return False


def refuse_grad(tensors: Iterable[Tensor | None], op: str) -> None:
    """Raises a ``RuntimeError`` when autograd would have to differentiate an op that has no derivative."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"mtlkernels.{op} is not differentiable, and an input requires grad; pass .detach()ed tensors, or call it under "
            "torch.no_grad(). Differentiable in the gradients: mtlkernels.combine."
        )
