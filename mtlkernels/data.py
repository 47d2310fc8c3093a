"""Small real multi-task data sets that come with packages; nothing is downloaded."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._optional import MissingPackageError, require

DIGIT = 8
"""Height and width of a source digit, in pixels."""
CANVAS = 11
"""Height and width of an overlay: the two digits share a square of 5 x 5 pixels."""
FASHION_CANVAS = 36
"""Height and width of an overlay of two Fashion-MNIST pictures, 28 x 28 each."""
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


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
        _check_sizes(num_train, num_test)
        source = require("sklearn.datasets", "scikit-learn", "mtlkernels.data.MultiDigits").load_digits()
        digits = torch.from_numpy(source.images).float() / 16  # stored as counts from 0 to 16
        targets = torch.from_numpy(source.target).long()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits), generator=generator)
        boundary = len(digits) * 4 // 5
        train = cls(*_overlay(digits, targets, order[:boundary], num_train, CANVAS, generator))
        test = cls(*_overlay(digits, targets, order[boundary:], num_test, CANVAS, generator))
        return train, test


@dataclass(frozen=True)
class MultiFashion:
    """Two articles of clothing in one picture, one task each: the top-left one and the bottom-right one.

    MultiFashion (Lin et al. 2019, Section 5.1): two pictures of Fashion-MNIST (Xiao et al. 2017), 28 x 28 pixels, each in its
    corner of a 36 x 36 canvas; a pixel under both takes the larger value.
    """

    images: Tensor
    """float32 [N, 1, 36, 36] in [0, 1]."""
    labels: dict[str, Tensor]
    """Task name (``"left"``, ``"right"``) -> int64 [N] in 0..9."""
    sources: Tensor
    """int64 [N, 2]: which source picture lies top left and which bottom right, of the 60,000 or 10,000 of its part."""

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(
        cls, num_train: int = 20_000, num_test: int = 10_000, seed: int = 0, root: Path | str = FASHION_MNIST
    ) -> tuple["MultiFashion", "MultiFashion"]:
        """Training and test overlays, of Fashion-MNIST's own training and test pictures.

        Args:
            num_train: overlays drawn with replacement from pairs of training pictures.
            num_test: overlays drawn with replacement from pairs of test pictures.
            seed: of the pairs; equal seeds give equal tensors.
            root: folder of the four ``.gz`` files of Fashion-MNIST.

        Raises:
            ValueError: a negative number of overlays, or a file that is not in the IDX format.
            MissingPackageError: the files are not there.
        """
        _check_sizes(num_train, num_test)
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for part, number in (("train", num_train), ("t10k", num_test)):
            images = _read_idx(Path(root) / f"{part}-images-idx3-ubyte.gz").float() / 255
            targets = _read_idx(Path(root) / f"{part}-labels-idx1-ubyte.gz").long()
            pool = torch.arange(len(images))
            parts.append(cls(*_overlay(images, targets, pool, number, FASHION_CANVAS, generator)))
        return parts[0], parts[1]


def _read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of bytes: a magic number with the number of dimensions, their sizes, the values; uint8."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingPackageError(
            f"mtlkernels.data.MultiFashion needs {path}, which is not there; install it with: "
            "apt-get install dataset-fashion-mnist, or pass root= with the folder of Fashion-MNIST's files"
        ) from error
    dims = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = [int.from_bytes(content[4 + 4 * n : 8 + 4 * n], "big") for n in range(dims)]
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims if dims else 0)
    if not dims or values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is not an IDX file of bytes; pass the files of Fashion-MNIST as they are distributed.")
    return torch.from_numpy(values.reshape(shape).copy())


def _check_sizes(num_train: int, num_test: int) -> None:
    for argument, value in (("num_train", num_train), ("num_test", num_test)):
        if value < 0:
            raise ValueError(f"{argument} is {value}; pass 0 or more overlays.")


def _overlay(
    pictures: Tensor, targets: Tensor, pool: Tensor, number: int, canvas: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Images, labels and sources of ``number`` overlays of pairs from ``pool``, the indices of one part's pictures."""
    size = pictures.shape[-1]
    sources = pool[torch.randint(len(pool), (number, 2), generator=generator)]
    left, right = sources.unbind(1)
    images = torch.zeros(number, canvas, canvas)
    images[:, :size, :size] = pictures[left]
    corner = images[:, -size:, -size:]
    torch.maximum(corner, pictures[right], out=corner)
    return images.unsqueeze(1), {"left": targets[left], "right": targets[right]}, sources
