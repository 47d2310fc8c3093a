#pragma once
// Gram matrix of task gradients: G[i][j] = sum_e g_i[e] g_j[e], each row read from memory once.
//
// Stage one: a block reads one chunk of one tensor, 16 bytes per row and thread at a time, keeps all pairs in registers (K <=
// 8; gram_tensor_core.cuh for more) and writes the chunk's products in float64. Stage two adds the chunks in order. Products
// and a chunk's sums are float32 (float64 for float64 gradients); a chunk whose squares leave float32's range is summed again
// in float64.

#include "../common/gram_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace mtlkernels {

/// sums[pair] += the products of `lanes` elements of K rows. A pair's products are added up before they meet its sum, for one
/// rounding of the sum instead of `lanes`.
template <typename S, int K, int lanes>
__device__ inline void add_products(const S (&value)[K][lanes], S (&sums)[num_pairs(K)]) {
#pragma unroll
  for (int i = 0; i < K; ++i) {
#pragma unroll
    for (int j = i; j < K; ++j) {
      S sum = value[i][0] * value[j][0];
#pragma unroll
      for (int lane = 1; lane < lanes; ++lane) sum += value[i][lane] * value[j][lane];
      sums[pair_index(K, i, j)] += sum;
    }
  }
}

/// What rows are made of: here each is a task's gradient.
struct GradientRows {
  __device__ static int count(const TensorTable& table) { return table.num_pointers; }
  template <typename T>
  __device__ static Packed<T> load(const T* from) {
    return load_packed(from);
  }

  /// Turns the loaded elements of K rows into the values that are multiplied.
  template <typename S, int K, int lanes>
  __device__ void form(S (&)[K][lanes]) const {}

  template <typename T>
  struct Row {
    const T* grad;

    __device__ bool present() const { return grad; }
    __device__ double operator[](int64_t e) const { return double(widen(grad[e])); }
  };
  template <typename T>
  __device__ Row<T> row(void* const* pointers, int k) const {
    return {static_cast<const T*>(pointers[k])};
  }
};

/// Elements that are widened at a time: as many as stay in registers.
template <typename T>
constexpr int kQuad = kLanes<T> < 4 ? kLanes<T> : 4;

template <typename T, int K, typename Rows>
__device__ inline void add_products(Rows rows, const Packed<T> (&packed)[K], Sum<T> (&sums)[num_pairs(K)]) {
#pragma unroll
  for (int first = 0; first < kLanes<T>; first += kQuad<T>) {
    Sum<T> value[K][kQuad<T>];
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int lane = 0; lane < kQuad<T>; ++lane) value[k][lane] = widen(packed[k].values[first + lane]);
    rows.form(value);
    add_products<Sum<T>, K, kQuad<T>>(value, sums);
  }
}

/// <a, b> over elements [begin, end) in float64.
/// Contract: all threads of the block call it; `scratch` holds a float64 per warp and `out` one, both in shared memory; `out`
/// is valid in every thread on return.
template <typename Row>
__device__ __forceinline__ void product_in_float64(const Row& a, const Row& b, int64_t begin, int64_t end, double* scratch,
                                                   double* out) {
  double sum[1] = {0};
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x; e < end; e += blockDim.x) sum[0] += a[e] * b[e];
  block_sum<1>(sum, scratch, out);
}

/// Sums a chunk's products again in float64 where float32 cannot hold them; rare, so small rather than fast.
/// Contract: all threads of the block call it; products[pair_index(R, i, j)] are in shared memory and valid in every thread;
/// barriers inside.
template <typename T, int R, typename Rows>
__device__ __forceinline__ void mend_products(Rows rows, const TensorTable& table, const Chunk& chunk, double* scratch,
                                              double* products) {
  const int num_rows = rows.count(table);
  const auto row = [&](int k) { return rows.template row<T>(table.pointers(chunk.tensor), k); };
  bool again = false;
  for (int k = 0; k < num_rows; ++k)
    again |= row(k).present() && out_of_range(products[pair_index(R, k, k)]) && any_nonzero(row(k), chunk.begin, chunk.end);
  if (!again) return;
  __syncthreads();  // every thread has read the products that are now written again
  for (int i = 0; i < num_rows; ++i)
    for (int j = i; j < num_rows; ++j)
      if (row(i).present() && row(j).present())
        product_in_float64(row(i), row(j), chunk.begin, chunk.end, scratch, products + pair_index(R, i, j));
}

/// Blocks of a multiprocessor, so that enough bytes are under way.
template <int K>
constexpr int kGramBlocks = K == 8 ? 2 : 4;

/// What else a block does with the elements that it has loaded: here nothing.
struct Nothing {
  template <typename T, int K>
  __device__ void vector(const Packed<T> (&)[K], int) const {}
  template <typename S, int K>
  __device__ void element(const S (&)[K][1], int) const {}
  __device__ void finish(int, int) const {}
};

/// The block's part of gram_chunks, for rows made of what `forms` says. `also` is given each vector of a thread, then each
/// single element, with its index in the chunk, and at the end how many vectors and elements there were; the products are final
/// then, and every thread has read all that it reads. Contract: all threads of the block call it.
template <typename T, int K, typename Rows, typename Also = Nothing>
__device__ __forceinline__ void gram_of_chunk(Rows forms, const TensorTable& table, const Chunk& chunk, bool aligned,
                                              double* partials, const Also& also = {}) {
  constexpr int pairs = num_pairs(K);
  __shared__ double scratch[pairs * (kGramThreads / kWarpSize)];
  __shared__ double products[pairs];
  const T* rows[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    rows[k] = k < forms.count(table) ? static_cast<const T*>(table.pointers(chunk.tensor)[k]) : nullptr;
    aligned &= is_aligned(rows[k]);
  }

  Sum<T> sums[pairs] = {};
  const int64_t vectors = aligned ? (chunk.end - chunk.begin) / kLanes<T> : 0;
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < vectors; v += kBatch<K> * kGramThreads) {
    Packed<T> packed[kBatch<K>][K];
#pragma unroll
    for (int b = 0; b < kBatch<K>; ++b)
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (rows[k] && v + b * kGramThreads < vectors)
          packed[b][k] = forms.load(rows[k] + chunk.begin + (v + b * kGramThreads) * kLanes<T>);
#pragma unroll
    for (int b = 0; b < kBatch<K>; ++b) {
      add_products<T, K>(forms, packed[b], sums);
      if (v + b * kGramThreads < vectors) also.vector(packed[b], int(v + b * kGramThreads) * kLanes<T>);
    }
  }
#pragma unroll 1
  for (int64_t e = chunk.begin + vectors * kLanes<T> + threadIdx.x; e < chunk.end; e += kGramThreads) {
    Sum<T> value[K][1];
#pragma unroll
    for (int k = 0; k < K; ++k) value[k][0] = rows[k] ? widen(rows[k][e]) : Sum<T>(0);
    forms.form(value);
    add_products<Sum<T>, K, 1>(value, sums);
    also.element(value, int(e - chunk.begin));
  }

  block_sum<pairs>(sums, reinterpret_cast<Sum<T>*>(scratch), products);
  if constexpr (sizeof(Sum<T>) == 4) mend_products<T, K>(forms, table, chunk, scratch, products);
  for (int p = threadIdx.x; p < pairs; p += kGramThreads)
    partials[int64_t(table.first_block + blockIdx.x) * pairs + p] = products[p];
  also.finish(int(vectors), int(chunk.end - chunk.begin));
}

/// partials[block][pair] = products of one chunk. K is the class of the number of rows, 1, 2, 3, 4 or 8: rows past
/// table.num_pointers, and null rows, count as zero and are not read. One block per chunk of kDeviceChunk elements.
template <typename T, int K>
__global__ void __launch_bounds__(kGramThreads, kGramBlocks<K>)
    gram_chunks(const __grid_constant__ TensorTable table, double* partials) {
  gram_of_chunk<T, K>(GradientRows(), table, find_chunk(table, blockIdx.x), true, partials);
}

/// Which blocks of stage one make up which results.
struct SlotTable {
  static constexpr int capacity = (kArgumentBytes - kOtherArguments) / 12;
  int32_t slot[capacity], begin[capacity], end[capacity];
};

/// gram[slot][i][j] = gram[slot][j][i] = sum of partials[begin .. end) in order: [num_rows, num_rows]. With `num_other`, the
/// pairs of the first num_rows rows with the num_other that follow: [num_rows, num_other]. Grid (entries that are summed, slots
/// of the launch); `rows_class` is the class that stage one ran with.
static __global__ void __launch_bounds__(kGramThreads)
    gram_finish(const __grid_constant__ SlotTable slots, const double* partials, int32_t rows_class, int32_t num_rows,
                int32_t num_other, double* gram) {
  __shared__ double scratch[kGramThreads / kWarpSize], total[1];
  int i = 0, j = blockIdx.x;
  if (num_other == 0) {
    while (j >= num_rows - i) j -= num_rows - i++;
    j += i;
  } else {
    i = blockIdx.x / num_other;
    j = num_rows + blockIdx.x % num_other;
  }
  double sum[1] = {0};
  for (int32_t b = slots.begin[blockIdx.y] + threadIdx.x; b < slots.end[blockIdx.y]; b += kGramThreads)
    sum[0] += partials[int64_t(b) * num_pairs(rows_class) + pair_index(rows_class, i, j)];
  block_sum<1>(sum, scratch, total);
  if (threadIdx.x != 0) return;
  if (num_other == 0) {
    double* matrix = gram + int64_t(slots.slot[blockIdx.y]) * num_rows * num_rows;
    matrix[i * num_rows + j] = matrix[j * num_rows + i] = total[0];
  } else {
    gram[(int64_t(slots.slot[blockIdx.y]) * num_rows + i) * num_other + j - num_rows] = total[0];
  }
}

}  // namespace mtlkernels
