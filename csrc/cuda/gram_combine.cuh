#pragma once
// Gram matrix and weighted sum of up to eight task gradients in one read: G[i][j] = sum_e g_i[e] g_j[e], out[e] = sum_k w_k
// g_k[e].
//
// Everything about the Gram is gram.cuh's, to the bit. The sums are float32 (float64 for float64 gradients), in the order of k.
// A chunk whose squares leave float32's range is read again, and the result may be one of the rows: so a chunk's results wait
// in shared memory until its products are final. Weights outside float32's range take a second read, element by element.

#include "combine.cuh"
#include "gram.cuh"

namespace mtlkernels {

/// The rows of a combination's pointers, one of which may be the result.
struct CombinedRows : GradientRows {
  __device__ static int count(const TensorTable& table) { return table.num_pointers - 2; }
  template <typename T>
  __device__ static Packed<T> load(const T* from) {  // not through the read-only cache
    Packed<T> packed;
    packed.raw = *reinterpret_cast<const uint4*>(from);
    return packed;
  }
};

/// A chunk's results, each kept by the thread that wrote it.
template <typename T>
struct WaitingResults {
  const Sum<T>* weights;  // [K] in shared memory
  T* results;             // [kDeviceChunk] in shared memory, 16-byte aligned
  const CombineArguments& arguments;
  int64_t begin;
  bool wide;

  template <typename S, int K, int lanes>
  __device__ S sum(const S (&value)[K][lanes], int lane) const {
    S total = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const S weight = weights[k];
      total += weight != 0 ? weight * value[k][lane] : S(0);
    }
    return total;
  }

  template <int K>
  __device__ void vector(const Packed<T> (&packed)[K], int at) const {
    Packed<T> result;
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      Sum<T> value[K][1];
#pragma unroll
      for (int k = 0; k < K; ++k) value[k][0] = widen(packed[k].values[lane]);
      narrow(sum(value, 0), result.values[lane]);
    }
    *reinterpret_cast<uint4*>(results + at) = result.raw;
  }

  template <int K>
  __device__ void element(const Sum<T> (&value)[K][1], int at) const {
    narrow(sum(value, 0), results[at]);
  }

  __device__ void finish(int vectors, int count) const {
    if (wide) return combine_wide<T, kGramThreads>(arguments, threadIdx.x, begin, begin + count);
    T* out = arguments.result<T>() + begin;
#pragma unroll 1
    for (int v = threadIdx.x; v < vectors; v += kGramThreads) {
      Packed<T> result;
      result.raw = *reinterpret_cast<const uint4*>(results + v * kLanes<T>);
      store_packed(out + v * kLanes<T>, result);
    }
#pragma unroll 1
    for (int e = vectors * kLanes<T> + threadIdx.x; e < count; e += kGramThreads) out[e] = results[e];
  }
};

/// Bytes of dynamic shared memory.
template <typename T>
constexpr int kWaitingBytes = kDeviceChunk * int(sizeof(T));

/// As gram_chunks; a tensor's pointers are those of combine.
template <typename T, int K>
__global__ void __launch_bounds__(kGramThreads, K == 8 ? 2 : 3)
    gram_combine_chunks(const __grid_constant__ TensorTable table, double* partials) {
  extern __shared__ __align__(16) unsigned char waiting[];
  __shared__ Sum<T> weights[K];
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const CombineArguments arguments(table, chunk.tensor);
  bool wild = false;
  if (threadIdx.x < K) {
    const double weight = arguments.weight(threadIdx.x);
    weights[threadIdx.x] = Sum<T>(weight);
    wild = sizeof(Sum<T>) == 4 && !fits_float(weight);
  }
  const bool wide = __syncthreads_or(wild);  // and the weights are there
  const WaitingResults<T> results{weights, reinterpret_cast<T*>(waiting), arguments, chunk.begin, wide};
  gram_of_chunk<T, K>(CombinedRows(), table, chunk, is_aligned(arguments.result<T>()), partials, results);
}

}  // namespace mtlkernels
