"""The update and the Gram in one read, for weights that are there before the Gram is: (1 + 1/K) K P bytes for (2 + 1/K) K P."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import reference
from ._library import define
from .checks import check_buffers, check_fit, check_gradients, check_weights
from .ops import Flat, Gradients, _call, _check_device, _columns, _nest, _rows


def _gram_combine_fake(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> Tensor:
    _check(out, flat, weights)
    check_fit(out, _columns(flat, len(weights)))
    return torch.empty(len(weights), len(weights), dtype=torch.float64, device=weights.device)


def _check(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> None:
    if weights.dim() != 1:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; one read takes one set of weights, [K].")
    check_gradients(_nest(flat, len(weights)))
    _check_device(flat, weights, "weights")


def _gram_combine_reference(out: Sequence[Tensor], flat: Flat, weights: Tensor) -> Tensor:
    """Writes out[n] = sum_k weights[k] g_k[n] and returns G[i, j] = sum_n <g_i[n], g_j[n]>, both of the gradients as they were.

    A task of weight 0 has its part in the Gram alone.

    Args:
        out: N buffers; a buffer may be one of its own tensor's gradients.
        flat: K times N gradients. None counts as zero.
        weights: [K].

    Returns:
        float64 [K, K].
    """
    _check(out, flat, weights)
    rows = _nest(flat, len(weights))
    check_buffers(out, _columns(flat, len(weights)))
    gram = reference.gram(rows).to(weights.device)
    for buffer, value in zip(out, reference.combine(rows, weights), strict=True):
        buffer.copy_(cast(Tensor, value))
    return gram


define(
    "gram_combine_(Tensor(a!)[] out, Tensor?[] grads, Tensor weights) -> Tensor",
    fake=_gram_combine_fake,
    reference=_gram_combine_reference,
)


def gram_combine_(out: Sequence[Tensor | None], grads: Gradients, weights: Tensor) -> Tensor:
    """:func:`mtlkernels.combine` with weights that are known, and :func:`mtlkernels.gram` of the same gradients, in one read.

    On CUDA up to 8 tasks, in Triton up to 4; more are read twice. The Gram has the bits of ``gram``; the sums are float32 for
    float32 and 16-bit gradients, unless a weight leaves its range, where the CPU's ``combine`` has float64.

    Args:
        out: N buffers, as of :func:`mtlkernels.combine`; what stands where every task is None is left alone.
        grads: K sequences of N gradients, as of :func:`mtlkernels.gram`.
        weights: [K], on the gradients' device. A task whose weight is exactly 0 adds nothing to the buffers, whatever it holds.

    Returns:
        The Gram, float64 [K, K], of the gradients as they were.

    Raises:
        As these two.
    """
    rows = _rows(grads, "grads")
    num_tensors = len(rows[0]) if rows else 0

    def check() -> None:
        check_gradients(rows)
        check_weights(weights, len(rows), -1)
        _check_device([t for row in rows for t in row], weights, "weights")
        check_buffers(out, zip(*rows, strict=True))

    if not isinstance(weights, Tensor) or weights.shape != (len(rows),) or len(out) != num_tensors:
        check()
    keep = [n for n in range(num_tensors) if any(row[n] is not None for row in rows)]
    if any(out[n] is None for n in keep):
        check()
    buffers, flat = [cast(Tensor, out[n]) for n in keep], [row[n] for row in rows for n in keep]
    if weights.dtype in (torch.bfloat16, torch.float16):
        weights = weights.float()
    gram = _call(torch.ops.mtlkernels.gram_combine_.default, "gram_combine_", check, buffers, flat, weights)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(buffers)
    return cast(Tensor, gram)
