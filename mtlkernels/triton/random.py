"""Random words and numbers of consecutive elements in Triton: mtlkernels/random.py; csrc/common/philox.h, normal.h in C++."""

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
def _words(seed, place, begin, E: tl.constexpr):
    """The four words of each counter, uint32 [E / 4]."""
    block = begin // 4 + tl.arange(0, E // 4)
    zero = tl.zeros([E // 4], tl.uint32)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    key_low, key_high = zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    return _philox(low, high, zero + place.to(tl.uint32), zero, key_low, key_high)


@triton.jit
def element_words(seed, place, begin, E: tl.constexpr):
    """uint32 [E] of elements ``begin`` .. ``begin`` + E - 1 of tensor ``place``; ``begin`` and E are multiples of 4."""
    c0, c1, c2, c3 = _words(seed, place, begin, E)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def _radius(word):
    """Of a pair of normal numbers, from its even word."""
    uniform = ((word >> 1).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31
    bits = uniform.to(tl.int32, bitcast=True) - 0x3F3504F3
    x = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    value = x * 0.20213793218135834 + -0.3244517147541046
    value = value * x + 0.34501662850379944
    value = value * x + -0.39800330996513367
    value = value * x + 0.4993981719017029
    value = value * x + -0.6667011976242065
    value = value * x + 1.0000072717666626
    value = value * x + -1.9999998807907104
    return tl.sqrt_rn((bits >> 23).to(tl.float32) * -1.3862943649291992 + x * value)


@triton.jit
def _cosine(word):
    """Of the angle that a word names, in units of 2^-32 turns."""
    angle = word.to(tl.int32, bitcast=True)
    size = tl.where(angle < 0, 0 - angle, angle)  # -2^31 is its own negative, and wraps to the right height
    y = (0x40000000 - size).to(tl.float32) * 2.0**-31
    square = y * y
    value = square * 0.07756038755178452 + -0.5982421040534973
    value = value * square + 2.550069808959961
    value = value * square + -5.167709827423096
    value = value * square + 3.1415927410125732
    return y * value


@triton.jit
def element_normals(seed, place, begin, E: tl.constexpr):
    """float32 [E], standard normal numbers of the elements as :func:`element_words` takes them."""
    c0, c1, c2, c3 = _words(seed, place, begin, E)
    first, second = _radius(c0), _radius(c2)
    even = tl.interleave(first * _cosine(c1), second * _cosine(c3))
    odd = tl.interleave(first * _cosine(c1 - 0x40000000), second * _cosine(c3 - 0x40000000))
    return tl.interleave(even, odd)


@triton.jit
def to_uniform(words):
    """float32 in (0, 1): to_uniform of mtlkernels/random.py."""
    return ((words >> 9).to(tl.float32) + 0.5) * 2.0**-23
