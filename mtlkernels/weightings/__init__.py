"""Weightings, one method per file, and the registry of their names."""

from typing import Any

from .base import Weighting
from .cagrad import CAGrad
from .constant import Constant
from .mean import Mean
from .mgda import MGDA
from .pcgrad import PCGrad
from .sum import Sum

REGISTRY: dict[str, type[Weighting]] = {
    "cagrad": CAGrad,
    "constant": Constant,
    "mean": Mean,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "sum": Sum,
}
"""Registry string -> class."""


def get_weighting(name: str, **options: Any) -> Weighting:
    """A weighting by its registry string, for example ``get_weighting("cagrad", c=0.4)``.

    Args:
        name: one of ``REGISTRY``.
        **options: the class's arguments.

    Raises:
        ValueError: an unknown name, the message lists the known ones; or options the method does not take.
    """
    if name not in REGISTRY:
        raise ValueError(f"weighting {name!r} is unknown; known are {', '.join(sorted(REGISTRY))}, or pass a Weighting.")
    try:
        return REGISTRY[name](**options)
    except TypeError as error:
        raise ValueError(f"weighting {name!r} does not take {options or 'no options'}: {error}.") from error


__all__ = ["MGDA", "CAGrad", "Constant", "Mean", "PCGrad", "Sum", "Weighting"]
