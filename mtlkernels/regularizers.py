"""Penalties on parameters that shape how tasks share features."""

import torch
from torch import Tensor


def block_diagonal_penalty(weight: Tensor, num_blocks: int) -> Tensor:
    """Task-feature collaborative learning's penalty (Jiang et al. 2020): 0 where features and tasks fall into blocks.

    The sum of the ``num_blocks`` smallest eigenvalues of the Laplacian of the bipartite graph whose edge between feature d and
    task k weighs |W[d, k]|. That graph has at least ``num_blocks`` connected parts exactly where the sum is 0: up to the order
    of its rows and columns W is then block-diagonal, and tasks share features within a block only. The paper says that it takes
    a spectral regulariser of that kind; this form of it is the textbook's, and its algorithm is not part of it: add the penalty
    to the loss. Differentiable where the (``num_blocks`` + 1)-th eigenvalue is larger than the one before and no weight is 0.

    Args:
        weight: [D, K], a linear layer over K tasks, features first (the transpose of ``torch.nn.Linear(D, K).weight``).
        num_blocks: from 1, which costs nothing, to D + K.

    Returns:
        A scalar in units of ``weight``.

    Raises:
        ValueError: ``weight`` is no matrix, or there are not so many blocks.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass [features, tasks].")
    features, tasks = weight.shape
    if not 1 <= num_blocks <= features + tasks:
        raise ValueError(f"num_blocks is {num_blocks}; a weight of shape {(features, tasks)} takes 1 to {features + tasks}.")
    edges = weight.abs()
    adjacency = torch.cat(
        [
            torch.cat([edges.new_zeros(features, features), edges], 1),
            torch.cat([edges.mT, edges.new_zeros(tasks, tasks)], 1),
        ]
    )
    laplacian = torch.diag(adjacency.sum(1)) - adjacency
    return torch.linalg.eigvalsh(laplacian)[:num_blocks].sum()
