"""Training on 1 to 4 gloo ranks gives what one process gives."""

import pytest
import torch
from distributed_models import KINDS, trained

from mtlkernels.weightings import CAGrad, GradVac, NashMTL, PCGrad, UPGrad

WEIGHTINGS = {
    "pcgrad": PCGrad(generator=torch.Generator().manual_seed(1)),
    "gradvac": GradVac(generator=torch.Generator().manual_seed(2)),
    "cagrad": CAGrad(c=0.4),
    "nash_mtl": NashMTL(),
    "upgrad": UPGrad(),
}


CASES = [(weighting, ranks) for weighting in WEIGHTINGS for ranks in (1, 2, 3, 4)]
QUICK = {("cagrad", 1), ("cagrad", 3), ("upgrad", 2), ("nash_mtl", 4), ("pcgrad", 4), ("gradvac", 2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weighting", "ranks"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_training_is_that_of_one_process(workers, kind, ranks, weighting):
    expected = trained("single", WEIGHTINGS[weighting], 20, {})

    for rank in workers.run(ranks, trained, kind, WEIGHTINGS[weighting], 20, {}):
        for what, values in expected.items():
            for actual, value in zip(rank[what], values, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)
