"""What the second pass over gradients finds in the L2 cache: a model of a cache that keeps what was used last.

A pass is a list of chunks, one a block. As many blocks as the chip holds run at once, each through its chunk slice by slice,
all at one pace; a slice of all rows is one entry of the cache. Real caches are hashed and set-associative, and the two halves
of some keep copies of their own: they keep less.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

CHUNK = 8192
SLICES = 8
"""Of a chunk: what a block has under way at once."""

Order = Literal["in order", "chunks from the end", "from the end"]


def slices(chunks: int, at_once: int, order: Order) -> Iterator[int]:
    """The slices in the order in which ``at_once`` blocks read them. "from the end": the slices of a chunk, too."""
    inner = range(SLICES)[::-1] if order == "from the end" else range(SLICES)
    for first in range(0, chunks, at_once):
        blocks = range(first, min(first + at_once, chunks))
        for piece in inner:
            for block in blocks:
                yield (block if order == "in order" else chunks - 1 - block) * SLICES + piece


def share_from_dram(
    elements: int, num_tasks: int, element_bytes: int, l2_bytes: int, at_once: tuple[int, int], order: Order
) -> float:
    """Share of the gradients that ``combine`` reads from DRAM after ``gram`` has read them in order.

    Args:
        elements: P of the model.
        num_tasks: K rows of it.
        element_bytes: of a gradient.
        l2_bytes: of the cache; the combined gradient takes its part of them.
        at_once: blocks of ``gram`` and of ``combine`` that the chip holds.
        order: of ``combine``.
    """
    chunks = max(elements // CHUNK, 1)
    rows, result = CHUNK // SLICES * element_bytes * num_tasks, CHUNK // SLICES * element_bytes
    kept: OrderedDict[int, int] = OrderedDict()  # slice, of the result -1 - slice -> bytes; what was used last at the end
    used = missed = 0

    def touch(key: int, size: int) -> bool:
        nonlocal used
        found = key in kept
        if found:
            kept.move_to_end(key)
        else:
            kept[key] = size
            used += size
            while used > l2_bytes:
                used -= kept.popitem(last=False)[1]
        return found

    for piece in slices(chunks, at_once[0], "in order"):
        touch(piece, rows)
    for piece in slices(chunks, at_once[1], order):
        missed += not touch(piece, rows)
        touch(-1 - piece, result)
    return missed / (chunks * SLICES)
