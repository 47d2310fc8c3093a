"""The CUDA kernels of combine, run on the CPU from their PTX with the launch plan's arguments, against float64."""

import numpy as np
import ptxsim
import pytest
from device import DTYPES, FLOAT32, THREADS, DType, address, compile_kernels, requires_nvcc, testing_module, weighted_sum

pytestmark = requires_nvcc

CLASSES = [1, 2, 3, 4, 8, 64]
NUM_ROWS = [1, 2, 3, 4, 5, 8, 9, 11, 16, 17, 64]
CHUNK = 8192


def class_of(num_rows: int) -> int:
    return next(k for k in CLASSES if num_rows <= k)


def kernels(dtype: DType) -> "ptxsim.Module":
    return compile_kernels("combine.cuh", *(f"combine<{dtype.cpp}, {k}>(const __grid_constant__ TensorTable)" for k in CLASSES))


class Problem:
    """Gradients of tensors of the given sizes, weights, results, and the launches that combine them."""

    def __init__(self, dtype: DType, num_rows: int, sizes: list[int], offset: int = 0, per_tensor: bool = False) -> None:
        random = np.random.default_rng(num_rows + 1000 * offset + len(sizes))
        self.dtype, self.num_rows, self.sizes = dtype, num_rows, sizes
        self.rows = [dtype.random_row(random, sizes, offset if k % 2 else 0) for k in range(num_rows)]
        self.out = [dtype.empty(size) for size in sizes]
        self.weights = ptxsim.empty((len(sizes), num_rows), dtype=np.float64)
        self.weights[...] = random.standard_normal(self.weights.shape if per_tensor else num_rows)

    def run(self, seed: int | None = None, written: bool = True, grid: int | None = None) -> list["ptxsim.Report"]:
        pointers = [
            [address(row[n]) for row in self.rows] + [address(self.out[n]), address(self.weights[n])]
            for n in range(len(self.sizes))
        ]
        rows = [buffer for row in self.rows for buffer in row if buffer is not None]
        read = [buffer for buffer in rows if not any(np.shares_memory(buffer, out) for out in self.out)]
        options = {} if seed is None else {"seed": seed}
        launches = testing_module().plan(pointers, self.sizes, self.num_rows + 2)
        reports = []
        for table, blocks in launches:
            reports.append(
                kernels(self.dtype).launch(
                    f"combine<{self.dtype.cpp}, {class_of(self.num_rows)}>",
                    grid=grid or blocks,
                    block=THREADS,
                    args=[table],
                    mem=[*rows, *self.out, self.weights],
                    outputs=self.out if written and len(launches) == 1 else [],
                    readonly=[*read, self.weights],
                    **options,
                )
            )
        return reports

    def expected(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The results in float64, and the sums of the terms' magnitudes."""
        sums, sizes = [], []
        for n, size in enumerate(self.sizes):
            terms = [
                self.weights[n, k] * self.dtype.load(row[n])
                for k, row in enumerate(self.rows)
                if row[n] is not None and self.weights[n, k] != 0
            ]
            value, magnitude = weighted_sum(terms, size)
            sums.append(value)
            sizes.append(magnitude)
        return sums, sizes

    def check(self, expected: tuple[list[np.ndarray], list[np.ndarray]] | None = None) -> None:
        for actual, value, size in zip(self.out, *(expected or self.expected()), strict=True):
            self.dtype.assert_weighted_sum(actual, value, size, self.num_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_matches_float64_at_tails_and_chunks(dtype, num_rows):
    problem = Problem(dtype, num_rows, [1, 7, 255, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37])
    problem.run()
    problem.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", [2, 3, 8, 11])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_rows_take_the_scalar_path(dtype, num_rows, offset):
    problem = Problem(dtype, num_rows, [5, 1000, CHUNK + 3], offset=offset)
    problem.run()
    problem.check()


@pytest.mark.parametrize("num_rows", [2, 3, 8, 11])
def test_weights_of_each_tensor(num_rows):
    problem = Problem(FLOAT32, num_rows, [17, 4096, 300], per_tensor=True)
    problem.run()
    problem.check()


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 17])
def test_each_byte_is_read_once_and_written_once(num_rows):
    problem = Problem(FLOAT32, num_rows, [4 * CHUNK])
    (report,) = problem.run()
    for row in problem.rows:
        assert report.alloc(row[0]).load_bytes == row[0].nbytes
        assert report.alloc(row[0]).load_sectors == row[0].nbytes // 32
    assert report.alloc(problem.out[0]).store_bytes == problem.out[0].nbytes
    assert report.alloc(problem.out[0]).store_sectors == problem.out[0].nbytes // 32
    assert report.alloc(problem.out[0]).load_bytes == 0


@pytest.mark.parametrize("num_rows", [3, 8, 11])
def test_absent_rows_and_rows_of_weight_zero_are_not_read(num_rows):
    problem = Problem(FLOAT32, num_rows, [CHUNK + 5, 100])
    problem.rows[1][0] = None
    problem.weights[:, 2] = 0
    problem.rows[2][0][...] = np.nan
    (report,) = problem.run()
    problem.check()
    assert report.alloc(problem.rows[2][0]).load_bytes == 0
    assert report.alloc(problem.rows[2][1]).load_bytes == 0


def test_all_rows_absent_gives_zero():
    problem = Problem(FLOAT32, 2, [100])
    problem.weights[...] = 0
    problem.run()
    assert (problem.out[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize("num_rows", [2, 8, 11])
def test_in_place(dtype, num_rows):
    problem = Problem(dtype, num_rows, [CHUNK + 9, 33])
    expected = problem.expected()
    problem.out = [problem.rows[1][n] for n in range(2)]
    problem.run(written=False)
    problem.check(expected)


@pytest.mark.parametrize("scale", [1e-60, 1e-35, 1e35, 1e60])
def test_weights_outside_float32(scale):
    problem = Problem(FLOAT32, 2, [CHUNK + 9])
    size = 1e-20 if scale > 1 else 1e20
    for row in problem.rows:
        row[0] *= np.float32(size)
    problem.weights *= scale
    problem.run()
    value = problem.expected()[0][0].astype(np.float32)
    np.testing.assert_allclose(problem.out[0], value, rtol=1e-6, atol=2.0**-148)


@pytest.mark.parametrize("num_rows", [3, 8, 11])
def test_any_schedule_gives_the_same_bits(num_rows):
    problem = Problem(FLOAT32, num_rows, [3 * CHUNK + 5, 77])
    problem.run()
    first = [out.copy() for out in problem.out]
    for seed in (1, 2, 3):
        problem.run(seed=seed)
        assert all(np.array_equal(a, b) for a, b in zip(first, problem.out, strict=True))


def test_tensors_past_one_table_take_more_launches():
    testing = testing_module()
    capacity = testing.capacity(4)
    problem = Problem(FLOAT32, 2, [5] * (capacity + 3))
    assert len(problem.run()) == 2
    problem.check()


def test_the_capacity_is_that_of_the_formula():
    testing = testing_module()
    assert testing.TABLE_BYTES + 60 <= 32764
    for num_pointers in (1, 2, 4, 10, 66):
        assert testing.capacity(num_pointers) == (testing.TABLE_BYTES - 16 - 4) // (8 * num_pointers + 12)


def test_chunks_of_a_plan_with_more_than_2_to_the_31_elements():
    testing = testing_module()
    sizes = [3, 2**33 + 5, 2**31 - 1, 7]
    ((table, blocks),) = testing.plan([[0, 0]] * 4, sizes, 2)
    chunks = [(size + CHUNK - 1) // CHUNK for size in sizes]
    assert blocks == sum(chunks)
    assert testing.chunk_of_block(table, 0) == (0, 0, 3)
    assert testing.chunk_of_block(table, 1) == (1, 0, CHUNK)
    assert testing.chunk_of_block(table, chunks[1]) == (1, 2**33, 2**33 + 5)
    assert testing.chunk_of_block(table, chunks[1] + 1) == (2, 0, CHUNK)
    assert testing.chunk_of_block(table, blocks - 2) == (2, 2**31 - CHUNK, 2**31 - 1)
    assert testing.chunk_of_block(table, blocks - 1) == (3, 0, 7)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiled_code_has_no_spills_and_leaves_room_for_warps(arch):
    instances = [f"combine<{dtype.cpp}, {k}>(const __grid_constant__ TensorTable)" for dtype in DTYPES for k in CLASSES]
    resources = compile_kernels("combine.cuh", *instances, arch=arch).resources()
    assert len(resources) == len(instances)
    for name, used in resources.items():
        assert used["spill_loads"] == used["spill_stores"] == used["stack"] == 0, name
        assert used["registers"] <= 128, name


def test_the_first_block_takes_the_last_chunk():
    problem = Problem(FLOAT32, 2, [CHUNK, CHUNK + 9])
    problem.run(written=False, grid=1)
    value = problem.expected()[0][1]
    assert np.allclose(problem.out[1][CHUNK:], value[CHUNK:], atol=1e-5)
    assert not problem.out[1][:CHUNK].any()
    assert not problem.out[0].any()
