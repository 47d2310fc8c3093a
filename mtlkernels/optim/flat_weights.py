"""From the Grams of gradients and their flat parts to the weights of both."""

import copy
from typing import Literal

import torch
from torch import Tensor

from ..flat import FlatGram
from ..weightings import Weighting, as_weighting
from ..weightings.seeded import drawn_seed
from .undo import Snapshot

Aggregation = Literal["separate", "direct", "second", "each"]


class FlatWeightings(torch.nn.Module):
    """Weightings of the update sum_k w_k g_k + v_k f_k, g_k the gradient of task k and f_k its flat part.

    ``"separate"``: w = loss(<g, g>), v = flat(<f, f>). ``"second"``: these, then the pair (sum w_k g_k, sum v_k f_k) once
    more. ``"each"``: the pair (g_k, f_k) of every task, then the results over the tasks. ``"direct"`` weighs f_k + g_k, by
    ``loss`` alone.

    Args:
        aggregation: which.
        loss: the weighting of the gradients.
        flat: of the flat parts; None: an independent copy of ``loss``.
        pair: of pairs of a gradient and a flat part; None: an independent copy of ``loss``.
    """

    def __init__(
        self, aggregation: Aggregation, loss: Weighting, flat: str | Weighting | None, pair: str | Weighting | None
    ) -> None:
        super().__init__()
        self.aggregation = aggregation
        self.loss = loss
        self.flat = _other(flat, loss) if aggregation in ("separate", "second") else None
        self.pair = _other(pair, loss) if aggregation in ("second", "each") else None

    def draw_seeds(self, device: torch.device) -> Tensor | None:
        """int64 [3]: seeds for ``loss``, ``flat`` and ``pair``, 0 for one that draws none; None where nothing is random."""
        order = ("pair", "loss") if self.aggregation == "each" else ("loss", "flat", "pair")  # in which a call draws them
        seeds = {}
        for name in order:
            weighting = getattr(self, name)
            seed = None if weighting is None else drawn_seed(weighting, device)
            if seed is not None:
                seeds[name] = seed
        none = torch.zeros(1, dtype=torch.int64, device=device)
        return torch.cat([seeds.get(name, none) for name in ("loss", "flat", "pair")]) if seeds else None

    def forward(
        self, gram: FlatGram, cut: float, active: Tensor | None, losses: Tensor, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weights w and v, float64 [..., K].

        Args:
            gram: [..., K, K] each, finite.
            cut: a flat part of at most ``cut`` times its gradient counts as zero: it gets no weight, and changes no state.
            active: bool [K]; tasks that are not get no weight. None: all.
            losses: float64 [K].
            seeds: as :meth:`draw_seeds` gives them; None: each weighting draws its own.
        """
        for_loss, for_flat, for_pair = (None, None, None) if seeds is None else seeds.split(1)
        if self.aggregation == "each":
            return self._each(gram, cut, active, losses, for_loss, for_pair)
        assert self.flat is not None
        zero = _trace(gram.flat) <= cut**2 * _trace(gram.loss)
        before = Snapshot([], self.flat)
        w = self.loss(gram.loss, active=active, losses=losses, seed=for_loss)
        v = self.flat(gram.flat, active=active, losses=losses, seed=for_flat)
        before.restore_buffers_unless(~zero.all())
        v = torch.where(zero.unsqueeze(-1), 0.0, v)
        if self.pair is None:
            return w, v
        inner = _inner(w, gram.loss, w), _inner(w, gram.cross, v), _inner(v, gram.flat, v)
        ratio = self._of_pairs(*inner, zero, None, for_pair)
        return ratio[..., :1] * w, ratio[..., 1:] * v

    def _each(
        self,
        gram: FlatGram,
        cut: float,
        active: Tensor | None,
        losses: Tensor,
        for_loss: Tensor | None,
        for_pair: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        loss, flat, cross = (part.diagonal(dim1=-2, dim2=-1) for part in gram)
        ratio = self._of_pairs(loss, cross, flat, flat <= cut**2 * loss, active, for_pair)
        a, b = ratio[..., 0], ratio[..., 1]
        mixed = _outer(a, b) * gram.cross
        total = _outer(a, a) * gram.loss + mixed + mixed.mT + _outer(b, b) * gram.flat
        w = self.loss(total, active=active, losses=losses, seed=for_loss)
        return w * a, w * b

    def _of_pairs(
        self, loss: Tensor, cross: Tensor, flat: Tensor, zero: Tensor, active: Tensor | None, seed: Tensor | None
    ) -> Tensor:
        """Weights [..., 2] of pairs with these inner products, (1, 0) where the flat part is ``zero``."""
        assert self.pair is not None
        grams = torch.stack([torch.stack([loss, cross], -1), torch.stack([cross, flat], -1)], -2)
        pairs = None if active is None else active.unsqueeze(-1).expand(*grams.shape[:-1])
        before = Snapshot([], self.pair)
        weights = self.pair(grams, active=pairs, seed=seed)
        before.restore_buffers_unless(~zero.all())
        alone = torch.stack([torch.ones_like(loss), torch.zeros_like(loss)], -1)
        return torch.where(zero.unsqueeze(-1), alone, weights)


def _other(weighting: str | Weighting | None, loss: Weighting) -> Weighting:
    """The weighting, or a copy of ``loss`` with state of its own; random methods draw from one generator, one after another."""
    if weighting is not None:
        return as_weighting(weighting)
    memo = {id(g): g for g in (getattr(m, "generator", None) for m in loss.modules()) if g is not None}
    return copy.deepcopy(loss, memo)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _inner(left: Tensor, gram: Tensor, right: Tensor) -> Tensor:
    return (left.unsqueeze(-1) * gram * right.unsqueeze(-2)).sum((-2, -1))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)
