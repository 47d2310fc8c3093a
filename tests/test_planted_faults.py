"""A fault of every kind, planted in a copy of the device code, is caught by the ordinary checks; else these prove nothing."""

import math
import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import device
import kernels
import numpy as np
import ptxsim
import pytest
import sass
import test_cuda_combine
import test_cuda_excess_risk
import test_cuda_finish
import test_cuda_flat
import test_cuda_gradient_dropout
import test_cuda_gram
import test_cuda_mix
import test_cuda_priority
import test_cuda_trimmed_mean
from device import CSRC, FLOAT16, FLOAT32, address, requires_nvcc
from ptxsim import SimError
from ptxsim.roofline import CHIPS
from simulated import Launch

pytestmark = requires_nvcc

Plant = Callable[..., Path]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Replaces text of a file of csrc, in a copy that everything compiles from until the test ends; returns the copy."""

    def run(file: str, *changes: tuple[str, str]) -> Path:
        for folder in ("cuda", "common", "testing"):
            shutil.copytree(CSRC / folder, tmp_path / folder, dirs_exist_ok=True)
        text = (tmp_path / file).read_text()
        for old, new in changes:
            assert old in text, f"{old!r} is not in {file} any more; plant the fault elsewhere"
            text = text.replace(old, new)
        (tmp_path / file).write_text(text)
        monkeypatch.setattr(device, "CSRC", tmp_path)
        forget()
        return tmp_path

    def forget() -> None:
        device.compile_kernels.cache_clear()
        device.testing_module.cache_clear()

    yield run
    forget()


def test_a_missing_barrier_is_a_race(plant):
    plant(
        "cuda/reduce.cuh",
        ("  __syncthreads();\n  for (int i = threadIdx.x; i < count", "  for (int i = threadIdx.x; i < count"),
    )
    with pytest.raises(SimError) as caught:
        test_cuda_gram.test_matches_float64_at_tails_and_chunks(FLOAT32, 3)
    assert caught.value.kind in ("race", "uninitialised")


def test_two_threads_that_store_different_values_are_a_race(plant):
    plant("cuda/reduce.cuh", ("if (threadIdx.x % kWarpSize == 0) scratch", "scratch"))
    with pytest.raises(SimError) as caught:
        test_cuda_gram.test_matches_float64_at_tails_and_chunks(FLOAT32, 3)
    assert caught.value.kind == "race"


def test_a_tail_that_runs_out_of_bounds(plant):
    plant("cuda/combine.cuh", ("thread; e < end; e +=", "thread; e <= end; e +="))
    with pytest.raises(SimError) as caught:
        test_cuda_combine.test_matches_float64_at_tails_and_chunks(FLOAT32, 2)
    assert caught.value.kind == "out-of-bounds"


def test_a_misaligned_vector_load(plant):
    plant("cuda/vec.cuh", ("return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;", "return true;"))
    with pytest.raises(SimError) as caught:
        test_cuda_gram.test_misaligned_rows_take_the_scalar_path(FLOAT32, 3, 1)
    assert caught.value.kind == "misaligned"


def test_a_forgotten_absent_row(plant):
    plant("cuda/gram.cuh", ("rows[k] ? widen(rows[k][e]) : Sum<T>(0)", "widen(rows[k][e])"))
    with pytest.raises(SimError) as caught:
        test_cuda_gram.test_absent_rows_count_as_zero(3)
    assert caught.value.kind == "out-of-bounds"
    assert caught.value.address < kernels.CHUNK * 16  # at an offset from null


def test_a_dropped_tail(plant):
    plant("cuda/gram.cuh", ("threadIdx.x; e < chunk.end; e += kGramThreads", "threadIdx.x; e < 0; e += kGramThreads"))
    with pytest.raises(AssertionError):
        test_cuda_gram.test_matches_float64_at_tails_and_chunks(FLOAT32, 3)


def test_float_atomics_depend_on_the_schedule(plant):
    ordered = "if (threadIdx.x % kWarpSize == 0) scratch[warp * count + i] = sum;"
    atomic = """if (threadIdx.x == 0) scratch[i] = 0;
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) atomicAdd(scratch + i, sum);"""
    plant("cuda/reduce.cuh", (ordered, atomic), ("w < warps", "w < 1"))
    with pytest.raises(AssertionError):
        test_cuda_gram.test_any_schedule_gives_the_same_bits(3)


def test_a_missing_wait_for_asynchronous_copies(plant):
    plant("cuda/mix.cuh", ("  __pipeline_wait_prior(0);\n", ""))
    with pytest.raises(SimError) as caught:
        test_cuda_mix.test_matches_float64_at_tails_and_chunks(FLOAT32, 3, 5)
    assert caught.value.kind == "uninitialised"


PRIORITY_FAULTS = {
    "results before the products": ("if (layer.top()) wait_for(done, blocks + 1);", "", {"resident": "all", "seed": 1}),
    "alphas of half the products": ("block < blocks; block += groups", "block < blocks / 2; block += groups", {}),
    "alphas when the first block is done": ("arrive(done) != blocks - 1", "arrive(done) != 0", {}),
    "blocks that do not count": (
        "before = atomicAdd(done, 1);",
        "before = *done; *done = before + 1;",
        {"resident": "all", "seed": 3},
    ),
    "a slice that is too long": ("int(left < shape.length ? left : shape.length)", "shape.length", {}),
    "no barrier before the sums": ("  __syncthreads();\n  double* matrix", "  double* matrix", {}),
    "another task's products": ("if (tops[slot] == i) sum", "if (tops[slot] >= 0) sum", {}),
    "no projection": ("sums[v][l] += Sum<T>(alpha) * value;", "", {}),
}


@pytest.mark.parametrize("fault", PRIORITY_FAULTS)
def test_faults_of_the_priority_kernel(plant, fault):
    old, new, options = PRIORITY_FAULTS[fault]
    plant("cuda/priority.cuh", (old, new))
    with pytest.raises((SimError, AssertionError)):
        test_cuda_priority.run_kernel(**options)


TRIM_FAULTS = {
    "NaN that is lost": ("max.NaN.f32", "max.f32"),
    "NaN that is kept": ("return fminf(a, b);", "return a < b ? a : b;"),
    "a row that has pushed nothing out": ("r < kept ? Order<T>::smallest() : row[c]", "row[c]"),
    "a row too many": ("r >= 2 * kept", "r >= 2 * kept - 1"),
    "ends that are full from the start": ("low[i][c] = i < kept ?", "low[i][c] = true ?"),
    "the divisor of all tasks": ("count - 2 * kept : 1", "count : 1"),
    "tasks that are not active": ("(!active || active[k])", "true"),
    "absent rows that are read": ("@present ld.global", "ld.global"),
    "rows before they are gathered": ("__syncthreads();\n  const int most", "const int most"),
    "a short tail": ("e < end; e += kTrimThreads", "e < end - 1; e += kTrimThreads"),
    "a tail that runs out of bounds": ("e < end; e += kTrimThreads", "e <= end; e += kTrimThreads"),
    "cells of another thread": ("upper ? low : high, step", "upper ? high : low, step"),
    "results in one cell": ("[threadIdx.x % Shape::split] =", "[0] ="),
}


@pytest.mark.parametrize("fault", TRIM_FAULTS)
def test_faults_of_the_trimmed_mean(plant, fault):
    plant("cuda/trimmed_mean.cuh", TRIM_FAULTS[fault])
    with pytest.raises((SimError, AssertionError)):
        test_cuda_trimmed_mean.test_kernels_alone((64, 32), 21, 9)


@pytest.mark.parametrize(
    ("old", "new", "num_rows", "size"),
    [
        ("for (int k = 1; k < K; k += 2)", "for (int k = 3; k < K; k += 2)", 6, 1.0),
        ("first * second : second - first", "first * second : first - second", 6, 1.0),
        ("threadIdx.x / 4 % 2", "threadIdx.x / 8 % 2", 12, 1.0),
        ("kind == PairForm::none ? read(grad, e)", "true ? read(grad, e)", 6, 1e-30),
        ("pointers[odd ? k - 1 : k]", "pointers[k]", 6, 1e-30),
    ],
    ids=["first pair", "sign", "lanes", "float64", "float64 first"],
)
def test_rows_formed_wrongly(plant, old, new, num_rows, size):
    plant("cuda/paired_gram.cuh", (old, new))
    with pytest.raises((AssertionError, SimError)):
        test_cuda_flat.run_kernel(num_rows, size)


NOISE_FAULTS = {
    "a tail too long": ("cuda/gradient_dropout.cuh", "e < chunk.end; e += kNoise", "e <= chunk.end; e += kNoise", {}),
    "no tail": ("cuda/gradient_dropout.cuh", "e < chunk.end; e += kNoise", "e < 0; e += kNoise", {}),
    "a misaligned gradient": (
        "cuda/gradient_dropout.cuh",
        "is_aligned(grad) && is_aligned(out)",
        "is_aligned(out)",
        {"offset": 1},
    ),
    "words of a chunk": ("cuda/gradient_dropout.cuh", "(e + first) / 4)", "(e + first) % 8192 / 4)", {}),
    "words of a tail": ("cuda/gradient_dropout.cuh", "place, e / 4)", "place, (e - 1) / 4)", {}),
    "the first tensor's words": ("cuda/gradient_dropout.cuh", "uintptr_t>(pointers[2])", "uintptr_t>(pointers[2]) * 0", {}),
    "one pair twice": ("cuda/gradient_dropout.cuh", "words.word[i + 1]", "words.word[1]", {}),
    "two cosines": ("cuda/gradient_dropout.cuh", "normal_cosine(odd - kQuarterTurn)", "normal_cosine(odd)", {}),
    "two cosines in a tail": ("cuda/gradient_dropout.cuh", "odd - (e & 1 ? kQuarterTurn : 0)", "odd", {}),
    "half the angles": ("cuda/random.cuh", "int32_t(word) < 0 ? 0u - word : word", "word", {}),
    "a root rounded down": ("cuda/random.cuh", "__fsqrt_rn", "__fsqrt_rd", {}),
    "a coefficient's last place": ("common/normal.h", "-1.3862943649291992f", "-1.3862944841384888f", {}),
    "a rate's last place": ("common/gradient_dropout.h", "root(S(p) / keep)", "root(S(p)) / root(keep)", {}),
    "twice the rate": ("common/gradient_dropout.h", "p * 0x1p32", "p * 0x1p33", {"mode": "bernoulli"}),
    "no scale": ("common/gradient_dropout.h", "S(1) / keep", "S(1)", {"mode": "bernoulli"}),
}


@pytest.mark.parametrize("fault", NOISE_FAULTS)
def test_faults_of_gradient_dropout(plant, fault):
    file, old, new, options = NOISE_FAULTS[fault]
    plant(file, (old, new))
    with pytest.raises((SimError, AssertionError)):
        test_cuda_gradient_dropout.run_kernel(**options)


def test_fused_multiply_adds_give_other_bits():
    """What the flag of setup.py is for."""
    assert kernels.setup_script()["FLAGS"]["csrc/cuda/gradient_dropout.cu"] == list(test_cuda_gradient_dropout.FLAGS)
    with pytest.raises(AssertionError):
        test_cuda_gradient_dropout.run_kernel(flags=())


FINISH_FAULTS = {
    "no barrier before the rule": ("finish.cuh", "  __syncthreads();\n  const Rule rule", "  const Rule rule"),
    "a dropped tail": (
        "finish.cuh",
        "e < end; e += kFinishThreads) {\n    Sum<T> sum",
        "e < 0; e += kFinishThreads) {\n    Sum<T> sum",
    ),
    "a tail out of bounds": (
        "finish.cuh",
        "e < end; e += kFinishThreads) {\n    Sum<T> sum",
        "e <= end; e += kFinishThreads) {\n    Sum<T> sum",
    ),
    "another state": ("finish.cuh", "from.num_rows + 1 + r", "from.num_rows + 1 + (r == 1 ? 2 : r)"),
    "a state that stays": ("finish.cuh", "if (rule.writes(r)) store_packed", "if (r != 2) store_packed"),
    "no gradient": ("finish.cuh", "move<Math>(sums[0][lane], values)", "move<Math>(Sum<T>(0), values)"),
    "no bias correction": ("../common/finish.h", "pow(options.beta1, step)", "pow(options.beta1, 100.0)"),
    "no decay": ("../common/finish.h", "1 - lr * options.weight_decay : 1", "1 : 1"),
}


@pytest.mark.parametrize("fault", FINISH_FAULTS)
def test_faults_of_the_finish(plant, fault):
    file, old, new = FINISH_FAULTS[fault]
    plant(f"cuda/{file}", (old, new))
    with pytest.raises((SimError, AssertionError)):
        test_cuda_finish.run_kernel()


EXCESS_FAULTS = {
    "a dropped tail": ("e < end; e += kExcessThreads", "e < 0; e += kExcessThreads", {}),
    "a tail out of bounds": ("e < end; e += kExcessThreads", "e <= end; e += kExcessThreads", {}),
    "a vector too many": ("* Beside<T>::lanes : chunk.begin", "* Beside<T>::lanes + 4 : chunk.begin", {}),
    "a batch that is left out": (
        "i < kExcessBatch; ++i) {\n      if (e + i * step >= vectors_end) continue;\n      S few",
        "i < 1; ++i) {\n      S few",
        {},
    ),
    "a misaligned gradient": ("is_aligned(grad) && is_aligned(memory)", "is_aligned(memory)", {"offset": 1}),
    "no factor": ("excess(factor * S(", "excess(S(", {}),
    "a gradient that is not in the root": ("h * h + (memory + epsilon)", "memory + epsilon", {}),
    "squares that overflow unseen": (" + (square - square);", ";", {"size": 1e21}),
    "a memory that overflows unseen": (" + (square - square);", ";", {"size": 1e19, "kept": 3e38}),
    "terms that underflow": ("&& out_of_range(total[0])", "&& !(total[0] < 0x1p127)", {"size": 1e-25}),
    "terms that underflow to 0": ("wide = any_nonzero", "wide = false && any_nonzero", {"size": 1e-38}),
    "sums in one place": ("[chunk.begin / kDeviceChunk] =", "[0] =", {}),
}


@pytest.mark.parametrize("fault", EXCESS_FAULTS)
def test_faults_of_the_excess_risk(plant, fault):
    old, new, options = EXCESS_FAULTS[fault]
    plant("cuda/excess_risk.cuh", (old, new))
    with pytest.raises((SimError, AssertionError)):
        test_cuda_excess_risk.run_kernel(**options)


# --- indices ------------------------------------------------------------------------------------------------------------------


def combine_past_2_to_the_31() -> None:
    """Combines the last chunk of two float16 gradients with 2^31 + 100 elements, which take no memory where none is touched."""
    size, tail = 2**31 + 100, 100
    rows = [np.frombuffer(mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | 0x4000), np.float16) for _ in range(3)]
    for k, row in enumerate(rows):
        row[-tail:] = k + 1
    weights = ptxsim.empty(2, dtype=np.float64)
    weights[...] = 2, 3
    ((table, blocks),) = device.testing_module().plan([[*map(address, [*rows, weights])]], [size], 4)
    assert blocks == math.ceil(size / kernels.CHUNK)  # of which block 0 takes the last
    test_cuda_combine.kernels(FLOAT16).launch(
        "combine<__half,2>", grid=1, block=device.THREADS, args=[table], mem=rows, readonly=[*rows[:2], weights]
    )
    assert (rows[2][-tail:] == 2 * 1 + 3 * 2).all()


def test_elements_past_2_to_the_31():
    combine_past_2_to_the_31()


@pytest.mark.parametrize(
    ("file", "index", "narrow"),
    [
        (
            "common/launch_plan.h",
            "int64_t(block - offsets[low]) * chunk_size",
            "int32_t(unsigned(block - offsets[low]) * chunk_size)",
        ),
        ("cuda/combine.cuh", "for (int64_t e = ", "for (int32_t e = "),
    ],
    ids=["plan", "kernel"],
)
def test_a_32_bit_index(plant, file, index, narrow):
    plant(file, (index, narrow))
    with pytest.raises((SimError, AssertionError)):
        combine_past_2_to_the_31()


# --- compiled code ------------------------------------------------------------------------------------------------------------

ONE_WARP = """
__global__ void __launch_bounds__(32) one_warp(const float4* from, float* to, int count) {
  extern __shared__ float memory[];  // as much as a block can have: one warp on the SM
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += 32) {
    const float4 value = from[i];
    sum += value.x + value.y + value.z + value.w;
  }
  memory[threadIdx.x] = sum;
  to[blockIdx.x * 32 + threadIdx.x] = memory[threadIdx.x];
}
"""


@pytest.mark.parametrize("name", ["A100", "H100", "B200"])
def test_one_warp_a_multiprocessor_has_too_little_in_flight(tmp_path, name):
    chip = CHIPS[name]
    (tmp_path / "one_warp.cu").write_text(ONE_WARP)
    functions, resources = sass.compile_source(tmp_path / "one_warp.cu", chip.arch)
    ((symbol, function),) = functions.items()
    compiled = kernels.Compiled(symbol, function, resources[symbol])
    launch = Launch("one_warp", (chip.sms, 1, 1), (32, 1, 1), chip.shared_bytes - 1024, 0, 0, ptxsim.Report())

    assert function.bytes_in_flight == 16
    assert kernels.resident_blocks(chip, compiled, launch) == 1
    assert kernels.bytes_in_flight(chip, compiled, launch) < kernels.bytes_in_flight_bar(chip) / 10
    # The same code in blocks that fit beside each other has 64 times as much.
    many = Launch("many_warps", (chip.sms, 1, 1), (1024, 1, 1), 0, 0, 0, ptxsim.Report())
    assert kernels.bytes_in_flight(chip, compiled, many) == 2048 * 16


def test_too_few_registers_spill(plant):
    ordinary = kernels.compile_library_source(CSRC / "cuda/mix.cu", "sm_90")
    assert not [complaint for kernel in ordinary.values() for complaint in kernels.complaints(kernel)]

    changed = plant("cuda/mix.cuh", ("__launch_bounds__(256)", "__launch_bounds__(256, 8)"))  # 32 registers
    starved = kernels.compile_library_source(changed / "cuda/mix.cu", "sm_90")
    assert any("spill" in complaint for kernel in starved.values() for complaint in kernels.complaints(kernel))
