"""The block-diagonal penalty: zero exactly on blocks, a gradient that makes them."""

import pytest
import torch

import mtlkernels as mtl


def blocks(*sizes: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(size, dtype=torch.float64, generator=generator) + 0.5 for size in sizes]
    weight = torch.block_diag(*parts)
    rows, columns = (torch.randperm(n, generator=generator) for n in weight.shape)
    return weight[rows][:, columns]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5])
def test_zero_for_no_more_than_the_blocks_there_are(num_blocks):
    penalty = mtl.block_diagonal_penalty(blocks((4, 2), (3, 3), (5, 1)), num_blocks)
    assert (float(penalty) < 1e-10) == (num_blocks <= 3)


def test_two_nodes_by_hand():
    """A graph of one edge w has the eigenvalues 0 and 2 w."""
    weight = torch.tensor([[-0.7]], dtype=torch.float64)
    assert float(mtl.block_diagonal_penalty(weight, 2)) == pytest.approx(1.4)
    assert float(mtl.block_diagonal_penalty(weight, 1)) == pytest.approx(0.0, abs=1e-12)


def test_gradient():
    weight = (blocks((4, 2), (3, 3)) + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: mtl.block_diagonal_penalty(w, 2), (weight,))


def test_descent_separates_the_blocks():
    clean = blocks((4, 2), (3, 3))
    noisy = clean + 0.03 * (clean == 0)
    weight = noisy.clone().requires_grad_()
    for _ in range(200):
        loss = (weight - noisy).square().sum() + 2 * mtl.block_diagonal_penalty(weight, 2)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.01 * gradient).detach().requires_grad_()
    assert float(weight.detach()[clean == 0].abs().mean()) < 0.015
    assert float((weight.detach() - clean)[clean != 0].abs().max()) < 0.1


@pytest.mark.parametrize(("weight", "num_blocks", "message"), [((3,), 1, "weight has shape"), ((3, 2), 6, "num_blocks is 6")])
def test_bad_input(weight, num_blocks, message):
    with pytest.raises(ValueError, match=message):
        mtl.block_diagonal_penalty(torch.ones(weight), num_blocks)
