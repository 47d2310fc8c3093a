"""The Triton kernels of gram and cross_gram, run on the CPU from their PTX with their plans' launches, against float64."""

import pytest
import torch
from helpers import DTYPES, assert_gram, drop, random_gradients
from triton_device import conflicts, misaligned, run, run_gram, triton

from mtlkernels.triton import gram, launch

SMALL = [(1,), (7,), (33, 5), (), (193,)]
MANY = [pytest.param(k, marks=pytest.mark.slow) for k in (1, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 11, *MANY])
def test_matches_float64_at_tails_and_chunks(dtype, num_tasks):
    size = gram.CHUNK
    grads = random_gradients(num_tasks, [*SMALL, (size - 1,), (size + 1,)], dtype)
    for per in ("model", "tensor"):
        assert_gram(run_gram(grads, per), grads, per=per)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tasks", [3, 11])
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_rows(dtype, num_tasks, offset):
    grads = random_gradients(num_tasks, [(5,), (9001,)], dtype)
    grads[1] = [misaligned(t, offset) for t in grads[1]]
    assert_gram(run_gram(grads), grads)


def channels(grads: list, actual: torch.Tensor) -> list[torch.Tensor | None]:
    sizes = [next((t.shape[0] if t.dim() else 1 for t in column if t is not None), 0) for column in zip(*grads, strict=True)]
    parts = actual.split(sizes)
    return [part if size else None for part, size in zip(parts, sizes, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [3, 11, *MANY])
def test_channels(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(3, 600), (2, 9, 3, 3), (5,), (), (4, 0), (3,)], dtype)
    grads = drop(grads, (1, 1), *((k, 5) for k in range(num_tasks)))
    grads[0][0] = grads[0][0].T.contiguous().T
    assert_gram(channels(grads, run_gram(grads, "channel")), grads, per="channel")


def test_long_channels_leave_float32_tile_by_tile():
    grads = random_gradients(3, [(2, gram.MAX_CHANNEL + 5), (4, 3)])
    assert_gram(channels(grads, run_gram(grads, "channel")), grads, per="channel")
    assert {report.kernel for report in run_gram.reports} == {"gram_dots", "gram_pairs"}


@pytest.mark.parametrize(("num_tasks", "num_other"), [(2, 1), (5, 7)])
def test_cross_gram(num_tasks, num_other):
    rows = drop(random_gradients(num_tasks + num_other, [(16385,), (33, 5)]), (0, 1), (num_tasks, 0))
    grads, other = rows[:num_tasks], rows[num_tasks:]
    for per in ("model", "tensor"):
        assert_gram(run_gram(rows, per, other=num_other), grads, other, per=per)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 4, 8, 16, 64])
def test_each_byte_is_read_once(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(gram.CHUNK + 4096,)], dtype)
    run_gram(grads)
    report = run_gram.reports[0]
    for (row,) in grads:
        assert report.alloc(row).load_bytes == row.nbytes
        assert report.alloc(row).load_sectors <= 1.02 * row.nbytes / 32
    if num_tasks >= 16 and dtype == torch.float32:
        # Reading the split operands conflicts. A column's wavefronts stay near the cycles that an H100's memory takes for it,
        # 4.5 and 18 (3.35 TB/s over 132 multiprocessors of 1.755 GHz); not so those of 16 tasks before Triton 3.9.
        old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
        wavefronts = report.shared_load_wavefronts + report.shared_store_wavefronts
        assert wavefronts <= {16: 38 if old else 4.5, 64: 28}[num_tasks] * grads[0][0].numel()
    else:
        assert conflicts(report) <= 0.05


@pytest.mark.parametrize("num_tasks", [3, 11])
def test_absent_rows_count_as_zero(num_tasks):
    grads = drop(random_gradients(num_tasks, [(9001,), (100,), (50,)]), (0, 0), (1, 1), *((k, 2) for k in range(num_tasks)))
    actual = run_gram(grads, "tensor")
    assert_gram(actual, grads, per="tensor")
    assert (actual[0, 0] == 0).all()
    assert (actual[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 11])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
@pytest.mark.parametrize("per", ["model", "channel"])
def test_squares_outside_float32(dtype, num_tasks, size, per):
    grads = random_gradients(num_tasks, [(3, 700)], torch.float64)
    grads = [[t.mul(size if k else 1.0).to(dtype) for t in row] for k, row in enumerate(grads)]
    actual = run_gram(grads, per)
    assert_gram(channels(grads, actual) if per == "channel" else actual, grads, per=per)


def test_rows_of_zeros_are_not_summed_twice():
    grads = random_gradients(3, [(4096,)])
    run_gram(grads)
    steps = run_gram.reports[0].global_load_requests
    grads[1][0].zero_()
    assert (run_gram(grads)[1] == 0).all()
    assert run_gram.reports[0].global_load_requests < 40 * steps


@pytest.mark.parametrize("num_tasks", [2, 11])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_row_and_column(num_tasks, bad):
    grads = random_gradients(num_tasks, [(9001,)])
    clean = run_gram(grads)
    grads[1][0][77] = bad
    dirty = run_gram(grads)
    assert not dirty[1, 1].isfinite()
    keep = torch.arange(num_tasks) != 1
    torch.testing.assert_close(dirty[keep][:, keep], clean[keep][:, keep], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("num_tasks", [3, 11, pytest.param(17, marks=pytest.mark.slow)])
def test_any_schedule_gives_the_same_bits(num_tasks):
    grads = random_gradients(num_tasks, [(20003,), (77,)])
    first = run_gram(grads)
    assert torch.equal(first, first.T)
    for seed in (1, 2):
        assert torch.equal(first, run_gram(grads, seed=seed))


def test_resnet50_sized_lists_take_two_launches():
    grads = [[torch.zeros(3) for _ in range(159)] for _ in range(8)]
    launches, _ = gram.plan(list(zip(*grads, strict=True)), 8, "model")
    assert len(launches) == 2


@pytest.mark.parametrize("num_tasks", [2, 16])
def test_elements_past_2_to_the_31(num_tasks):
    """The last chunk of a tensor of more than 2^31 elements; its addresses count back from memory that is there."""
    grads = random_gradients(num_tasks, [(4099,)])
    kernel, constants, options = gram.meta(num_tasks, torch.float32, False)
    length = gram.CHUNK
    number = 2**32 // length
    back = [row[0].data_ptr() - 4 * number * length for row in grads]
    values, _ = launch.table_of([launch.Work(number * length + 4099, length, -number, back)])
    values[:2] = [-number, 1]  # the first block is chunk `number`, whose sums go to place 0
    out = torch.empty(num_tasks, num_tasks, 1, dtype=torch.float64)
    run(
        [launch.Launch(kernel, 1, (torch.tensor(values), out, 1, num_tasks, 1), constants, options)],
        [[row[0] for row in grads]],
        [out],
    )
    assert_gram(out[..., 0], grads)
