#pragma once
// The combination of task gradients and a step of SGD or Adam along it: each gradient, parameter and state is read once, each
// parameter and state written once, and the combined gradient stays in registers.
//
// Weights, learning rate, steps and the flag that skips the update stay on the device. Sums are as combine's, rounded to
// float32 (float64 of float64), in which the step is computed. A parameter or state may be one of the gradients.

#include <type_traits>

#include "../common/finish.h"
#include "combine.cuh"

namespace mtlkernels {

constexpr int kFinishThreads = 256;

struct Math {
  __device__ static float fused(float a, float b, float c) { return fmaf(a, b, c); }
  __device__ static double fused(double a, double b, double c) { return fma(a, b, c); }
  __device__ static float square_root(float value) { return sqrtf(value); }
  __device__ static double square_root(double value) { return sqrt(value); }
};

template <typename Options, typename S>
using RuleOf = std::conditional_t<std::is_same_v<Options, SgdOptions>, SgdRule<S>, AdamRule<S>>;

/// Pointers of a tensor besides its gradients: parameter, weights, states, step.
template <typename Options>
constexpr int kFinishPointers = RuleOf<Options, float>::kRows + 2;

/// What moves: the parameter and its states.
template <typename T, typename Rule>
struct Moved {
  T* rows[Rule::kRows];

  __device__ explicit Moved(const CombineArguments& from) {
    rows[0] = from.result<T>();
#pragma unroll
    for (int r = 1; r < Rule::kRows; ++r) rows[r] = static_cast<T*>(from.pointers[from.num_rows + 1 + r]);
  }

  __device__ void move_element(const Rule& rule, int64_t e, Sum<T> grad) const {
    Sum<T> values[Rule::kRows] = {};
#pragma unroll
    for (int r = 0; r < Rule::kRows; ++r)
      if (rule.reads(r)) values[r] = widen(rows[r][e]);
    rule.template move<Math>(grad, values);
#pragma unroll
    for (int r = 0; r < Rule::kRows; ++r)
      if (rule.writes(r)) narrow(values[r], rows[r][e]);
  }
};

/// Elements [begin, end), up to `vectors_end` in vectors.
template <typename T, typename Rows, typename Rule>
__device__ inline void finish_chunk(const CombineArguments& arguments, const Rule& rule, int64_t begin, int64_t vectors_end,
                                    int64_t end) {
  const Rows rows(arguments, 0);
  const Moved<T, Rule> moved(arguments);
  constexpr int64_t step = kFinishThreads * kLanes<T>;
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x * kLanes<T>; e < vectors_end; e += step) {
    Packed<T> packed[Rule::kRows];
#pragma unroll
    for (int r = 0; r < Rule::kRows; ++r)
      if (rule.reads(r)) packed[r].raw = *reinterpret_cast<const uint4*>(moved.rows[r] + e);
    Sum<T> sums[1][kLanes<T>] = {};
    rows.add_vectors(e, step, vectors_end, sums);
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      Sum<T> values[Rule::kRows];
#pragma unroll
      for (int r = 0; r < Rule::kRows; ++r) values[r] = widen(packed[r].values[lane]);
      rule.template move<Math>(sums[0][lane], values);
#pragma unroll
      for (int r = 0; r < Rule::kRows; ++r) narrow(values[r], packed[r].values[lane]);
    }
#pragma unroll
    for (int r = 0; r < Rule::kRows; ++r)
      if (rule.writes(r)) store_packed(moved.rows[r] + e, packed[r]);
  }
#pragma unroll 1
  for (int64_t e = vectors_end + threadIdx.x; e < end; e += kFinishThreads) {
    Sum<T> sum = 0;
    rows.add_element(e, sum);
    moved.move_element(rule, e, sum);
  }
}

/// Sums in float64, element by element: for weights that float32 cannot hold. Rare, so small rather than fast.
template <typename T, typename Rule>
__device__ void finish_wide(const CombineArguments& arguments, const Rule& rule, int64_t begin, int64_t end) {
  const Moved<T, Rule> moved(arguments);
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x; e < end; e += kFinishThreads) {
    double sum = 0;
#pragma unroll 1
    for (int k = 0; k < arguments.num_rows; ++k) {
      const T* row = arguments.row<T>(k);
      if (row) sum += arguments.weight(k) * double(widen(row[e]));
    }
    moved.move_element(rule, e, Sum<T>(sum));
  }
}

/// One block per chunk of kDeviceChunk elements. K is the class of the number of rows, as of combine.
template <typename T, int K, typename Options>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish(const __grid_constant__ TensorTable table, const double* lr, const bool* skip, Options options) {
  using Rule = RuleOf<Options, Sum<T>>;
  if (skip && *skip) return;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const CombineArguments arguments(table.pointers(chunk.tensor), table.num_pointers - kFinishPointers<Options>);
  __shared__ alignas(8) unsigned char made[sizeof(Rule)];
  if (threadIdx.x == 0) {  // powers in float64 are dear
    const float* step = static_cast<const float*>(arguments.pointers[table.num_pointers - 1]);
    *reinterpret_cast<Rule*>(made) = Rule(options, *lr, step ? double(*step) : 0.0);
  }
  __syncthreads();
  const Rule rule = *reinterpret_cast<const Rule*>(made);
  bool aligned = true, wide = false;
#pragma unroll
  for (int r = 0; r < Rule::kRows; ++r) aligned &= !rule.writes(r) || is_aligned(Moved<T, Rule>(arguments).rows[r]);
  for (int k = 0; k < arguments.num_rows; ++k) {
    const T* row = arguments.row<T>(k);
    const double size = fabs(arguments.weight(k));
    aligned &= !row || is_aligned(row);  // chunks begin on multiples of 16 bytes
    wide |= row && !(size > 0x1p-100 && size < 0x1p100);
  }
  const int64_t vectors_end = aligned ? chunk.begin + (chunk.end - chunk.begin) / kLanes<T> * kLanes<T> : chunk.begin;
  if (sizeof(Sum<T>) == 4 && wide) {
    finish_wide<T>(arguments, rule, chunk.begin, chunk.end);
  } else if constexpr (K <= 8) {
    finish_chunk<T, RowGroup<T, K, Sum<T>>>(arguments, rule, chunk.begin, vectors_end, chunk.end);
  } else {
    finish_chunk<T, ManyRows<T, Sum<T>>>(arguments, rule, chunk.begin, vectors_end, chunk.end);
  }
}

}  // namespace mtlkernels
