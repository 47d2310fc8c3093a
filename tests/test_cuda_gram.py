"""The CUDA kernels of gram, run on the CPU from their PTX with the launch plan's arguments, against float64."""

import itertools
import math

import numpy as np
import ptxsim
import pytest
from device import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, DType, address, compile_kernels, requires_nvcc, testing_module

pytestmark = requires_nvcc

TABLE = "const __grid_constant__ TensorTable"
CHUNK = 8192
NUM_ROWS = [1, 2, 3, 4, 5, 8, 9, 11, 16, 17, 64]


def kernel(dtype: DType, rows_class: int) -> tuple["ptxsim.Module", str]:
    registers = rows_class <= (4 if dtype.storage().itemsize == 2 else 8)
    header, name = ("gram.cuh", "gram_chunks") if registers else ("gram_tensor_core.cuh", "gram_tensor_core")
    instance = f"{name}<{dtype.cpp}, {rows_class}>"
    return compile_kernels(header, f"{instance}({TABLE}, double*)"), instance


def finish() -> "ptxsim.Module":
    return compile_kernels("gram.cuh", f"gram_chunks<float, 1>({TABLE}, double*)")


class Problem:
    """Gradients of tensors of the given sizes, and the launches that make their Gram matrices."""

    def __init__(self, dtype: DType, num_rows: int, sizes: list[int], offset: int = 0) -> None:
        random = np.random.default_rng(num_rows + 1000 * offset + len(sizes))
        self.dtype, self.num_rows, self.sizes = dtype, num_rows, sizes
        self.rows: list[list[np.ndarray | None]] = []
        common = [random.standard_normal(size) for size in sizes]
        for k in range(num_rows):
            row = [dtype.empty(size, offset if k % 2 else 0) for size in sizes]
            for buffer, shared in zip(row, common, strict=True):
                dtype.store(random.standard_normal(buffer.size) + 0.5 * shared, buffer)
            self.rows.append(row)

    def run(self, per_tensor: bool = False, seed: int | None = None, num_other: int = 0) -> np.ndarray:
        """The Gram matrix, or with ``num_other`` the products of the other rows with that many at the end."""
        testing = testing_module()
        self.rows_class, threads, shared = testing.gram_launch(DTYPES.index(self.dtype), self.num_rows)
        pairs = self.rows_class * (self.rows_class + 1) // 2
        blocks = [math.ceil(size / CHUNK) for size in self.sizes]
        partials = ptxsim.empty(sum(blocks) * pairs, dtype=np.float64)
        pointers = [[address(row[n]) for row in self.rows] for n in range(len(self.sizes))]
        read = [buffer for row in self.rows for buffer in row if buffer is not None]
        options = {} if seed is None else {"seed": seed}
        module, name = kernel(self.dtype, self.rows_class)
        launches = testing.plan(pointers, self.sizes, self.num_rows)
        self.reports = [
            module.launch(
                name,
                grid=grid,
                block=threads,
                shared=shared,
                args=[table, partials],
                mem=read,
                outputs=[partials] if len(launches) == 1 else [],
                readonly=read,
                **options,
            )
            for table, grid in launches
        ]
        ends = list(itertools.accumulate(blocks))
        slots = [(0, 0, ends[-1])] if not per_tensor else [(n, ends[n] - blocks[n], ends[n]) for n in range(len(blocks))]
        num_left = self.num_rows - num_other
        gram = ptxsim.empty((len(slots), num_left, num_other or num_left), dtype=np.float64)
        capacity = (32764 - 60) // 12
        table = np.zeros((3, capacity), dtype=np.int32)
        table[:, : len(slots)] = np.array(slots).T
        sizes = [np.int32(self.rows_class), np.int32(num_left), np.int32(num_other)]
        finish().launch(
            "gram_finish",
            grid=(num_left * num_other or num_left * (num_left + 1) // 2, len(slots)),
            block=256,
            args=[table.tobytes(), partials, *sizes, gram],
            outputs=[gram],
            readonly=[partials],
            **options,
        )
        return gram if per_tensor else gram[0]

    def expected(self) -> np.ndarray:
        """[N, K, K] in float64."""
        grams = []
        for n, size in enumerate(self.sizes):
            stacked = np.stack([np.zeros(size) if row[n] is None else self.dtype.load(row[n]) for row in self.rows])
            grams.append(stacked @ stacked.T)
        return np.stack(grams)

    def check(self, actual: np.ndarray, expected: np.ndarray) -> None:
        self.check_block(actual, expected, 0)
        assert np.array_equal(actual, np.swapaxes(actual, -1, -2))

    def check_block(self, actual: np.ndarray, expected: np.ndarray, num_left: int) -> None:
        """``actual`` is all of the Gram matrix ``expected``, or its first ``num_left`` rows and the columns after them."""
        norms = np.sqrt(np.diagonal(expected, axis1=-2, axis2=-1))
        scale = norms[..., :, None] * norms[..., None, :]
        # A thread sums up to 64 products in float32, a warp adds 32 of these by halving: at most 64 + 5 roundings of a sum
        # that stays below the product of the norms.
        eps = FLOAT64.eps if self.dtype is FLOAT64 else FLOAT32.eps
        if num_left:
            expected, scale = expected[..., :num_left, num_left:], scale[..., :num_left, num_left:]
        assert (np.abs(actual - expected) <= 70 * eps * scale + 1e-300).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_matches_float64_at_tails_and_chunks(dtype, num_rows):
    problem = Problem(dtype, num_rows, [1, 7, 191, 193, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 37])
    problem.check(problem.run(), problem.expected().sum(0))
    problem.check(problem.run(per_tensor=True), problem.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", [2, 3, 8, 11, 17])
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_rows_take_the_scalar_path(dtype, num_rows, offset):
    problem = Problem(dtype, num_rows, [5, CHUNK + 3], offset=offset)
    problem.check(problem.run(), problem.expected().sum(0))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=repr)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 8, 16, 64])
def test_each_byte_is_read_once(dtype, num_rows):
    problem = Problem(dtype, num_rows, [2 * CHUNK])
    problem.run()
    (report,) = problem.reports
    for row in problem.rows:
        assert report.alloc(row[0]).load_bytes == row[0].nbytes
        assert report.alloc(row[0]).load_sectors <= 1.02 * row[0].nbytes / 32


@pytest.mark.parametrize("num_rows", [2, 3, 8, 11, 17])
def test_absent_rows_count_as_zero(num_rows):
    problem = Problem(FLOAT32, num_rows, [CHUNK + 5, 100, 50])
    problem.rows[0][0] = problem.rows[1][1] = None
    for row in problem.rows:
        row[2] = None
    actual = problem.run(per_tensor=True)
    problem.check(actual, problem.expected())
    assert (actual[0, 0] == 0).all()
    assert (actual[2] == 0).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=repr)
@pytest.mark.parametrize("num_rows", [2, 8, 11])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
def test_squares_outside_float32(dtype, num_rows, size):
    problem = Problem(dtype, num_rows, [CHUNK + 5, 40])
    for k, row in enumerate(problem.rows):
        for buffer in row:
            dtype.store(dtype.load(buffer) * (size if k else 1.0), buffer)
    problem.check(problem.run(), problem.expected().sum(0))


@pytest.mark.parametrize("num_rows", [2, 8, 11])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_stays_in_its_row_and_column(num_rows, bad):
    problem = Problem(FLOAT32, num_rows, [CHUNK + 5])
    clean = problem.run()
    problem.rows[1][0][77] = bad
    dirty = problem.run()
    assert not np.isfinite(dirty[1]).any() or bad == np.inf
    assert not np.isfinite(dirty[1, 1])
    keep = np.arange(num_rows) != 1
    np.testing.assert_allclose(dirty[keep][:, keep], clean[keep][:, keep], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("num_rows", [2, 8, 11, 17])
def test_any_schedule_gives_the_same_bits(num_rows):
    problem = Problem(FLOAT32, num_rows, [2 * CHUNK + 5, 77])
    first = problem.run()
    for seed in (1, 2, 3):
        assert np.array_equal(first, problem.run(seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", [9, 64])
def test_totals_fit_the_shared_memory_of_every_chip(dtype, num_rows):
    _, _, dynamic = testing_module().gram_launch(DTYPES.index(dtype), num_rows)
    assert dynamic + 8 * 64 <= 99 * 1024  # with the row pointers; sm_86, 89 and 120 have the least


def test_resnet50_with_8_tasks_takes_two_launches():
    # 159 tensors fit in one table; stage two is the second launch.
    assert testing_module().capacity(8) >= 159


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize(("num_left", "num_other"), [(1, 1), (2, 3), (5, 4), (9, 13)])
def test_cross(dtype, num_left, num_other):
    problem = Problem(dtype, num_left + num_other, [7, CHUNK + 9])
    problem.rows[0][0] = problem.rows[-1][1] = None
    expected = problem.expected()
    for per_tensor in (False, True):
        actual = problem.run(per_tensor=per_tensor, num_other=num_other)
        problem.check_block(actual, expected if per_tensor else expected.sum(0), num_left)


# Terms that a thread sums without float64: equal gradients round the same way at every step, so the errors of a chain add up.
# It is at most 12 terms long (a quad of products, then up to 16 of these), 5 more for the lanes of a warp; on the tensor cores,
# where a sum is cut off rather than rounded, 8 to 16 at twice the error.
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=repr)
@pytest.mark.parametrize("num_rows", [2, 8, 11, 17])
def test_equal_gradients_lose_little(dtype, num_rows):
    problem = Problem(dtype, num_rows, [CHUNK])
    for row in problem.rows:
        dtype.store(np.full(CHUNK, 0.1234567), row[0])
    actual, expected = problem.run(), problem.expected()[0]
    assert np.abs(actual / expected - 1).max() <= 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 9, 17])
@pytest.mark.parametrize("rest", [1, 3, 32, 100, 260])
def test_channels(dtype, num_rows, rest):
    problem, channels = channel_problem(dtype, num_rows, [1, 7, 33], rest)
    problem.rows[-1][1] = None
    check_channels(problem, channels, rest)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=repr)
@pytest.mark.parametrize("num_rows", [2, 8, 11])
def test_long_channels_lose_little(dtype, num_rows):
    problem, channels = channel_problem(dtype, num_rows, [1], 20003)
    for row in problem.rows:
        dtype.store(np.full(20003, 0.1234567), row[0])
    out = [ptxsim.empty((1, num_rows, num_rows), dtype=np.float64)]
    check_channels(problem, channels, 20003, out=out)
    # Equal terms, as above. Pairs of different groups of tasks have chains of 16 products.
    assert np.abs(out[0] / problem.expected() - 1).max() <= 1e-6


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=repr)
@pytest.mark.parametrize(("num_left", "num_other"), [(1, 1), (3, 2), (5, 7)])
def test_cross_channels(dtype, num_left, num_other):
    problem, channels = channel_problem(dtype, num_left + num_other, [3, 9], 40)
    problem.rows[0][1] = None
    check_channels(problem, channels, 40, num_other)


@pytest.mark.parametrize("num_rows", [2, 8, 11])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
def test_channels_outside_float32(num_rows, size):
    problem, channels = channel_problem(FLOAT32, num_rows, [5, 9], 40)
    for k, row in enumerate(problem.rows):
        for buffer in row:
            buffer *= np.float32(size if k else 1.0)
    problem.rows[0][0][:] = 0
    check_channels(problem, channels, 40)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=repr)
@pytest.mark.parametrize("num_rows", [2, 4, 8])
def test_channels_read_each_byte_once(dtype, num_rows):
    problem, channels = channel_problem(dtype, num_rows, [64], 512)
    report = check_channels(problem, channels, 512)
    for row in problem.rows:
        assert report.alloc(row[0]).load_bytes == row[0].nbytes
        assert report.alloc(row[0]).load_sectors == row[0].nbytes // 32


def channel_problem(dtype, num_rows, channels, rest):
    return Problem(dtype, num_rows, [count * rest for count in channels]), channels


def check_channels(
    problem: Problem, channels: list[int], rest: int, num_other: int = 0, out: list[np.ndarray] | None = None
) -> "ptxsim.Report":
    """Runs the kernel and compares with float64."""
    dtype, num_rows = problem.dtype, problem.num_rows
    num_left = num_rows - num_other
    rows_class = next(k for k in (2, 4, 8, 64) if num_rows <= k)
    instance = f"gram_channels<{dtype.cpp}, {rows_class}>"
    module = compile_kernels("gram_channels.cuh", f"{instance}({TABLE}, int32_t)")
    out = out or [ptxsim.empty((count, num_left, num_other or num_left), dtype=np.float64) for count in channels]
    pointers = [[address(row[n]) for row in problem.rows] + [address(out[n]), rest] for n in range(len(channels))]
    ((table, blocks),) = testing_module().plan(pointers, channels, num_rows + 2, 32)
    read = [buffer for row in problem.rows for buffer in row if buffer is not None]
    arguments = [table, np.int32(num_other)]
    report = module.launch(instance, blocks, 128, arguments, mem=[*read, *out], outputs=out, readonly=read)
    for n, count in enumerate(channels):
        stacked = np.stack(
            [np.zeros((count, rest)) if row[n] is None else dtype.load(row[n]).reshape(count, rest) for row in problem.rows]
        )
        expected = np.einsum("icr,jcr->cij", stacked, stacked)
        if num_other:
            problem.check_block(out[n], expected, num_left)
        else:
            problem.check(out[n], expected)
    return report


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
def test_compiled_code_has_no_spills_and_leaves_room_for_warps(dtype, arch):
    narrow = dtype.storage().itemsize == 2
    chunks = {f"gram_chunks<{dtype.cpp}, {k}>({TABLE}, double*)": 128 for k in ((1, 2, 3, 4) if narrow else (1, 2, 3, 4, 8))}
    classes = {8: 128, 16: 128, 64: 255} if narrow else {16: 128, 64: 255}
    tensor_core = {f"gram_tensor_core<{dtype.cpp}, {k}>({TABLE}, double*)": bound for k, bound in classes.items()}
    rooms = {2: 80, 4: 128, 8: 168, 64: 255}
    channels = {f"gram_channels<{dtype.cpp}, {k}>({TABLE}, int32_t)": bound for k, bound in rooms.items()}
    # Two blocks of 256 threads fit beside each other up to 128 registers.
    for header, instances in (
        ("gram.cuh", chunks),
        ("gram_tensor_core.cuh", tensor_core),
        ("gram_channels.cuh", channels),
    ):
        module = compile_kernels(header, *instances, arch=arch)
        resources = module.resources()
        for instance, bound in instances.items():
            used = resources[module.find(instance[: instance.index("(")])]
            assert used["spill_loads"] == used["spill_stores"] == used["stack"] == 0, instance
            assert used["registers"] <= bound, instance
