"""How task gradients are obtained, and how the update gets into ``.grad``."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import ops
from .checks import overlaps_itself
from .dtensor import local, same_placement

Source = Literal["autograd", "backward"]
"""``"autograd"``: ``torch.autograd.grad``, for plain eager and compiled models. ``"backward"``: ``loss.backward()`` with
``.grad`` taken, which also works under post-accumulate-grad hooks and reentrant checkpoints."""

SOURCES = get_args(Source)
Rows = list[list[Tensor | None]]


Received = Callable[[list[Tensor | None], Sequence[Tensor]], list[Tensor | None]]
"""What becomes of one task's gradients of its inputs as soon as they are there, before the next task's are computed."""

Arrived = Callable[[Tensor, Tensor], Tensor]
"""What becomes of the gradient, the second argument, of an input, the first, as soon as it is there: another tensor in its
place, or the gradient itself."""


def task_gradients(
    losses: Sequence[Tensor | None],
    inputs: Sequence[Sequence[Tensor]],
    source: Source,
    received: Received | None = None,
    retain: bool = False,
    arrived: Arrived | None = None,
) -> Rows:
    """Gradients of each task's loss with respect to that task's own inputs. ``.grad`` of the inputs is left as it was.

    Args:
        losses: K scalars, None for a task that is absent.
        inputs: K lists of leaf tensors that require grad. Tensors may be in several lists, once in each.
        source: how to get them. Under ``"backward"`` leaves that are nobody's input accumulate into ``.grad``, as they do
            for ``sum(losses).backward()``; under ``"autograd"`` they are left alone.
        received: replaces the gradients of a present task, and is given the only references to them.
        retain: whether the graph is kept after the last task.
        arrived: replaces each gradient: under ``"autograd"`` while the backward pass goes on, so that those that it replaces
            are never there at once; under ``"backward"`` when it is over. Not called for sparse and complex ones.

    Returns:
        K lists aligned with ``inputs``; None where the graph of the loss does not reach the tensor, and for absent tasks.

    Raises:
        RuntimeError: as autograd does, for example for a graph that was freed.
    """
    present = [k for k, loss in enumerate(losses) if loss is not None]
    result: Rows = [[None] * len(tensors) for tensors in inputs]
    if source == "autograd":
        for k in present:
            if inputs[k]:
                keep = retain or k != present[-1]
                result[k] = _differentiated(losses[k], inputs[k], keep, arrived)  # type: ignore[arg-type]
                if received is not None:
                    result[k] = received(result[k], inputs[k])
        return result
    every = list({id(t): t for tensors in inputs for t in tensors}.values())
    before = [t.grad for t in every]
    try:
        for k in present:
            _clear(every)
            losses[k].backward(retain_graph=retain or k != present[-1])  # type: ignore[union-attr]
            result[k] = [t.grad for t in inputs[k]] if arrived is None else [_replaced(t, arrived) for t in inputs[k]]
            _clear(every)
            if received is not None:
                result[k] = received(result[k], inputs[k])
    finally:
        for tensor, grad in zip(every, before, strict=True):
            tensor.grad = grad
    return result


def _differentiated(loss: Tensor, inputs: Sequence[Tensor], retain: bool, arrived: Arrived | None) -> list[Tensor | None]:
    if arrived is None:
        return list(torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True))
    kept: list[Tensor | None] = [None] * len(inputs)

    def hook(n: int) -> Callable[[Tensor | None], Tensor | None]:
        def replace(grad: Tensor | None) -> Tensor | None:
            if grad is None:
                return None
            kept[n] = grad if not _is_dense(grad) else arrived(inputs[n], grad)
            # What autograd goes on with has the gradient's shape and dtype, as it insists, but one element of memory.
            return None if kept[n] is grad else grad.new_zeros(()).expand_as(grad)

        return replace

    hooks = [t.register_hook(hook(n)) for n, t in enumerate(inputs)]
    try:
        torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True)
    finally:
        for handle in hooks:
            handle.remove()
    return kept


def _replaced(tensor: Tensor, arrived: Arrived) -> Tensor | None:
    """What becomes of ``.grad``, which is None afterwards."""
    grad, tensor.grad = tensor.grad, None
    return grad if grad is None or not _is_dense(grad) else arrived(tensor, grad)


def _is_dense(grad: Tensor) -> bool:
    return grad.layout == torch.strided and not grad.is_complex()


def weighted_gradients(
    losses: Sequence[Tensor | None],
    weights: Tensor,
    shared: Sequence[Tensor],
    own: Sequence[Sequence[Tensor]],
    source: Source,
    hidden: bool = False,
) -> tuple[list[Tensor | None], Rows]:
    """The gradient of sum_k w_k L_k with respect to ``shared`` in one backward pass, and of each loss with respect to its own.

    The latter run the part of the graph above their tensors only (of a compiled graph, all of it). ``.grad`` is left as it was.

    Args:
        losses: K scalars, None for a task that is absent.
        weights: [K], read on the device only.
        shared: N leaf tensors that require grad.
        own: K lists of such.
        source: how to get the former; the latter come by ``torch.autograd.grad``, which runs no hooks.
        hidden: the tensors need not be leaves of the graph. The latter then come from one whole backward pass of the sum of the
            losses, and what several tasks have for a tensor stands in the first one's list.

    Returns:
        N gradients, and K lists aligned with ``own``; None as in :func:`task_gradients`.
    """
    rows: Rows = [[None] * len(tensors) for tensors in own]
    everything = [*shared, *{id(t): t for tensors in own for t in tensors}.values()]
    total = weighted_sum(losses, weights)
    if hidden and len(everything) > len(shared):
        both = [total, weighted_sum(losses, torch.ones_like(weights))]
        row, others = task_gradients(both, [everything, everything], "backward")
        left = {id(t): grad for t, grad in zip(everything, others, strict=True)}
        for k, loss in enumerate(losses):
            if loss is not None:
                rows[k] = [left.pop(id(t), None) for t in own[k]]
        return row[: len(shared)], rows
    for k, loss in enumerate(losses):
        if loss is not None and own[k]:
            rows[k] = list(torch.autograd.grad(loss, list(own[k]), retain_graph=True, allow_unused=True))
    # Under "backward" the pass reaches the others' .grad, too, which is put back.
    inputs = everything if source == "backward" else list(shared)
    return task_gradients([total], [inputs], source)[0][: len(shared)], rows


def weighted_sum(losses: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """sum_k w_k L_k, a scalar with a graph, over the tasks that have a loss."""
    total = torch.zeros((), dtype=weights.dtype, device=weights.device)
    with torch.enable_grad():
        for k, loss in enumerate(losses):
            if loss is not None:
                total = total + weights[k] * loss.reshape(()).to(weights.device, weights.dtype)
    return total


def check_heads_in_graph(
    losses: Sequence[Tensor | None], heads: Sequence[Sequence[Tensor]], name: Callable[[Tensor], str]
) -> None:
    """Raises a ``ValueError`` where a reentrant checkpoint hides a head from :func:`weighted_gradients`.

    Args:
        losses: K scalars, None for a task that is absent.
        heads: K lists of parameters that are known to be that task's.
        name: names a parameter.
    """
    for loss, params in zip(losses, heads, strict=True):
        if loss is None or not params or "CheckpointFunctionBackward" not in graph_nodes([loss]):
            continue
        reached = graph_leaves(loss)
        for param in params:
            if param.requires_grad and id(param) not in reached:
                raise ValueError(
                    f"update_every and gram_losses need the head {name(param)} in the graph, where a reentrant checkpoint "
                    "hides it; use checkpoint(..., use_reentrant=False) in the heads, or neither of the two."
                )


def _clear(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def graph_nodes(losses: Iterable[Tensor | None]) -> set[str]:
    """Type names of the autograd nodes that the losses reach, for example ``AddmmBackward0``. 0.2 us a node."""
    return {type(node).__name__ for node in autograd_nodes(losses)}


def graph_leaves(loss: Tensor) -> set[int]:
    """``id`` of each leaf tensor that the graph of a loss reaches, of the loss itself where it is a leaf."""
    if loss.grad_fn is None:
        return {id(loss)}
    return {id(node.variable) for node in autograd_nodes([loss]) if type(node).__name__ == "AccumulateGrad"}


def autograd_nodes(losses: Iterable[Tensor | None]) -> set[Any]:
    """The autograd nodes that the losses, or other results, reach."""
    stack: list[Any] = [loss.grad_fn for loss in losses if loss is not None and loss.grad_fn is not None]
    seen = set(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


def check_graph(losses: Sequence[Tensor | None], source: Source, by_reach: bool, undecided: bool = False) -> None:
    """Raises a ``ValueError`` where autograd would give wrong gradients in silence.

    Args:
        losses: K scalars, None for a task that is absent.
        source: the gradient source about to be used. ``torch.autograd.grad`` returns None for what a reentrant checkpoint
            hides.
        by_reach: whether tasks are told apart by what their graphs reach. A compiled graph reaches all its parameters.
        undecided: whether shared parameters are told from heads by these graphs, so that nothing may hide a leaf.
    """
    if source == "backward" and not (by_reach or undecided):
        return
    nodes = graph_nodes(losses)
    if undecided and "CheckpointFunctionBackward" in nodes:
        raise ValueError(
            'shared parameters cannot be found behind a reentrant checkpoint; pass shared=parameters and gradients="backward", '
            "or use checkpoint(..., use_reentrant=False)."
        )
    if undecided and "CompiledFunctionBackward" in nodes:
        raise ValueError(
            "shared parameters cannot be told from heads in a compiled graph, where every task reaches every parameter; "
            "pass shared=parameters and heads={task: parameters} that together name every parameter of the optimizer."
        )
    if source == "autograd" and "CheckpointFunctionBackward" in nodes:
        raise ValueError(
            'gradients="autograd" cannot see the parameters inside a reentrant checkpoint; pass gradients="backward", or '
            "checkpoint(..., use_reentrant=False)."
        )
    if by_reach and "CompiledFunctionBackward" in nodes:
        raise ValueError(
            "heads cannot be found from a compiled graph, because it reaches every parameter for every task; pass "
            "heads={task: parameters} that, with shared, name every parameter of the optimizer."
        )


def update_buffers(rows: Sequence[Sequence[Tensor | None]], params: Sequence[Tensor]) -> list[Tensor | None]:
    """One buffer per parameter for the combined gradient: the first task's gradient itself where nobody else can see it.

    A gradient that something else holds (a hook, a saved tensor, another parameter's gradient) or that has another layout
    than its parameter is replaced by a new buffer, so that ``.grad`` has the parameter's layout as torch promises.

    Args:
        rows: K lists of N gradients; the lists must hold the only references of the caller.
        params: N parameters.

    Returns:
        N tensors, None where no task has a gradient.
    """
    buffers: list[Tensor | None] = []
    for n, param in enumerate(params):
        for row in rows:
            if row[n] is not None:
                buffers.append(_own_or_new_buffer(row, n, param))
                break
        else:
            buffers.append(None)
    return buffers


def own_memory(row: Sequence[Tensor | None]) -> list[Tensor | None]:
    """For each gradient of a row memory to sum into: its own where nobody else can see it, otherwise a new tensor like it.

    Args:
        row: N gradients; the list must hold the only reference of the caller.
    """
    result: list[Tensor | None] = []
    for n in range(len(row)):
        sole = row[n] is not None and _is_sole_reference(row, n)
        grad = row[n]
        result.append(None if grad is None else grad if sole and not overlaps_itself(grad) else torch.empty_like(grad))
    return result


def _own_or_new_buffer(row: Sequence[Tensor | None], n: int, param: Tensor) -> Tensor:
    sole = _is_sole_reference(row, n)  # before a local name refers to it
    grad = row[n]
    assert grad is not None
    return grad if sole and grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype)


def combine_own(rows: Rows, buffers: list[Tensor | None], weights: Tensor, weighted: bool) -> list[Tensor | None]:
    """Gradients of the M parameters that are not shared: the sum of their tasks' rows, times the task's weight if ``weighted``.

    They go to the ``buffers``, as :func:`update_buffers` gives them; a single row that is its buffer costs no read.
    """
    columns = list(zip(*rows, strict=True))
    keep = [n for n, column in enumerate(columns) if weighted or not _is_only_row(column, buffers[n])]
    if keep:
        ops.combine([[row[n] for n in keep] for row in rows], weights, out=[buffers[n] for n in keep])
    return buffers


def scattered(values: Sequence[Tensor | None], indices: Sequence[int], size: int) -> list[Tensor | None]:
    """A row of ``size`` with the values at the indices and None elsewhere."""
    row: list[Tensor | None] = [None] * size
    for index, value in zip(indices, values, strict=True):
        row[index] = value
    return row


def _is_only_row(column: Sequence[Tensor | None], buffer: Tensor | None) -> bool:
    return all(row is None or row is buffer for row in column)


def check_hooks(params: Iterable[Tensor], name: Callable[[Tensor], str]) -> None:
    """Raises a ``ValueError`` for a hook that ``torch.autograd.grad`` would not run. ``name`` names a parameter."""
    for param in params:
        if getattr(param, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f'the {name(param)} has a post-accumulate-grad hook, which gradients="autograd" never runs; pass '
                'gradients="backward", or remove the hook.'
            )


def check_grads(params: Iterable[Tensor], name: Callable[[Tensor], str]) -> None:
    """Raises a ``ValueError`` for a ``.grad`` that :func:`add_to_grad` could not add to in place; ``name`` names one."""
    for param in params:
        if param.grad is None:
            continue
        grad, like = local(param.grad), local(param)
        writable = (
            same_placement(param.grad, param)
            and grad.layout == torch.strided
            and grad.dtype.is_floating_point
            and grad.shape == like.shape
            and grad.device == like.device
            and not grad.is_inference()
            and (grad.is_contiguous() or not overlaps_itself(grad))
        )
        if not writable:
            raise ValueError(
                f".grad of the {name(param)} cannot be added to in place: it is {grad.layout}, {grad.dtype}, of shape "
                f"{tuple(grad.shape)} and on {grad.device}, or its elements share memory; clear it with zero_grad(), or set it "
                "to a dense tensor like the parameter."
            )


def check_dense(tasks: Iterable[object], rows: Rows, params: Sequence[Tensor], name: Callable[[Tensor], str]) -> None:
    """Raises a ``ValueError`` for the first gradient that no op takes; ``name`` names a parameter."""
    for task, row in zip(tasks, rows, strict=False):
        for param, grad in zip(params, row, strict=True):
            if grad is not None and not _is_dense(grad):
                raise ValueError(
                    f"the gradient of task {task!r} for the {name(param)} is {grad.layout}, {grad.dtype}; the "
                    "optimizer takes dense, real ones: build the layer with sparse=False, or on torch.view_as_real."
                )


def check_reached(rows: Rows, params: Sequence[Tensor], name: Callable[[Tensor], str]) -> None:
    """Raises a ``ValueError`` for a shared parameter without a gradient, where no task is absent; ``name`` names one."""
    for param, column in zip(params, zip(*rows, strict=True), strict=True):
        if column[0] is None and param.requires_grad and all(row is None for row in column):
            raise ValueError(
                f"no loss reaches the shared {name(param)}; leave it out of shared, freeze it with requires_grad_(False), or "
                'use gradients="backward" where a reentrant checkpoint hides it.'
            )


def add_to_grad(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """Adds to ``.grad`` in place where there is one, as autograd does."""
    existing, added = [], []
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        if param.grad is None:
            param.grad = grad
        else:
            existing.append(local(param.grad))
            added.append(local(grad))
    if existing:
        torch._foreach_add_(existing, added)


_storage_use_count: Callable[[int], int] = torch._C._storage_Use_Count


def _is_sole_reference(row: Sequence[Tensor | None], n: int) -> bool:
    """Whether ``row[n]`` is the only way to its memory: one Python and one C++ reference, no other tensor on the storage.

    Errs to False: an unknown reference costs a copy, never a wrong value.
    """
    tensor = row[n]
    assert tensor is not None
    if sys.getrefcount(tensor) > _LIST_AND_LOCAL or tensor._use_count() > 1:  # type: ignore[attr-defined]
        return False
    base = tensor._base
    if base is None:
        return _storage_use_count(tensor.untyped_storage()._cdata) <= 2
    return base._use_count() <= 2 and _storage_use_count(tensor.untyped_storage()._cdata) <= 3  # type: ignore[attr-defined]


def _references_of_list_and_local() -> int:
    row = [object()]
    item = row[0]
    return sys.getrefcount(item)


_LIST_AND_LOCAL = _references_of_list_and_local()
"""What ``sys.getrefcount`` counts for an object held by one list and one local variable; differs between Python versions."""
