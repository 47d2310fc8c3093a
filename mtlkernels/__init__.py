"""Fused kernels for multi-task gradient work: Gram matrices, projections, weightings and an optimizer layer."""

from .ops import combine, condition_number, conflict_rate, cosine, gram, magnitude_similarity, mix, project

from ._version import __version__ as __version__
__all__ = ["combine", "condition_number", "conflict_rate", "cosine", "gram", "magnitude_similarity", "mix", "project"]
