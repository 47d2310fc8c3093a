#pragma once
// Gram matrix for more than eight tasks: rows staged through shared memory, tiles of 4 x 4 pairs in registers.
//
// A block stages Shape::elements of all R rows at a time with asynchronous copies, three stages deep. Each thread owns one tile
// of pairs and one slice of the elements. A tile's rows are R / 4 apart, so the threads of a warp read consecutive rows, which
// the padded row stride puts on different banks. Sums are float32 per stage, then kept as an unevaluated sum of two float32.

#include <cuda_pipeline.h>

#include "gram.cuh"

namespace mtlkernels {

template <typename T, int R>
using Shape = TileShape<int(sizeof(T)), R>;

/// Adds `value` to the pair (high, low), whose exact sum is the result; error-free (Knuth's two-sum).
__device__ inline void add_exactly(float& high, float& low, float value) {
  const float sum = high + value, part = sum - high;
  low += (high - (sum - part)) + (value - part);
  high = sum;
}
__device__ inline void add_exactly(double& high, double&, double value) { high += value; }

/// Starts copying elements [begin, begin + S::elements) of all rows into one stage; what lies past `end`, and null rows, become
/// zero.
template <typename T, int R>
__device__ inline void load_stage(const T* const* rows, bool aligned, int64_t begin, int64_t end, T* stage) {
  using S = Shape<T, R>;
  constexpr int vectors = S::elements / kLanes<T>;
  for (int v = threadIdx.x; v < R * vectors; v += S::threads) {
    const int row = v / vectors, at = v % vectors * kLanes<T>;
    const T* from = rows[row];
    T* to = stage + row * S::stride + at;
    const int64_t e = begin + at;
    if (from && aligned && e + kLanes<T> <= end) {
      __pipeline_memcpy_async(to, from + e, 16);
    } else {
      Packed<T> packed;
      for (int lane = 0; lane < kLanes<T>; ++lane)
        if (from && e + lane < end) packed.values[lane] = from[e + lane];
      *reinterpret_cast<uint4*>(to) = packed.raw;
    }
  }
}

template <typename T>
__device__ inline void widen_quad(const T* from, Sum<T> (&to)[4]) {
  struct alignas(4 * sizeof(T)) Quad {
    T values[4];
  };
  const Quad quad = *reinterpret_cast<const Quad*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = widen(quad.values[i]);
}

/// partials[block][pair] = products of one chunk, for R = 16 or 64 rows at most; as gram_chunks.
template <typename T, int R>
__global__ void __launch_bounds__(Shape<T, R>::threads, 1)
    gram_tiles(const __grid_constant__ TensorTable table, double* partials) {
  using S = Shape<T, R>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* stages = reinterpret_cast<T*>(memory);
  __shared__ const T* rows[R];
  const Chunk chunk = find_chunk(table, blockIdx.x);
  bool mine = true;
  for (int k = threadIdx.x; k < R; k += S::threads) {
    rows[k] = k < table.num_pointers ? static_cast<const T*>(table.pointers(chunk.tensor)[k]) : nullptr;
    mine &= is_aligned(rows[k]);
  }
  const bool aligned = __syncthreads_and(mine);

  const int tile = threadIdx.x % S::tiles, slice = threadIdx.x / S::tiles;
  const bool works = slice < S::slices;
  int left = 0, right = tile;
  while (right >= S::tiles_per_side - left) right -= S::tiles_per_side - left++;
  right += left;

  Sum<T> high[4][4] = {}, low[4][4] = {};
  const int64_t num_stages = (chunk.end - chunk.begin + S::elements - 1) / S::elements;
  for (int s = 0; s < S::stages - 1; ++s) {
    if (s < num_stages) load_stage<T, R>(rows, aligned, chunk.begin + s * S::elements, chunk.end, stages + s * R * S::stride);
    __pipeline_commit();
  }
  for (int64_t s = 0; s < num_stages; ++s) {
    __pipeline_wait_prior(S::stages - 2);
    __syncthreads();  // this stage has arrived for all threads, and all have left the stage that is loaded next
    const int64_t next = s + S::stages - 1;
    if (next < num_stages)
      load_stage<T, R>(rows, aligned, chunk.begin + next * S::elements, chunk.end, stages + next % S::stages * R * S::stride);
    __pipeline_commit();
    if (works) {
      const T* stage = stages + s % S::stages * R * S::stride;
      Sum<T> sums[4][4] = {};
#pragma unroll 2
      for (int q = slice; q < S::quads; q += S::slices) {
        Sum<T> a[4][4], b[4][4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          widen_quad(stage + (left + r * S::tiles_per_side) * S::stride + q * 4, a[r]);
          widen_quad(stage + (right + r * S::tiles_per_side) * S::stride + q * 4, b[r]);
        }
#pragma unroll
        for (int lane = 0; lane < 4; ++lane)
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[r][c] += a[r][lane] * b[c][lane];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) add_exactly(high[r][c], low[r][c], sums[r][c]);
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();

  // The slices of a tile are added in their order through shared memory, one entry of all tiles at a time.
  double* exchange = reinterpret_cast<double*>(memory);
  double* products = exchange + S::threads;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      exchange[threadIdx.x] = double(high[r][c]) + double(low[r][c]);
      __syncthreads();
      const int i = left + r * S::tiles_per_side, j = right + c * S::tiles_per_side;
      if (slice == 0 && (left != right || r <= c)) {
        double sum = 0;
        for (int other = 0; other < S::slices; ++other) sum += exchange[other * S::tiles + tile];
        products[i <= j ? pair_index(R, i, j) : pair_index(R, j, i)] = sum;
      }
      __syncthreads();
    }
  }
  if constexpr (sizeof(Sum<T>) == 4) mend_products<T, R>(table, chunk, exchange, products);
  for (int p = threadIdx.x; p < num_pairs(R); p += S::threads)
    partials[int64_t(table.first_block + blockIdx.x) * num_pairs(R) + p] = products[p];
}

}  // namespace mtlkernels
