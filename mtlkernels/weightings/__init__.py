"""Weightings, one method per file, and the registry of their names."""

from typing import Any, cast

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
from .elementwise import Elementwise
from .fairgrad import FairGrad
from .graddrop import GradDrop
from .gradvac import GradVac
from .imtl_g import IMTLG
from .krum import Krum
from .loss_only import (
    BMTL,
    COSMOS,
    DWA,
    EMTL,
    FAMO,
    GLS,
    IMTLL,
    LOSS_ONLY,
    PBI,
    SLAW,
    STCH,
    GO4Align,
    GradNorm,
    LossWeighting,
    UncertaintyWeighting,
)
from .mean import Mean
from .memory import DBMTL, MEMORY, ExcessMTL, MemoryWeighting, MoCo, MomentumConFIG
from .mgda import MGDA
from .nash_mtl import NashMTL
from .ngdiff import NGDiff
from .pcd import PCD
from .pcgrad import PCGrad
from .rgw import RGW
from .rlw import RLW
from .sum import Sum
from .trimmed_mean import TrimmedMean
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
"""Registry string -> class that needs a Gram alone; ``LOSS_ONLY`` has those that need losses alone, ``MEMORY`` those that keep
a memory of gradients, ``CROSS`` those that take two batches."""


ELEMENTWISE: dict[str, type[Elementwise]] = {"graddrop": GradDrop, "trimmed_mean": TrimmedMean}
"""Registry string -> class of the methods that have no weights."""


def get_weighting(name: str, **options: Any) -> Weighting | Elementwise:
    """A method by its registry string, for example ``get_weighting("cagrad", c=0.4)``.

    Args:
        name: one of ``REGISTRY``, ``LOSS_ONLY``, ``MEMORY``, ``CROSS`` or ``ELEMENTWISE``.
        **options: the class's arguments.

    Raises:
        ValueError: an unknown name, the message lists the known ones; or options the method does not take.
    """
    known: dict[str, Any] = {**REGISTRY, **LOSS_ONLY, **MEMORY, **CROSS, **ELEMENTWISE}
    if name not in known:
        raise ValueError(f"weighting {name!r} is unknown; known are {', '.join(sorted(known))}, or pass a Weighting.")
    try:
        return cast(Weighting | Elementwise, known[name](**options))
    except TypeError as error:
        raise ValueError(f"weighting {name!r} does not take {options or 'no options'}: {error}.") from error


def as_method(weighting: str | Weighting | Elementwise) -> Weighting | Elementwise:
    """The method itself, or the one that a registry string names.

    Raises:
        ValueError: an unknown name, or neither a string nor a :class:`Weighting` nor an :class:`Elementwise`.
    """
    if isinstance(weighting, str):
        return get_weighting(weighting)
    if not isinstance(weighting, Weighting | Elementwise):
        raise ValueError(f"weighting is a {type(weighting).__name__}; pass a Weighting or its name, for example 'pcgrad'.")
    return weighting


def as_weighting(weighting: str | Weighting) -> Weighting:
    """As :func:`as_method`, where only weights will do.

    Raises:
        ValueError: as :func:`as_method`, or a method that has no weights.
    """
    method = as_method(weighting)
    if isinstance(method, Elementwise):
        raise ValueError(
            f"weighting is {type(method).__name__}, which combines gradients element by element and has no weights; pass a "
            "Weighting, or use it in aggregate or MultiTaskOptimizer."
        )
    return method


__all__ = [
    "BMTL",
    "COSMOS",
    "CRMOGM",
    "DBMTL",
    "DWA",
    "EMTL",
    "FAMO",
    "GLS",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "PBI",
    "PCD",
    "RGW",
    "RLW",
    "SLAW",
    "STCH",
    "AlignedMTL",
    "AvgNorm",
    "CAGrad",
    "ConFIG",
    "ConicGrad",
    "Constant",
    "CrossWeighting",
    "DualProj",
    "Elementwise",
    "ExcessMTL",
    "FairGrad",
    "GO4Align",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "LossWeighting",
    "Mean",
    "MemoryWeighting",
    "MoCo",
    "MoDo",
    "MomentumConFIG",
    "NGDiff",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "UncertaintyWeighting",
    "Weighting",
]
