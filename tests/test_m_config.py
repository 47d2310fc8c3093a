"""M-ConFIG against a NumPy transcription of its definition, alone and in MultiTaskOptimizer."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import DTYPES, LAYOUTS, UNIT_ROUNDOFF, random_gradients, to_numpy
from multitask_models import TASKS, Net, assert_equal, grads_of, task_losses, values_of
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.weightings import MEMORY

SHAPES = [(5, 7), (), (3, 2, 3, 3), (1000,)]
STEPS = 20


class Definition:
    """PseudoMomentumOperator of the authors' conflictfree/momentum_operator.py, with the pseudo-inverse for ConFIG."""

    def __init__(self, num_tasks: int, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.m, self.counts = [0.0] * num_tasks, np.zeros(num_tasks)
        self.s = self.f = 0.0
        self.t = 0

    def __call__(self, grads: dict[int, np.ndarray]) -> np.ndarray:
        for k, g in grads.items():
            self.counts[k] += 1
            self.m[k] = self.beta1 * self.m[k] + (1 - self.beta1) * g
        if not self.counts.all():
            return np.zeros_like(g)
        self.t += 1
        moments = np.stack(self.m) / (1 - self.beta1**self.counts)[:, None]
        c = self.config(moments)
        first = c * (1 - self.beta1**self.t)
        fake = (first - self.beta1 * self.f) / (1 - self.beta1)
        self.f = first
        self.s = self.beta2 * self.s + (1 - self.beta2) * fake**2
        return c / (np.sqrt(self.s / (1 - self.beta2**self.t)) + 1e-8)

    @staticmethod
    def config(rows: np.ndarray) -> np.ndarray:
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        v = np.linalg.pinv(units) @ np.ones(len(rows))
        v /= np.linalg.norm(v)
        return (rows @ v).sum() * v


def calls_of(kind: str, step: int, num_tasks: int) -> list[int]:
    return [step % num_tasks] if kind == "round robin" else list(range(num_tasks))


def only(grads: list[list[Tensor]], tasks: list[int]) -> tuple[list[list[Tensor | None]], Tensor]:
    """Rows of None for the other tasks, and which are active."""
    rows = [row if k in tasks else [None] * len(row) for k, row in enumerate(grads)]
    return rows, torch.tensor([k in tasks for k in range(len(grads))])


def one_call(method: mtl.MemoryWeighting, rows, active: Tensor, out=None) -> list[Tensor | None]:
    memory = method.memory_of(rows)
    return method.combine(method.update(method.gram(rows, memory), active=active), rows, memory, out)


def flat(row) -> np.ndarray:
    return np.concatenate([to_numpy(t).ravel() for t in row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["round robin", "all tasks"])
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_matches_the_definition(backend, num_tasks, kind, dtype):
    """An element of the update is c over a root of what c was, of size 1 whatever the size of c: where c is all but 0, what it
    has of float32's rounding is large beside it. So all elements but one in a hundred are held to tens of roundings."""
    method, oracle = mtl.MomentumConFIG(), Definition(num_tasks)
    most, every = (1e-10, 1e-8) if dtype == torch.float64 else (2e-5 + UNIT_ROUNDOFF[dtype], 5e-3)
    for step in range(STEPS):
        grads = random_gradients(num_tasks, SHAPES, dtype, seed=step)
        tasks = calls_of(kind, step, num_tasks)
        expected = oracle({k: flat(grads[k]) for k in tasks})
        update = mtl.aggregate(grads, method) if kind == "all tasks" else one_call(method, *only(grads, tasks))
        assert [t.dtype for t in update] == [dtype] * len(SHAPES)
        assert expected.any() == (kind == "all tasks" or step + 1 >= num_tasks)
        error, size = np.abs(flat(update) - expected), max(np.abs(expected).max(), 1)
        assert np.quantile(error, 0.99) <= most * size
        assert error.max() <= every * size
    assert method.calls == (STEPS if kind == "all tasks" else STEPS - num_tasks + 1)


def test_options_and_preference(backend):
    """One call: the update is the sign of c, which has the preferred projections."""
    grads = random_gradients(3, [(50,)], torch.float64)
    (update,) = mtl.aggregate(grads, mtl.MomentumConFIG(0.5, 0.9, (1.0, 2.0, 5.0)))
    (c,) = mtl.aggregate(grads, mtl.ConFIG((1.0, 2.0, 5.0)))
    torch.testing.assert_close(update, c / (c.abs() + 1e-8), rtol=1e-9, atol=1e-9)
    assert not torch.equal(c.sign(), mtl.aggregate(grads, "config")[0].sign())
    for options in ({"beta1": 1.0}, {"beta2": -0.1}, {"preference": [-1.0, 1.0]}, {"epsilon": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            mtl.get_weighting("m_config", **options)
    with pytest.raises(ValueError, match="preference lists 2 tasks"):
        mtl.aggregate(grads, mtl.MomentumConFIG(preference=(1.0, 1.0)))


def channels_last(step: int) -> list[list[Tensor]]:
    rows = random_gradients(3, SHAPES, seed=step)
    return [[LAYOUTS["channels_last"](t) if t.dim() == 4 else t for t in row] for row in rows]


def robin(method: mtl.MemoryWeighting, steps: range) -> list[Tensor]:
    return [t for step in steps for t in one_call(method, *only(channels_last(step), [step % 3]))]


def test_state_resumes_to_the_bit_in_a_fresh_object(backend):
    for torn_at in (2, 7):  # before and after all tasks have been seen
        method, torn, fresh = (mtl.MomentumConFIG() for _ in range(3))
        expected = robin(method, range(12))
        before = robin(torn, range(torn_at))
        file = io.BytesIO()
        torch.save(torn.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        again = copy.deepcopy(torn)
        assert_equal(before + robin(fresh, range(torn_at, 12)), expected)
        assert_equal(before + robin(again, range(torn_at, 12)), expected)
        method.reset()
        assert method.state_dict().keys() == {"steps", "calls"}
        assert_equal(robin(method, range(12)), expected)


@pytest.mark.parametrize("fault", ["nan", "inf"])
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_what_is_not_finite_changes_nothing(backend, steps, fault):
    method, same = mtl.MomentumConFIG(), mtl.MomentumConFIG()
    robin(method, range(steps)), robin(same, range(steps))
    grads = channels_last(9)
    grads[1][0][0, 0] = float(fault)
    assert all(t.isnan().all() for t in mtl.aggregate(grads, method))
    one_call(method, channels_last(9), torch.zeros(3, dtype=torch.bool))  # nor does a call without an active task
    after = robin(method, range(steps, steps + 4))
    assert_equal(after, robin(same, range(steps, steps + 4)))
    for (key, a), b in zip(method.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_out_may_be_the_first_gradient(backend):
    for dtype in (torch.float32, torch.bfloat16):
        grads = random_gradients(2, SHAPES, dtype)
        expected = mtl.aggregate(grads, "m_config")
        out = mtl.aggregate(grads, "m_config", list(grads[0]))
        assert all(a is b for a, b in zip(out, grads[0], strict=True))
        assert_equal(out, expected)


def test_bad_buffers(backend):
    grads = random_gradients(2, SHAPES)
    for name in MEMORY:
        method = mtl.get_weighting(name)
        out = [torch.zeros(2), *grads[0][1:]]
        with pytest.raises(ValueError, match=r"out\[0\]"):
            mtl.aggregate(grads, method, out, losses=torch.ones(2))
        assert not any(value.nan_to_num().any() for value in method.state_dict().values()), name
    shared = torch.zeros(7)
    with pytest.raises(ValueError, match="shares memory"):
        mtl.aggregate([[torch.ones(5), torch.ones(5)]] * 2, "m_config", [shared[:5], shared[2:]])


def test_a_tensor_that_no_task_of_a_call_touches_has_no_part_in_it(backend):
    method = mtl.MomentumConFIG()
    robin(method, range(4))
    kept = method._memory[1].clone()
    grads = random_gradients(3, SHAPES, seed=9)
    rows, active = only(grads, [0])
    rows[0] = [rows[0][0], None, *rows[0][2:]]
    update = one_call(method, rows, active)
    assert [t is None for t in update] == [False, True, False, False]
    assert torch.equal(method._memory[1], kept)


# --- MultiTaskOptimizer -----------------------------------------------------------------------------------------------------


def optimizer_of(model: Net, **options) -> mtl.MultiTaskOptimizer:
    inner = torch.optim.SGD(model.parameters(), 0.01)
    options = {"tasks": TASKS, "shared": model.encoder.parameters(), "heads": model.head_parameters(), **options}
    return mtl.MultiTaskOptimizer(inner, "m_config", **options)


def loss_of(model: Net, step: int) -> dict[str, Tensor]:
    return task_losses(model, step, (TASKS[step % 3],))


def test_one_task_a_step(backend):
    model, method = Net(), mtl.MomentumConFIG()
    optimizer = optimizer_of(model)
    first = sum(task_losses(model).values()).item()
    for step in range(60):
        losses, task = loss_of(model, step), TASKS[step % 3]
        params, own = list(model.encoder.parameters()), list(model.heads[task].parameters())
        grads = torch.autograd.grad(losses[task], [*params, *own], retain_graph=True)
        rows = [list(grads[: len(params)]) if t == task else [None] * len(params) for t in TASKS]
        expected = one_call(method, rows, torch.tensor([t == task for t in TASKS]))
        info = optimizer.step(losses)
        assert_equal(grads_of(model.encoder), expected)
        assert all(t.any() == (step >= 2) for t in expected)
        for name in TASKS:
            wanted = grads[len(params) :] if name == task else [None, None]
            assert_equal(grads_of(model.heads[name]), list(wanted))
        assert info.active.tolist() == [t == task for t in TASKS]
        assert info.weights.count_nonzero() == (3 if step >= 2 else 0)
        optimizer.zero_grad()
    assert optimizer.weighting.steps.tolist() == [20, 20, 20]
    assert sum(task_losses(model).values()).item() < 0.9 * first


@pytest.mark.parametrize("where", ["encoder", "head"])
@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_step_that_is_not_finite_changes_nothing(steps, where):
    model, same = Net(), Net()
    optimizer, twin = optimizer_of(model), optimizer_of(same)
    for step in range(steps):
        optimizer.step(loss_of(model, step))
        twin.step(loss_of(same, step))
    task = TASKS[steps % 3]
    losses = loss_of(model, steps)
    bad = model.encoder[0].weight if where == "encoder" else model.heads[task].weight
    losses[task] = losses[task] + bad.sum() * torch.inf
    assert optimizer.step(losses).skipped
    for step in range(steps, steps + 4):
        optimizer.step(loss_of(model, step))
        twin.step(loss_of(same, step))
    assert_equal(values_of(model), values_of(same))
    for (key, a), b in zip(optimizer.weighting.state_dict().items(), twin.weighting.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_dropped_task_acts_through_its_momentum():
    model = Net()
    optimizer = optimizer_of(model, on_nonfinite="drop_task")
    optimizer.step(task_losses(model, 0))
    kept = [m[1].clone() for m in optimizer.weighting._memory]
    losses = task_losses(model, 1)
    losses["b"] = losses["b"] * torch.nan
    info = optimizer.step(losses)
    assert not info.skipped
    assert info.weights[1] != 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(torch.equal(m[1], value) for m, value in zip(optimizer.weighting._memory, kept, strict=True))
    assert optimizer.weighting.steps.tolist() == [2, 1, 2]


@pytest.mark.parametrize("way", ["step", "backward"])
def test_a_scaler_changes_nothing(way):
    model, plain = Net(), Net()
    optimizer, other = optimizer_of(model), optimizer_of(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(8):
        optimizer.zero_grad()
        if way == "step":
            optimizer.step(loss_of(model, step), scaler=scaler)
        else:
            optimizer.backward(loss_of(model, step), scaler)
            scaler.step(optimizer)
            scaler.update()
        other.step(loss_of(plain, step))
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(optimizer.weighting._memory, other.weighting._memory, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_clipping_is_before_the_second_moment():
    """max_norm so small that every step is clipped: c and the heads' gradients have that norm together."""
    model, free = Net(), Net()
    optimizer, other = optimizer_of(model, max_norm=1e-3), optimizer_of(free)
    for step in range(6):
        info, loose = optimizer.backward(task_losses(model, step)), other.backward(task_losses(free, step))
        torch.testing.assert_close(info.norm, loose.norm)
        f, unclipped = (
            torch.cat([m[-1].flatten() for m in o.weighting._memory]).double() for o in (optimizer, other)
        )  # c (1 - beta1^t)
        torch.testing.assert_close(f, unclipped * 1e-3 / loose.norm, rtol=1e-4, atol=1e-9)
        heads = torch.cat([g.flatten() for g in grads_of(model.heads)]).double()
        whole = torch.cat([f / (1 - 0.9 ** (step + 1)), heads]).norm()
        torch.testing.assert_close(whole, whole.new_tensor(1e-3), rtol=1e-4, atol=0)
        assert max(g.abs().max() for g in grads_of(model.encoder)) > 0.5
        optimizer.zero_grad(), other.zero_grad()


def test_checkpoints_resume_to_the_bit():
    model, other = Net(), Net(seed=1)
    optimizer, fresh = optimizer_of(model), optimizer_of(other)
    for step in range(5):
        optimizer.step(loss_of(model, step))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    for step in range(5, 9):
        optimizer.step(loss_of(model, step))
        fresh.step(loss_of(other, step))
    assert_equal(values_of(other), values_of(model))
