#pragma once
// Trimmed mean: of an element's K gradients the b smallest and the b largest are left out. Each row is read once, the result
// written once.
//
// The b smallest and the b largest so far stay in registers; a gradient pushes one of the smallest out, that one of the
// largest, and what comes out there is added to the sum: in float32 (float64 for float64) in the order of the rows, so that
// every compiled backend gives the same bits. NaN is past the largest number. An exchange is two instructions for a float32 or
// for two 16-bit numbers, and a gradient takes 2 b of them: DRAM is the bound while b is small.
//
// A row that is absent counts as zeros, one whose task is not active does not count; neither is read. The result may be one
// of the rows.

#include <type_traits>

#include "../common/launch_plan.h"
#include "../common/trim_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace mtlkernels {

constexpr int kTrimThreads = 256;

/// Numbers with NaN past the largest. A cell is what one instruction orders: a number, or, as here, two of 16 bits.
template <typename T>
struct Order {
  using Cell = uint32_t;
  static constexpr bool brain = std::is_same_v<T, BFloat16>;
  static __device__ Cell smallest() { return brain ? 0xff80ff80 : 0xfc00fc00; }
  static __device__ Cell largest() { return 0x7fff7fff; }
  static __device__ Cell smaller(Cell a, Cell b) {
    Cell result;
    if constexpr (brain) {
      asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
  }
  static __device__ Cell larger(Cell a, Cell b) {
    Cell result;
    if constexpr (brain) {
      asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    } else {
      asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    }
    return result;
  }
};

template <>
struct Order<float> {
  using Cell = float;
  static __device__ Cell smallest() { return __uint_as_float(0xff800000); }
  static __device__ Cell largest() { return __uint_as_float(0x7fffffff); }
  static __device__ Cell smaller(Cell a, Cell b) { return fminf(a, b); }  // what is not NaN
  static __device__ Cell larger(Cell a, Cell b) {
    Cell result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
  }
};

template <>
struct Order<double> {
  using Cell = double;
  static __device__ Cell smallest() { return __longlong_as_double(0xfff0000000000000); }
  static __device__ Cell largest() { return __longlong_as_double(0x7fffffffffffffff); }
  static __device__ bool ordered(Cell a, Cell b) { return a <= b || b != b; }
  static __device__ Cell smaller(Cell a, Cell b) { return ordered(a, b) ? a : b; }
  static __device__ Cell larger(Cell a, Cell b) { return ordered(a, b) ? b : a; }
};

template <typename T>
using Cell = typename Order<T>::Cell;
template <typename T>
constexpr int kOfCell = int(sizeof(Cell<T>) / sizeof(T));
template <typename T>
constexpr int kCells = 16 / int(sizeof(Cell<T>));

/// The numbers of a cell.
template <typename T>
union Split {
  Cell<T> cell;
  T values[kOfCell<T>];
  __device__ explicit Split(Cell<T> cell = 0) : cell(cell) {}
};

/// Cell c of 16 bytes.
template <typename T>
__device__ inline Cell<T>& cell_of(Packed<T>& packed, int c) {
  if constexpr (kOfCell<T> == 2) {
    return packed.words[c];
  } else {
    return packed.values[c];
  }
}

/// What is kept of C cells of the rows so far. B is the class of the number that is kept on each side; where fewer are, the
/// others hold what nothing pushes out.
template <typename T, int C, int B>
struct Ends {
  Cell<T> low[B][C], high[B][C];
  Sum<T> sums[C][kOfCell<T>];

  __device__ void clear(int kept) {
    asm volatile("" : "+r"(kept));  // else what the ends start with takes registers of its own across the loop over elements
#pragma unroll
    for (int i = 0; i < B; ++i)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        low[i][c] = i < kept ? Order<T>::largest() : Order<T>::smallest();
        high[i][c] = i < kept ? Order<T>::smallest() : Order<T>::largest();
      }
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (Sum<T>& sum : sums[c]) sum = 0;
  }

  /// The r-th row; r is at_least, known to the compiler, or more.
  __device__ void push(Cell<T> (&row)[C], int r, int at_least, int kept) {
#pragma unroll
    for (int i = 0; i < B; ++i)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const Cell<T> stays = Order<T>::smaller(low[i][c], row[c]);
        row[c] = Order<T>::larger(low[i][c], row[c]);
        low[i][c] = stays;
      }
    if (at_least < B) {  // nothing came out of the first ones
#pragma unroll
      for (int c = 0; c < C; ++c) row[c] = r < kept ? Order<T>::smallest() : row[c];
    }
#pragma unroll
    for (int i = 0; i < B; ++i)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const Cell<T> stays = Order<T>::larger(high[i][c], row[c]);
        row[c] = Order<T>::smaller(high[i][c], row[c]);
        high[i][c] = stays;
      }
    const bool counts = at_least >= 2 * B || r >= 2 * kept;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const Split<T> split(row[c]);
#pragma unroll
      for (int i = 0; i < kOfCell<T>; ++i) sums[c][i] += counts ? Sum<T>(widen(split.values[i])) : Sum<T>(0);
    }
  }

  __device__ Split<T> mean(int c, Sum<T> divisor) const {
    Split<T> result;
#pragma unroll
    for (int i = 0; i < kOfCell<T>; ++i) narrow(sums[c][i] / divisor, result.values[i]);
    return result;
  }
};

/// The rows that count go to `rows`, in their order and from element `begin` on; returns how many, and `aligned`, whether all
/// lie on 16 bytes. Contract: the first warp calls it.
template <typename T>
__device__ inline int gather_rows(void* const* pointers, int num_rows, int64_t begin, const bool* active, const T** rows,
                                  bool& aligned) {
  int count = 0;
  aligned = true;
#pragma unroll 1
  for (int k = int(threadIdx.x); k < trim_table(num_rows); k += kWarpSize) rows[k] = nullptr;
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < num_rows; first += kWarpSize) {
    const int k = first + int(threadIdx.x);
    const bool counts = k < num_rows && (!active || active[k]);
    const uint32_t all = __ballot_sync(~0u, counts);
    if (counts) {
      const T* row = static_cast<const T*>(pointers[k]);
      rows[count + __popc(all & ((1u << threadIdx.x) - 1))] = row ? row + begin : nullptr;
      aligned &= is_aligned(row);
    }
    count += __popc(all);
  }
  aligned = __all_sync(~0u, aligned);
  return count;
}

/// Threads share as many vectors as a vector has cells, one each: afterwards a thread has the cells of its place in all of
/// them.
template <typename T>
__device__ inline void transpose(Packed<T>& vector) {
  const uint32_t group = (1u << kCells<T>)-1, mask = group << (threadIdx.x % kWarpSize / kCells<T> * kCells<T>);
#pragma unroll
  for (int step = kCells<T> / 2; step > 0; step /= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int c = 0; c < kCells<T>; ++c) {
      if (c & step) continue;
      Cell<T>&low = cell_of(vector, c), &high = cell_of(vector, c + step);
      const Cell<T> received = __shfl_xor_sync(mask, upper ? low : high, step);
      low = upper ? received : low;
      high = upper ? high : received;
    }
  }
}

/// The vector that lies at `from`, zeros where that is null. Without a branch, so that many loads are under way at once; not
/// through the read-only cache, because it may be the result's.
template <typename T>
__device__ inline Packed<T> load_vector(const T* from) {
  Packed<T> vector;
  asm volatile("{ .reg .pred present;\n setp.ne.u64 present, %4, 0;\n @present ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(vector.words[0]), "+r"(vector.words[1]), "+r"(vector.words[2]), "+r"(vector.words[3])
               : "l"(from)
               : "memory");
  return vector;
}

/// How a kernel of classes K and B goes over rows and elements.
template <typename T, int K, int B>
struct TrimShape {
  static constexpr int split = B > 8 ? kCells<T> : 1;  // threads that share a vector, so that what they keep fits in registers
  static constexpr int cells = kCells<T> / split;
  static constexpr int batch = K <= 8 ? kBatch<K> : 1;                   // vectors of a row that a thread has under way
  static constexpr int loads = K <= 8 ? K : B < 8 ? 4 : B == 8 ? 2 : 1;  // rows of which it has
  static constexpr int rows = loads * split;
  static constexpr int peeled = B < 8 ? rows : 0;  // of which the compiler knows the number, and so what they push out
  static constexpr int step = kTrimThreads / split * kLanes<T>;
};

/// The rows from `first` on, as many as a thread takes at a time, of the vectors from e on.
template <typename Shape, typename T, int C, int B>
__device__ inline void push_rows(Ends<T, C, B> (&ends)[Shape::batch], const T* const* rows, int first, int at_least, int count,
                                 int kept, int e, int end) {
  const int place = int(threadIdx.x) % Shape::split;
  Packed<T> loaded[Shape::batch][Shape::loads];
#pragma unroll
  for (int b = 0; b < Shape::batch; ++b)
#pragma unroll
    for (int i = 0; i < Shape::loads; ++i) {
      const T* row = rows[first + i * Shape::split + place];
      loaded[b][i] = load_vector(row && e + b * Shape::step < end ? row + e + b * Shape::step : nullptr);
    }
#pragma unroll
  for (int b = 0; b < Shape::batch; ++b)
#pragma unroll
    for (int i = 0; i < Shape::loads; ++i) {
      if constexpr (Shape::split > 1) transpose<T>(loaded[b][i]);
#pragma unroll
      for (int j = 0; j < Shape::split; ++j) {
        const int ahead = i * Shape::split + j;
        Cell<T> row[C];
#pragma unroll
        for (int c = 0; c < C; ++c) row[c] = cell_of(loaded[b][i], j * C + c);
        if (first + ahead < count) ends[b].push(row, first + ahead, at_least + ahead, kept);
      }
    }
}

/// One block per chunk of kDeviceChunk elements; `trim` is B at most. K is the class of the number of rows: 2, 4, 8, or 64 for
/// any number. Dynamic shared memory holds a pointer for each row.
template <typename T, int K, int B>
__global__ void __launch_bounds__(kTrimThreads)
    trimmed_mean(const __grid_constant__ TensorTable table, const bool* active, int trim) {
  using Shape = TrimShape<T, K, B>;
  extern __shared__ const void* shared_rows[];
  __shared__ int count;
  __shared__ bool rows_aligned;
  const T** rows = reinterpret_cast<const T**>(shared_rows);
  const Chunk chunk = find_chunk(table, blockIdx.x);
  void* const* pointers = table.pointers(chunk.tensor);
  const int num_rows = table.num_pointers - 1;
  if (threadIdx.x < kWarpSize) {
    bool aligned;
    const int gathered = gather_rows<T>(pointers, num_rows, chunk.begin, active, rows, aligned);
    if (threadIdx.x == 0) {
      count = gathered;
      rows_aligned = aligned;
    }
  }
  __syncthreads();
  const int most = count > 0 ? (count - 1) / 2 : 0, kept = trim < most ? trim : most;
  const Sum<T> divisor = count > 0 ? count - 2 * kept : 1;
  T* out = static_cast<T*>(pointers[num_rows]) + chunk.begin;
  const bool aligned = rows_aligned && is_aligned(out);
  const int end = int(chunk.end - chunk.begin), vectors_end = aligned ? end / kLanes<T> * kLanes<T> : 0;
#pragma unroll 1
  for (int e = int(threadIdx.x) / Shape::split * kLanes<T>; e < vectors_end; e += Shape::batch * Shape::step) {
    Ends<T, Shape::cells, B> ends[Shape::batch];
#pragma unroll
    for (int b = 0; b < Shape::batch; ++b) ends[b].clear(kept);
    if constexpr (Shape::peeled > 0) push_rows<Shape>(ends, rows, 0, 0, count, kept, e, vectors_end);
    if constexpr (K > 8) {
#pragma unroll 1
      for (int first = Shape::peeled; first < count; first += Shape::rows)
        push_rows<Shape>(ends, rows, first, Shape::peeled, count, kept, e, vectors_end);
    }
#pragma unroll
    for (int b = 0; b < Shape::batch; ++b) {
      const int at = e + b * Shape::step;
      if (at >= vectors_end) continue;
      if constexpr (Shape::split > 1) {
        reinterpret_cast<Cell<T>*>(out + at)[threadIdx.x % Shape::split] = ends[b].mean(0, divisor).cell;
      } else {
        Packed<T> packed;
#pragma unroll
        for (int c = 0; c < kCells<T>; ++c) cell_of(packed, c) = ends[b].mean(c, divisor).cell;
        store_packed(out + at, packed);
      }
    }
  }
#pragma unroll 1
  for (int e = vectors_end + int(threadIdx.x); e < end; e += kTrimThreads) {
    Ends<T, 1, B> ends;
    ends.clear(kept);
#pragma unroll 1
    for (int r = 0; r < count; ++r) {
      Split<T> element;
      if (rows[r]) element.values[0] = rows[r][e];
      Cell<T> row[] = {element.cell};
      ends.push(row, r, 0, kept);
    }
    out[e] = ends.mean(0, divisor).values[0];
  }
}

}  // namespace mtlkernels
