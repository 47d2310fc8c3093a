"""More weight for the tasks that are farthest from their best."""

from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ...memory import excess_risk
from ..simplex import share_of, softmax, with_share
from .base import MemoryUpdate, MemoryWeighting, Rows

FirstUpdate = Literal["raw", "none"]
EPSILON = 1e-7


class ExcessMTL(MemoryWeighting):
    """ExcessMTL (He et al. 2024, equations 6, 7 and 9): w_k <- w_k exp(eta E_k) over their sum, E_k the excess risk of task k.

    e_k = sum_p g_kp^2 / sqrt(S_kp + 1e-7) with S_k the sum of squares of all gradients of the task so far, this one included;
    E_k = e_k / (e_k0 + 1e-7) with e_k0 that of the task's first call, or their mean over ``n_warmup`` calls. For tasks whose
    labels are noisy, whose loss stays high however well they do. A weight that has come to 0 stays there. A task that is not
    active keeps its share, and the others' weights have sum 1. The states are ``share``, ``baseline`` and ``steps`` [K].

    The memory is S. A call reads the gradients three times (the Gram, the excess risks, the update) and S twice (the risks, the
    update), and writes S once: a read of the gradients more than other methods take.

    Args:
        eta: step size, above 0; TorchJD's 1. LibMTL has 1e-2, and weights of sum K: multiply the loss by K for those.
        n_warmup: calls in which weights stay and e is averaged for the baseline; the paper has three epochs of them.
        first_update: what the first call does without ``n_warmup``. ``"raw"``: a step with E = e, as TorchJD does; ``"none"``:
            no step, as LibMTL does.

    Raises:
        ValueError: an option out of its range.
    """

    squares = True
    share: Tensor
    baseline: Tensor
    steps: Tensor

    def __init__(self, eta: float = 1.0, n_warmup: int = 0, first_update: FirstUpdate = "raw") -> None:
        super().__init__()
        if not eta > 0:
            raise ValueError(f"eta is {eta}; pass a positive number.")
        if isinstance(n_warmup, bool) or not isinstance(n_warmup, int) or n_warmup < 0:
            raise ValueError(f"n_warmup is {n_warmup!r}; pass a whole number, 0 or more.")
        if first_update not in get_args(FirstUpdate):
            raise ValueError(f'first_update is {first_update!r}; pass "raw" or "none".')
        self.eta, self.n_warmup, self.first_update = float(eta), n_warmup, first_update
        self.add_state("share", torch.nan)  # NaN: 1 / K
        self.add_state("baseline", 0.0)
        self.add_state("steps", 0.0)

    def measure(self, rows: Rows, memory: Rows, factor: Tensor) -> Tensor | None:
        used = [n for n, column in enumerate(zip(*memory, strict=True)) if column[0] is not None]
        kept, grads = ([[row[n] for n in used] for row in kind] for kind in (memory, rows))
        return excess_risk(cast(list[list[Tensor]], kept), grads, factor, EPSILON)

    def decide(self, gram: Tensor, mask: Tensor, losses: Tensor | None, excess: Tensor | None) -> MemoryUpdate:
        assert excess is not None
        state, baseline, before = (self.read_state(name, mask.shape, mask.device) for name in ("share", "baseline", "steps"))
        excess = torch.where(mask, excess, 0.0)
        counts = max(self.n_warmup, 1)  # calls that make the baseline
        baseline = baseline + torch.where(mask & (before < counts), excess / counts, 0.0)
        scaled = excess / (baseline + EPSILON)
        if self.n_warmup:
            scaled = torch.where(before < counts, 0.0, scaled)
        else:
            scaled = torch.where(before == 0, excess if self.first_update == "raw" else 0.0, scaled)
        share, part = share_of(state, mask)
        share = softmax(share.log() + self.eta * scaled, mask)  # of logarithms, so that nothing overflows
        self.write_state("share", with_share(state, mask, share, part))
        self.write_state("baseline", baseline)
        self.write_state("steps", before + mask)
        ones = torch.ones_like(share)
        return MemoryUpdate(ones, ones, share)

    def extra_repr(self) -> str:
        return f"eta={self.eta}, n_warmup={self.n_warmup}, first_update={self.first_update!r}"
