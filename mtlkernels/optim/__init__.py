"""The optimizer layer."""

from .flat import FlatInfo, FlatMinimaOptimizer
from .groups import SelectiveGroupOptimizer
from .info import GroupsInfo, PriorityInfo, StepInfo
from .multitask import MultiTaskOptimizer
from .priority import TaskPriorityOptimizer

__all__ = [
    "FlatInfo",
    "FlatMinimaOptimizer",
    "GroupsInfo",
    "MultiTaskOptimizer",
    "PriorityInfo",
    "SelectiveGroupOptimizer",
    "StepInfo",
    "TaskPriorityOptimizer",
]
