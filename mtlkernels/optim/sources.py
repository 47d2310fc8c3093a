"""Which source the weights of a step come from."""

from typing import TYPE_CHECKING, cast

from ..weightings import MemoryWeighting, Weighting
from .gram_source import GramSource
from .online import OnlineGram
from .representation import Representation, RepresentationGram
from .streamed import Cuts, StreamedGram
from .sub_batch import SubBatch, SubBatchGram
from .undo import Snapshot

if TYPE_CHECKING:
    from .multitask import MultiTaskOptimizer


def gram_source(
    optimizer: "MultiTaskOptimizer",
    representation: Representation | None,
    gram_losses: SubBatch | None,
    cuts: Cuts | None,
    kept: Snapshot,
) -> GramSource | None:
    """Where the weights of the step come from; None: from the gradients of all parameters, or none are computed in it.

    Args:
        optimizer: that is about to take the step.
        representation: as of :meth:`MultiTaskOptimizer.backward`.
        gram_losses: likewise.
        cuts: likewise.
        kept: the weighting's buffers as they go back where the update is not finite.

    Raises:
        ValueError: both, or an optimizer whose weights one Gram does not give.
    """
    options = {"representation": representation, "gram_losses": gram_losses, "cuts": cuts}
    names = [name for name, value in options.items() if value is not None]
    if not names:
        return OnlineGram(optimizer, kept) if optimizer.rows == "online" and optimizer._held.left <= 0 else None
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are both given; pass one of them.")
    (name,) = names
    if optimizer.rows == "online":
        raise ValueError(
            f'{name} is given, but rows is "online", which takes the weights from the gradients as they arrive; leave {name} '
            'out, or pass rows="stored".'
        )
    method = optimizer.weighting
    plain = isinstance(method, Weighting) and not isinstance(method, MemoryWeighting)
    if not plain or optimizer._one_pass or optimizer._crosses:
        raise ValueError(
            f"{name} is given, but {type(method).__name__} takes more, or less, than the Gram of one batch; leave it out, or "
            "pass a weighting of a Gram."
        )
    if optimizer.per != "model":
        raise ValueError(f'{name} is given: one backward pass has one set of weights; pass per="model".')
    if optimizer.weights_from == "previous":
        raise ValueError(
            f'{name} is given, but weights_from is "previous", which needs no Gram before the update; leave {name} out, or '
            'pass weights_from="current".'
        )
    if optimizer._held.left > 0:
        return None
    if optimizer._accumulated.batches:
        raise ValueError(
            f"{name} is given, but the gradients of {optimizer._accumulated.batches} micro-batches wait for weights of "
            "their own; leave it out, or call backward, instead of accumulate, for every micro-batch."
        )
    if gram_losses is not None:
        return SubBatchGram(optimizer, gram_losses, kept)
    if optimizer.ranks.hides_leaves:
        raise ValueError(
            f"{name} is given, but the parameters are DTensors, whose gradients come from whole backward passes; pass "
            "gram_losses, or update_every."
        )
    if cuts is not None:
        return StreamedGram(optimizer, cuts, kept)
    return RepresentationGram(optimizer, cast(Representation, representation), kept)
