"""How the K gradients of the shared parameters are held between their backward passes and the update."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..gradients import Arrived, Rows
from ..weightings import Elementwise, MemoryWeighting, PCGrad, Weighting
from .host import to_host

RowsKind = Literal["stored", "bfloat16", "host", "online"]


def to_bfloat16(param: Tensor, grad: Tensor) -> Tensor:
    """Rounded to nearest: a relative error of at most 2^-9 in each element. What has 16 bits stays as it is."""
    return grad.to(torch.bfloat16) if grad.element_size() > 2 else grad


ARRIVED: dict[str, Arrived] = {"bfloat16": to_bfloat16, "host": to_host}
"""What becomes of each gradient of a shared parameter, by the kind of rows."""


def check_rows(
    rows: RowsKind, method: Weighting | Elementwise, one_pass: bool, ranks: Ranks, options: Mapping[str, object]
) -> None:
    """Raises a ``ValueError`` for what ``rows`` of :class:`MultiTaskOptimizer` rules out."""
    if rows == "stored":
        return
    name = type(method).__name__
    stored = 'pass rows="stored"'
    if one_pass:
        raise ValueError(f'rows is "{rows}", but {name} takes one backward pass, whose gradient is no row of a task; {stored}.')
    if ranks.size > 1 or ranks.communicates or ranks.hides_leaves:
        raise ValueError(
            f'rows is "{rows}", but a rank exchanges its gradients with others, or has a part of them, as they are; {stored}, '
            "or train in one process on plain parameters."
        )
    if options["weights_from"] == "previous":
        raise ValueError(f'rows is "{rows}", but weights_from is "previous", which reads the rows once, as they are; {stored}.')
    if rows == "online":
        if type(method) is not PCGrad or method.order is not None:
            raise ValueError(
                f'rows is "online", which takes each gradient off the sum of those before it, in random order, as PCGrad does, '
                f"and has no Gram for {name}{'' if type(method) is not PCGrad else ' with an order'}; pass "
                'weighting=PCGrad() or "pcgrad", or rows="bfloat16".'
            )
        if options["per"] != "model":
            raise ValueError('rows is "online": a sum has one set of weights; pass per="model".')
        return
    if options["fused"]:
        raise ValueError(
            f'rows is "{rows}", but fused is True, which steps along rows of the parameters\' dtype and device; {stored}, or '
            "fused=False."
        )
    if rows == "host" and isinstance(method, (Elementwise, MemoryWeighting)):
        raise ValueError(f'rows is "host", but {name} takes the gradients of all parameters at once; pass rows="bfloat16".')
    if rows == "host" and options["per"] == "channel":
        raise ValueError(
            'rows is "host", and per="channel" has other weights in every row of a tensor, which may come back in parts; pass '
            'per="tensor" or "model", or rows="bfloat16".'
        )


def widen_(buffers: list[Tensor | None], rows: Rows, params: Sequence[Tensor]) -> None:
    """Puts the combination into the dtype of the parameters, tensor by tensor. The rows that it is of are let go first.

    Args:
        buffers: N tensors, None where there is none. What is replaced is freed where the list has the only reference.
        rows: K lists, empty afterwards.
        params: N parameters.
    """
    for row in rows:
        row.clear()
    for n, param in enumerate(params):
        own = buffers[n]
        buffers[n] = None if own is None else own.to(param.dtype)
        del own
