"""Random words of consecutive elements in Triton: element_words of mtlkernels/random.py, csrc/common/philox.h in C++."""

import triton
import triton.language as tl


@triton.jit
def _philox(c0, c1, c2, c3, key_low, key_high):
    """Philox4x32-10 (Salmon et al. 2011): four words uint32 for counters and keys of uint32."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        low2 = c2 * 0xCD9E8D57
        c0 = high2 ^ c1 ^ key_low
        c1 = low2
        c2 = high0 ^ c3 ^ key_high
        c3 = low0
        key_low += 0x9E3779B9
        key_high += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def element_words(seed, place, begin, E: tl.constexpr):
    """uint32 [E] of elements ``begin`` .. ``begin`` + E - 1 of tensor ``place``; ``begin`` and E are multiples of 4."""
    block = begin // 4 + tl.arange(0, E // 4)
    zero = tl.zeros([E // 4], tl.uint32)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    key_low, key_high = zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    c0, c1, c2, c3 = _philox(low, high, zero + place.to(tl.uint32), zero, key_low, key_high)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def to_uniform(words):
    """float32 in (0, 1): to_uniform of mtlkernels/random.py."""
    return ((words >> 9).to(tl.float32) + 0.5) * 2.0**-23
