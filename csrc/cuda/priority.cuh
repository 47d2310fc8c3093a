#pragma once
// Task priority: out[p] = sum_j g_j[p] + alpha_i g_i[p] for each channel p, i its top task, where alpha_i depends on the inner
// products D[i][j] = sum over the channels of top task i of <g_i, g_j>.
//
// One launch does both. A layer's blocks come twice: first for its products, then for its results, last block first, as soon
// as the last block of the first kind has turned the products into alphas. Blocks take numbers in the order in which they
// start, so that those they wait for run already, whatever runs beside them. The second reading of a layer finds in the L2
// cache what has been read since the layer began and still lies there: a layer that fits is read from memory once.
//
// Products and the sums of a warp's share, at most 512 of them, are float32 (float64 for float64 gradients); all beyond is
// float64. A share whose products leave float32's range is summed again in float64. Sums of rows are float32 (float64), in the
// order of k. The result may be one of the rows.

#include "../common/launch_plan.h"
#include "../common/priority.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace mtlkernels {

/// What a tensor's pointers mean: a gradient per task, the result, the top tasks (int64; null for a plain sum), float64 scratch
/// [blocks][K][K] for the products and [K] for the alphas, and the words of its shape.
template <typename T>
struct PriorityLayer {
  void* const* pointers;
  int num_tasks;
  PriorityShape shape;

  __device__ PriorityLayer(const TensorTable& table, int tensor)
      : pointers(table.pointers(tensor)),
        num_tasks(table.num_pointers - 3 - kPriorityShapeWords),
        shape(*reinterpret_cast<const PriorityShape*>(pointers + num_tasks + 3)) {}
  __device__ const T* row(int k) const { return k < num_tasks ? static_cast<const T*>(pointers[k]) : nullptr; }
  __device__ T* result() const { return static_cast<T*>(pointers[num_tasks]); }
  __device__ const int64_t* top() const { return static_cast<const int64_t*>(pointers[num_tasks + 1]); }
  __device__ double* products() const { return static_cast<double*>(pointers[num_tasks + 2]); }
  __device__ double* alphas() const { return products() + shape.blocks * num_tasks * num_tasks; }
  /// The top task of a channel; -1 where it is no task, or has no gradient.
  __device__ int top_task(int64_t channel) const {
    const int64_t task = top() ? top()[channel] : -1;
    return task >= 0 && task < num_tasks && pointers[task] ? int(task) : -1;
  }
};

/// Vectors of a lane: 16 values (8 of float64).
template <typename T>
constexpr int kShare = (sizeof(T) == 8 ? 8 : 16) / kLanes<T>;

/// A warp's part of a channel, spread over its lanes by vectors of 16 bytes or, where not `aligned`, by elements.
template <typename T, bool aligned>
struct Share {
  int64_t begin;
  int count;

  /// Element i of those that a lane has, relative to `begin`.
  __device__ static int place(int vector, int lane_of_vector) {
    const int lane = threadIdx.x % kWarpSize;
    return aligned ? (vector * kWarpSize + lane) * kLanes<T> + lane_of_vector
                   : (vector * kLanes<T> + lane_of_vector) * kWarpSize + lane;
  }
  __device__ void load(const T* row, Packed<T> (&values)[kShare<T>]) const {
#pragma unroll
    for (int v = 0; v < kShare<T>; ++v) {
      if constexpr (aligned) {  // not through the read-only cache: may be the result
        if (place(v, 0) < count) values[v].raw = *reinterpret_cast<const uint4*>(row + begin + place(v, 0));
      } else {
#pragma unroll
        for (int l = 0; l < kLanes<T>; ++l)
          if (place(v, l) < count) values[v].values[l] = row[begin + place(v, l)];
      }
    }
  }
  __device__ void store(T* row, const Packed<T> (&values)[kShare<T>]) const {
#pragma unroll
    for (int v = 0; v < kShare<T>; ++v) {
      if constexpr (aligned) {
        if (place(v, 0) < count) store_packed(row + begin + place(v, 0), values[v]);
      } else {
#pragma unroll
        for (int l = 0; l < kLanes<T>; ++l)
          if (place(v, l) < count) row[begin + place(v, l)] = values[v].values[l];
      }
    }
  }
};

/// Rows that a warp loads at a time.
constexpr int kRowsAtOnce = 2;

/// products[k] = <row top, row k> over a share, for all tasks. Returns whether float32 has left its range: a sum overflowed or
/// is no number, or the top task's square is so small that products underflowed.
/// Contract: every lane of the warp calls it with the same arguments; `products` are written by lane 0.
template <typename T, bool aligned>
__device__ inline bool products_of_share(const PriorityLayer<T>& layer, const Share<T, aligned>& share, int top,
                                         double* products) {
  Packed<T> own[kShare<T>];
  share.load(layer.row(top), own);
  bool uncertain = false;
#pragma unroll 1
  for (int first = 0; first < layer.num_tasks; first += kRowsAtOnce) {
    Packed<T> other[kRowsAtOnce][kShare<T>];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
      if (first + r != top && layer.row(first + r)) share.load(layer.row(first + r), other[r]);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (first + r == top)
#pragma unroll
        for (int v = 0; v < kShare<T>; ++v) other[r][v] = own[v];
      Sum<T> sum = 0;
#pragma unroll
      for (int v = 0; v < kShare<T>; ++v)
#pragma unroll
        for (int l = 0; l < kLanes<T>; ++l) sum += widen(own[v].values[l]) * widen(other[r][v].values[l]);
      sum = warp_sum(sum);
      if (threadIdx.x % kWarpSize != 0 || first + r >= layer.num_tasks) continue;
      products[first + r] = double(sum);
      uncertain |= !(fabs(sum) < Sum<T>(0x1p127)) || (first + r == top && sum < Sum<T>(0x1p-96));
    }
  }
  if (sizeof(Sum<T>) == 8 || !__any_sync(0xffffffffu, uncertain)) return false;
  bool nonzero = false;
#pragma unroll
  for (int v = 0; v < kShare<T>; ++v)
#pragma unroll
    for (int l = 0; l < kLanes<T>; ++l) nonzero |= widen(own[v].values[l]) != 0;
  return __any_sync(0xffffffffu, nonzero);
}

/// The same in float64, element by element; rare, so small rather than fast.
template <typename T>
__device__ inline void products_in_float64(const PriorityLayer<T>& layer, int64_t begin, int count, int top, double* products) {
#pragma unroll 1
  for (int k = 0; k < layer.num_tasks; ++k) {
    const T *own = layer.row(top) + begin, *other = layer.row(k);
    double sum = 0;
#pragma unroll 1
    for (int e = threadIdx.x % kWarpSize; other && e < count; e += kWarpSize)
      sum += double(widen(own[e])) * double(widen(other[begin + e]));
    sum = warp_sum(sum);
    if (threadIdx.x % kWarpSize == 0) products[k] = sum;
  }
}

/// The results of a share. Contract: every lane of the warp calls it with the same arguments.
template <typename T, bool aligned>
__device__ inline void combine_share(const PriorityLayer<T>& layer, const Share<T, aligned>& share, int top, double alpha) {
  Sum<T> sums[kShare<T>][kLanes<T>] = {};
  Packed<T> own[kShare<T>];
#pragma unroll 1
  for (int first = 0; first < layer.num_tasks; first += kRowsAtOnce) {
    Packed<T> rows[kRowsAtOnce][kShare<T>];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
      if (layer.row(first + r)) share.load(layer.row(first + r), rows[r]);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
      for (int v = 0; v < kShare<T>; ++v) {
        if (first + r == top) own[v] = rows[r][v];
#pragma unroll
        for (int l = 0; l < kLanes<T>; ++l) sums[v][l] += widen(rows[r][v].values[l]);
      }
    }
  }
  Packed<T> result[kShare<T>];
  const bool wide = !(fabs(alpha) < 0x1p100);  // float32 cannot hold it, what it adds it may
#pragma unroll
  for (int v = 0; v < kShare<T>; ++v) {
#pragma unroll
    for (int l = 0; l < kLanes<T>; ++l) {
      const Sum<T> value = widen(own[v].values[l]);
      if (wide) {
        sums[v][l] = Sum<T>(double(sums[v][l]) + alpha * double(value));
      } else if (top >= 0) {
        sums[v][l] += Sum<T>(alpha) * value;
      }
      narrow(sums[v][l], result[v].values[l]);
    }
  }
  share.store(layer.result(), result);
}

/// Calls visit(share, channel, slot) for the shares of the calling warp in block `block` of a layer; `slot` numbers the
/// channels of the block. All rows and the result count for alignment.
template <typename T, typename Visit>
__device__ inline void for_shares(const PriorityLayer<T>& layer, int64_t block, const Visit& visit) {
  const PriorityShape& shape = layer.shape;
  bool aligned = is_aligned(layer.result());
  for (int k = 0; k < layer.num_tasks; ++k) aligned &= is_aligned(layer.row(k));
  const int warp = threadIdx.x / kWarpSize;
  const int64_t number = block * kPriorityWarps + warp;
  int64_t first = number * shape.run, slice = 0;
  if (shape.slices > 1) {
    first = number >> 32 ? number / shape.slices : uint32_t(number) / uint32_t(shape.slices);
    slice = number - first * shape.slices;
  }
  const int64_t offset = slice * shape.length, left = shape.rest - offset;
  const int count = int(left < shape.length ? left : shape.length);
#pragma unroll 1
  for (int r = 0; r < shape.run && first + r < shape.channels; ++r) {
    const int64_t begin = (first + r) * shape.rest + offset;
    if (aligned && (begin | count) % kLanes<T> == 0) {
      visit(Share<T, true>{begin, count}, first + r, warp * shape.run + r);
    } else {
      visit(Share<T, false>{begin, count}, first + r, warp * shape.run + r);
    }
  }
}

/// Writes the products of a block's channels, summed by top task, to products[block][K][K].
/// Contract: all threads of the block call it; `shared` holds kPriorityWarps * kPriorityRun * K values; two barriers. Order:
/// lanes by halving, channels ascending.
template <typename T>
__device__ inline void products_of_block(const PriorityLayer<T>& layer, int64_t block, double* shared) {
  __shared__ int tops[kPriorityWarps * kPriorityRun];
  const int slots = kPriorityWarps * layer.shape.run, num_tasks = layer.num_tasks;
  for (int slot = threadIdx.x; slot < slots; slot += kPriorityThreads) tops[slot] = -1;
  __syncthreads();
  for_shares(layer, block, [&](const auto& share, int64_t channel, int slot) {
    const int top = layer.top_task(channel);
    if (top < 0) return;
    double* products = shared + slot * num_tasks;
    if (products_of_share(layer, share, top, products)) {
      __syncwarp();  // the sums are stored before others take their place
      products_in_float64(layer, share.begin, share.count, top, products);
    }
    if (threadIdx.x % kWarpSize == 0) tops[slot] = top;
  });
  __syncthreads();
  double* matrix = layer.products() + block * num_tasks * num_tasks;
  for (int entry = threadIdx.x; entry < num_tasks * num_tasks; entry += kPriorityThreads) {
    const int i = entry / num_tasks, j = entry % num_tasks;
    double sum = 0;
    for (int slot = 0; slot < slots; ++slot)
      if (tops[slot] == i) sum += shared[slot * num_tasks + j];
    matrix[entry] = sum;
  }
}

/// Turns the products of all blocks of a layer into its alphas. Loads past the first-level cache, which knows nothing of what
/// other multiprocessors have written.
/// Contract: all threads of the block call it; `shared` holds K (K + 1) and 2 kPriorityThreads values; barriers inside. Order:
/// blocks by remainder, then ascending.
template <typename T>
__device__ inline void finish_layer(const PriorityLayer<T>& layer, bool skip_degenerate, double* shared) {
  const int num_tasks = layer.num_tasks, entries = num_tasks * num_tasks, padded = entries + num_tasks;
  const int64_t blocks = layer.shape.blocks;
  const int groups = entries < kPriorityThreads ? kPriorityThreads / entries : 1;
  const auto place = [&](int entry) { return entry + entry / num_tasks; };  // rows in different banks
  for (int at = threadIdx.x; at < groups * entries; at += kPriorityThreads) {
    double sum = 0;
    for (int64_t block = at / entries; block < blocks; block += groups)
      sum += __ldcg(layer.products() + block * entries + at % entries);
    shared[at / entries * padded + place(at % entries)] = sum;
  }
  __syncthreads();
  for (int entry = threadIdx.x; entry < entries; entry += kPriorityThreads)  // in place: others read other entries
    for (int group = 1; group < groups; ++group) shared[place(entry)] += shared[group * padded + place(entry)];
  bool differs = !skip_degenerate;
  for (int64_t channel = threadIdx.x; channel < layer.shape.channels; channel += kPriorityThreads)
    differs |= layer.top()[channel] != layer.top()[0];
  differs = __syncthreads_or(differs);
  for (int i = threadIdx.x; i < num_tasks; i += kPriorityThreads)
    layer.alphas()[i] = differs ? priority_alpha(shared + place(i * num_tasks), i, num_tasks) : 0;
}

/// Counts a block's work as done, visible to all that see the count. Returns how many were before.
/// Contract: all threads of the block call it; two barriers.
__device__ inline int32_t arrive(int32_t* done) {
  __shared__ int32_t before;
  __syncthreads();  // also: everybody has read the last value
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicAdd(done, 1);
    __threadfence();
  }
  __syncthreads();
  return before;
}

/// Waits until `count` have arrived; then sees what they did. Contract: all threads of the block call it; one barrier.
__device__ inline void wait_for(const int32_t* done, int32_t count) {
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile int32_t*>(done) < count) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();
}

/// The table counts blocks as elements, in chunks of 1: those of a layer's products, if it has top tasks, and those of its
/// results. `state` [1 + tensors], zeroed: the next block's number, and for each tensor how many blocks of products are done,
/// one more when the alphas are.
template <typename T>
__global__ void __launch_bounds__(kPriorityThreads, 2)
    priority_combine(const __grid_constant__ TensorTable table, int32_t* state, bool skip_degenerate) {
  extern __shared__ double shared[];
  __shared__ int32_t number;
  if (threadIdx.x == 0) number = atomicAdd(state, 1);
  __syncthreads();
  const Chunk chunk = find_chunk(table, number, 1);
  const PriorityLayer<T> layer(table, chunk.tensor);
  const int32_t blocks = int32_t(layer.shape.blocks);
  int32_t* done = state + 1 + chunk.tensor;
  if (layer.top() && chunk.begin < blocks) {
    products_of_block(layer, chunk.begin, shared);
    if (arrive(done) != blocks - 1) return;
    finish_layer(layer, skip_degenerate, shared);
    arrive(done);
    return;
  }
  if (layer.top()) wait_for(done, blocks + 1);
  for_shares(layer, layer.top() ? 2 * blocks - 1 - chunk.begin : chunk.begin, [&](const auto& share, int64_t channel, int) {
    const int top = layer.top_task(channel);
    combine_share(layer, share, top, top < 0 ? 0 : __ldcg(layer.alphas() + top));
  });
}

}  // namespace mtlkernels
