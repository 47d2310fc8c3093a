"""The optimizer layer."""

from .flat import FlatInfo, FlatMinimaOptimizer
from .info import StepInfo
from .multitask import MultiTaskOptimizer

__all__ = ["FlatInfo", "FlatMinimaOptimizer", "MultiTaskOptimizer", "StepInfo"]
