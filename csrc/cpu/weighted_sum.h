// Weighted sums of a block of rows, for the kernels that form them on the way to something else.

#pragma once

#include <cstring>
#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 512;  // elements; a multiple of every vector and cache line
constexpr int kRows = 8;         // rows per sweep: their pointers and the output's stay in registers

/// Up to a vector of elements, and zeros.
template <typename A, typename T>
inline Vector<A> load_some(const T* from, int64_t count) {
  T some[kLanes<A>] = {};
  std::memcpy(some, from, size_t(count) * sizeof(T));
  return load_as<A>(static_cast<const T*>(some));
}

/// Where a sweep that is not the last one leaves its sums.
template <typename A>
struct KeepSums {
  static constexpr int64_t kAhead = kBlock;
  A* sums;

  void operator()(int64_t e, Vector<A> sum) const { store(sums + e, sum); }
  void last(int64_t e, int64_t, Vector<A> sum) const { store(sums + e, sum); }
};

/// One sweep over up to kRows rows: from the sums of earlier sweeps (unless `First`) to sink(e, sum) for every vector of sums,
/// and sink.last(e, number, sum) for those of the last few elements. Sums are in A: double, or float for float rows. `sums` has
/// room for whole vectors. Rows are asked for Sink::kAhead elements before they are read.
template <typename T, int R, bool First, typename A, typename Sink>
void sweep(const T* const* rows, const A* weights, int64_t count, const A* sums, Sink sink) {
  constexpr int lanes = kLanes<A>;
  const T* row[R];
  Vector<A> weight[R];
  for (int r = 0; r < R; ++r) {
    row[r] = rows[r];
    weight[r] = Vector<A>{} + weights[r];
  }
  const Sink each = sink;  // whose address nobody has: it stays in registers
  int64_t e = 0;
  for (; e + lanes <= count; e += lanes) {
    if constexpr (Sink::kAhead > 0)
      if (e * int64_t(sizeof(T)) % 64 == 0) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + e + Sink::kAhead);
      }
    Vector<A> sum = First ? Vector<A>{} : load<Vector<A>>(sums + e);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum = fused(weight[r], load_as<A>(row[r] + e), sum);
    each(e, sum);
  }
  if (e == count) return;
  Vector<A> sum = First ? Vector<A>{} : load<Vector<A>>(sums + e);
  for (int r = 0; r < R; ++r) sum = fused(weight[r], load_some<A>(row[r] + e, count - e), sum);
  sink.last(e, count - e, sum);
}

template <typename T, bool First, typename A, typename Sink>
void sweep(const T* const* rows, const A* weights, int num_rows, int64_t count, const A* sums, Sink sink) {
  switch (num_rows) {
    case 0: return sweep<T, 0, First>(rows, weights, count, sums, sink);
    case 1: return sweep<T, 1, First>(rows, weights, count, sums, sink);
    case 2: return sweep<T, 2, First>(rows, weights, count, sums, sink);
    case 3: return sweep<T, 3, First>(rows, weights, count, sums, sink);
    case 4: return sweep<T, 4, First>(rows, weights, count, sums, sink);
    case 5: return sweep<T, 5, First>(rows, weights, count, sums, sink);
    case 6: return sweep<T, 6, First>(rows, weights, count, sums, sink);
    case 7: return sweep<T, 7, First>(rows, weights, count, sums, sink);
    default: return sweep<T, 8, First>(rows, weights, count, sums, sink);
  }
}

/// The sums of `num_rows` weighted rows over one block, in their order, to `sink`; `sums` [kBlock] is scratch.
template <typename T, typename A, typename Sink>
void sum_block(const T* const* rows, const A* weights, int num_rows, int64_t count, A* sums, Sink sink) {
  if (num_rows <= kRows) return sweep<T, true>(rows, weights, num_rows, count, sums, sink);
  sweep<T, true>(rows, weights, kRows, count, sums, KeepSums<A>{sums});
  int r = kRows;
  for (; r + kRows < num_rows; r += kRows) sweep<T, false>(rows + r, weights + r, kRows, count, sums, KeepSums<A>{sums});
  sweep<T, false>(rows + r, weights + r, num_rows - r, count, sums, sink);
}

}  // namespace
}  // namespace mtlkernels::cpu
