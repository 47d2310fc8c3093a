"""The optimizer layer."""

from .choose import MemoryChoice, choose_memory
from .flat import FlatInfo, FlatMinimaOptimizer
from .groups import SelectiveGroupOptimizer
from .info import GroupsInfo, PriorityInfo, StepInfo
from .master import MasterWeights
from .multitask import MultiTaskOptimizer
from .priority import TaskPriorityOptimizer
from .streamed import Cuts, cut

__all__ = [
    "Cuts",
    "FlatInfo",
    "FlatMinimaOptimizer",
    "GroupsInfo",
    "MasterWeights",
    "MemoryChoice",
    "MultiTaskOptimizer",
    "PriorityInfo",
    "SelectiveGroupOptimizer",
    "StepInfo",
    "TaskPriorityOptimizer",
    "choose_memory",
    "cut",
]
