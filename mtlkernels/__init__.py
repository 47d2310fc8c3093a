"""Fused kernels for multi-task gradient work: Gram matrices, projections, weightings and an optimizer layer."""

from . import weightings
from ._version import __version__
from .aggregation import aggregate
from .dispatch import use_backend
from .flat import FlatGram, flat_gram, perturb_, restore_
from .landscape import ConflictShare, LossSlice, loss_slice, sharpness
from .ops import combine, condition_number, conflict_rate, cosine, gram, magnitude_similarity, mix, project
from .optim import FlatInfo, FlatMinimaOptimizer, MultiTaskOptimizer, StepInfo
from .weightings import *  # noqa: F403  the classes that weightings.__all__ lists
from .weightings import get_weighting

__all__ = [
    "ConflictShare",
    "FlatGram",
    "FlatInfo",
    "FlatMinimaOptimizer",
    "LossSlice",
    "MultiTaskOptimizer",
    "StepInfo",
    "__version__",
    "aggregate",
    "combine",
    "condition_number",
    "conflict_rate",
    "cosine",
    "flat_gram",
    "get_weighting",
    "gram",
    "loss_slice",
    "magnitude_similarity",
    "mix",
    "perturb_",
    "project",
    "restore_",
    "sharpness",
    "use_backend",
    *weightings.__all__,
]
