"""The common descent direction of tracked gradients."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ..simplex import project_onto_simplex, share_of, softmax, with_share
from .base import MemoryUpdate, MemoryWeighting, gram_after

Normalization = Literal["loss", "none"]
Simplex = Literal["softmax", "proj"]


class MoCo(MemoryWeighting):
    """MoCo (Fernando et al. 2023): y_k <- y_k - beta_t (y_k - h_k); the update is sum_k lam_k y_k, whose length lam lowers.

    lam <- P(lam - gamma_t (Y lam + rho lam)) with Y the Gram of the moved y; beta_t = beta / t^beta_sigma and gamma_t = gamma /
    t^gamma_sigma in a task's t-th step. The memories average the noise away that biases a single batch's weights; the first
    updates are short, as they start at 0. A task that is not active keeps its share of lam, and the others' weights have sum 1.
    The states are ``lam`` and ``steps`` [K].

    Defaults are LibMTL's. The authors' code is ``MoCo(beta=0.1, gamma=0.2, normalize="none", simplex="proj")``.

    Args:
        beta, beta_sigma: how fast memories follow; beta from above 0 to 1.
        gamma, gamma_sigma: how fast lam moves, in units of 1 over the squared gradient; gamma above 0.
        rho: pull of lam towards equal weights, 0 or more.
        normalize: h_k. ``"loss"``: L_k g_k / (|g_k| + 1e-8); ``"none"``: g_k.
        simplex: P. ``"softmax"`` makes weights nearly equal in every step, as LibMTL does; ``"proj"`` is the nearest point of
            the simplex, which the paper has.

    Raises:
        ValueError: an option out of its range; ``normalize="loss"`` and a call without losses.
    """

    lam: Tensor
    steps: Tensor

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        normalize: Normalization = "loss",
        simplex: Simplex = "softmax",
    ) -> None:
        super().__init__()
        if not 0 < beta <= 1:
            raise ValueError(f"beta is {beta}; pass a number from above 0 to 1.")
        if not gamma > 0:
            raise ValueError(f"gamma is {gamma}; pass a positive number.")
        for name, value in (("beta_sigma", beta_sigma), ("gamma_sigma", gamma_sigma), ("rho", rho)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; pass 0 or more.")
        for name, choice, known in (("normalize", normalize, Normalization), ("simplex", simplex, Simplex)):
            if choice not in get_args(known):
                raise ValueError(f"{name} is {choice!r}; pass one of {', '.join(map(repr, get_args(known)))}.")
        self.beta, self.beta_sigma, self.gamma, self.gamma_sigma = beta, beta_sigma, gamma, gamma_sigma
        self.rho, self.normalize, self.simplex = rho, normalize, simplex
        self.reads_losses = normalize == "loss"
        self.add_state("lam", torch.nan)  # NaN: 1 / K
        self.add_state("steps", 0.0)

    def decide(self, gram: Tensor, mask: Tensor, losses: Tensor | None, excess: Tensor | None) -> MemoryUpdate:
        lam, before = (self.read_state(name, mask.shape, gram.device) for name in ("lam", "steps"))
        steps = before + mask
        beta, gamma = (
            rate / steps.clamp(min=1) ** sigma for rate, sigma in ((self.beta, self.beta_sigma), (self.gamma, self.gamma_sigma))
        )
        scale = beta
        if self.normalize == "loss" and losses is not None:
            norms = gram.diagonal()[: len(mask)].clamp(min=0).sqrt()
            scale = torch.where(mask, beta * losses / (norms + 1e-8), 0.0)
        after = torch.where(mask.unsqueeze(-1) & mask, gram_after(gram, 1 - beta, scale), 0.0)
        share, part = share_of(lam, mask)
        stepped = share - gamma * ((after * share).sum(-1) + self.rho * share)
        share = softmax(stepped, mask) if self.simplex == "softmax" else project_onto_simplex(stepped, mask)
        self.write_state("lam", with_share(lam, mask, share, part))
        self.write_state("steps", steps)
        return MemoryUpdate(1 - beta, scale, share)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, beta_sigma={self.beta_sigma}, gamma={self.gamma}, gamma_sigma={self.gamma_sigma}, "
            f"rho={self.rho}, normalize={self.normalize!r}, simplex={self.simplex!r}"
        )
