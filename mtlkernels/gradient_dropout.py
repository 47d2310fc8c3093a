"""Gradient dropout for meta-learning (Tseng et al. 2020, DropGrad): gradients multiplied by noise, element by element.

One read of the gradients and one write of the result. The noise is a function of a seed, so that nothing of it is kept for the
backward pass, which is the same op on the gradients that come in.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._library import define
from .checks import check_buffers, check_fit, check_floating, check_gradients
from .elementwise import _check_places, _into, _reached
from .ops import Flat, _call, _check_device
from .random import draw_seed, element_normals, element_words
from .reference import device_of

Mode = Literal["gaussian", "bernoulli"]
MODES = ("gaussian", "bernoulli")


def noise(p: Tensor, mode: str, seed: Tensor, place: int, numel: int, dtype: torch.dtype) -> Tensor:
    """The specification of the noise n of :func:`gradient_dropout`, [E] in ``dtype``: base + scale * draw, each rounded.

    Gaussian: 1 + sqrt(p / (1 - p)) z for z of :func:`mtlkernels.random.element_normals`. Bernoulli: 1 / (1 - p) times whether
    the element's word is 2^32 p, rounded down, or more. ``p``: float64; NaN, as the noise is then, outside of [0, 1).
    """
    p = torch.where((p >= 0) & (p < 1), p, torch.nan).reshape(())
    keep = (1.0 - p).to(dtype)
    if mode == "gaussian":
        scale = (p.to(dtype) / keep).double().sqrt().to(dtype)
        return 1.0 + scale * element_normals(seed, place, numel).to(dtype)
    dropped = element_words(seed, place, numel) < (p * 2.0**32).nan_to_num().long()
    return 1.0 / keep * (~dropped).to(dtype)


def _dropout(flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]) -> list[Tensor]:
    """The specification of :func:`gradient_dropout`: products in float32 (float64 for float64), rounded once."""
    _check(flat, p, mode, seed, places)
    if p.device.type == "cpu":
        _check_probability(p.item())
    results = []
    for grad, place in zip(flat, places, strict=True):
        wide = torch.promote_types(grad.dtype, torch.float32)
        factor = noise(p, mode, seed, place, grad.numel(), wide).view(grad.shape)
        results.append(torch.empty_like(grad).copy_(grad.detach().to(wide) * factor))
    return results


def _check(flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]) -> None:
    check_gradients([flat], names=["grads"])
    _check_mode(mode)
    _check_places(places, [[grad] for grad in flat])
    if p.dtype != torch.float64 or p.numel() != 1:
        raise ValueError(f"p is {p.dtype} of shape {tuple(p.shape)}; the op takes one float64.")
    _check_seed(seed)
    for name, tensor in (("p", p), ("seed", seed)):
        _check_device(flat, tensor, name)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f'mode is {mode!r}; pass "gaussian" or "bernoulli".')


def _check_seed(seed: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise ValueError(f"seed is a {type(seed).__name__}; pass one int64, for example torch.tensor([{seed}]).")
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}; pass one int64, for example torch.tensor([0]).")


def _check_probability(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"p is {p}; pass a probability of at least 0 and below 1, of which 0 drops nothing.")


def _fake(flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]) -> list[Tensor]:
    _check(flat, p, mode, seed, places)
    return [torch.empty_like(grad) for grad in flat]


def _inplace_fake(
    out: Sequence[Tensor], flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]
) -> None:
    _check(flat, p, mode, seed, places)
    check_fit(out, [[grad] for grad in flat])


def _inplace_reference(
    out: Sequence[Tensor], flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]
) -> None:
    _into(out, [[grad] for grad in flat], _dropout(flat, p, mode, seed, places))


class _Dropout(torch.autograd.Function):
    """The derivative: d out[n] / d grads[n] is the noise, drawn again by the same function, which differentiates again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, mode: str, seed: Tensor, places: Sequence[int], *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.mtlkernels.gradient_dropout(list(grads), p, mode, seed, places))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        p, ctx.mode, seed, ctx.places, *_ = inputs
        ctx.save_for_backward(p, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        p, seed = ctx.saved_tensors
        reached = {n: grad for n, grad in enumerate(grad_outputs) if grad is not None}
        values = _autograd(list(reached.values()), p, ctx.mode, seed, [ctx.places[n] for n in reached])
        result: list[Tensor | None] = [None] * len(grad_outputs)
        for n, value in zip(reached, values, strict=True):
            result[n] = value
        return None, None, None, None, *result


def _autograd(flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]) -> list[Tensor]:
    if torch.is_grad_enabled() and p.requires_grad:
        raise RuntimeError("mtlkernels.gradient_dropout is not differentiable in p, which requires grad; pass p.detach().")
    if torch.is_grad_enabled() and any(grad.requires_grad for grad in flat):
        return list(_Dropout.apply(p, mode, seed, tuple(places), *flat))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mtlkernels.gradient_dropout(flat, p, mode, seed, places)


# Not mode: torch passes the arguments of ops that write by name, beside a mode of its own.
define(
    "gradient_dropout(Tensor[] grads, Tensor p, str kind, Tensor seed, int[] places) -> Tensor[]",
    fake=_fake,
    reference=_dropout,
    autograd=_autograd,
)
define(
    "gradient_dropout_(Tensor(a!)[] out, Tensor[] grads, Tensor p, str kind, Tensor seed, int[] places) -> ()",
    fake=_inplace_fake,
    reference=_inplace_reference,
)


def gradient_dropout(
    grads: Sequence[Tensor | None],
    p: float | Tensor = 0.1,
    mode: Mode = "gaussian",
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Gradients of a meta-learner's inner loop with noise of mean 1 on every element (Tseng et al. 2020, DropGrad): g n.

    ``"gaussian"``: n is normal with mean 1 and deviation sqrt(p / (1 - p)). ``"bernoulli"``: n = 1 / (1 - p) with probability
    1 - p, else 0. Both have mean 1 and variance p / (1 - p). Products in float32 (float64 for float64 gradients).

    Differentiable in the gradients, any number of times, when ``out`` is not given: the backward pass multiplies by the same
    noise, which it draws again, so that none is stored. Random numbers are functions of the seed, of the tensor's index in the
    list and of the element's index in the tensor's logical order: the result has the same bits on every backend, and depends
    neither on layouts nor on how the work is split. The normal numbers are a choice of ours, of which
    :func:`mtlkernels.random.element_normals` tells how exact they are; a word of 32 bits decides whether an element is dropped.

    Args:
        grads: N tensors (float32, bfloat16, float16 or float64) of any strides; None stays None.
        p: the rate, at least 0 and below 1; 0 gives the gradients back, to the bit. The paper uses 0.1 to 0.2, constant or
            growing linearly with the epochs. Or a floating-point tensor with one element, which a compiled graph or a captured
            CUDA graph reads anew in each run. Not read on the host: out of range on a GPU, it makes every element NaN.
        mode: ``"gaussian"`` or ``"bernoulli"``.
        seed: int64, one element; a new one for each inner step. Not read on the host. None: drawn.
        generator: draws the seed; None: torch's default generator. Not inside a compiled graph: pass ``seed`` there.
        out: N buffers, as in :func:`mtlkernels.combine`; a buffer may be its own gradient.

    Returns:
        N tensors with the dtype and layout of the gradients, None where a gradient is; with ``out``, the buffers.

    Raises:
        ValueError: p outside of [0, 1), gradients or buffers that do not fit, an unknown mode, or both seed and generator.
        RuntimeError: ``p`` requires grad, or with ``out`` a gradient does; pass ``.detach()``ed tensors.
    """
    _check_mode(mode)
    if isinstance(grads, Tensor) or not isinstance(grads, Sequence):
        raise ValueError(
            f"grads is a {type(grads).__name__}; pass a list of tensors, for example [grads] or list(grads.values())."
        )
    if seed is not None and generator is not None:
        raise ValueError("seed and generator are both given; the seed leaves nothing to draw, so pass one of them.")
    if seed is not None:
        _check_seed(seed)
    device = device_of([[g for g in grads if isinstance(g, Tensor)]])
    rate = _rate_on(device, p)
    seed = draw_seed(device, generator) if seed is None else seed.to(device)

    def call(kept: tuple[int, ...], flat: Flat, buffers: list[Tensor] | None) -> list[Tensor]:
        ops, given = torch.ops.mtlkernels, (rate, mode, seed, kept)
        if buffers is None:
            return _call(ops.gradient_dropout.default, "gradient_dropout", check, flat, *given, autograd=_autograd)
        _call(ops.gradient_dropout_.default, "gradient_dropout", check, buffers, flat, *given)
        return buffers

    def check() -> None:
        check_gradients([grads], names=["grads"])
        if rate.device.type == "cpu":
            _check_probability(rate.item())
        if out is not None:
            check_buffers(out, [[grad] for grad in grads])

    return _reached([grads], out, check, call)


def _rate_on(device: torch.device, p: float | Tensor) -> Tensor:
    """float64 on the device; a number is filled in there, since a copy from the host would make it wait."""
    if not isinstance(p, Tensor):
        if not isinstance(p, (int, float)):
            raise ValueError(f"p is a {type(p).__name__}; pass a number or a floating-point tensor with one element.")
        _check_probability(p)
        return torch.full((), p, dtype=torch.float64, device=device)
    check_floating(p, "p")
    if p.numel() != 1:
        raise ValueError(f"p has shape {tuple(p.shape)}; pass one rate for all gradients, for example p[0].")
    return p.to(device=device, dtype=torch.float64)
