"""Random weights of the gradients."""

import torch
from torch import Tensor

from ..random import random_normals
from .seeded import SeededWeighting


class RGW(SeededWeighting):
    """Random gradient weighting (Lin et al. 2022, Algorithm 2): w = softmax(z), z standard normal, over the active tasks.

    Positive, and 1 in sum; 1 / K on average. Every problem of a batch draws its own z, a function of the seed
    (:func:`mtlkernels.random.random_normals`). A baseline: what a method gains over it, it does not gain by noise.

    Args:
        generator: draws the seeds, as :class:`~mtlkernels.weightings.seeded.SeededWeighting` says.
    """

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        problems, num_tasks = gram.shape[:-2].numel(), gram.shape[-1]
        normals = random_normals(self.seed_for(gram, seed), problems, num_tasks).view(gram.shape[:-1])
        if active is None:
            return normals.softmax(-1)
        mask = active | ~active.any(-1, keepdim=True)  # a softmax over no task is NaN
        return torch.where(active, normals.masked_fill(~mask, -torch.inf).softmax(-1), 0.0)
