"""What weightings share that decompose the Gram or its cosines."""

import math

RANK_EPSILON = 1e-14
"""Default precision of a Gram: what is left of linear dependence in one of float64 gradients stays below K times it."""


def check_epsilon(epsilon: float) -> float:
    """Raises a ``ValueError`` unless ``epsilon`` is from 0 to below 1."""
    if not (math.isfinite(epsilon) and 0 <= epsilon < 1):
        raise ValueError(f"epsilon is {epsilon}; pass the Gram's relative precision, 0 or more and below 1, for example 1e-7.")
    return float(epsilon)
