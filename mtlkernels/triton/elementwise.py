"""What the ops that combine gradients element by element share in Triton: chunks, and the rows of active tasks."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import at_element


def chunk_length(num_rows: int, constants: dict[str, Any], dtype: torch.dtype) -> int:
    """Elements of a chunk: about 128 KiB of all rows together, in whole tiles."""
    tile: int = constants["E"]
    return max(1, 2**17 // (max(num_rows, 1) * tile * dtype.itemsize)) * tile


def active_bytes(active: Tensor | None, stand_in: Tensor) -> Tensor:
    """``active`` as the kernels take it, uint8 [K]; where it is None, a tensor of the same device that is not read."""
    return (stand_in if active is None else active.contiguous()).view(torch.uint8)


@triton.jit
def is_active(active, all_active, task, num_rows):
    """Whether there is such a task and it counts; ``active`` is not read where ``all_active``."""
    inside = task < num_rows
    return inside & (tl.load(active + task, mask=inside & (all_active == 0), other=1) != 0)


@triton.jit
def row_address(pointers, counts, task, begin, T: tl.constexpr):
    """Address of element ``begin`` of a task's row; 0 where it has none or does not count."""
    return at_element(tl.load(pointers + task, mask=counts, other=0), begin, T)
