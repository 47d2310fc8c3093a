"""Weightings, one method per file, and the registry of their names."""

from typing import Any

from .aligned_mtl import AlignedMTL
from .avg_norm import AvgNorm
from .base import Weighting
from .cagrad import CAGrad
from .config import ConFIG
from .conicgrad import ConicGrad
from .constant import Constant
from .cr_mogm import CRMOGM
from .cross import CROSS, CrossWeighting, MoDo, SDMGrad
from .dualproj import DualProj
from .fairgrad import FairGrad
from .gradvac import GradVac
from .imtl_g import IMTLG
from .krum import Krum
from .mean import Mean
from .memory import DBMTL, MEMORY, ExcessMTL, MemoryWeighting, MoCo
from .mgda import MGDA
from .nash_mtl import NashMTL
from .ngdiff import NGDiff
from .pcd import PCD
from .pcgrad import PCGrad
from .rgw import RGW
from .rlw import RLW
from .sum import Sum
from .upgrad import UPGrad

REGISTRY: dict[str, type[Weighting]] = {
    "aligned_mtl": AlignedMTL,
    "avg_norm": AvgNorm,
    "cagrad": CAGrad,
    "config": ConFIG,
    "conicgrad": ConicGrad,
    "constant": Constant,
    "cr_mogm": CRMOGM,
    "fairgrad": FairGrad,
    "gradvac": GradVac,
    "imtl_g": IMTLG,
    "krum": Krum,
    "dualproj": DualProj,
    "mean": Mean,
    "mgda": MGDA,
    "nash_mtl": NashMTL,
    "ngdiff": NGDiff,
    "pcd": PCD,
    "pcgrad": PCGrad,
    "rgw": RGW,
    "rlw": RLW,
    "sum": Sum,
    "upgrad": UPGrad,
}
"""Registry string -> class that needs a Gram alone; ``MEMORY`` has those that keep a memory of gradients, ``CROSS`` those that
take two batches."""


def get_weighting(name: str, **options: Any) -> Weighting:
    """A weighting by its registry string, for example ``get_weighting("cagrad", c=0.4)``.

    Args:
        name: one of ``REGISTRY``, ``MEMORY`` or ``CROSS``.
        **options: the class's arguments.

    Raises:
        ValueError: an unknown name, the message lists the known ones; or options the method does not take.
    """
    known = {**REGISTRY, **MEMORY, **CROSS}
    if name not in known:
        raise ValueError(f"weighting {name!r} is unknown; known are {', '.join(sorted(known))}, or pass a Weighting.")
    try:
        return known[name](**options)
    except TypeError as error:
        raise ValueError(f"weighting {name!r} does not take {options or 'no options'}: {error}.") from error


def as_weighting(weighting: str | Weighting) -> Weighting:
    """The weighting itself, or the one that a registry string names.

    Raises:
        ValueError: an unknown name, or neither a string nor a :class:`Weighting`.
    """
    if isinstance(weighting, str):
        return get_weighting(weighting)
    if not isinstance(weighting, Weighting):
        raise ValueError(f"weighting is a {type(weighting).__name__}; pass a Weighting or its name, for example 'pcgrad'.")
    return weighting


__all__ = [
    "CRMOGM",
    "DBMTL",
    "IMTLG",
    "MGDA",
    "PCD",
    "RGW",
    "RLW",
    "AlignedMTL",
    "AvgNorm",
    "CAGrad",
    "ConFIG",
    "ConicGrad",
    "Constant",
    "CrossWeighting",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradVac",
    "Krum",
    "Mean",
    "MemoryWeighting",
    "MoCo",
    "MoDo",
    "NGDiff",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "Sum",
    "UPGrad",
    "Weighting",
]
