"""Task norms against K torch norms, bit by bit, and the task that a forward pass belongs to."""

import threading

import pytest
import torch
from multitask_models import assert_equal
from torch import nn

import mtlkernels as mtl
from mtlkernels.nn import TaskBatchNorm1d, TaskBatchNorm2d, TaskBatchNorm3d, TaskLayerNorm, TaskRMSNorm, task

TASKS = ("a", "b", "c")
KINDS = {
    "1d": (TaskBatchNorm1d, nn.BatchNorm1d, (5, 4)),
    "1d of sequences": (TaskBatchNorm1d, nn.BatchNorm1d, (5, 4, 3)),
    "2d": (TaskBatchNorm2d, nn.BatchNorm2d, (5, 4, 3, 2)),
    "3d": (TaskBatchNorm3d, nn.BatchNorm3d, (5, 4, 3, 2, 2)),
}
OPTIONS = [
    {},
    {"eps": 1e-2, "momentum": 0.4},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None, "affine": False},
]


def random_values(norm: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in norm.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_torch_norm_for_each_task(kind, options, dtype):
    ours_of, theirs_of, shape = KINDS[kind]
    ours = ours_of(4, TASKS, dtype=dtype, **options)
    theirs = [theirs_of(4, dtype=dtype, **options) for _ in TASKS]
    for k, norm in enumerate(theirs):
        random_values(norm, k)
        with torch.no_grad():
            for name in ("weight", "bias"):
                if getattr(ours, name) is not None:
                    getattr(ours, name)[k].copy_(getattr(norm, name))
    # The cumulative average: torch forms (1 - f) a + f b, we a + f (b - a), a rounding or two of numbers below 20 in each of
    # three batches, and the outputs in evaluation are below 20 in turn.
    inexact = {"rtol": 0, "atol": 400 * torch.finfo(dtype).eps}
    tolerance = inexact if options.get("momentum", 0) is None else {"rtol": 0, "atol": 0}
    order = ["a", "b", "a", "c", "c", "b", "a"]
    for step, name in enumerate(order):
        if step == 5:
            ours.eval()
            [norm.eval() for norm in theirs]
        k = TASKS.index(name)
        x = (1 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(step))).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        with task(name):
            actual = ours(x)
        expected = theirs[k](y)
        torch.testing.assert_close(actual, expected, **tolerance)
        actual.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, **tolerance)
        for j, norm in enumerate(theirs):
            if ours.weight is not None:
                for mine, his in ((ours.weight[j], norm.weight), (ours.bias[j], norm.bias)):
                    assert (mine.grad is None) == (his.grad is None)
                    if his.grad is not None:
                        torch.testing.assert_close(mine.grad, his.grad, rtol=tolerance["atol"], atol=tolerance["atol"])
            if ours.running_mean is not None:
                torch.testing.assert_close(ours.running_mean[j], norm.running_mean, **tolerance)
                torch.testing.assert_close(ours.running_var[j], norm.running_var, **tolerance)
                assert ours.num_batches_tracked[j] == norm.num_batches_tracked


def test_shapes():
    norm = TaskBatchNorm2d(4, 3)
    assert norm.tasks == (0, 1, 2)
    assert [scale.shape for scale in norm.weight] == [(4,)] * 3
    assert norm.running_mean.shape == norm.running_var.shape == (3, 4)
    assert norm.num_batches_tracked.tolist() == [0, 0, 0]
    scale, variance = norm.strength()
    assert scale.shape == variance.shape == (3, 4)
    assert not scale.requires_grad
    assert [s.shape for s in TaskBatchNorm1d(4, 3, affine=False, track_running_stats=False).strength()] == [(3, 4)] * 2
    assert "tasks=(0, 1, 2)" in repr(norm)
    assert "tasks=" in repr(TaskLayerNorm(4, 2))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_passes_of_all_tasks_before_the_first_backward(momentum):
    """The statistics of one task are written between another's forward and backward pass."""
    norm = TaskBatchNorm1d(4, TASKS, momentum=momentum)
    x = torch.randn(6, 4)
    total = torch.zeros(())
    for name in TASKS:
        with task(name):
            total = total + norm(x).square().sum()
    total.backward()
    assert all(scale.grad is not None for scale in norm.weight)


@pytest.mark.parametrize("inner", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1)])
def test_a_step_of_one_task_leaves_the_others_scales_alone(inner):
    """Which rows of one [K, C] parameter would not be: momentum and weight decay move every row."""
    norm = TaskBatchNorm1d(4, TASKS)
    optimizer = inner(norm.parameters(), 0.1)
    for name in ("a", "b", "c", "a"):
        before = [scale.detach().clone() for scale in norm.weight]
        optimizer.zero_grad()
        with task(name):
            norm(torch.randn(6, 4)).pow(3).sum().backward()
        optimizer.step()
        moved = [not torch.equal(b, scale) for b, scale in zip(before, norm.weight, strict=True)]
        assert moved == [name == other for other in TASKS]


@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_rms_norm(bias):
    x = torch.randn(2, 5, 4)
    layer, rms = TaskLayerNorm(4, TASKS, eps=1e-3, bias=bias), TaskRMSNorm(4, TASKS)
    random_values(layer)
    random_values(rms, 1)
    for k, name in enumerate(TASKS):
        with task(name):
            shift = layer.bias[k] if bias else None
            assert torch.equal(layer(x), torch.nn.functional.layer_norm(x, (4,), layer.weight[k], shift, 1e-3))
            assert torch.equal(rms(x), torch.nn.functional.rms_norm(x, (4,), rms.weight[k]))
    assert (layer.bias is not None) == bias
    assert rms.bias is None
    assert torch.equal(layer.strength()[0], torch.stack(list(layer.weight)))
    assert torch.equal(layer.strength()[1], torch.ones(3, 4))
    assert [s.shape for s in TaskLayerNorm(4, 2, elementwise_affine=False).strength()] == [(2, 4)] * 2


def test_reset():
    norm = TaskBatchNorm1d(4, TASKS)
    with task("b"):
        norm(5 + torch.randn(6, 4)).sum()
    random_values(norm)
    norm.reset_parameters()
    fresh = TaskBatchNorm1d(4, TASKS)
    assert_equal(list(norm.state_dict().values()), list(fresh.state_dict().values()))


# --- the current task -----------------------------------------------------------------------------------------------------


def test_no_task_is_a_clear_error():
    norm = TaskBatchNorm2d(4, TASKS)
    with pytest.raises(RuntimeError, match=r"TaskBatchNorm2d does not know which task.*nn.task\(name\).*'a', 'b', 'c'"):
        norm(torch.ones(2, 4, 3, 3))
    assert norm.num_batches_tracked.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["d", 3, -1, None, True + 2])
def test_unknown_task(name):
    with pytest.raises(ValueError, match=r"TaskBatchNorm1d has no task .*; its tasks are 'a', 'b', 'c'"), task(name):
        TaskBatchNorm1d(4, TASKS)(torch.ones(2, 4))


def test_index_selects_where_names_are_no_integers():
    norm = TaskBatchNorm1d(4, TASKS)
    with task(1):
        norm(torch.randn(3, 4))
    assert norm.num_batches_tracked.tolist() == [0, 1, 0]
    numbered = TaskBatchNorm1d(4, [7, 1, 0])
    with task(1):
        numbered(torch.randn(3, 4))
    assert numbered.num_batches_tracked.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="has no task 2"), task(2):
        numbered(torch.randn(3, 4))


def test_blocks_nest_and_end_with_an_exception():
    norm = TaskBatchNorm1d(4, TASKS)

    def fail() -> None:
        with task("b"):
            norm(torch.randn(3, 4))
            raise KeyError

    with task("a"):
        with pytest.raises(KeyError):
            fail()
        norm(torch.randn(3, 4))
    assert norm.num_batches_tracked.tolist() == [1, 1, 0]
    with pytest.raises(RuntimeError, match="does not know which task"):
        norm(torch.randn(3, 4))


def test_threads_have_their_own_task():
    norm = TaskBatchNorm1d(4, TASKS)
    started, go = threading.Barrier(3), threading.Barrier(3)
    seen, errors = {}, []

    def run(name: str) -> None:
        try:
            with task(name):
                started.wait(10)  # all are inside their block
                seen[name] = TASKS[norm.index()]
                go.wait(10)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in TASKS]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors
    assert seen == {name: name for name in TASKS}


@pytest.mark.parametrize("kind", [lambda: TaskBatchNorm1d(4, TASKS), lambda: TaskBatchNorm1d(4, TASKS, momentum=None)])
@pytest.mark.parametrize("block", ["outside", "inside"])
def test_compiles(block, kind):
    """Without a graph break where the block is outside, from torch 2.14 on; one inside breaks the graph."""
    torch._dynamo.reset()
    whole = block == "outside" and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    ours, eager = kind(), kind()

    def forward(norm: nn.Module, x: torch.Tensor, name: str) -> torch.Tensor:
        if block == "outside":
            return torch.tanh(norm(x))
        with task(name):
            return torch.tanh(norm(x))

    compiled = torch.compile(forward, fullgraph=whole, backend="aot_eager")
    for step, name in enumerate(["a", "b", "c", "a", "b"]):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        with task(name if block == "outside" else "c"):
            actual, expected = compiled(ours, x, name), forward(eager, x, name)
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()
        expected.sum().backward()
    for a, b in zip((*ours.parameters(), *ours.buffers()), (*eager.parameters(), *eager.buffers()), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours.weight, eager.weight, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_checkpoint_runs_again_for_its_task_with_the_block_inside():
    norm = TaskBatchNorm1d(4, TASKS)
    x = torch.randn(6, 4, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        with task("b"):
            return norm(x).pow(3)

    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    assert [scale.grad is not None for scale in norm.weight] == [False, True, False]


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("ab", "tasks is 'ab'"),
        ([], "at least one name"),
        (0, "at least one name"),
        (["a", "a"], "each once"),
        (1.5, "tasks is 1.5"),
    ],
)
def test_bad_tasks(tasks, message):
    for make in (TaskBatchNorm2d, TaskLayerNorm):
        with pytest.raises(ValueError, match=message):
            make(4, tasks)


def test_input_of_another_number_of_dimensions_is_refused_before_anything_changes():
    norm = TaskBatchNorm2d(4, TASKS)
    with task("a"), pytest.raises(ValueError, match=r"takes 4D input, got 2D of shape \(3, 4\)"):
        norm(torch.ones(3, 4))
    with task("a"), pytest.raises(ValueError, match="takes 2D or 3D input, got 4D"):
        TaskBatchNorm1d(4, TASKS)(torch.ones(1, 4, 2, 2))
    assert not norm.num_batches_tracked.any()


def test_names_are_exported():
    assert {"task", "TaskBatchNorm1d", "TaskBatchNorm2d", "to_task_norms", "from_task_norms"} <= set(dir(mtl.nn))
