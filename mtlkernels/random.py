"""Counter-based random bits, the same on every backend: Philox4x32-10 (Salmon et al. 2011).

A draw is a function of a seed and of the place it is for, so it needs no state on the device and does not depend on how the
work is split. ``csrc/common/philox.h`` is the same in C++.
"""

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
    words = list(counter.unbind(-1))
    keys = list(key.unbind(-1))
    for _ in range(10):
        high_0, low_0 = _multiply(words[0], _MULTIPLIERS[0])
        high_1, low_1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(k + step) & _WORD for k, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(words, -1)


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


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, without leaving the range of int64."""
    upper, lower = (word >> 16) * constant, (word & 0xFFFF) * constant
    return (upper + (lower >> 16)) >> 16, ((upper << 16 & _WORD) + lower) & _WORD
