"""Planted task clusters: which share of them does training find, and how much noise does it take to lose them?

K regression tasks in equal clusters. Tasks of a cluster have one linear target in common, targets of different clusters are
orthogonal, and each task adds a target of its own and label noise, both of the given size. A linear trunk with two outputs a
cluster is shared. :class:`mtlkernels.SelectiveGroupOptimizer` trains on it; the affinity measured is grouped at the end.
Printed: the adjusted Rand index of these groups against the planted ones (1: the same, 0: chance), mean and standard deviation
over seeds, and how often the clusters were recovered exactly.

    python examples/planted_groups.py            prints the table
    python examples/planted_groups.py --quick    one seed of a few batches
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch import nn

import mtlkernels as mtl
from mtlkernels.grouping import Groups

CLUSTERS = {6: 2, 12: 3, 40: 5}
"""K -> number of clusters."""
NOISE = (0.0, 0.5, 1.0, 2.0, 4.0)
FEATURES, BATCH = 64, 256


def rand_index(found: Groups, planted: Groups) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985)."""

    def pairs(count: int) -> float:
        return count * (count - 1) / 2

    total = pairs(sum(map(len, planted)))
    both = sum(pairs(len(set(a) & set(b))) for a in found for b in planted)
    first, second = sum(pairs(len(a)) for a in found), sum(pairs(len(b)) for b in planted)
    expected, most = first * second / total, (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def run(num_tasks: int, noise: float, batches: int, seed: int) -> tuple[Groups, Groups]:
    """Groups found and planted."""
    generator = torch.Generator().manual_seed(seed)
    clusters = CLUSTERS[num_tasks]
    cluster_of = torch.randperm(num_tasks, generator=generator) % clusters
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator))[0]
    own = torch.randn(num_tasks, FEATURES, generator=generator) / FEATURES**0.5
    targets = basis[cluster_of] + noise * own
    torch.manual_seed(seed)
    trunk = nn.Linear(FEATURES, 2 * clusters, bias=False)
    heads = nn.ModuleList(nn.Linear(2 * clusters, 1, bias=False) for _ in range(num_tasks))
    for head in heads:
        nn.init.zeros_(head.weight)  # random heads would read a common target with either sign, and oppose each other
    inner = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 0.02)
    optimizer = mtl.SelectiveGroupOptimizer(inner, affinity=mtl.ProximalAffinity(num_tasks, 0.02), grouping=None)
    for _ in range(batches):
        inputs = torch.randn(BATCH, FEATURES, generator=generator)
        labels = inputs @ targets.T + noise * torch.randn(BATCH, num_tasks, generator=generator)

        def losses_fn(inputs: torch.Tensor = inputs, labels: torch.Tensor = labels) -> list[torch.Tensor]:
            features = trunk(inputs)
            return [nn.functional.mse_loss(head(features)[:, 0], labels[:, k]) for k, head in enumerate(heads)]

        optimizer.step(losses_fn)
    assert optimizer.affinity is not None
    planted = [torch.nonzero(cluster_of == c).flatten().tolist() for c in range(clusters)]
    return optimizer.affinity.groups(), sorted(planted)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--tasks", type=int, nargs="+", choices=tuple(CLUSTERS), default=list(CLUSTERS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.batches, options.tasks = 1, 15, [6]
    torch.set_num_threads(1)
    print("| K | clusters | noise | adjusted Rand index | recovered exactly |\n| --- | --- | --- | --- | --- |")
    for num_tasks in options.tasks:
        for noise in NOISE:
            runs = [run(num_tasks, noise, options.batches, seed) for seed in range(options.seeds)]
            scores = [rand_index(*pair) for pair in runs]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            exact = sum(found == planted for found, planted in runs)
            cells = (num_tasks, CLUSTERS[num_tasks], noise, f"{statistics.mean(scores):.2f}{spread}", f"{exact} of {len(runs)}")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
