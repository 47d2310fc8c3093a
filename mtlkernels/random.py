"""Counter-based random bits, the same on every backend: Philox4x32-10 (Salmon et al. 2011).

A draw is a function of a seed and of the place it is for, so it needs no state on the device and does not depend on how the
work is split. ``csrc/common/philox.h`` is the same in C++.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
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


def to_uniform(words: Tensor) -> Tensor:
    """float32 in (0, 1) from random words: the middle of the one of 2^23 equal intervals that the upper 23 bits name.

    Exact in float32, and never 0 or 1: what has probability 1 always happens.
    """
    return ((words >> 9).float() + 0.5) * 2.0**-23


def _multiply(word: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, without leaving the range of int64."""
    upper, lower = (word >> 16) * constant, (word & 0xFFFF) * constant
    return (upper + (lower >> 16)) >> 16, ((upper << 16 & _WORD) + lower) & _WORD
