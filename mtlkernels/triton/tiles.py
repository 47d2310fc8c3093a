"""Device code that the kernels share: which chunk a program works on, and tiles of its rows.

A launch's pointer table is int64 in device memory. For N tensors of W pointers each: their first blocks and the number of
blocks [N + 1], their elements [N], elements of a chunk [N], an index of their own [N], then the pointers [N, W]. A null pointer
is a row without a gradient. :mod:`.launch` writes it.
"""

import triton
import triton.language as tl

VECTOR_BYTES = tl.constexpr(16)


@triton.jit
def find_chunk(table, num_tensors, num_pointers, FROM_END=False):
    """The chunk of this program. FROM_END: the first program has the last chunk.

    The latter is for what is read a second time: where that pass begins, the L2 cache still holds what the first one read last.

    Returns the place of its tensor's pointers, its first element, its number of elements (int64), its number within the tensor
    and the tensor's own index. The tensor is found by binary search among the first blocks.
    """
    block = tl.program_id(0)
    if FROM_END:
        block = tl.num_programs(0) - 1 - block
    tensor = 0
    past = num_tensors
    while past - tensor > 1:
        middle = (tensor + past) // 2
        before = tl.load(table + middle) <= block
        tensor = tl.where(before, middle, tensor)
        past = tl.where(before, past, middle)
    number = block - tl.load(table + tensor)
    columns = table + num_tensors + 1 + tensor
    numel = tl.load(columns)
    length = tl.load(columns + num_tensors)
    index = tl.load(columns + 2 * num_tensors)
    pointers = table + 4 * num_tensors + 1 + tensor.to(tl.int64) * num_pointers
    begin = number * length
    return pointers, begin, tl.minimum(length, numel - begin), number, index


@triton.jit
def at_element(address, begin, T: tl.constexpr):
    """Addresses of element ``begin`` of the tensors at addresses; 0 where there is none."""
    return tl.where(address != 0, address + begin * (T.primitive_bitwidth // 8), 0)


@triton.jit
def vector_count(count, misaligned, E: tl.constexpr):
    """Elements of a chunk in the whole tiles of E that 16-byte loads may read.

    None where ``misaligned``, the chunk's addresses modulo 16 or'ed together, says that a row does not lie on 16 bytes.
    """
    return tl.where(misaligned == 0, count // E * E, 0)


@triton.jit
def load_row(address, offsets, mask, T: tl.constexpr, ALIGNED: tl.constexpr, BYTES: tl.constexpr = VECTOR_BYTES):
    """[E] elements of a row; 0, unread, where it is absent. ALIGNED: 16 bytes (BYTES) a load, whatever ``mask`` says."""
    row = address.to(tl.pointer_type(T))
    present = tl.broadcast_to(address, offsets.shape) != 0  # compared as a block, as the interpreter wants its masks
    if ALIGNED:
        row = tl.multiple_of(row, BYTES)
    else:
        present = mask & present
    return tl.load(row + offsets, mask=present, other=0.0)


@triton.jit
def load_tile(rows, offsets, mask, T: tl.constexpr, ALIGNED: tl.constexpr):
    """[K, E] elements of the rows at addresses [K], as :func:`load_row`."""
    base = rows.to(tl.pointer_type(T))
    present = (rows != 0)[:, None]
    if ALIGNED:
        base = tl.multiple_of(base, VECTOR_BYTES)
    else:
        present = present & mask[None, :]
    return tl.load(base[:, None] + offsets[None, :], mask=present, other=0.0)


@triton.jit
def fits_float(factor):
    """Whether float32 holds factors, and their products with gradients of ordinary size."""
    size = tl.abs(factor)
    return (factor == 0) | ((size > 2.0**-100) & (size < 2.0**100))
