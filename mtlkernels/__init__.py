"""Fused kernels for multi-task gradient work: Gram matrices, projections, weightings and an optimizer layer."""

from . import _vmap, grouping, monitor, nn, trainers, weightings  # noqa: F401
from ._version import __version__
from .affinities import affinity, curvature_bound, lookahead_affinity
from .aggregation import aggregate
from .dispatch import use_backend
from .flat import FlatGram, flat_gram, perturb_, restore_
from .gradient_dropout import gradient_dropout
from .landscape import ConflictShare, LossSlice, loss_slice, sharpness
from .ops import combine, condition_number, conflict_rate, cosine, gram, magnitude_similarity, mix, project
from .optim import (
    Cuts,
    FlatInfo,
    FlatMinimaOptimizer,
    GroupsInfo,
    MasterWeights,
    MemoryChoice,
    MultiTaskOptimizer,
    PriorityInfo,
    SelectiveGroupOptimizer,
    StepInfo,
    TaskPriorityOptimizer,
    choose_memory,
    cut,
)
from .priority import connection_strength, priority_combine
from .proximal import ProximalAffinity
from .regularizers import block_diagonal_penalty
from .weightings import *  # noqa: F403  the classes that weightings.__all__ lists
from .weightings import get_weighting

__all__ = [
    "ConflictShare",
    "Cuts",
    "FlatGram",
    "FlatInfo",
    "FlatMinimaOptimizer",
    "GroupsInfo",
    "LossSlice",
    "MasterWeights",
    "MemoryChoice",
    "MultiTaskOptimizer",
    "PriorityInfo",
    "ProximalAffinity",
    "SelectiveGroupOptimizer",
    "StepInfo",
    "TaskPriorityOptimizer",
    "__version__",
    "affinity",
    "aggregate",
    "choose_memory",
    "block_diagonal_penalty",
    "combine",
    "condition_number",
    "conflict_rate",
    "connection_strength",
    "cosine",
    "curvature_bound",
    "cut",
    "flat_gram",
    "get_weighting",
    "gradient_dropout",
    "gram",
    "grouping",
    "lookahead_affinity",
    "loss_slice",
    "magnitude_similarity",
    "mix",
    "monitor",
    "nn",
    "perturb_",
    "priority_combine",
    "project",
    "restore_",
    "sharpness",
    "trainers",
    "use_backend",
    *weightings.__all__,
]
