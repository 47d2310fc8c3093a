// Trimmed mean on the CPU: of an element's K gradients the b smallest and the b largest are left out, each gradient read from
// memory once.
//
// The b smallest and the b largest so far are kept, in registers where b is small; a gradient pushes one of the smallest out,
// that one of the largest, and what comes out there is added to the sum. The order is that of numbers with NaN past the
// largest.

#include "blocks.h"
#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int kAnyTrim = -1;  // the class for what does not fit in registers

/// The smaller stays, the larger goes on.
template <typename V>
inline void keep_smaller(V& kept, V& value) {
  const auto swap = ~(value >= kept) & (value == value);
  const V larger = swap ? kept : value;
  kept = swap ? value : kept;
  value = larger;
}

/// The larger stays, the smaller goes on.
template <typename V>
inline void keep_larger(V& kept, V& value) {
  const auto swap = ~(value <= kept) & (kept == kept);
  const V smaller = swap ? kept : value;
  kept = swap ? value : kept;
  value = smaller;
}

/// Whole vectors of 2 `trim` + 1 rows or more. B is `trim`, or kAnyTrim, which keeps 2 `trim` vectors in `scratch`.
template <typename S, int B>
void trim_block(const S* const* rows, int num_rows, int trim, int64_t count, S* scratch, S* out, bool stream) {
  using V = Vector<S>;
  const int b = B == kAnyTrim ? trim : B;
  V registers[B > 0 ? 2 * B : 1];
  V* low = B == kAnyTrim ? reinterpret_cast<V*>(scratch) : registers;
  V* high = low + b;
  const V divisor = V{} + S(num_rows - 2 * b);
  for (int64_t e = 0; e < count; e += kLanes<S>) {
#pragma GCC unroll 4
    for (int i = 0; i < b; ++i) low[i] = load<V>(rows[i] + e);
#pragma GCC unroll 4
    for (int j = 0; j < b; ++j) {
      V value = load<V>(rows[b + j] + e);
#pragma GCC unroll 4
      for (int i = 0; i < b; ++i) keep_smaller(low[i], value);
      high[j] = value;
    }
    V sum{};
    for (int r = 2 * b; r < num_rows; ++r) {
      V value = load<V>(rows[r] + e);
#pragma GCC unroll 4
      for (int i = 0; i < b; ++i) keep_smaller(low[i], value);
#pragma GCC unroll 4
      for (int i = 0; i < b; ++i) keep_larger(high[i], value);
      sum += value;
    }
    if (stream) {
      store_streaming(out + e, sum / divisor);
    } else {
      store(out + e, sum / divisor);
    }
  }
}

template <typename S>
using Block = void (*)(const S* const*, int, int, int64_t, S*, S*, bool);

template <typename S>
Block<S> pick_block(int trim) {
  switch (trim) {
    case 0: return trim_block<S, 0>;
    case 1: return trim_block<S, 1>;
    case 2: return trim_block<S, 2>;
    case 3: return trim_block<S, 3>;
    case 4: return trim_block<S, 4>;
    default: return trim_block<S, kAnyTrim>;
  }
}

/// Computed as S, written as T.
template <typename S, typename T>
void trim_range(const Column& column, const Trim& trim, int64_t begin, int64_t end, const Output& out) {
  Scratch places(size_t(column.num_rows) * sizeof(int));
  int* task = places.as<int>();
  int used = 0;
  for (int k = 0; k < column.num_rows; ++k)
    if (!trim.active || trim.active[k]) task[used++] = k;
  const int most = used > 0 ? (used - 1) / 2 : 0, dropped = trim.count < most ? int(trim.count) : most;
  Scratch pointers(size_t(used) * sizeof(S*));
  const S** rows = pointers.as<const S*>();
  Scratch kept(size_t(2 * dropped) * kVectorBytes);
  Scratch scratch(size_t(used + 2) * kBlock * sizeof(S));
  S *values = scratch.as<S>(), *zeros = values + used * kBlock, *results = zeros + kBlock;
  std::memset(zeros, 0, kBlock * sizeof(S));
  const Block<S> run = pick_block<S>(dropped);
  for_blocks<S, T>(
      column, begin, end, out, used, rows, values, results,
      [&](int64_t at, int64_t count) {
        for (int r = 0; r < used; ++r)
          rows[r] = column.rows[task[r]] ? read_row<S>(column, task[r], at, count, values + r * kBlock) : zeros;
      },
      [&](int64_t, int64_t count, S* to, bool stream) { run(rows, used, dropped, count, kept.as<S>(), to, stream); });
}

}  // namespace

namespace MTL_ISA {

void trimmed_mean(const Column& column, const Trim& trim, int64_t begin, int64_t end, const Output& out) {
  switch (column.dtype) {
    case DType::float32: return trim_range<float, float>(column, trim, begin, end, out);
    case DType::bfloat16: return trim_range<float, BFloat16>(column, trim, begin, end, out);
    case DType::float16: return trim_range<float, Float16>(column, trim, begin, end, out);
    case DType::float64: return trim_range<double, double>(column, trim, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
