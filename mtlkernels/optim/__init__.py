"""The optimizer layer."""

from .groups import SelectiveGroupOptimizer
from .info import GroupsInfo, PriorityInfo, StepInfo
from .multitask import MultiTaskOptimizer
from .priority import TaskPriorityOptimizer

__all__ = [
    "GroupsInfo",
    "MultiTaskOptimizer",
    "PriorityInfo",
    "SelectiveGroupOptimizer",
    "StepInfo",
    "TaskPriorityOptimizer",
]
