"""MultiDigits against scikit-learn's digits and MultiFashion against its files, pixel by pixel."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mtlkernels._optional import MissingPackageError, require
from mtlkernels.data import FASHION_MNIST, MultiDigits, MultiFashion


@pytest.fixture(scope="module")
def parts() -> tuple[MultiDigits, MultiDigits]:
    return MultiDigits.load()


def test_shapes_dtypes_and_range(parts: tuple[MultiDigits, MultiDigits]) -> None:
    for part, number in zip(parts, (20_000, 4_000), strict=True):
        assert len(part) == number
        assert part.images.shape == (number, 1, 11, 11)
        assert part.images.dtype == torch.float32
        assert part.images.min() == 0
        assert part.images.max() == 1
        assert list(part.labels) == ["left", "right"]
        for labels in part.labels.values():
            assert labels.shape == (number,)
            assert labels.dtype == torch.int64
            assert labels.unique().tolist() == list(range(10))


def test_no_source_digit_is_in_both_parts(parts: tuple[MultiDigits, MultiDigits]) -> None:
    train, test = (set(part.sources.flatten().tolist()) for part in parts)

    assert not train & test
    # 40,000 draws from 1,437 digits and 8,000 from 360 miss one with probability 1437 exp(-27.8) and 360 exp(-22.2).
    assert (len(train), len(test)) == (1437, 360)


def test_pixels_and_labels_are_those_of_the_source_digits(parts: tuple[MultiDigits, MultiDigits]) -> None:
    source = load_digits()
    for part in parts:
        left, right = part.sources.numpy().T
        canvas = np.zeros((2, len(part), 11, 11), dtype=np.float32)
        canvas[0, :, 0:8, 0:8] = source.images[left] / 16
        canvas[1, :, 3:11, 3:11] = source.images[right] / 16
        np.testing.assert_array_equal(part.images[:, 0].numpy(), canvas.max(0))
        np.testing.assert_array_equal(part.labels["left"].numpy(), source.target[left])
        np.testing.assert_array_equal(part.labels["right"].numpy(), source.target[right])


def test_the_two_labels_are_independent(parts: tuple[MultiDigits, MultiDigits]) -> None:
    left, right = (labels.numpy() for labels in parts[0].labels.values())
    counts = np.histogram2d(left, right, bins=10, range=((0, 10), (0, 10)))[0]
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()

    # Chi-squared with 81 degrees of freedom: mean 81, standard deviation 12.7; six of them above the mean.
    assert ((counts - expected) ** 2 / expected).sum() < 81 + 6 * 12.7


def test_seeds(parts: tuple[MultiDigits, MultiDigits]) -> None:
    same, other = MultiDigits.load(seed=0), MultiDigits.load(seed=1)

    for part, again in zip(parts, same, strict=True):
        assert torch.equal(part.images, again.images)
        assert torch.equal(part.sources, again.sources)
    assert set(parts[1].sources.flatten().tolist()) != set(other[1].sources.flatten().tolist())


def test_sizes() -> None:
    train, test = MultiDigits.load(3, 0)

    assert (len(train), len(test)) == (3, 0)
    assert test.images.shape == (0, 1, 11, 11)
    with pytest.raises(ValueError, match="num_test is -1; pass 0 or more"):
        MultiDigits.load(3, -1)


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(MissingPackageError, match=r"MultiDigits needs scikit-learn, .*pip install scikit-learn"):
        MultiDigits.load(1, 1)


def test_an_installed_package_that_fails_keeps_its_own_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_package.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there") as caught:
        require("broken_package", "broken-package", "this test")
    assert not isinstance(caught.value, MissingPackageError)


# --- MultiFashion ---------------------------------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()))


@pytest.fixture
def fashion_files(tmp_path: Path) -> Path:
    """Files in the format of Fashion-MNIST with few pictures."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 30), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (number, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", rng.integers(0, 10, number, dtype=np.uint8))
    return tmp_path


def test_multi_fashion_overlays_pictures_of_each_part(fashion_files: Path) -> None:
    parts = MultiFashion.load(50, 40, seed=3, root=fashion_files)
    for part, name, number in zip(parts, ("train", "t10k"), (50, 40), strict=True):
        raw = gzip.decompress((fashion_files / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
        pictures = np.frombuffer(raw, np.uint8).reshape(-1, 28, 28)
        targets = np.frombuffer(gzip.decompress((fashion_files / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
        left, right = part.sources.numpy().T
        canvas = np.zeros((2, number, 36, 36), dtype=np.float32)
        canvas[0, :, :28, :28] = pictures[left] / np.float32(255)
        canvas[1, :, 8:, 8:] = pictures[right] / np.float32(255)
        np.testing.assert_allclose(part.images[:, 0].numpy(), canvas.max(0), rtol=1e-6)
        np.testing.assert_array_equal(part.labels["left"].numpy(), targets[left])
        np.testing.assert_array_equal(part.labels["right"].numpy(), targets[right])
        assert len(part) == number
    again = MultiFashion.load(50, 40, seed=3, root=fashion_files)
    assert torch.equal(parts[0].images, again[0].images)
    assert not torch.equal(parts[0].sources, MultiFashion.load(50, 40, seed=4, root=fashion_files)[0].sources)


def test_multi_fashion_that_is_missing_or_broken(fashion_files: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=r"train-images-idx3-ubyte.gz.*apt-get install dataset-fashion-mnist"):
        MultiFashion.load(1, 1, root=tmp_path / "nothing")
    with pytest.raises(ValueError, match="num_train is -1"):
        MultiFashion.load(-1, 1, root=fashion_files)
    (fashion_files / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09abc"))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is not an IDX file"):
        MultiFashion.load(1, 1, root=fashion_files)


def test_multi_fashion_of_debian() -> None:
    if not FASHION_MNIST.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    train, test = MultiFashion.load(2_000, 500)
    assert train.images.shape == (2_000, 1, 36, 36)
    assert (train.images.min(), train.images.max()) == (0, 1)
    assert train.labels["left"].unique().tolist() == list(range(10))
    assert int(train.sources.max()) > 10_000 > int(test.sources.max())
