"""Weightings, one method per file, and the registry of their names."""

from typing import Any

from .base import Weighting
from .mean import Mean

REGISTRY: dict[str, type[Weighting]] = {"mean": Mean}
"""Registry string -> class."""


def get_weighting(name: str, **options: Any) -> Weighting:
    """A weighting by its registry string, for example ``get_weighting("cagrad", c=0.4)``.

    Args:
        name: one of ``REGISTRY``.
        **options: the class's arguments.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in REGISTRY:
        raise ValueError(f"weighting {name!r} is unknown; known are {', '.join(sorted(REGISTRY))}, or pass a Weighting.")
    return REGISTRY[name](**options)


__all__ = ["REGISTRY", "Mean", "Weighting", "get_weighting"]
