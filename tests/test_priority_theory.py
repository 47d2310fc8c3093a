"""Theorem 1 of the paper (stated in its main text; its proof is not) on small quadratic problems, in float64."""

import torch

SUBSETS = ((0, 1), (2, 3, 4), (5,))


def problem(seed: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    """K = 3 quadratics L_i = (t - c_i)' A_i (t - c_i) / 2 of six parameters, task weights that sum to 1, and a point."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    tasks = [
        (m @ m.T + 0.1 * torch.eye(6, dtype=torch.float64), torch.randn(6, generator=generator, dtype=torch.float64))
        for m in matrices
    ]
    weights = torch.rand(3, generator=generator, dtype=torch.float64)
    return tasks, weights / weights.sum(), torch.randn(6, generator=generator, dtype=torch.float64)


def total(tasks: list, weights: torch.Tensor, point: torch.Tensor) -> float:
    return float(sum(w * (point - c) @ a @ (point - c) / 2 for w, (a, c) in zip(weights, tasks, strict=True)))


def test_each_subset_along_its_priority_tasks_gradient_beats_the_weighted_sum():
    """sum_i w_i L_i after theta_s - eta g_m, m the task with priority on subset s (Definition 3), against the joint step."""
    eta = 1e-6  # the first order decides: curvature adds eta^2 |g|^2 |A|, six orders below eta |g|^2
    gained = 0
    for seed in range(200):
        tasks, weights, point = problem(seed)
        grads = torch.stack([a @ (point - c) for a, c in tasks])
        joint = point - eta * weights @ grads
        chosen = point.clone()
        for subset in SUBSETS:
            part = list(subset)
            candidates = []
            for grad in grads:
                moved = point.clone()
                moved[part] -= eta * grad[part]
                candidates.append(total(tasks, weights, moved))
            best = min(range(3), key=candidates.__getitem__)
            chosen[part] -= eta * grads[best][part]
        before = total(tasks, weights, point)
        decrease, of_sum = before - total(tasks, weights, chosen), before - total(tasks, weights, joint)
        assert decrease >= of_sum - 1e-9 * abs(of_sum) - 64 * 2.0**-53 * before
        gained += decrease > 1.01 * of_sum
    assert gained > 150  # a strict gain is the rule, so the inequality is not met by equality


def test_the_inequality_is_that_of_the_first_order():
    """max_m <gbar, g_m> >= <gbar, gbar> on every subset, because gbar is a convex combination of the g_m."""
    for seed in range(200):
        tasks, weights, point = problem(seed)
        grads = torch.stack([a @ (point - c) for a, c in tasks])
        mean = weights @ grads
        for subset in SUBSETS:
            part = list(subset)
            assert (grads[:, part] @ mean[part]).max() >= mean[part] @ mean[part] * (1 - 1e-12)
