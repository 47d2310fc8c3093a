"""Which way to hold the gradients of K tasks fits the memory that there is, and why."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..weightings import Elementwise, MemoryWeighting, PCGrad, Weighting, as_method
from ..weightings.cross.base import takes_cross
from .host import BLOCK_BYTES


class ModeBytes(NamedTuple):
    """What a step holds of gradients at its peak, in bytes; activations, parameters and the optimizer's state come on top."""

    mode: str
    device: int
    host: int
    passes: str
    """Backward passes."""
    weights: str
    """What they are made from."""
    how: str
    """What chooses it."""
    exact: bool
    """Whether the weights and the update are those of stored gradients, but for float32's rounding."""


PLAIN = "sum of losses"


def mode_bytes(sizes: Sequence[tuple[int, int]], num_tasks: int, segments: Sequence[int] = ()) -> list[ModeBytes]:
    """What each mode holds, the exact ones first, of each kind the cheapest first.

    With P bytes of gradients of the shared parameters, H bytes of the same in bfloat16, L bytes of the largest tensor, B bytes
    of a block and S bytes of the largest segment: stored K P, streamed max(K S, P), host P + min(2 B, K P), bfloat16
    max(K H, P) + L, online 2 P, representation P.

    Args:
        sizes: elements and bytes an element of each shared parameter.
        num_tasks: K.
        segments: bytes of each segment's shared parameters; none: of a graph that is not cut.
    """
    whole, half = sum(n * each for n, each in sizes), sum(n * min(each, 2) for n, each in sizes)
    largest = max((n * each for n, each in sizes), default=0)
    rows = num_tasks * whole
    k = str(num_tasks)
    gradients = "all gradients of the step"
    modes = [
        ModeBytes(PLAIN, whole, 0, "1", "none", "a torch optimizer", False),
        ModeBytes("stored", rows, 0, k, gradients, "step(losses)", True),
        ModeBytes("host", whole + min(2 * BLOCK_BYTES, rows), rows, k, gradients, 'rows="host"', True),
        ModeBytes(
            "bfloat16", max(num_tasks * half, whole) + largest, 0, k, "the same, rounded to 2^-9", 'rows="bfloat16"', False
        ),
        ModeBytes("online", 2 * whole, 0, k, "a gradient and the sum of those before", 'rows="online", PCGrad only', False),
        ModeBytes(
            "representation", whole, 0, f"1 and {k} of the heads", "gradients at what heads get", "representation=", False
        ),
    ]
    if segments:
        size = max(num_tasks * max(segments), whole)
        modes.insert(2, ModeBytes("streamed", size, 0, str(num_tasks + 1), gradients, "cuts=", True))
    return modes


class MemoryChoice(NamedTuple):
    """What :func:`choose_memory` found; ``print`` explains it."""

    chosen: str | None
    """The mode; None: none fits."""
    modes: list[ModeBytes]
    budget: float
    left_out: dict[str, str]
    """Mode -> why it could not be chosen, whatever it takes."""

    def __str__(self) -> str:
        head = ["mode", "device MB", "host MB", "backward passes", "weights from", "chosen by"]
        rows = [
            [
                own.mode,
                f"{own.device / 1e6:.1f}",
                f"{own.host / 1e6:.1f}" if own.host else "-",
                own.passes,
                own.weights,
                own.how,
            ]
            for own in self.modes
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        return "\n".join([*lines, "", *self.reasons()])

    def reasons(self) -> list[str]:
        """A sentence for each mode, and one for the choice."""
        sentences = []
        for own in self.modes[1:]:
            if own.mode in self.left_out:
                sentences.append(f"{own.mode}: {self.left_out[own.mode]}.")
            elif own.device > self.budget:
                sentences.append(f"{own.mode}: takes {own.device / max(self.budget, 1):.2f} times the budget.")
            elif own.mode != self.chosen:
                sentences.append(f"{own.mode}: fits, {'exact' if own.exact else 'approximate'}, and comes later in the order.")
        if self.chosen is None:
            least = min((own for own in self.modes[1:] if own.mode not in self.left_out), key=lambda own: own.device)
            return [
                *sentences,
                f"Nothing fits {self.budget / 1e6:.1f} MB; the least is {least.mode}, {least.device / 1e6:.1f} MB.",
            ]
        own = next(own for own in self.modes if own.mode == self.chosen)
        kind = "exact" if own.exact else "approximate; no exact one fits"
        return [*sentences, f"Chosen: {own.mode} ({own.how}), the first that fits {self.budget / 1e6:.1f} MB, and {kind}."]


def choose_memory(
    shared: Iterable[Tensor],
    num_tasks: int,
    budget: float,
    *,
    modules: Iterable[torch.nn.Module] = (),
    weighting: str | Weighting | Elementwise | None = None,
) -> MemoryChoice:
    """The first way to hold the gradients that fits, exact ones before approximate ones, with what each takes.

    ``print(mtl.choose_memory(model.encoder.parameters(), 8, 2e9, modules=model.encoder.blocks))``

    Args:
        shared: the shared parameters, as :class:`MultiTaskOptimizer` is given them; frozen ones do not count.
        num_tasks: K.
        budget: bytes that gradients of the shared parameters, and the update that is made of them, may take on the device.
            Plain training takes those of one gradient.
        modules: behind which the graph could be cut, in the order in which they run, as for :func:`mtlkernels.cut`. What is in
            none of them counts as one more segment. K gradients at the cuts come on top.
        weighting: the method, or its registry string, where it rules something out.

    Raises:
        ValueError: no shared parameter that requires grad, K or the budget not positive, or a loss-only weighting.
    """
    if isinstance(shared, Tensor) or not isinstance(shared, Iterable):
        raise ValueError(f"shared is a {type(shared).__name__}; pass an iterable of parameters, as module.parameters().")
    params = {id(p): p for p in shared if p.requires_grad}
    if not params:
        raise ValueError("shared has no parameter that requires grad; pass those that all tasks train.")
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks!r}; pass a whole number, 1 or more.")
    if not budget > 0:
        raise ValueError(f"budget is {budget!r}; pass the bytes that gradients may take.")
    sizes = [(p.numel(), p.element_size()) for p in params.values()]
    method = None if weighting is None else as_method(weighting)
    left_out = {} if method is None else _left_out(method)
    if all(p.device.type == "cpu" for p in params.values()):
        left_out["host"] = "the parameters are in the host's memory, so that it saves nothing"
    batches = 2 if method is not None and takes_cross(method) else 1
    modes = mode_bytes(sizes, batches * num_tasks, segments_of(params, list(modules)))
    fitting = (own.mode for own in modes[1:] if own.mode not in left_out and own.device <= budget)
    return MemoryChoice(next(fitting, None), modes, budget, left_out)


def _left_out(method: Weighting | Elementwise) -> dict[str, str]:
    """Mode -> why the method rules it out."""
    name = type(method).__name__
    if isinstance(method, Weighting) and method.loss_only:
        raise ValueError(
            f"weighting is {name}, which takes one backward pass as plain training does; there is nothing to choose."
        )
    whole = isinstance(method, (Elementwise, MemoryWeighting))
    modes = ["streamed", "representation", *(["host"] if whole else [])] if whole or takes_cross(method) else []
    reasons = dict.fromkeys(modes, f"{name} takes more than the Gram of one batch")
    if not isinstance(method, PCGrad):
        reasons["online"] = f"is for PCGrad, and the weighting is {name}"
    return reasons


def segments_of(params: dict[int, Tensor], modules: Sequence[torch.nn.Module]) -> list[int]:
    """Bytes of the parameters, given by ``id``, that each module has for itself, and of those in none; none without modules."""
    left = dict(params)
    sizes = []
    for module in sorted(modules, key=lambda m: sum(1 for _ in m.modules())):  # a module inside another has its own first
        sizes.append(sum(left.pop(id(p)).nbytes for p in list(module.parameters()) if id(p) in left))
    return [*sizes, sum(p.nbytes for p in left.values())] if modules else []
