"""The CUDA kernel of mix, run on the CPU from its PTX with the launch plan's arguments, against float64."""

import numpy as np
import ptxsim
import pytest
from device import DTYPES, FLOAT32, DType, address, compile_kernels, requires_nvcc, testing_module, weighted_sum

pytestmark = requires_nvcc

CHUNK = 8192
PARAMETERS = "const __grid_constant__ TensorTable, int32_t, const double*"


def kernel(dtype: DType, arch: str = "sm_90") -> "ptxsim.Module":
    return compile_kernels("mix.cuh", f"mix<{dtype.cpp}>({PARAMETERS})", arch=arch)


class Problem:
    """Gradients of tensors of the given sizes, coefficients, and the launches that mix them."""

    def __init__(self, dtype: DType, num_rows: int, num_results: int, sizes: list[int], offset: int = 0) -> None:
        random = np.random.default_rng(num_rows + 100 * num_results + 10000 * offset)
        self.dtype, self.num_rows, self.sizes = dtype, num_rows, sizes
        self.rows = [dtype.random_row(random, sizes, offset if k % 2 else 0) for k in range(num_rows)]
        self.out = [[dtype.empty(size) for size in sizes] for _ in range(num_results)]
        self.coefficients = ptxsim.empty((num_results, num_rows), dtype=np.float64)
        self.coefficients[...] = random.standard_normal(self.coefficients.shape)

    def run(self, seed: int | None = None) -> "ptxsim.Report":
        testing = testing_module()
        num_results = len(self.out)
        threads, shared = testing.mix_launch(DTYPES.index(self.dtype), self.num_rows, num_results)
        pointers = [[address(row[n]) for row in [*self.rows, *self.out]] for n in range(len(self.sizes))]
        read = [buffer for row in self.rows for buffer in row if buffer is not None]
        written = [buffer for row in self.out for buffer in row]
        ((table, blocks),) = testing.plan(pointers, self.sizes, self.num_rows + num_results)
        return kernel(self.dtype).launch(
            f"mix<{self.dtype.cpp}>",
            grid=blocks,
            block=threads,
            shared=shared,
            args=[table, np.int32(self.num_rows), self.coefficients],
            mem=[*read, *written],
            outputs=written,
            readonly=[*read, self.coefficients],
            **({} if seed is None else {"seed": seed}),
        )

    def check(self) -> None:
        for weights, row in zip(self.coefficients, self.out, strict=True):
            for n, actual in enumerate(row):
                terms = [
                    weight * self.dtype.load(gradient[n])
                    for weight, gradient in zip(weights, self.rows, strict=True)
                    if gradient[n] is not None and weight != 0
                ]
                self.dtype.assert_weighted_sum(actual, *weighted_sum(terms, actual.size), self.num_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
@pytest.mark.parametrize(("num_rows", "num_results"), [(1, 1), (2, 2), (3, 5), (8, 8), (17, 3), (5, 19)])
def test_matches_float64_at_tails_and_chunks(dtype, num_rows, num_results):
    problem = Problem(dtype, num_rows, num_results, [1, 7, 255, CHUNK + 1])
    problem.run()
    problem.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
def test_largest(dtype):
    problem = Problem(dtype, 64, 64, [300])
    problem.run()
    problem.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=repr)
def test_misaligned_rows_take_the_scalar_path(dtype):
    problem = Problem(dtype, 3, 3, [5, 1000], offset=1)
    problem.run()
    problem.check()


@pytest.mark.parametrize(("num_rows", "num_results"), [(2, 2), (8, 8), (17, 6)])
def test_each_byte_is_read_once_and_written_once(num_rows, num_results):
    problem = Problem(FLOAT32, num_rows, num_results, [2 * CHUNK])
    report = problem.run()
    for row in problem.rows:
        assert report.alloc(row[0]).load_bytes == row[0].nbytes
        assert report.alloc(row[0]).load_sectors == row[0].nbytes // 32
    for row in problem.out:
        assert report.alloc(row[0]).store_bytes == row[0].nbytes
        assert report.alloc(row[0]).store_sectors == row[0].nbytes // 32
        assert report.alloc(row[0]).load_bytes == 0


def test_absent_rows_and_coefficients_of_zero_leave_a_row_out():
    problem = Problem(FLOAT32, 4, 3, [CHUNK + 5, 100])
    problem.rows[1][0] = None
    problem.coefficients[:, 2] = 0  # never read
    problem.coefficients[1, 3] = 0  # not in the second result
    problem.rows[2][0][...] = np.nan
    problem.rows[3][0][...] = np.inf
    report = problem.run()
    assert report.alloc(problem.rows[2][0]).load_bytes == 0
    assert np.isfinite(problem.out[1][0]).all()
    assert np.isinf(problem.out[0][0]).all()
    problem.rows[3][0][...] = 1
    problem.run()
    problem.check()


@pytest.mark.parametrize("scale", [1e-60, 1e-35, 1e35, 1e60])
def test_coefficients_outside_float32(scale):
    problem = Problem(FLOAT32, 2, 3, [CHUNK + 9])
    for row in problem.rows:
        row[0] *= np.float32(1e-20 if scale > 1 else 1e20)
    problem.coefficients *= scale
    problem.run()
    for weights, row in zip(problem.coefficients, problem.out, strict=True):
        value = sum(weight * gradient[0].astype(np.float64) for weight, gradient in zip(weights, problem.rows, strict=True))
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(row[0], value.astype(np.float32), rtol=1e-6, atol=2.0**-148)


@pytest.mark.parametrize("num_rows", [3, 17])
def test_any_schedule_gives_the_same_bits(num_rows):
    problem = Problem(FLOAT32, num_rows, 5, [CHUNK + 5, 77])
    problem.run()
    first = [buffer.copy() for row in problem.out for buffer in row]
    for seed in (1, 2):
        problem.run(seed=seed)
        assert all(np.array_equal(a, b) for a, b in zip(first, (buffer for row in problem.out for buffer in row), strict=True))


def test_the_largest_block_fits_the_shared_memory_of_every_chip():
    sizes = [testing_module().mix_launch(d, rows, 64)[1] for d in range(4) for rows in (1, 16, 17, 64)]
    assert max(sizes) + 2 * 8 * 64 <= 99 * 1024  # with the pointers; sm_86, 89 and 120 have the least


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiled_code_has_no_spills_and_leaves_room_for_warps(arch):
    for dtype in DTYPES:
        for used in kernel(dtype, arch).resources().values():
            assert used["spill_loads"] == used["spill_stores"] == used["stack"] == 0, dtype
            assert used["registers"] <= 80, dtype
