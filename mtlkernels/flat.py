"""Ops of flatness-seeking optimization: perturbed parameters, and Grams of the flat parts of SAM gradients.

The flat part of a task is f_k = s_k - g_k, its gradient at perturbed parameters less that at the parameters (Phan et al. 2025,
Algorithm 1). Both ops form what they need in registers: no difference and no product of tensors is ever in memory.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from . import reference
from ._library import define
from .checks import check_buffers, check_gradients, check_kind, check_lengths
from .ops import Flat, Gradients, _call, _gram_rows, _nest, _rows, gram

Form = Literal["difference", "product"]
EPSILON = 1e-12
"""What the released code adds to a norm that it divides by."""


# --- paired_gram --------------------------------------------------------------------------------------------------------


def _in_pairs(first: Flat, second: Flat, num_tasks: int) -> list[list[Tensor | None]]:
    rows = zip(_nest(first, num_tasks), _nest(second, num_tasks), strict=True)
    return [row for pair in rows for row in pair]


def _paired_gram_fake(first: Flat, second: Flat, num_tasks: int, per: str, form: str) -> Tensor:
    rows = _in_pairs(first, second, num_tasks)
    check_gradients(rows)
    lead = [] if per == "model" else [_gram_rows(list(zip(*rows, strict=True)), per)]
    return torch.empty([*lead, 2 * num_tasks, 2 * num_tasks], dtype=torch.float64, device=reference.device_of(rows))


def _paired_gram_reference(first: Flat, second: Flat, num_tasks: int, per: str, form: str) -> Tensor:
    """The Gram matrix of the rows a_1, p_1, a_2, p_2, ... with p_k = b_k - a_k, or a_k b_k element by element.

    Args:
        first: rows a_k, K lists of N tensors end to end. None counts as zero.
        second: rows b_k of the same tensors.
        num_tasks: K.
        per: ``"model"`` or ``"tensor"``.
        form: ``"difference"`` or ``"product"``.

    Returns:
        float64 [2K, 2K], or [N, 2K, 2K]; exactly symmetric. Rows are formed in float64.
    """
    if per not in ("model", "tensor") or form not in ("difference", "product"):
        raise ValueError(f'per is {per!r} and form {form!r}; pass "model" or "tensor", and "difference" or "product".')
    check_gradients(_in_pairs(first, second, num_tasks))
    rows: list[list[Tensor | None]] = []
    for left, right in zip(_nest(first, num_tasks), _nest(second, num_tasks), strict=True):
        rows += [left, [_paired(a, b, form) for a, b in zip(left, right, strict=True)]]
    wide = [[None if t is None else t.double() for t in row] for row in rows]
    result = reference.gram(wide, per=cast(reference.Granularity, per))
    device = reference.device_of(rows)
    return result.to(device)


def _paired(first: Tensor | None, second: Tensor | None, form: str) -> Tensor | None:
    if form == "product":
        return None if first is None or second is None else first.double() * second.double()
    if second is None:
        return None if first is None else -first.double()
    return second.double() if first is None else second.double() - first.double()


define(
    "paired_gram(Tensor?[] grads, Tensor?[] other, int num_tasks, str per, str form) -> Tensor",
    fake=_paired_gram_fake,
    reference=_paired_gram_reference,
)


class FlatGram(NamedTuple):
    """Inner products of K task gradients g and their flat parts f, float64 [K, K] or [N, K, K]."""

    loss: Tensor
    """<g_i, g_j>"""
    flat: Tensor
    """<f_i, f_j>"""
    cross: Tensor
    """<g_i, f_j>"""

    @classmethod
    def of_pairs(cls, matrix: Tensor) -> "FlatGram":
        """Of a Gram [..., 2K, 2K] of the rows g_1, f_1, g_2, f_2, ..., without a copy."""
        return cls(matrix[..., ::2, ::2], matrix[..., 1::2, 1::2], matrix[..., ::2, 1::2])


def flat_gram(grads: Gradients, sam: Gradients, *, per: Literal["model", "tensor"] = "model") -> FlatGram:
    """Grams of task gradients g_k and of their flat parts f_k = s_k - g_k, in one read of both.

    The difference is formed element by element, in registers: a difference of Grams would lose it to cancellation. Accumulated
    as by :func:`mtlkernels.gram`. The update sum_k w_k g_k + v_k f_k is ``combine([*grads, *sam], cat([w - v, v]))``.

    Args:
        grads: K sequences of N tensors, as in :func:`mtlkernels.gram`: the gradients at the parameters.
        sam: K sequences of the same N tensors: the gradients at the perturbed parameters. None counts as zero.
        per: one set of Grams for the whole ``"model"``, or one for each ``"tensor"``.

    Returns:
        :class:`FlatGram`. A task that is not finite shows only in its own rows and columns.

    Raises:
        ValueError: as in :func:`mtlkernels.gram`; lists of different lengths.
        RuntimeError: an input requires grad; pass ``.detach()``ed tensors.
    """
    return FlatGram.of_pairs(paired_gram(grads, sam, per))


def paired_gram(grads: Gradients, sam: Gradients, per: Literal["model", "tensor"]) -> Tensor:
    """What :class:`FlatGram` is made of, as :func:`flat_gram`: the Gram [..., 2K, 2K] of g_1, f_1, g_2, f_2, ..."""
    if per not in ("model", "tensor"):
        raise ValueError(f'per is {per!r}; pass "model" or "tensor".')
    first, second = _rows(grads, "grads"), _rows(sam, "sam")
    if len(first) != len(second):
        raise ValueError(f"sam lists {len(second)} tasks, grads list {len(first)}; pass a row of each for every task.")
    names = [*(f"grads[{k}]" for k in range(len(first))), *(f"sam[{k}]" for k in range(len(second)))]
    check_lengths([*first, *second], names=names)
    flat = [[t for row in rows for t in row] for rows in (first, second)]

    def check() -> None:
        check_gradients(first)
        check_gradients([*first, *second], names=names)

    op = torch.ops.mtlkernels.paired_gram.default
    return _call(op, "flat_gram", check, *flat, len(first), per, "difference")


# --- perturb_ -----------------------------------------------------------------------------------------------------------


def _perturb_fake(
    out: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor], radii: Tensor, adaptive: bool
) -> None:
    _check_perturb(out, params, grads, radii)


def _perturb_reference(
    out: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor], radii: Tensor, adaptive: bool
) -> None:
    """out[n] = params[n] + radii[n] * grads[n], adaptive: params[n] + radii[n] * params[n]^2 * grads[n]. In float64.

    Args:
        out: N buffers; a buffer may be its own parameter or gradient.
        params: N tensors.
        grads: N tensors like them.
        radii: [N].
        adaptive: whether steps are in units of the parameters.
    """
    _check_perturb(out, params, grads, radii)
    check_buffers(out, list(zip(params, grads, strict=True)))
    values = []
    for param, grad, radius in zip(params, grads, radii.double(), strict=True):
        a, b = param.double(), grad.double()
        values.append(a + (radius * a * b * a if adaptive else radius * b))
    for buffer, value in zip(out, values, strict=True):
        buffer.copy_(value)


def _check_perturb(out: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor], radii: Tensor) -> None:
    check_gradients([params, grads, out], names=["params", "grads", "out"])
    if radii.shape != (len(params),) or radii.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"radii is {radii.dtype} of shape {tuple(radii.shape)}; pass float64 [{len(params)}].")


define(
    "perturb_(Tensor(a!)[] out, Tensor[] params, Tensor[] grads, Tensor radii, bool adaptive) -> ()",
    fake=_perturb_fake,
    reference=_perturb_reference,
)


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    rho: float | Sequence[float],
    *,
    adaptive: bool = False,
    groups: Sequence[int] | None = None,
    buffers: Sequence[Tensor] | None = None,
    whole: Callable[[Tensor, list[int]], Tensor] | None = None,
) -> list[Tensor]:
    """Moves parameters to the worst place within a radius, to first order: theta + eps (Foret et al. 2021; Kwon et al. 2021).

    SAM: eps = rho g / (|g| + 1e-12). Adaptive: eps = rho theta^2 g / (| |theta| g | + 1e-12). The norm is taken over all
    tensors of a group. A zero gradient moves nothing. Nothing returns to the host.

    The parameters get other memory, which holds theta + eps, and theta stays where it is: :func:`restore_` gives it back, to
    the bit and without a copy. That moves the least there is: one read of the gradients for the norm (adaptive: of both), then
    one read of both and one write. Code that keeps the address of a parameter (a captured CUDA graph) does not see eps. In a
    graph of torch.compile theta is copied, and the parameters are restored to that copy.

    Args:
        params: N floating-point tensors.
        grads: N gradients like them; a parameter whose gradient is None stays where it is.
        rho: the radius, for every group or one for each.
        adaptive: whether eps is measured in units of the parameters.
        groups: sizes of consecutive groups of parameters that have a norm of their own; None: one norm for all.
        buffers: N tensors like the parameters to hold theta + eps, written whatever is in them. None: new ones.
        whole: where the tensors are shards: makes squared norms, float64, those of the whole tensors, in every process the
            same. It is given those of the tensors with a gradient, and their indices. None: the tensors are whole.

    Returns:
        The N tensors that hold theta, for :func:`restore_`.

    Raises:
        ValueError: arguments that do not fit; nothing has changed.
    """
    params, grads = list(params), list(grads)
    sizes = [len(params)] if groups is None else list(groups)
    radius = [float(r) for r in rho] if isinstance(rho, Sequence) else [float(rho)] * len(sizes)
    _check_arguments(params, grads, sizes, radius, buffers)
    # What a graph of torch.compile returns as theirs is the parameters' memory as of its end: it would be theta + eps.
    originals = [p.clone() if torch.compiler.is_compiling() else p.detach() for p in params]
    keep = [n for n, grad in enumerate(grads) if grad is not None]
    if not keep:
        return originals
    before, steps = [originals[n] for n in keep], [cast(Tensor, grads[n]) for n in keep]
    after = [torch.empty_like(t) for t in before] if buffers is None else [buffers[n].detach() for n in keep]

    def check() -> None:
        check_gradients([before, steps, after], names=["params", "grads", "buffers"])

    squares = squared_norms(before, steps, adaptive)
    if whole is not None:
        squares = whole(squares, keep)
    counts = [sum(start <= n < start + size for n in keep) for start, size in zip(_starts(sizes), sizes, strict=True)]
    parts = [
        (r / (part.sum().sqrt() + EPSILON)).expand(count)
        for part, count, r in zip(squares.split(counts), counts, radius, strict=True)
    ]
    op = torch.ops.mtlkernels.perturb_.default
    _call(op, "perturb_", check, after, before, steps, torch.cat(parts), adaptive)
    for n, value in zip(keep, after, strict=True):
        params[n].data = value
    torch.clear_autocast_cache()  # it holds 16-bit copies of theta
    return originals


def restore_(params: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
    """Gives parameters the memory back that :func:`perturb_` returned. Cannot fail half-way; nothing is copied.

    Backward passes of what was computed at theta + eps come before it: autograd keeps the parameters, not copies of them.
    """
    for param, original in zip(params, originals, strict=True):
        param.data = original
    torch.clear_autocast_cache()


def squared_norms(params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool) -> Tensor:
    """|g|^2, or adaptive | |theta| g |^2, of each of N tensors in one read of them, float64 [N]."""
    if not adaptive:
        return cast(Tensor, gram([grads], per="tensor"))[:, 0, 0]

    def check() -> None:
        check_gradients([params, grads], names=["params", "grads"])

    op = torch.ops.mtlkernels.paired_gram.default
    return _call(op, "perturb_", check, list(params), list(grads), 1, "tensor", "product")[:, 1, 1]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _check_arguments(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    sizes: Sequence[int],
    rho: Sequence[float],
    buffers: Sequence[Tensor] | None,
) -> None:
    for n, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise ValueError(f"params[{n}] is a {type(param).__name__}; pass tensors, for example model.parameters().")
        check_kind(param, f"params[{n}]")
    check_lengths([params, grads], names=["params", "grads"])
    if buffers is not None:
        check_lengths([params, buffers], names=["params", "buffers"])
    if sum(sizes) != len(params) or any(size < 0 for size in sizes):
        raise ValueError(f"groups is {list(sizes)}; pass sizes that add up to the {len(params)} parameters.")
    if len(rho) != len(sizes):
        raise ValueError(f"rho lists {len(rho)} radii; {len(sizes)} groups take one number, or one for each.")
    for radius in rho:
        if not 0 <= radius < float("inf"):
            raise ValueError(f"rho is {radius}; pass a radius, 0 or more.")
