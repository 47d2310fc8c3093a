"""Loss-only weightings, one method per file: one backward pass a step."""

from .base import LearnedWeighting, LossWeighting
from .bmtl import BMTL
from .cosmos import COSMOS
from .dwa import DWA
from .emtl import EMTL
from .famo import FAMO
from .gls import GLS
from .go4align import GO4Align
from .gradnorm import GradNorm
from .imtl_l import IMTLL
from .pbi import PBI
from .slaw import SLAW
from .stch import STCH
from .uncertainty import UncertaintyWeighting

LOSS_ONLY: dict[str, type[LossWeighting]] = {
    "bmtl": BMTL,
    "cosmos": COSMOS,
    "dwa": DWA,
    "emtl": EMTL,
    "famo": FAMO,
    "gls": GLS,
    "go4align": GO4Align,
    "gradnorm": GradNorm,
    "imtl_l": IMTLL,
    "pbi": PBI,
    "slaw": SLAW,
    "stch": STCH,
    "uncertainty": UncertaintyWeighting,
}
"""Registry string -> class."""

__all__ = [
    "BMTL",
    "COSMOS",
    "DWA",
    "EMTL",
    "FAMO",
    "GLS",
    "IMTLL",
    "PBI",
    "SLAW",
    "STCH",
    "GO4Align",
    "GradNorm",
    "LearnedWeighting",
    "LossWeighting",
    "UncertaintyWeighting",
]
