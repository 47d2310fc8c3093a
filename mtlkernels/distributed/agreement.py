"""Whether ranks that must hold the same things do."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

Entries = Mapping[str, tuple[object, Hashable]]
"""{what: (place, value)}; ranks of one place must have the same value."""


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's elements read as integers, modulo 2^64, whatever the order of the sum. Reads the device."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.int8)
    return int(tensor.detach().contiguous().view(-1).view(kind).sum())


def require_equal(ranks: Sequence[Entries]) -> None:
    """Raises a ``RuntimeError`` that says what differs, and on which ranks: those that are not with most of their place."""
    differing = []
    for what in dict.fromkeys(what for entries in ranks for what in entries):
        values = [entries.get(what, (None, "missing")) for entries in ranks]
        wrong = {rank for rank, entries in enumerate(ranks) if what not in entries}
        if not wrong:
            wrong = {rank for place in _unique(place for place, _ in values) for rank in _minority(values, place)}
        if wrong:
            right = next(value for rank, (_, value) in enumerate(values) if rank not in wrong)
            found = ", ".join(f"{values[rank][1]} on rank {rank}" for rank in sorted(wrong))
            differing.append(f"{what}: {found}, {right} on others")
    if differing:
        shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise RuntimeError(f"the ranks disagree. {shown}. Nothing was changed.")


def _minority(values: Sequence[tuple[object, Hashable]], place: object) -> list[int]:
    members = [rank for rank, (own, _) in enumerate(values) if own == place]
    ((most, _),) = Counter(values[rank][1] for rank in members).most_common(1)  # the first rank's among equals
    return [rank for rank in members if values[rank][1] != most]


def _unique(places: Iterable[object]) -> list[object]:
    unique: list[object] = []
    for place in places:
        if place not in unique:
            unique.append(place)
    return unique
