"""Which shared weight belongs to which task norm, found from the graph of an eager forward pass."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import ops
from ..dtensor import gathered_channels, is_dtensor, local
from ..gradients import autograd_nodes
from .context import Task, index_of, task
from .convert import task_norms
from .norms import TaskLayerNorm, TaskNorm
from .record import Call, recorded_calls

Side = Literal["after", "before"]

# Nodes that pass a tensor on with its channels as they are, ``Backward0`` left out.
_VIEWS = frozenset(
    ("Alias", "Clone", "Permute", "ReshapeAlias", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View")
)
_RESIDUAL = _VIEWS | {"Add", "NativeDropout"}
_LAYERS = ("Addmm", "Convolution", "Linear", "Mm")
_DROPOUT = frozenset({"Mul", "Div"})
"""Dropout and stochastic depth on the CPU: a product of which one factor needs a gradient."""


@dataclass(frozen=True)
class Layer:
    """A shared weight and the task norm that gives its output channels a priority.

    Attributes:
        weight: [C, ...], one row for each output channel.
        norm: the task norm of its output (C channels), or of its input.
        side: ``"after"``: the norm of the output, as in the paper. ``"before"``: of the input, a layer or RMS norm; ours.
    """

    weight: Tensor
    norm: TaskNorm
    side: Side = "after"

    def __post_init__(self) -> None:
        """Raises a ``ValueError`` where weight, norm and side do not fit each other."""
        if not isinstance(self.norm, TaskNorm):
            raise ValueError(f"norm is a {type(self.norm).__name__}; pass a task norm, as mtlkernels.nn.TaskBatchNorm2d.")
        if self.side not in ("after", "before"):
            raise ValueError(f'side is {self.side!r}; pass "after" or "before".')
        shape, channels = tuple(self.weight.shape), self.norm.shape
        if self.side == "after" and (len(shape) < 2 or (shape[0],) != channels):
            raise ValueError(f"weight has shape {shape}, its norm {channels[0]} channels; pass [{channels[0]}, ...].")
        if self.side == "before" and (not isinstance(self.norm, TaskLayerNorm) or len(shape) != 2 or (shape[1],) != channels):
            raise ValueError(
                f"weight has shape {shape} and its {type(self.norm).__name__} shape {channels}; a norm before a layer is a "
                "TaskLayerNorm or TaskRMSNorm of the layer's inputs."
            )

    @torch.no_grad()
    def strength(self, tasks: Sequence[Task]) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, scale and variance whose connection strength is this layer's: [C, ...], [K, C], [K, C].

        Args:
            tasks: K tasks of the norm, in the order of the rows.

        With the norm after the layer those of Eq. 6. With a norm before it task i sees the weight W[p, q] gamma_i[q], so
        S_p^i = sum_q W[p, q]^2 gamma_i[q]^2: the scale is its root, over a weight of ones. Of a DTensor the norms of its
        channels stand for the weight, [C, 1]; they and the scales are gathered.
        """
        scale, variance = self.norm.strength()
        order = [index_of(name, self.norm.tasks, type(self.norm).__name__) for name in tasks]
        if order != list(range(len(scale))):  # not by an index tensor, which would be a copy to the device
            scale, variance = (torch.stack([values[k] for k in order]) for values in (scale, variance))
        weight = local(self.weight.detach())
        if self.side == "after" and not is_dtensor(self.weight):
            return weight, scale, variance
        if self.side == "after":
            (squares,) = ops.gram([[weight]], per="channel")
            assert squares is not None
            return gathered_channels(squares.flatten(1).sqrt(), self.weight), scale, variance
        strength = gathered_channels(weight.float().square() @ scale.float().square().T, self.weight).T
        return torch.ones_like(strength[0]).unsqueeze(1), strength.sqrt(), torch.ones_like(strength)


def find_layers(model: torch.nn.Module, forward: Callable[[], Any]) -> tuple[Layer, ...]:
    """The weights of a model that have task norms, from one eager forward pass for each task.

    A weight is paired with the batch norm that normalises its output: the output of a convolution (not a transposed one) or of
    a linear layer, perhaps cast, reshaped or permuted, is the norm's input. Ours, for transformers: a layer or RMS norm is also
    paired with the layers whose outputs reach it through dropout and residual sums, the nearest norm with each, and otherwise
    with the linear layers that take its output. What every task's pass pairs in the same way, and in no other, is listed;
    a weight that two norms follow, that is computed from others (weight norm), or that no node of autograd shows is not.

    Args:
        model: the eager model; task norms are looked for in it.
        forward: runs the model as training does, for example ``lambda: model(images)``. Running statistics are put back.

    Raises:
        ValueError: ``model`` has no task norms.
    """
    norms = [norm for _, norm in task_norms(model)]
    if not norms:
        raise ValueError(f"model, a {type(model).__name__}, has no task norms; pass it through to_task_norms first.")
    buffers = [(b, b.clone()) for m in model.modules() for b in m.buffers(recurse=False)]
    found = []
    try:
        for name in norms[0].tasks:
            with task(name), recorded_calls() as calls, torch.enable_grad():
                outputs = [t for t in tree_leaves(forward()) if isinstance(t, Tensor)]
            found.append(pairs(calls, outputs))
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return common(found)


def given_layers(layers: Mapping[Tensor, TaskNorm] | Iterable[Layer]) -> tuple[Layer, ...]:
    """What a user passes as ``layers``: {weight: the norm after it}, or :class:`Layer` objects.

    Raises:
        ValueError: something else, or a weight that is listed twice.
    """
    if isinstance(layers, Mapping):
        return tuple(Layer(weight, norm) for weight, norm in layers.items())
    result = tuple(layers)
    for n, layer in enumerate(result):
        if not isinstance(layer, Layer):
            raise ValueError(f"layers[{n}] is a {type(layer).__name__}; pass {{weight: norm}} or mtlkernels.nn.Layer objects.")
    if len({id(layer.weight) for layer in result}) != len(result):
        raise ValueError("layers lists a weight twice; one norm gives it its priority.")
    return result


def pairs(calls: Sequence[Call], outputs: Iterable[Tensor]) -> dict[int, Layer]:
    """``id`` of each weight -> its layer, of the forward pass of one task whose norms and results are given."""
    after: dict[Any, TaskNorm] = {}  # the node of a layer -> the first norm that its output reaches
    for call in calls:
        through = _RESIDUAL if isinstance(call.norm, TaskLayerNorm) else _VIEWS
        for node in _sources(call.before, through):
            after.setdefault(node, call.norm)
    before = {call.after: call.norm for call in calls if isinstance(call.norm, TaskLayerNorm) and call.after is not None}

    found: dict[int, set[Layer | None]] = {}
    nodes = [node for node in autograd_nodes(outputs) if _kind(node) in _LAYERS]
    for node in sorted(nodes, key=lambda node: node._sequence_nr()):
        weight, x = _weight_and_input(node)
        if weight is None:
            continue
        layer = _fitting(weight, after[node], "after") if node in after else None
        sources = {n for n in _sources(x, _VIEWS, stop=before) if n in before}
        if layer is None and len(sources) == 1:
            layer = _fitting(weight, before[sources.pop()], "before")
        found.setdefault(id(weight), set()).add(layer)
    return {key: layer for key, (layer, *others) in ((k, list(v)) for k, v in found.items()) if layer and not others}


def common(found: Sequence[Mapping[int, Layer]]) -> tuple[Layer, ...]:
    """The layers that are the same for every task, in the order of the first task's."""
    first, *others = found
    return tuple(layer for key, layer in first.items() if all(other.get(key) == layer for other in others))


def _fitting(weight: Tensor, norm: TaskNorm, side: Side) -> Layer | None:
    try:
        return Layer(weight, norm, side)
    except ValueError:
        return None


def _kind(node: Any) -> str:
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _sources(node: Any, through: Collection[str], stop: Collection[Any] = ()) -> set[Any]:
    """The nodes that ``node`` gets its values from, itself perhaps, through nodes of the kinds given."""
    stack, seen, result = [node], {node}, set()
    while stack:
        node = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None] if node is not None else []
        passes = _kind(node) in through or (through is _RESIDUAL and _kind(node) in _DROPOUT and len(following) == 1)
        if node in stop or not passes:
            result.add(node)
            continue
        stack += [n for n in following if n not in seen]
        seen.update(following)
    return result - {None}


def _weight_and_input(node: Any) -> tuple[Tensor | None, Any]:
    """The leaf weight [C, ...] of a convolution or linear layer, and the node of its input; None for another node."""
    kind = _kind(node)
    edges = [n for n, _ in node.next_functions]
    if kind == "Convolution" and not node._saved_transposed:
        return _leaf(edges[1], {"ToCopy"}), edges[0]
    if kind == "Linear":  # where a backend has an op of its own for it
        return _leaf(edges[1], {"ToCopy"}), edges[0]
    if kind in ("Addmm", "Mm"):
        x, matrix = edges[-2:]
        return (_leaf(matrix, {"ToCopy", "T"}), x) if matrix is not None and _kind(matrix) == "T" else (None, None)
    return None, None


def _leaf(node: Any, through: Collection[str]) -> Tensor | None:
    while node is not None and _kind(node) in through:
        node = node.next_functions[0][0]
    return node.variable if node is not None and _kind(node) == "AccumulateGrad" else None
