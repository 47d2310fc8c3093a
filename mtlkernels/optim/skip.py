"""The flag that makes the next step skip an update that was not finite."""

from collections.abc import Sequence

from torch import Tensor

from ..dtensor import local


class SkipFlag:
    """Which of the updates accumulated in ``.grad`` were not finite, for as long as their NaN is there. Immutable.

    A skipped update fills every combined ``.grad`` with NaN, which accumulating and clipping keep and clearing removes, however
    it is done. So each flag counts only while the first element of one such ``.grad`` is NaN; that is read on the device.
    """

    def __init__(self, flags: dict[Tensor, Tensor] | None = None) -> None:
        self._flags = flags or {}  # parameter that shows the NaN -> bool scalar

    def with_update(self, param: Tensor, skipped: Tensor) -> "SkipFlag":
        """This flag and another update's, whose NaN shows in ``param.grad``."""
        earlier = self._flags.get(param)
        return SkipFlag({**self._flags, param: skipped if earlier is None else earlier | skipped})

    def on_device(self) -> Tensor | None:
        """Whether to skip, a bool scalar on the device; None where no flag is left."""
        result = None
        for param, flag in self._flags.items():
            if param.grad is not None:
                shard = local(param.grad)  # without an element on this rank, the others' NaN cannot be seen
                current = flag & shard[(0,) * shard.dim()].isnan().to(flag.device) if shard.numel() else flag
                result = current if result is None else result | current
        return result


def first_written(params: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> Tensor | None:
    """The first parameter with an element that is written; of a rank with none, one that is written on others."""
    there = [(p, b) for p, b in zip(params, buffers, strict=True) if b is not None and p.numel()]
    return next((p for p, b in there if b.numel()), there[0][0] if there else None)
