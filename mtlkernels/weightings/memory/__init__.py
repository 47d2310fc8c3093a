"""Weightings that keep a memory of each task's gradients."""

from .base import MemoryUpdate, MemoryWeighting
from .db_mtl import DBMTL
from .excess_mtl import ExcessMTL
from .m_config import MomentumConFIG
from .moco import MoCo

MEMORY: dict[str, type[MemoryWeighting]] = {
    "db_mtl": DBMTL,
    "excess_mtl": ExcessMTL,
    "m_config": MomentumConFIG,
    "moco": MoCo,
}
"""Registry string -> class that keeps a memory of gradients."""

__all__ = ["DBMTL", "MEMORY", "ExcessMTL", "MemoryUpdate", "MemoryWeighting", "MoCo", "MomentumConFIG"]
