"""Ops that finish an update: the combination of task gradients and the step of torch's SGD, Adam or AdamW in one sweep.

The combined gradient g_n = sum_k w_k g_kn is formed in registers and stored nowhere. What clips or unscales an update is in its
weights, and what skips one is a flag on the device. States are laid out as in torch.optim, so that its optimizers and these ops
take turns on them.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import reference
from ._library import define
from .checks import check_buffers, check_gradients, check_weights
from .memory import memory_dtype
from .ops import Flat, _call, _nest


def _check(
    params: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    flat: Flat,
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    steps: Sequence[Tensor] | None = None,
) -> None:
    """What both ops refuse. ``states``: lists of N tensors like the parameters, by the name of the argument."""
    num_tasks = weights.shape[-1] if weights.dim() else 0
    check_weights(weights, num_tasks, len(params))
    if len(flat) != num_tasks * len(params):
        raise ValueError(f"grads lists {len(flat)} tensors; {num_tasks} tasks of {len(params)} take {num_tasks * len(params)}.")
    rows = _nest(flat, num_tasks)
    check_gradients([params, *rows], names=["params", *(f"grads[{k}]" for k in range(num_tasks))])
    for n in range(len(params)):
        if all(row[n] is None for row in rows):
            raise ValueError(f"grads has no gradient of tensor {n}; leave the tensor out.")
    for name, tensors in states.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} lists {len(tensors)} tensors, params {len(params)}; pass one for each.")
        check_gradients([params, tensors], names=["params", name])
    device = reference.device_of([params])
    scalars = [("lr", lr, torch.float64), ("skip", skip, torch.bool), ("weights", weights, weights.dtype)]
    if steps is not None:
        if len(steps) != len(params):
            raise ValueError(f"steps lists {len(steps)} tensors, params {len(params)}; pass one for each.")
        scalars += [(f"steps[{n}]", step, torch.float32) for n, step in enumerate(steps)]
    for name, tensor, dtype in scalars:
        if tensor is None:
            continue
        if tensor.dtype != dtype or (tensor.dim() and name != "weights"):
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; pass a scalar tensor of {dtype}.")
        if params and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the parameters are on {device}; pass {name}.to({str(device)!r}).")


def _check_memory(params: Sequence[Tensor], states: dict[str, Sequence[Tensor]]) -> None:
    """Refuses what is written twice."""
    written = [*params, *(t for tensors in states.values() for t in tensors)]
    check_buffers(written, [[t] for t in written])


def _combined(params: Sequence[Tensor], flat: Flat, weights: Tensor) -> list[Tensor]:
    """g_n = sum_k w_k g_kn in float32, or float64 of float64, not rounded before; in memory of its own."""
    wide = [[None if t is None else t.to(memory_dtype(t.dtype)) for t in row] for row in _nest(flat, weights.shape[-1])]
    return cast(list[Tensor], reference.combine(wide, weights)) if params else []


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to(memory_dtype(tensor.dtype), copy=True)


def _write(values: Sequence[tuple[Tensor, Tensor]], skip: Tensor | None) -> None:
    """Rounds each value into its place, where the flag is not true."""
    for place, value in values:
        place.copy_(value if skip is None else torch.where(skip, place, value))


# --- combine_sgd_ -------------------------------------------------------------------------------------------------------


def _check_sgd(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    flat: Flat,
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    momentum: float,
) -> None:
    if momentum == 0 and momenta:
        raise ValueError(f"momenta lists {len(momenta)} tensors, but momentum is 0; pass [].")
    _check(params, {"momenta": momenta} if momentum != 0 else {}, flat, weights, lr, skip)


def _combine_sgd_fake(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    flat: Flat,
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    _check_sgd(params, momenta, flat, weights, lr, skip, momentum)


def _combine_sgd_reference(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    flat: Flat,
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """A step of ``torch.optim.SGD`` along g = sum_k w_k g_k, negated to maximize.

    In this order: d = g + weight_decay p; m <- momentum m + (1 - dampening) d, or d at ``first``; d <- m, or d + momentum m
    with ``nesterov``; p <- p - lr d. In float64 of float64, in float32 of all others; scalars are rounded to that before they
    meet a tensor. Every step of it is the function that torch.optim calls, so that the bits are torch's: on a CPU with FMA
    weight_decay p, (1 - dampening) d, nesterov's momentum m and lr d are added in one each.

    Args:
        params: N tensors.
        momenta: N tensors of their shapes and dtypes; ``[]`` where ``momentum`` is 0.
        flat: K times N gradients of their shapes and dtypes end to end. None counts as zero; a tensor has one or more. As they
            were before the call, even where they share memory with what is written.
        weights: [K], or [N, K]. A row whose weight is exactly 0 is not read.
        lr: float64 scalar.
        skip: bool scalar; where it is true nothing is written. None: false.
        momentum: as in torch.optim.SGD.
        dampening: as there.
        weight_decay: as there.
        nesterov: as there.
        maximize: as there.
        first: whether this is the first step; ``momenta`` are written whatever is in them.
    """
    _check_sgd(params, momenta, flat, weights, lr, skip, momentum)
    _check_memory(params, {"momenta": momenta})
    written = []
    for n, (param, g) in enumerate(zip(params, _combined(params, flat, weights), strict=True)):
        p, d = _copy(param), -g if maximize else g
        if weight_decay != 0:
            d = d.add(p, alpha=weight_decay)
        if momentum != 0:
            m = d.clone() if first else _copy(momenta[n]).mul_(momentum).add_(d, alpha=1 - dampening)
            d = d.add(m, alpha=momentum) if nesterov else m
            written.append((momenta[n], m))
        written.append((param, p.addcmul_(d, lr.to(p.dtype), value=-1)))
    _write(written, skip)


define(
    "combine_sgd_(Tensor(a!)[] params, Tensor(b!)[] momenta, Tensor?[] grads, Tensor weights, Tensor lr, Tensor? skip, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> ()",
    fake=_combine_sgd_fake,
    reference=_combine_sgd_reference,
)


def combine_sgd_(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None = None,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """The op ``combine_sgd_`` on K lists of N tensors, as its reference says. One read, and one write of the results.

    Raises:
        ValueError: tensors that do not fit, or memory that is written twice; nothing has changed.
    """
    flat = [t for row in grads for t in row]

    def check() -> None:
        _check_sgd(params, momenta, flat, weights, lr, skip, momentum)
        _check_memory(params, {"momenta": momenta})

    op = torch.ops.mtlkernels.combine_sgd_.default
    options = momentum, dampening, weight_decay, nesterov, maximize, first
    _call(op, "combine_sgd_", check, list(params), list(momenta), flat, weights, lr, skip, *options)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*params, *momenta])


# --- combine_adam_ ------------------------------------------------------------------------------------------------------


def _adam_states(
    exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], max_exp_avg_sqs: Sequence[Tensor], amsgrad: bool
) -> dict[str, Sequence[Tensor]]:
    if max_exp_avg_sqs and not amsgrad:
        raise ValueError(f"max_exp_avg_sqs lists {len(max_exp_avg_sqs)} tensors, but amsgrad is False; pass [].")
    largest = {"max_exp_avg_sqs": max_exp_avg_sqs} if amsgrad else {}
    return {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **largest}


def _combine_adam_fake(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    flat: Flat,
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    _check(params, _adam_states(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad), flat, weights, lr, skip, steps)


def _combine_adam_reference(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    flat: Flat,
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """A step of ``torch.optim.Adam`` or AdamW along g = sum_k w_k g_k, negated to maximize.

    In this order: p <- (1 - lr weight_decay) p where ``decoupled``, else g <- g + weight_decay p; m <- lerp(m, g, 1 - beta1);
    v <- beta2 v + ((1 - beta2) g) g; u <- max(u, v) with ``amsgrad``, else u = v; with the bias corrections
    c_i = 1 - beta_i^step, p <- p + (-(lr / c_1) m) / (sqrt(u) / c_2^0.5 + eps). In float64 of float64, in float32 of all
    others; what has no element index is computed in float64 and rounded before it meets a tensor. Every step of it is the
    function that torch.optim calls, so that the bits are torch's: on a CPU with FMA g + weight_decay p, beta2 v + a g with
    a = (1 - beta2) g, and lerp(m, g, w) = m + w (g - m), or g + (w - 1) (g - m) for w of 0.5 or more, are one each.

    Args:
        params: N tensors.
        exp_avgs: N tensors m of their shapes and dtypes.
        exp_avg_sqs: N tensors v.
        max_exp_avg_sqs: N tensors u; ``[]`` without ``amsgrad``.
        steps: N float32 scalars, the step that this is, from 1; only read.
        flat: K times N gradients of their shapes and dtypes end to end. None counts as zero; a tensor has one or more. As they
            were before the call, even where they share memory with what is written.
        weights: [K], or [N, K]. A row whose weight is exactly 0 is not read.
        lr: float64 scalar.
        skip: bool scalar; where it is true nothing is written. None: false.
        beta1: as in torch.optim.Adam.
        beta2: as there.
        eps: as there.
        weight_decay: as there.
        decoupled: whether the weight decay is AdamW's.
        amsgrad: as in torch.optim.Adam.
        maximize: as there.
    """
    states = _adam_states(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad)
    _check(params, states, flat, weights, lr, skip, steps)
    _check_memory(params, states)
    written = []
    half = torch.full_like(lr, 0.5)  # pow as Python has it, which sqrt is not in the last bit
    for n, (param, g) in enumerate(zip(params, _combined(params, flat, weights), strict=True)):
        p, m, v, g = _copy(param), _copy(exp_avgs[n]), _copy(exp_avg_sqs[n]), -g if maximize else g
        if weight_decay != 0 and decoupled:
            p.mul_((1 - lr * weight_decay).to(p.dtype))
        elif weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = (1 - beta ** steps[n].double() for beta in (beta1, beta2))
        u = torch.maximum(_copy(max_exp_avg_sqs[n]), v) if amsgrad else v
        denominator = (u.sqrt() / (correction2**half).to(p.dtype)).add_(eps)
        p.add_(m * -(lr / correction1).to(p.dtype) / denominator)
        written += [(param, p), (exp_avgs[n], m), (exp_avg_sqs[n], v)]
        if amsgrad:
            written.append((max_exp_avg_sqs[n], u))
    _write(written, skip)


define(
    "combine_adam_(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
    "Tensor[] steps, Tensor?[] grads, Tensor weights, Tensor lr, Tensor? skip, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool amsgrad, bool maximize) -> ()",
    fake=_combine_adam_fake,
    reference=_combine_adam_reference,
)


def combine_adam_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
) -> None:
    """The op ``combine_adam_`` on K lists of N tensors, as its reference says. One read, and one write of the results.

    Raises:
        ValueError: tensors that do not fit, or memory that is written twice; nothing has changed.
    """
    flat = [t for row in grads for t in row]

    def check() -> None:
        states = _adam_states(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad)
        _check(params, states, flat, weights, lr, skip, steps)
        _check_memory(params, states)

    op = torch.ops.mtlkernels.combine_adam_.default
    states = list(params), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs)
    options = beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize
    _call(op, "combine_adam_", check, *states, list(steps), flat, weights, lr, skip, *options)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for tensors in states for t in tensors])
