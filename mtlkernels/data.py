"""Small real multi-task data sets that come with packages from the index; nothing is downloaded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._optional import require

DIGIT = 8
"""Height and width of a source digit, in pixels."""
CANVAS = 11
"""Height and width of an overlay: the two digits share a square of 5 x 5 pixels."""


@dataclass(frozen=True)
class MultiDigits:
    """Two handwritten digits in one picture, one task each: the top-left digit and the bottom-right digit.

    The two tasks of MultiMNIST (Sener and Koltun 2018, Section 5.1) on the 1,797 real digits of 8 x 8 pixels that scikit-learn
    ships (UCI Optical Recognition of Handwritten Digits): each lies in its corner of an 11 x 11 canvas, and a pixel under both
    takes the larger value.
    """

    images: Tensor
    """float32 [N, 1, 11, 11] in [0, 1]."""
    labels: dict[str, Tensor]
    """Task name (``"left"``, ``"right"``) -> int64 [N] in 0..9."""
    sources: Tensor
    """int64 [N, 2]: which source digit lies top left and which bottom right."""

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(cls, num_train: int = 20_000, num_test: int = 4_000, seed: int = 0) -> tuple["MultiDigits", "MultiDigits"]:
        """Training and test overlays.

        The source digits are split 80 to 20 (1,437 and 360) before any overlay is made, so that no digit of a test picture is
        seen in training.

        Args:
            num_train: overlays drawn with replacement from pairs of training digits.
            num_test: overlays drawn with replacement from pairs of test digits.
            seed: of the split and of the pairs; equal seeds give equal tensors.

        Raises:
            ValueError: a negative number of overlays.
            MissingPackageError: scikit-learn is not installed.
        """
        for argument, value in (("num_train", num_train), ("num_test", num_test)):
            if value < 0:
                raise ValueError(f"{argument} is {value}; pass 0 or more overlays.")
        source = require("sklearn.datasets", "scikit-learn", "mtlkernels.data.MultiDigits").load_digits()
        digits = torch.from_numpy(source.images).float() / 16  # stored as counts from 0 to 16
        targets = torch.from_numpy(source.target).long()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits), generator=generator)
        boundary = len(digits) * 4 // 5
        train = _overlay(digits, targets, order[:boundary], num_train, generator)
        test = _overlay(digits, targets, order[boundary:], num_test, generator)
        return train, test


def _overlay(digits: Tensor, targets: Tensor, pool: Tensor, number: int, generator: torch.Generator) -> MultiDigits:
    """``number`` overlays of pairs from ``pool``, the indices of one part's digits."""
    sources = pool[torch.randint(len(pool), (number, 2), generator=generator)]
    left, right = sources.unbind(1)
    images = torch.zeros(number, CANVAS, CANVAS)
    images[:, :DIGIT, :DIGIT] = digits[left]
    corner = images[:, -DIGIT:, -DIGIT:]
    torch.maximum(corner, digits[right], out=corner)
    return MultiDigits(images.unsqueeze(1), {"left": targets[left], "right": targets[right]}, sources)
