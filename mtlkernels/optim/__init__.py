"""The optimizer layer."""

from .groups import SelectiveGroupOptimizer
from .info import GroupsInfo, StepInfo
from .multitask import MultiTaskOptimizer

__all__ = ["GroupsInfo", "MultiTaskOptimizer", "SelectiveGroupOptimizer", "StepInfo"]
