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
    header, name = ("gram.cuh", "gram_chunks") if rows_class <= 8 else ("gram_tiles.cuh", "gram_tiles")
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

    def run(self, per_tensor: bool = False, seed: int | None = None) -> np.ndarray:
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
        gram = ptxsim.empty((len(slots), self.num_rows, self.num_rows), dtype=np.float64)
        capacity = (32764 - 60) // 12
        table = np.zeros((3, capacity), dtype=np.int32)
        table[:, : len(slots)] = np.array(slots).T
        finish().launch(
            "gram_finish",
            grid=(self.num_rows * (self.num_rows + 1) // 2, len(slots)),
            block=256,
            args=[table.tobytes(), partials, np.int32(self.rows_class), np.int32(self.num_rows), gram],
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
        norms = np.sqrt(np.diagonal(expected, axis1=-2, axis2=-1))
        scale = norms[..., :, None] * norms[..., None, :]
        # A thread sums up to 64 products in float32, a warp adds 32 of these by halving: at most 64 + 5 roundings of a sum
        # that stays below the product of the norms.
        eps = FLOAT64.eps if self.dtype is FLOAT64 else FLOAT32.eps
        assert (np.abs(actual - expected) <= 70 * eps * scale + 1e-300).all()
        assert np.array_equal(actual, np.swapaxes(actual, -1, -2))


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
def test_tiles_fit_the_shared_memory_of_every_chip(dtype, num_rows):
    _, _, dynamic = testing_module().gram_launch(DTYPES.index(dtype), num_rows)
    assert dynamic + 8 * 64 <= 99 * 1024  # with the row pointers; sm_86, 89 and 120 have the least


def test_resnet50_with_8_tasks_takes_two_launches():
    # 159 tensors fit in one table; stage two is the second launch.
    assert testing_module().capacity(8) >= 159


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("rest", [1, 3, 32, 100])
def test_channels(dtype, num_rows, rest):
    channels = [1, 7, 33]
    problem = Problem(dtype, num_rows, [count * rest for count in channels])
    problem.rows[-1][1] = None
    rows = 2 if num_rows <= 2 else 4
    module = compile_kernels("gram_channels.cuh", f"gram_channels<{dtype.cpp}, {rows}>({TABLE})")
    out = [ptxsim.empty((count, num_rows, num_rows), dtype=np.float64) for count in channels]
    pointers = [[address(row[n]) for row in problem.rows] + [address(out[n]), rest] for n in range(3)]
    ((table, blocks),) = testing_module().plan(pointers, channels, num_rows + 2, 32)
    read = [buffer for row in problem.rows for buffer in row if buffer is not None]
    module.launch(f"gram_channels<{dtype.cpp}, {rows}>", blocks, 256, [table], mem=[*read, *out], outputs=out, readonly=read)
    for n, count in enumerate(channels):
        stacked = np.stack(
            [np.zeros((count, rest)) if row[n] is None else dtype.load(row[n]).reshape(count, rest) for row in problem.rows]
        )
        problem.check(out[n], np.einsum("icr,jcr->cij", stacked, stacked))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, FLOAT64], ids=repr)
def test_compiled_code_has_no_spills_and_leaves_room_for_warps(dtype, arch):
    chunks = [f"gram_chunks<{dtype.cpp}, {k}>({TABLE}, double*)" for k in (1, 2, 3, 4, 8)]
    tiles = [f"gram_tiles<{dtype.cpp}, {k}>({TABLE}, double*)" for k in (16, 64)]
    channels = [f"gram_channels<{dtype.cpp}, {k}>({TABLE})" for k in (2, 4)]
    # Two blocks of 256 threads fit beside each other up to 128 registers. One block of tiles is enough: its loads in flight
    # are the stages in shared memory.
    for header, instances, bound in (
        ("gram.cuh", chunks, 128),
        ("gram_tiles.cuh", tiles, 168),
        ("gram_channels.cuh", channels, 128),
    ):
        for name, used in compile_kernels(header, *instances, arch=arch).resources().items():
            assert used["spill_loads"] == used["spill_stores"] == used["stack"] == 0, name
            assert used["registers"] <= bound, name
