"""Fused kernels for multi-task gradient work: Gram matrices, projections, weightings and an optimizer layer."""

from . import _vmap, grouping, monitor, nn, weightings  # noqa: F401
from ._version import __version__
from .affinities import affinity, curvature_bound, lookahead_affinity
from .aggregation import aggregate
from .dispatch import use_backend
from .ops import combine, condition_number, conflict_rate, cosine, gram, magnitude_similarity, mix, project
from .optim import (
    GroupsInfo,
    MultiTaskOptimizer,
    PriorityInfo,
    SelectiveGroupOptimizer,
    StepInfo,
    TaskPriorityOptimizer,
)
from .priority import connection_strength, priority_combine
from .proximal import ProximalAffinity
from .weightings import *  # noqa: F403  the classes that weightings.__all__ lists
from .weightings import get_weighting

__all__ = [
    "GroupsInfo",
    "MultiTaskOptimizer",
    "PriorityInfo",
    "ProximalAffinity",
    "SelectiveGroupOptimizer",
    "StepInfo",
    "TaskPriorityOptimizer",
    "__version__",
    "affinity",
    "aggregate",
    "combine",
    "condition_number",
    "conflict_rate",
    "connection_strength",
    "cosine",
    "curvature_bound",
    "get_weighting",
    "gram",
    "grouping",
    "lookahead_affinity",
    "magnitude_similarity",
    "mix",
    "monitor",
    "nn",
    "priority_combine",
    "project",
    "use_backend",
    *weightings.__all__,
]
