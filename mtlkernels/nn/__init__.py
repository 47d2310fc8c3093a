"""Norms with parameters and statistics for each task, the current task, and the layers that task priority is about."""

from .context import task
from .convert import from_task_norms, task_norms, to_task_norms
from .layers import Layer, find_layers
from .norms import TaskBatchNorm1d, TaskBatchNorm2d, TaskBatchNorm3d, TaskLayerNorm, TaskNorm, TaskRMSNorm

__all__ = [
    "Layer",
    "TaskBatchNorm1d",
    "TaskBatchNorm2d",
    "TaskBatchNorm3d",
    "TaskLayerNorm",
    "TaskNorm",
    "TaskRMSNorm",
    "find_layers",
    "from_task_norms",
    "task",
    "task_norms",
    "to_task_norms",
]
