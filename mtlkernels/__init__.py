"""Fused kernels for multi-task gradient work: Gram matrices, projections, weightings and an optimizer layer."""

from . import _vmap, monitor, nn, weightings  # noqa: F401
from ._version import __version__
from .aggregation import aggregate
from .dispatch import use_backend
from .ops import combine, condition_number, conflict_rate, cosine, gram, magnitude_similarity, mix, project
from .optim import MultiTaskOptimizer, PriorityInfo, StepInfo, TaskPriorityOptimizer
from .priority import connection_strength, priority_combine
from .weightings import *  # noqa: F403  the classes that weightings.__all__ lists
from .weightings import get_weighting

__all__ = [
    "MultiTaskOptimizer",
    "PriorityInfo",
    "StepInfo",
    "TaskPriorityOptimizer",
    "__version__",
    "aggregate",
    "combine",
    "condition_number",
    "conflict_rate",
    "connection_strength",
    "cosine",
    "get_weighting",
    "gram",
    "magnitude_similarity",
    "mix",
    "monitor",
    "nn",
    "priority_combine",
    "project",
    "use_backend",
    *weightings.__all__,
]
