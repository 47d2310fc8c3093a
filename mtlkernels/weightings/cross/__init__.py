"""Weightings of two batches: they take the cross Gram of one batch's gradients with the other's."""

from .base import CrossWeighting
from .modo import MoDo
from .sdmgrad import SDMGrad

CROSS: dict[str, type[CrossWeighting]] = {"modo": MoDo, "sdmgrad": SDMGrad}
"""Registry string -> class that takes a cross Gram."""

__all__ = ["CROSS", "CrossWeighting", "MoDo", "SDMGrad"]
