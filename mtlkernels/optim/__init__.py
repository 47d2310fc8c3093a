"""The optimizer layer."""

from .info import StepInfo
from .multitask import MultiTaskOptimizer

__all__ = ["MultiTaskOptimizer", "StepInfo"]
