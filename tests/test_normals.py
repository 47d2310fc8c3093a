"""Normal numbers of elements against Box and Muller's in float64, and as a distribution."""

import math

import numpy as np
import torch
from scipy import stats
from test_graddrop import SEED

from mtlkernels.random import element_normals, element_words


def test_normals_are_box_mullers_in_float64():
    """From U and V as they are, rounded to 24 bits: the polynomials, the root and their roundings are off by less than 4e-7."""
    words = element_words(SEED, 3, 2**20).numpy().reshape(-1, 2)
    uniform = ((words[:, 0] >> 1).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    turns = words[:, 1] / 2.0**32
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
    exact = np.stack([radius * np.cos(2 * np.pi * turns), radius * np.sin(2 * np.pi * turns)], 1)
    actual = element_normals(SEED, 3, 2**20).double().numpy().reshape(-1, 2)
    assert (np.abs(actual - exact) <= 7e-7 * radius[:, None]).all()
    assert np.abs(actual - exact).max() > 1e-8  # float32 it is


def test_normals_have_the_distribution_of_every_word(monkeypatch):
    """P(R > r) is the share of words that give more than r, and P(R > r) = exp(-r^2 / 2): tails as far as they go."""
    halves = torch.tensor([0, 1, 2, 5, 100, 10**4, 10**6, 2**24 + 1, 10**8, 2**30, 2**31 - 10**6, 2**31 - 10**3])
    words = torch.stack([2 * halves, torch.zeros_like(halves)], 1).flatten()  # an angle of 0: the radius itself
    monkeypatch.setattr("mtlkernels.random.element_words", lambda seed, place, numel: words)
    radius = element_normals(SEED, 0, len(words))[::2].double()
    share = (halves + 0.5) / 2.0**31
    tail = (-(radius**2) / 2).exp()
    assert ((tail - share).abs() <= 1e-5 * share).all()
    assert ((tail - share).abs() <= 2e-7).all()
    assert 6.6 < radius[0] < 6.67
    assert (radius[:-1] >= radius[1:]).all()


def test_angles_go_round_once(monkeypatch):
    """Sine and cosine of every sixteenth of a turn and beside it, the radius held at its largest."""
    angles = (torch.arange(16)[:, None] * 2**28 + torch.tensor([-1, 0, 1])).flatten() & 0xFFFFFFFF
    words = torch.stack([torch.zeros_like(angles), angles], 1).flatten()
    monkeypatch.setattr("mtlkernels.random.element_words", lambda seed, place, numel: words)
    pairs = element_normals(SEED, 0, len(words)).double().view(-1, 2)
    radius = math.sqrt(-2 * math.log(2.0**-32))
    turn = 2 * math.pi * angles.double() / 2.0**32
    torch.testing.assert_close(pairs, radius * torch.stack([turn.cos(), turn.sin()], 1), rtol=0, atol=4e-6)


def test_normals_are_normal():
    """Kolmogorov-Smirnov, moments, quantiles and tails against scipy's, for 4 million numbers of a fixed seed."""
    size = 4_000_000
    values = element_normals(torch.tensor([11]), 0, size).double().numpy()
    for part in (values, values[::2], values[1::2]):
        assert stats.kstest(part, "norm").pvalue > 0.01
    assert abs(values.mean()) < 4 / math.sqrt(size)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / size)
    assert abs(stats.skew(values)) < 4 * math.sqrt(6 / size)
    assert abs(stats.kurtosis(values)) < 4 * math.sqrt(24 / size)
    for q in (1e-5, 1e-3, 0.01, 0.25, 0.5):
        for sign in (-1, 1):
            count = (sign * values < stats.norm.ppf(q)).sum()
            assert abs(count - q * size) < 4 * math.sqrt(q * size)
    # Neighbours, which share a radius, have nothing to do with each other; nor have their squares.
    for power in (1, 2):
        first, second = values[::2] ** power, values[1::2] ** power
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(size / 2)
