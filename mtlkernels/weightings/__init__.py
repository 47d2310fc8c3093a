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


__all__ = ["MGDA", "CAGrad", "Constant", "Mean", "PCGrad", "Sum", "Weighting"]
