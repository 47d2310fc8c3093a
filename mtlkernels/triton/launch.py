"""What surrounds a Triton launch on the host: columns of gradients, pointer tables and their upload."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from ..checks import DTYPES, check_gradients
from ..reference import like

TYPES: dict[torch.dtype, tl.dtype] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
MAX_BLOCKS = 2**31 - 1
Kind = TypeVar("Kind")


class Launch(NamedTuple):
    """A kernel with everything that it is launched with; called, it launches."""

    kernel: Any
    blocks: int
    arguments: tuple[Tensor | int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[(self.blocks,)](*self.arguments, **self.constants, **self.options)


class Work(NamedTuple):
    """What a pointer table holds of one tensor: see :mod:`.tiles`."""

    numel: int
    length: int
    place: int
    pointers: list[int]

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.length)


def split(flat: Sequence[Tensor | None], num_tasks: int, num_tensors: int) -> list[list[Tensor | None]]:
    """The rows of each tensor, [N][K]. Raises the errors of :func:`check_gradients`."""
    if len(flat) != num_tasks * num_tensors:
        raise ValueError(f"grads lists {len(flat)} tensors, which are not {num_tasks} rows of {num_tensors}.")
    columns = [list(flat[n::num_tensors]) for n in range(num_tensors)]
    device: torch.device | None = None
    for column in columns:
        model = like(column)
        if model is None:
            continue
        device = model.device if device is None else device
        kind = (model.shape, model.dtype, device)
        if model.dtype not in DTYPES or any(t is not None and (t.shape, t.dtype, t.device) != kind for t in column):
            check_gradients([flat[k * num_tensors : (k + 1) * num_tensors] for k in range(num_tasks)])
    return columns


def lie_alike(tensors: Sequence[Tensor | None], row_major: bool = False) -> bool:
    """Whether element i of each tensor is at offset i of one common order of its memory, the logical one if ``row_major``."""
    present = [t for t in tensors if t is not None]
    in_order = all(t.is_contiguous() for t in present)
    if in_order or row_major:
        return in_order
    strides = present[0].stride()
    return torch.empty_like(present[0], device="meta").stride() == strides and all(t.stride() == strides for t in present)


def contiguous(column: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in column]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def upload(lists: Sequence[list[int]], device: torch.device) -> list[Tensor]:
    """int64 tensors on the device from lists, in one copy that the host does not wait for.

    The copy's source is pinned memory, which the allocator keeps until the copy is done. A copy that is captured into a CUDA
    graph runs again with each replay: its source is kept for the life of the process.
    """
    values = [value for part in lists for value in part]
    if device.type == "cpu":
        table = torch.tensor(values, dtype=torch.int64)
    else:
        source = torch.tensor(values, dtype=torch.int64, pin_memory=True)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.append(source)
        table = source.to(device, non_blocking=True)
    return list(table.split([len(part) for part in lists]))


_captured: list[Tensor] = []


def table_of(works: Sequence[Work]) -> tuple[list[int], int]:
    """A pointer table and the number of blocks of its launch.

    Raises:
        ValueError: more blocks than a grid has.
    """
    first = [0]
    for work in works:
        first.append(first[-1] + work.blocks)
    if first[-1] > MAX_BLOCKS:
        raise ValueError(f"the gradients take {first[-1]} blocks, a launch at most {MAX_BLOCKS}; pass fewer tensors at once.")
    columns = [work.numel for work in works] + [work.length for work in works] + [work.place for work in works]
    return [*first, *columns, *(pointer for work in works for pointer in work.pointers)], first[-1]


def by_kernel(works: Sequence[tuple[Kind, Work]]) -> dict[Kind, list[Work]]:
    """The tensors of each launch, by what tells apart the kernels that they need."""
    groups: dict[Kind, list[Work]] = {}
    for kind, work in works:
        groups.setdefault(kind, []).append(work)
    return groups


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current: Triton launches on the current stream of the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


class Chip(NamedTuple):
    """What the offline tables need to know of a GPU."""

    threads_of_warp: int
    nvidia: bool

    @property
    def float32_dot(self) -> str:
        """Precision of float32 matrix products: on NVIDIA's tensor cores three products of split operands; else float32."""
        return "tf32x3" if self.nvidia else "ieee"

    def options(self, threads: int) -> dict[str, Any]:
        """Options of a kernel of so many threads a program.

        Without fused multiply-adds, lanes that hold one element of a reduction agree to the last bit. Without a limit of
        registers, NVIDIA's assembler spills some to fit another block onto a multiprocessor.
        """
        limit = {"maxnreg": 255} if self.nvidia else {}
        return {"num_warps": max(1, threads // self.threads_of_warp), "enable_fp_fusion": False} | limit


NVIDIA = Chip(32, True)


@cache
def chip_of(device: torch.device) -> Chip:
    """The GPU of a device; NVIDIA's for the CPU, whose interpreter does not care."""
    if device.type == "xpu":
        return Chip(32, False)
    if device.type == "cuda" and torch.version.hip is not None:
        return Chip(int(torch.cuda.get_device_properties(device).warp_size), False)
    return NVIDIA
