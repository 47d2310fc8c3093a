"""Gradients in the host's memory: copied there while the backward pass goes on, and back, block by block, as ops read them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .. import ops
from ..checks import TaskGradients
from ..granularity import Problems

Block = TypeVar("Block")

BLOCK_BYTES = 2**23
"""Of one block of all tasks' rows; two are on the device at a time."""
ALIGNED = 64
"""Pieces begin at multiples of so many elements, which kernels read and write 16 bytes at a time."""


class Piece(NamedTuple):
    """A range of the elements of tensor ``n``, in the order of its memory."""

    n: int
    start: int
    stop: int


def to_host(param: Tensor, grad: Tensor) -> Tensor:
    """A gradient's copy in the host's memory, laid out like its parameter, on the way there on a stream of its own."""
    side = _side_stream(grad.device)
    if side is not None:
        side.wait_stream(torch.accelerator.current_stream(grad.device))
    host = _empty_on_host(param, grad.dtype)
    with _on(side):
        host.copy_(grad, non_blocking=True)
    if side is not None:
        grad.record_stream(side)  # its memory is not used again before it is copied
    return host


class HostProblems(Problems):
    """Problems whose rows :func:`to_host` gave. Grams and combinations are of blocks of elements, which come back in turn.

    A Gram is the sum of those of the blocks. While one is read, the next is copied.
    """

    def gram(self, rows: TaskGradients) -> Tensor:
        model = self.per == "model"
        device = _device_of(self.tensors)
        total = torch.zeros(1 if model else len(self.tensors), len(rows), len(rows), dtype=torch.float64, device=device)
        for pieces, block in self._blocks(rows):
            grams = cast(Tensor, ops.gram(block, per="model" if model else "tensor"))
            places = [0] if model else [piece.n for piece in pieces]
            for place, own in zip(places, grams.view(-1, *total.shape[1:]), strict=True):
                total[place] += own
        return total[0] if model else self._grouped(total)

    def combine(self, rows: TaskGradients, weights: Tensor, out: Sequence[Tensor | None] | None = None) -> list[Tensor | None]:
        """As of :class:`Problems`; ``out`` is laid out like the tensors that the problems are of."""
        if out is None:
            models = [next((row for row in column if row is not None), None) for column in zip(*rows, strict=True)]
            pairs = zip(self.tensors, models, strict=True)
            out = [None if m is None else torch.empty_like(cast(Tensor, t), dtype=m.dtype) for t, m in pairs]
        weights = self.by_tensor(weights)
        for pieces, block in self._blocks(rows):
            own = weights if weights.dim() == 1 else torch.stack([weights[piece.n] for piece in pieces])
            ops.combine_rows(block, own, [_part(cast(Tensor, out[piece.n]), piece) for piece in pieces])
        return list(out)

    def _blocks(self, rows: TaskGradients) -> Iterator[tuple[list[Piece], list[list[Tensor | None]]]]:
        """Pieces of the tensors that some task has a gradient of, and K lists of their gradients on the device."""
        device = _device_of(self.tensors)
        side = _side_stream(device)
        if side is not None:
            side.wait_stream(torch.accelerator.current_stream(device))

        def copied(pieces: list[Piece]) -> tuple[list[Piece], list[list[Tensor | None]], Any]:
            with _on(side):
                parts = [[None if (t := row[p.n]) is None else _copy_of(_part(t, p), device) for p in pieces] for row in rows]
                return pieces, parts, None if side is None else side.record_event()

        for pieces, parts, done in _one_ahead(copied, blocks_of(rows)):
            if side is not None:
                _hand_over(parts, done, torch.accelerator.current_stream(device))
            yield pieces, parts
            for row in parts:
                row.clear()  # before the copies of the block after the next one


def blocks_of(rows: TaskGradients, limit: int | None = None) -> list[list[Piece]]:
    """All elements of the tensors that some row has, in blocks of at most ``limit`` bytes of all rows (``BLOCK_BYTES``)."""
    limit = BLOCK_BYTES if limit is None else limit
    blocks: list[list[Piece]] = []
    room = 0
    for n, column in enumerate(zip(*rows, strict=True)):
        there = [row for row in column if row is not None]
        if not there:
            continue
        size, each = there[0].numel(), len(there) * there[0].element_size()
        start = 0
        while start < size:
            if room < each:
                blocks.append([])
                room = max(limit, each)
            count = room // each
            stop = min(size, start + (count - count % ALIGNED or count))
            blocks[-1].append(Piece(n, start, stop))
            room -= (stop - start) * each
            start = stop
    return blocks


def _one_ahead(function: Callable[[Any], Block], arguments: Sequence[Any]) -> Iterator[Block]:
    """The function's results in order, each call made before the result of the one before is used."""
    ahead: list[Block] = []
    for argument in arguments:
        ahead.append(function(argument))
        if len(ahead) > 1:
            yield ahead.pop(0)
    while ahead:
        yield ahead.pop(0)


def _hand_over(rows: TaskGradients, done: Any, stream: torch.Stream) -> None:
    """Makes the stream wait for copies, and their memory for the stream."""
    stream.wait_event(done)
    for row in rows:
        for tensor in row:
            if tensor is not None:
                tensor.record_stream(stream)


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    """The piece of a dense tensor."""
    return tensor.as_strided((piece.stop - piece.start,), (1,), tensor.storage_offset() + piece.start)


def _copy_of(part: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(part, device=device, pin_memory=False).copy_(part, non_blocking=True)


def _empty_on_host(param: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(param, dtype=dtype, device="cpu", pin_memory=param.device.type != "cpu", requires_grad=False)


def _device_of(tensors: Sequence[Tensor | None]) -> torch.device:
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))


@cache
def _side_stream(device: torch.device) -> Any:
    """The stream of copies to and from the device; None where it is the host itself."""
    return None if device.type in ("cpu", "meta") else torch.Stream(device=device)


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else cast(AbstractContextManager[Any], stream)
