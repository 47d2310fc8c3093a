"""The optimizer layer."""

from .info import PriorityInfo, StepInfo
from .multitask import MultiTaskOptimizer
from .priority import TaskPriorityOptimizer

__all__ = ["MultiTaskOptimizer", "PriorityInfo", "StepInfo", "TaskPriorityOptimizer"]
