"""Groups by a threshold."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .common import Groups, groups_of_labels, host_matrix


def threshold_groups(affinity: Tensor | Sequence[Sequence[float]], threshold: float = 0.0) -> Groups:
    """Connected components of the tasks whose mean affinity in both directions, (A_ij + A_ji) / 2, exceeds the threshold.

    Args:
        affinity: [K, K], for example a cosine or an affinity matrix.
        threshold: in its units.

    Raises:
        ValueError: not [K, K], or not finite.
    """
    matrix = host_matrix(affinity)
    linked = (matrix + matrix.T) / 2 > threshold
    labels = np.arange(len(matrix))
    for _ in range(len(matrix)):  # the smallest label of a component spreads by one edge a round
        neighbours = np.where(linked, labels[None, :], len(matrix)).min(1)
        spread = np.minimum(labels, neighbours)
        if (spread == labels).all():
            break
        labels = spread
    return groups_of_labels(labels.tolist())
