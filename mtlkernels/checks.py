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


def check_gradients(grads: TaskGradients, argument: str = "grads", names: Sequence[str] | None = None) -> None:
    """Raises a ``ValueError`` for the first task gradient that no op can take.

    Ragged lists, rows of one tensor that differ in shape, dtype or device, tensors on several devices, sparse and complex
    tensors and dtypes outside ``DTYPES`` are refused. ``names`` are the rows' names where they are not ``argument[k]``.
    """
    check_lengths(grads, argument, names)
    numbered = names is None
    names = [f"{argument}[{k}]" for k in range(len(grads))] if names is None else names
    device: torch.device | None = None
    for n, column in enumerate(zip(*grads, strict=True)):
        first: tuple[int, Tensor] | None = None
        for k, row in enumerate(column):
            if row is None:
                continue
            name = f"{names[k]}[{n}]"
            place = f"{name} (task {k}, tensor {n})" if numbered else f"{name} (tensor {n})"
            if not isinstance(row, Tensor):
                raise ValueError(f"{name} is a {type(row).__name__}, not a tensor; pass None where task {k} has no gradient.")
            check_kind(row, name)
            device = row.device if device is None else device
            if row.device != device:
                raise ValueError(
                    f"{place} is on {row.device}, earlier tensors are on {device}; "
                    "move all task gradients to one device, or call the op once per device."
                )
            if first is None:
                first = k, row
                continue
            other = f"{names[first[0]]}[{n}]"
            if row.shape != first[1].shape:
                raise ValueError(
                    f"{place} has shape {tuple(row.shape)}, {other} has {tuple(first[1].shape)}; "
                    "all gradients of one tensor must have its shape."
                )
            if row.dtype != first[1].dtype:
                raise ValueError(
                    f"{place} is {row.dtype}, {other} is {first[1].dtype}; "
                    "cast the gradients of one tensor to one dtype. Different tensors may differ."
                )


def check_lengths(grads: TaskGradients, argument: str = "grads", names: Sequence[str] | None = None) -> None:
    """Raises a ``ValueError`` when the tasks do not list the same number of tensors."""
    for k, row in enumerate(grads):
        if len(row) != len(grads[0]):
            name, first = (f"{argument}[{k}] (task {k})", f"{argument}[0]") if names is None else (names[k], names[0])
            raise ValueError(
                f"{name} lists {len(row)} tensors, {first} lists {len(grads[0])}; "
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
    """Raises a ``ValueError`` unless ``weights`` is a floating-point tensor of shape [K] or [N, K]."""
    check_floating(weights, "weights")
    if weights.shape not in ((num_tasks,), (num_tensors, num_tasks)):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; {num_tasks} tasks and {num_tensors} tensors take "
            f"[{num_tasks}] or [{num_tensors}, {num_tasks}]."
        )


def check_channel_weights(weights: Sequence[Tensor | None], grads: TaskGradients, channels: Sequence[int]) -> None:
    """Raises a ``ValueError`` unless ``weights`` is a floating-point [C_n, K] for each tensor; ``channels`` are the C_n.

    The weights of a tensor that no task has a gradient of are not looked at.
    """
    num_tasks, num_tensors = len(grads), len(channels)
    if len(weights) != num_tensors:
        raise ValueError(f"weights lists {len(weights)} tensors, grads list {num_tensors}; pass [C_n, {num_tasks}] for each.")
    for n, (own, count, column) in enumerate(zip(weights, channels, zip(*grads, strict=True), strict=True)):
        if all(row is None for row in column):
            continue
        if own is None:
            raise ValueError(f"weights[{n}] is None; tensor {n} has gradients and takes [{count}, {num_tasks}].")
        check_floating(own, f"weights[{n}]")
        if own.shape != (count, num_tasks):
            raise ValueError(
                f"weights[{n}] has shape {tuple(own.shape)}; tensor {n} has {count} channels and takes [{count}, {num_tasks}]."
            )


def check_floating(tensor: Tensor, argument: str) -> None:
    """Raises a ``ValueError`` unless ``tensor`` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{argument} is a {type(tensor).__name__}; pass a tensor, for example torch.tensor({argument}).")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{argument} is {tensor.dtype}; pass a floating-point tensor, for example {argument}.double().")


def check_buffers(buffers: Sequence[Tensor | None], columns: Iterable[Sequence[Tensor | None]]) -> None:
    """Raises a ``ValueError`` unless ``out`` holds one distinct tensor of the right shape, dtype and device per tensor."""
    columns = list(columns)
    check_fit(buffers, columns)
    used = [
        (n, b) for n, (b, column) in enumerate(zip(buffers, columns, strict=True)) if any(row is not None for row in column)
    ]
    extents = []
    for n, buffer in used:
        if buffer is None or not buffer.numel():
            continue
        if overlaps_itself(buffer):
            raise ValueError(f"out[{n}] shares memory with itself; pass distinct, dense buffers.")
        last = sum(stride * (size - 1) for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
        dense = last + 1 == buffer.numel()
        extents.append((buffer.data_ptr(), buffer.data_ptr() + (last + 1) * buffer.element_size(), dense, n))
    # Two buffers share memory where both begin at one element, or one begins inside another that has no gaps.
    reach, owner = -1, -1
    for begin, end, dense, n in sorted(extents):
        if begin < reach:
            raise ValueError(f"out[{max(n, owner)}] shares memory with out[{min(n, owner)}]; pass distinct, dense buffers.")
        reach, owner = max(reach, end if dense else begin + 1), n


def check_fit(buffers: Sequence[Tensor | None], columns: Sequence[Sequence[Tensor | None]]) -> None:
    """Raises a ``ValueError`` unless ``out`` holds one tensor of the right shape, dtype and device per tensor."""
    if len(buffers) != len(columns):
        raise ValueError(f"out lists {len(buffers)} tensors, grads list {len(columns)}; pass one buffer per tensor.")
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


def overlaps_itself(tensor: Tensor) -> bool:
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
            "torch.no_grad(). Differentiable in the gradients, without out: mtlkernels.combine and mtlkernels.gradient_dropout."
        )
