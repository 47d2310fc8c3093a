"""Counter-based random bits, the same on every backend: Philox4x32-10 (Salmon et al. 2011).

A draw is a function of a seed and of the place it is for, so it needs no state on the device and does not depend on how the
work is split. ``csrc/common/philox.h`` is the same in C++.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROOT_HALF = 0x3F3504F3
"""Bits of the float32 nearest to sqrt(1/2)."""
_LOG = (
    -1.9999998807907104, 1.0000072717666626, -0.6667011976242065, 0.4993981719017029,
    -0.39800330996513367, 0.34501662850379944, -0.3244517147541046, 0.20213793218135834,
)  # fmt: skip
"""-2 ln(1 + x) = x (_LOG[0] + _LOG[1] x + ...) for 1 + x from sqrt(1/2) to sqrt(2), to 1.7e-7 of it; float32 numbers."""
_LOG_2 = -1.3862943649291992
"""-2 ln 2 in float32."""
_SINE = (3.1415927410125732, -5.167709827423096, 2.550069808959961, -0.5982421040534973, 0.07756038755178452)
"""sin(pi y) = y (_SINE[0] + _SINE[1] y^2 + ...) for y from -1/2 to 1/2, to 6e-9 of it; float32 numbers."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Four random words for each counter.

    Args:
        counter: int64 [..., 4], words in [0, 2^32).
        key: int64 [..., 2], words in [0, 2^32).

    Returns:
        int64 [..., 4], words in [0, 2^32).
    """
    even, odd = counter[..., ::2], counter[..., 1::2]  # the two halves of a round at a time
    first = torch.arange(2, device=counter.device) == 0
    multipliers = torch.where(first, *_MULTIPLIERS)
    steps = torch.where(first, *_KEY_STEPS)
    for _ in range(10):
        high, low = _multiply(even, multipliers)
        even, odd = high.flip(-1) ^ odd ^ key, low.flip(-1)
        key = (key + steps) & _WORD
    return torch.stack([even, odd], -1).flatten(-2)


def random_orders(seed: Tensor, num_problems: int, num_tasks: int) -> Tensor:
    """A random order of the tasks for every row of every problem: tasks sorted by random keys, equal keys by index.

    The key of task j in row i of problem b is word j % 4 of the counter (j // 4, i, low half of b, high half of b); the seed's
    halves are the Philox key. So the order of two tasks does not depend on how many others there are.

    Args:
        seed: int64, one element. Not read on the host.
        num_problems: B.
        num_tasks: K.

    Returns:
        int64 [B, K, K] on the seed's device.
    """
    seed = seed.reshape(())
    key = torch.stack([seed & _WORD, (seed >> 32) & _WORD])
    problem = torch.arange(num_problems, device=seed.device).view(-1, 1, 1)
    row = torch.arange(num_tasks, device=seed.device).view(1, -1, 1)
    block = torch.arange((num_tasks + 3) // 4, device=seed.device).view(1, 1, -1)
    counter = torch.stack(torch.broadcast_tensors(block, row, problem & _WORD, problem >> 32), -1)
    keys = philox(counter, key).flatten(-2)[..., :num_tasks]
    return torch.argsort(keys, dim=-1, stable=True)


def random_normals(seed: Tensor, num_problems: int, num_tasks: int) -> Tensor:
    """Standard normal numbers, one for every task of every problem (Box and Muller 1958).

    Task j of problem b takes words 0 and 1 of the counter (j, 0, low half of b, high half of b), so that its number does not
    depend on how many others there are. The bits are the same on every device, their logarithm and cosine to a few units in
    the last place.

    Args:
        seed: int64, one element. Not read on the host.
        num_problems: B.
        num_tasks: K.

    Returns:
        float64 [B, K] on the seed's device.
    """
    seed = seed.reshape(())
    key = torch.stack([seed & _WORD, (seed >> 32) & _WORD])
    problem = torch.arange(num_problems, device=seed.device).view(-1, 1)
    task = torch.arange(num_tasks, device=seed.device)
    counter = torch.stack(torch.broadcast_tensors(task, torch.zeros_like(task), problem & _WORD, problem >> 32), -1)
    words = philox(counter, key).double()
    radius, angle = (words[..., 0] + 1) / 2**32, words[..., 1] / 2**32  # (0, 1] and [0, 1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def element_words(seed: Tensor, place: int, numel: int) -> Tensor:
    """A random word for every element of a tensor, in its logical (row-major) order.

    Element e of tensor ``place`` of a list takes word e % 4 of the counter (low half of e // 4, high half of e // 4, place, 0);
    the seed's halves are the Philox key. So the word of an element depends neither on how the work is split nor on other
    tensors.

    Args:
        seed: int64, one element. Not read on the host.
        place: n, below 2^32.
        numel: E.

    Returns:
        int64 [E], words in [0, 2^32), on the seed's device.
    """
    seed = seed.reshape(())
    key = torch.stack([seed & _WORD, (seed >> 32) & _WORD])
    block = torch.arange((numel + 3) // 4, device=seed.device)
    other = torch.zeros_like(block)
    counter = torch.stack([block & _WORD, block >> 32, other + place, other], -1)
    return philox(counter, key).flatten()[:numel]


def element_normals(seed: Tensor, place: int, numel: int) -> Tensor:
    """A standard normal number for every element of a tensor (Box and Muller 1958), the same bits on every backend.

    Elements 2 i and 2 i + 1 share their :func:`element_words` a and b: R cos(2 pi V) and R sin(2 pi V) are their numbers, where
    R = sqrt(-2 ln U), U = (a // 2 + 1/2) / 2^31 and V = b / 2^32.

    Mathematical libraries and the special function units of GPUs give logarithms, roots and cosines bits of their own. So this
    is made of what IEEE 754 fixes, in one order and without fused multiply-adds: float32 additions, multiplications, a root and
    conversions from int32, each rounded to nearest, and of bits. The polynomials are a choice of ours. U and V are rounded to
    24 bits. From U and V so rounded, R is exact to 4e-7 of itself and the cosine to 3e-7. The distribution function is the
    normal one within 2e-7, tails within 1e-5 of themselves out to +-6.6; nothing lies beyond +-6.67, where a normal number
    would lie once in 4e10.

    Args:
        seed: int64, one element. Not read on the host.
        place: n, below 2^32.
        numel: E.

    Returns:
        float32 [E] on the seed's device.
    """
    words = element_words(seed, place, numel + numel % 2).view(-1, 2)
    uniform = ((words[:, :1] >> 1).float() + 0.5) * 2.0**-31
    bits = uniform.view(torch.int32) - _ROOT_HALF
    exponent, fraction = (bits >> 23).float(), ((bits & 0x7FFFFF) + _ROOT_HALF).view(torch.float32) - 1.0
    square = exponent * _LOG_2 + fraction * _polynomial(_LOG, fraction)
    radius = square.double().sqrt().float()  # to nearest: vector libraries may round a float32 root to another
    turn = (words[:, 1:] - torch.arange(2, device=seed.device) * 2**30) & _WORD  # a sine is the cosine a quarter turn before
    height = (2**30 - (turn - ((turn >> 31) << 32)).abs()).float() * 2.0**-31
    return (radius * (height * _polynomial(_SINE, height * height))).flatten()[:numel]


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One int64 on ``device``, from the generator; None: torch's default generator.

    Raises:
        ValueError: inside a compiled graph, where a generator cannot be used.
    """
    if generator is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if torch.compiler.is_compiling():
        raise ValueError(
            "generator cannot be used inside a compiled graph; draw outside it, for example "
            "torch.randint(2**63 - 1, (1,), generator=generator), and pass seed=."
        )
    return torch.randint(2**63 - 1, (1,), device=generator.device, generator=generator).to(device)


def to_uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1) from random words: the middle of the one of 2^23 equal intervals that the upper 23 bits name.

    Exact in float32, and never 0 or 1: what has probability 1 always happens.
    """
    return ((words >> 9).float() + 0.5) * 2.0**-23


def _multiply(word: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, without leaving the range of int64."""
    upper, lower = (word >> 16) * constant, (word & 0xFFFF) * constant
    return (upper + (lower >> 16)) >> 16, ((upper << 16 & _WORD) + lower) & _WORD


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule, each operation rounded."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
