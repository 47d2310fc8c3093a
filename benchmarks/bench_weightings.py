"""Every weighting on Gram matrices: one of 11 tasks, and 10,000 of 8 in one call.

make bench-each ARGS="-k weights"
"""

import pytest
import torch

import mtlkernels as mtl
from mtlkernels.weightings import REGISTRY

OPTIONS = {"constant": {"weights": torch.ones(11)}, "cr_mogm": {"weighting": "mgda"}, "krum": {"n_byzantine": 2}}
"""What a method cannot do without."""


def grams(problems: int, num_tasks: int) -> torch.Tensor:
    rows = torch.randn(problems, num_tasks, 3 * num_tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rows @ rows.mT


@pytest.mark.parametrize("name", REGISTRY)
def bench_weights_of_11_tasks(benchmark, name: str) -> None:
    weighting, gram = mtl.get_weighting(name, **OPTIONS.get(name, {})), grams(1, 11)[0]
    weighting(gram)
    benchmark(weighting, gram)


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "constant"])
def bench_weights_of_10000_grams(benchmark, name: str) -> None:
    weighting, gram = mtl.get_weighting(name, **OPTIONS.get(name, {})), grams(10_000, 8)
    benchmark.pedantic(weighting, (gram,), warmup_rounds=1, rounds=5)
