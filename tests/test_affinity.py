"""Affinities from a Gram against their definitions, and measured by looking ahead, which must leave no trace."""

import numpy as np
import pytest
import torch
from hard_grams import gram_of, hard_gradients
from multitask_models import TASKS, Net, assert_equal, task_losses, values_of

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 14, 40])
def test_first_order_affinity(num_tasks):
    rows = hard_gradients("random", num_tasks, num_tasks + 4, seed=num_tasks)
    losses = torch.rand(num_tasks, dtype=torch.float64) + 0.1
    expected = 0.3 * (rows @ rows.T) / losses.numpy()[None, :]
    np.testing.assert_allclose(mtl.affinity(gram_of(rows), losses, 0.3).numpy(), expected, rtol=1e-14)


def test_first_order_affinity_of_batches():
    grams = torch.stack([gram_of(hard_gradients("common", 4, 6, seed)) for seed in range(6)]).view(2, 3, 4, 4)
    losses, lr = torch.rand(2, 3, 4, dtype=torch.float64) + 1, torch.rand(2, 3, dtype=torch.float64)
    together = mtl.affinity(grams, losses, lr)
    for i, j in np.ndindex(2, 3):
        torch.testing.assert_close(together[i, j], mtl.affinity(grams[i, j], losses[i, j], float(lr[i, j])))
    torch.testing.assert_close(mtl.affinity(grams, losses[0, 0], 0.1)[1, 2], mtl.affinity(grams[1, 2], losses[0, 0], 0.1))
    assert mtl.affinity(grams.float(), losses, 0.1).dtype == torch.float32


def test_a_loss_that_is_not_positive_has_no_relative_change():
    gram = gram_of(hard_gradients("random", 4, 6, seed=0))
    actual = mtl.affinity(gram, torch.tensor([1.0, 0.0, -2.0, torch.nan]), 0.1)
    assert actual.isnan().tolist() == [[False, True, True, True]] * 4


@pytest.mark.parametrize("losses", [torch.ones(2), torch.ones(4, 4), 1.0, [1.0, 2.0, 3.0, 4.0]], ids=str)
def test_affinity_refuses_other_losses(losses):
    with pytest.raises(ValueError, match=r"losses is .*takes a tensor \(4,\)"):
        mtl.affinity(torch.eye(4), losses, 0.1)
    with pytest.raises(ValueError, match="gram has shape"):
        mtl.affinity(torch.ones(3, 4), torch.ones(4), 0.1)


# --- curvature ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "common", "scales"])
def test_curvature_bound(kind):
    rows = hard_gradients(kind, 6, 9, seed=1)
    norm = np.linalg.norm(rows, axis=1)
    cosine = rows @ rows.T / np.outer(norm, norm)
    apart = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    together = ((rows[:, None] + rows[None]) ** 2).sum(-1)
    actual = mtl.curvature_bound(gram_of(rows)).numpy()
    np.testing.assert_allclose(actual, (1 - cosine**2) * apart / together, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(actual, actual.T, rtol=1e-14, atol=1e-15)


def test_curvature_bound_at_its_limits():
    gram = gram_of(np.array([[1.0, 0], [2, 0], [-1, 0], [0, 0], [0, 1]]))
    actual = mtl.curvature_bound(gram)
    inf = torch.inf
    assert actual.tolist() == [[0, 0, inf, 1, 1], [0, 0, 0, 1, 1], [inf, 0, 0, 1, 1], [1, 1, 1, inf, 1], [1, 1, 1, 1, 0]]
    torch.testing.assert_close(mtl.curvature_bound(gram * 2.0**900), actual)
    gram[4, 4] = torch.nan
    assert mtl.curvature_bound(gram)[4].isnan().all()
    assert mtl.curvature_bound(gram.expand(2, 3, 5, 5)).shape == (2, 3, 5, 5)


# --- looking ahead --------------------------------------------------------------------------------------------------------


class Positive:
    """A model with batch norm and dropout, and its three losses, which are positive."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.model = Net().to(dtype)
        self.model.encoder.append(torch.nn.BatchNorm1d(5, dtype=dtype))
        self.model.encoder.append(torch.nn.Dropout(0.3))
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {task: loss + 0.1 for task, loss in task_losses(self.model).items()}

    def state(self) -> list[torch.Tensor]:
        return [*values_of(self.model), *(b.clone() for b in self.model.buffers()), torch.get_rng_state()]


def by_hand(losses_fn: Positive, lr: float) -> torch.Tensor:
    """Z[i, j] in a fresh copy for each task, from the same random state."""
    torch.manual_seed(7)
    before = losses_fn()
    shared = list(losses_fn.model.encoder.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in before.values()]
    result = []
    for row in rows:
        other = Positive()
        other.model.load_state_dict({**losses_fn.model.state_dict()})
        with torch.no_grad():
            for param, grad in zip(other.model.encoder.parameters(), row, strict=True):
                param -= lr * grad
            torch.manual_seed(7)
            after = other()
        result.append(torch.stack([1 - after[task] / before[task] for task in before]))
    return torch.stack(result).detach()


@pytest.mark.parametrize("source", SOURCES)
def test_lookahead_is_what_steps_in_copies_show(source):
    losses_fn, again = Positive(), Positive()
    before = losses_fn.state()
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    actual = mtl.lookahead_affinity(
        losses_fn, losses_fn.model.encoder.parameters(), 0.2, module=losses_fn.model, gradients=source
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(actual, by_hand(again, 0.2), rtol=1e-10, atol=1e-12)
    assert losses_fn.calls == 4
    assert_equal(losses_fn.state()[:-1], before[:-1])
    assert all(p.grad is None for p in losses_fn.model.parameters())
    assert (actual.diagonal() > 0).all()  # a small step of a task's own helps it


def test_lookahead_agrees_with_the_first_order_for_small_steps():
    losses_fn = Positive()
    losses_fn.model.encoder[-1].p = 0.0
    shared = list(losses_fn.model.encoder.parameters())
    losses = losses_fn()
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
    errors = []
    for lr in (1e-4, 1e-5):
        first = mtl.affinity(mtl.gram(grads), torch.stack(list(losses.values())).detach(), lr)
        errors.append(float((mtl.lookahead_affinity(losses_fn, shared, lr) - first).abs().max()))
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.05)  # second order in the learning rate


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_lookahead_that_raises_leaves_no_trace(fails_at):
    losses_fn = Positive(torch.float32)
    losses_fn.model.encoder[0].weight.grad = torch.ones(5, 4)

    def failing() -> dict[str, torch.Tensor]:
        losses = losses_fn()
        if losses_fn.calls == fails_at:
            raise KeyError("batch")
        return losses

    before, grad = losses_fn.state(), losses_fn.model.encoder[0].weight.grad
    with pytest.raises(KeyError):
        mtl.lookahead_affinity(failing, losses_fn.model.encoder.parameters(), 0.3, module=losses_fn.model)
    assert_equal(losses_fn.state(), before)
    assert losses_fn.model.encoder[0].weight.grad is grad


def test_lookahead_with_absent_tasks_and_losses_that_are_not_positive():
    losses_fn = Positive()
    shared = list(losses_fn.model.encoder.parameters())
    losses_fn.model.encoder[-1].p = 0.0
    full = mtl.lookahead_affinity(losses_fn, shared, 0.1)
    absent = mtl.lookahead_affinity(lambda: {**losses_fn(), "b": None}, shared, 0.1)
    kept = torch.tensor([0, 2])
    assert torch.equal(absent[kept][:, kept], full[kept][:, kept])
    assert absent[1].isnan().all()
    assert absent[:, 1].isnan().all()
    negative = mtl.lookahead_affinity(lambda: {**losses_fn(), "b": losses_fn()["b"] - 100}, shared, 0.1)
    assert negative.isnan().tolist() == [[False, True, False]] * 3
    assert mtl.lookahead_affinity(lambda: list(losses_fn().values()), shared, 0.1).shape == (3, 3)


def test_lookahead_refuses_what_it_cannot_measure():
    losses_fn = Positive()
    with pytest.raises(ValueError, match="shared holds something"):
        mtl.lookahead_affinity(losses_fn, ["encoder"], 0.1)
    with pytest.raises(ValueError, match=r"losses\['a'\] does not require grad"):
        mtl.lookahead_affinity(lambda: {"a": torch.ones(())}, losses_fn.model.parameters(), 0.1)
    calls = iter([TASKS, TASKS[:2]])
    with pytest.raises(ValueError, match="return the same tasks in every call"):
        mtl.lookahead_affinity(lambda: [losses_fn()[task] for task in next(calls)], losses_fn.model.parameters(), 0.1)
