"""What the collectives of a rank move, whoever calls them: DistributedDataParallel's C++ and FSDP2 included."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FACTORS = {"allreduce_": 2, "_reduce_scatter_base_": 1, "_allgather_base_": 1}
"""How many times (n - 1) / n of the largest tensor a rank sends in a ring."""


class Traffic(TorchDispatchMode):
    """Counts collectives while it is entered.

    Attributes:
        calls: how many of each kind and size: {(name, bytes of the whole tensor): count}.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.calls[func.__name__.split(".")[0], max(sizes, default=0)] += 1
        return func(*args, **(kwargs or {}))

    def sent(self, ranks: int) -> float:
        """Bytes that a rank of a ring sends. Raises a ``KeyError`` for a collective that :data:`FACTORS` does not have."""
        return sum(FACTORS[name] * count * nbytes * (ranks - 1) / ranks for (name, nbytes), count in self.calls.items())
