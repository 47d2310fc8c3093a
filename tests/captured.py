"""What a CUDA graph would do with a step, without a GPU: the torch ops of one step, run again on the memory they had."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of the ops whose result, or its size, the host learns from the device's values."""


class CaptureError(RuntimeError):
    """What ends a capture: the host waits for the device."""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Capture(TorchDispatchMode):
    """Records the ops of a block; :meth:`replay` runs them again, as a graph does: the same memory, and no Python.

    Python that ran in the block does not run again. So a state that the block bound to a new tensor, instead of writing it in
    place, is read from its old address in every replay and never moves on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if WAITS & set(func.tags) or name == "is_nonzero":
            raise CaptureError(f"{func} makes the host wait")
        kwargs = kwargs or {}
        held = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))  # keeps the address
        result = func(*args, **kwargs)
        given = {_storage(leaf) for leaf in tree_leaves(held) if isinstance(leaf, Tensor)}
        fresh = [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _storage(leaf) not in given]
        if fresh or func._schema.is_mutable:
            self.ops.append((func, *held, fresh))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.ops:
            given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            result = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, value in zip(outputs, [leaf for leaf in result if _storage(leaf) not in given], strict=True):
                output.copy_(value)
