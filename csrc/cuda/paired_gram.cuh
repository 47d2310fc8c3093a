#pragma once
// Gram matrix of rows made of pairs in registers: of K pairs (a, b), rows a and b - a, or a and a b element by element.
//
// The flat part of a SAM gradient is a difference of two gradients that are nearly equal; a difference of Grams would lose it.
// Each row is read from memory once, and what is formed reaches memory never. Everything else is gram's, in gram.cuh and
// gram_tensor_core.cuh: the differences and products are float32 (float64 for float64 gradients), and a chunk whose squares
// leave float32's range is formed and summed again in float64.

#include "../common/paired_plan.h"
#include "gram_tensor_core.cuh"

namespace mtlkernels {

/// Rows in pairs: an even row is as it is, an odd one is formed of itself and the row before it. Absent gradients are zero.
struct PairedRows : GradientRows {
  PairForm kind;

  __device__ explicit PairedRows(PairForm kind) : kind(kind) {}

  template <typename S>
  __device__ static S pair(PairForm kind, S first, S second) {
    return kind == PairForm::product ? first * second : second - first;
  }

  template <typename S, int K, int lanes>
  __device__ void form(S (&value)[K][lanes]) const {
#pragma unroll
    for (int k = 1; k < K; k += 2)
#pragma unroll
      for (int lane = 0; lane < lanes; ++lane) value[k][lane] = pair(kind, value[k - 1][lane], value[k][lane]);
  }

  template <typename T>
  struct Row {
    const T *first, *grad;
    PairForm kind;  // none for an even row

    __device__ static double read(const T* from, int64_t e) { return from ? double(widen(from[e])) : 0; }
    __device__ bool present() const {
      return kind == PairForm::difference ? first || grad : grad && (first || kind == PairForm::none);
    }
    __device__ double operator[](int64_t e) const {
      return kind == PairForm::none ? read(grad, e) : pair(kind, read(first, e), read(grad, e));
    }
  };
  template <typename T>
  __device__ Row<T> row(void* const* pointers, int k) const {
    const bool odd = k % 2;
    return {static_cast<const T*>(pointers[odd ? k - 1 : k]), static_cast<const T*>(pointers[k]), odd ? kind : PairForm::none};
  }
};

/// As Multiplier, of rows in pairs: lane l holds elements of row l / 4 of a group, and lane l - 4 those of the row before it.
/// Formed values have more bits than 16-bit gradients: they are multiplied as float32.
template <typename T, int R>
struct PairedMultiplier {
  using S = TensorCoreShape<int(sizeof(T)), R>;
  using Value = Sum<T>;
  static constexpr int kChain = sizeof(T) == 2 ? 4 : Multiplier<Value, R>::kChain;
  PairForm kind;

  /// Of a batch, multiplied one at a time: registers do not suffice for the values of 16-bit gradients at once.
  static constexpr int kParts = kLanes<T> / kLanes<Value>;

  __device__ void add(const Packed<T> (&loaded)[S::groups], int part, Value (&sums)[S::tiles][S::tile_sums]) const {
    const bool formed = threadIdx.x / 4 % 2;
    constexpr int count = kLanes<Value>, words = 4 * count / kLanes<T>;  // of a lane, multiplied at a time
    Packed<Value> values[S::groups];
#pragma unroll
    for (int g = 0; g < S::groups; ++g) {
      const uint4& raw = loaded[g].raw;
      Packed<T> own, before;
      own.raw = words == 4 || part == 0 ? raw : uint4{raw.z, raw.w, 0, 0};
#pragma unroll
      for (int w = 0; w < words; ++w) {
        // In this order, so that the words of few groups are in registers at a time.
        asm volatile("shfl.sync.up.b32 %0, %1, 4, 0, 0xffffffff;" : "=r"(before.words[w]) : "r"(own.words[w]) : "memory");
      }
#pragma unroll
      for (int lane = 0; lane < count; ++lane) {
        const Value value = widen(own.values[lane]);
        values[g].values[lane] = formed ? PairedRows::pair(kind, Value(widen(before.values[lane])), value) : value;
      }
    }
    Multiplier<Value, R>::add(values, 0, sums);
  }
};

/// As gram_chunks, of rows in pairs. K is 2, 4 or 8.
template <typename T, int K>
__global__ void __launch_bounds__(kGramThreads, kGramBlocks<K>)
    paired_gram_chunks(const __grid_constant__ TensorTable table, double* partials, PairForm kind) {
  gram_of_chunk<T, K>(PairedRows{kind}, table, find_chunk(table, blockIdx.x), true, partials);
}

/// As gram_tensor_core, of rows in pairs.
template <typename T, int R>
__global__ void __launch_bounds__(TensorCoreShape<int(sizeof(T)), R>::threads, R == 16 ? 2 : 1)
    paired_gram_tensor_core(const __grid_constant__ TensorTable table, double* partials, PairForm kind) {
  using Product = PairedMultiplier<T, R>;
  gram_on_tensor_cores<T, R, Product::kParts>(Product{kind}, PairedRows{kind}, table, partials);
}

}  // namespace mtlkernels
