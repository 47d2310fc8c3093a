// Task priority: inner products with the top task's row of each channel, and the sum that they lead to.
//
// Products and short sums of them are float32, all else is float64; products that leave float32's range are formed again in
// float64. Rows are summed in float32. Both are float64 throughout for float64, and for 16 bits, which are widened anyway.
// Results that no cache could keep are stored past it.

#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements that are gathered at a time where rows are not flat
constexpr int kTerms = 8;         // of one float32 sum, as in gram
constexpr int kGroup = 4;         // rows at a time: their pointers, sums and operands stay in registers

/// The rows that a column has, over ranges of its elements: where they lie, or gathered as T where they are not flat.
template <typename T>
class Rows {
 public:
  explicit Rows(const Column& column)
      : column_(column),
        flat_(column.layout.dim == 0),
        scratch_(size_t(column.num_rows) * (3 * 8 + (flat_ ? 0 : kBlock * sizeof(T)))) {
    task_ = scratch_.as<int64_t>();
    first_ = reinterpret_cast<const T**>(task_ + column.num_rows);
    now_ = first_ + column.num_rows;
    values_ = reinterpret_cast<T*>(now_ + column.num_rows);
    for (int k = 0; k < column.num_rows; ++k)
      if (column.rows[k]) task_[count_++] = k;
  }

  int count() const { return count_; }
  int64_t task(int r) const { return task_[r]; }
  /// Which of them is a task's; -1 where that is no task, or has no gradient.
  int find(int64_t task) const {
    for (int r = 0; r < count_; ++r)
      if (task_[r] == task) return r;
    return -1;
  }

  /// Calls visit(channel, begin, count, rows) for each channel's part of elements [begin, end), where the rows lie at its
  /// first element. At most kBlock elements at a time where `in_blocks`.
  template <typename Visit>
  void for_channels(int64_t rest, int64_t begin, int64_t end, bool in_blocks, const Visit& visit) {
    for (int64_t at = begin; at < end;) {
      const int64_t size = flat_ || end - at < kBlock ? end - at : kBlock;
      for (int r = 0; r < count_; ++r) {
        if (flat_) {
          first_[r] = static_cast<const T*>(column_.rows[task_[r]]) + at;
        } else if constexpr (sizeof(T) >= 4) {
          first_[r] = read_row<T>(column_, int(task_[r]), at, size, values_ + r * kBlock);
        }
      }
      int64_t channel = at / rest, end_of_channel = (channel + 1) * rest - at;
      for (int64_t offset = 0; offset < size;) {
        int64_t count = (end_of_channel < size ? end_of_channel : size) - offset;
        if (in_blocks && count > kBlock) count = kBlock;
        for (int r = 0; r < count_; ++r) now_[r] = first_[r] + offset;
        visit(channel, at + offset, count, static_cast<const T* const*>(now_));
        offset += count;
        if (offset == end_of_channel) {
          ++channel;
          end_of_channel += rest;
        }
      }
      at += size;
    }
  }

 private:
  const Column& column_;
  const bool flat_;
  Scratch scratch_;
  int64_t* task_;
  const T **first_, **now_;
  T* values_;
  int count_ = 0;
};

/// sums[r] = <own, row r> over `count` elements, and square = <own, own>.
template <typename T, int R>
void products(const T* own, const T* const* rows, int64_t count, double* sums, double* square) {
  constexpr int lanes = kLanes<double>, unroll = R <= 2 ? 4 : 2;  // enough sums under way to hide the latency of an addition
  DoubleVector total[R + 1][unroll] = {};
  int64_t e = 0;
  for (; e + unroll * lanes <= count; e += unroll * lanes) {
#pragma GCC unroll 4
    for (int u = 0; u < unroll; ++u) {
      const DoubleVector left = load_as_double(own + e + u * lanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][u] += left * load_as_double(rows[r] + e + u * lanes);
      total[R][u] += left * left;
    }
  }
  for (; e + lanes <= count; e += lanes) {
    const DoubleVector left = load_as_double(own + e);
    for (int r = 0; r < R; ++r) total[r][0] += left * load_as_double(rows[r] + e);
    total[R][0] += left * left;
  }
  for (int r = 0; r <= R; ++r) {
    const T* other = r < R ? rows[r] : own;
    for (int u = 1; u < unroll; ++u) total[r][0] += total[r][u];
    double sum = sum_lanes(total[r][0]);
    for (int64_t tail = e; tail < count; ++tail) sum += double(to_float(own[tail])) * double(to_float(other[tail]));
    (r < R ? sums[r] : *square) = sum;
  }
}

/// The same for float32 in float32, at most kTerms products a lane before they go to float64.
template <int R>
void products_in_float32(const float* own, const float* const* rows, int64_t count, double* sums, double* square) {
  constexpr int lanes = kLanes<float>;
  DoubleVector total[R + 1][2] = {};
  int64_t e = 0;
  while (e + lanes <= count) {
    FloatVector part[R + 1] = {};
    for (int term = 0; term < kTerms && e + lanes <= count; ++term, e += lanes) {
      const FloatVector left = load<FloatVector>(own + e);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) part[r] += left * load<FloatVector>(rows[r] + e);
      part[R] += left * left;
    }
#pragma GCC unroll 5
    for (int r = 0; r <= R; ++r) {
      HalfFloatVector halves[2];
      __builtin_memcpy(halves, &part[r], sizeof(halves));
      total[r][0] += __builtin_convertvector(halves[0], DoubleVector);
      total[r][1] += __builtin_convertvector(halves[1], DoubleVector);
    }
  }
  for (int r = 0; r <= R; ++r) {
    const float* other = r < R ? rows[r] : own;
    double sum = sum_lanes(total[r][0] + total[r][1]);
    for (int64_t tail = e; tail < count; ++tail) sum += double(own[tail]) * double(other[tail]);
    (r < R ? sums[r] : *square) = sum;
  }
}

/// Products of float32 in float32; in float64 where they may have left its range: a sum overflowed or is no number, or the
/// square is so small that products underflowed. Of all else in float64.
template <int R, typename T>
void products_in_range(const T* own, const T* const* rows, int64_t count, double* sums, double* square) {
  if constexpr (std::is_same_v<T, float>) {
    products_in_float32<R>(own, rows, count, sums, square);
    bool certain = *square > 0x1p-96 && *square < 0x1p127;
    for (int r = 0; r < R; ++r) certain &= sums[r] > -0x1p127 && sums[r] < 0x1p127;
    if (certain) return;
  }
  products<T, R>(own, rows, count, sums, square);
}

template <typename T>
void products(const T* own, const T* const* rows, int num_rows, int64_t count, double* sums, double* square) {
  for (int r = 0; r < num_rows || r == 0; r += kGroup) {
    switch (num_rows - r) {
      case 0: products_in_range<0>(own, rows, count, sums, square); break;
      case 1: products_in_range<1>(own, rows + r, count, sums + r, square); break;
      case 2: products_in_range<2>(own, rows + r, count, sums + r, square); break;
      case 3: products_in_range<3>(own, rows + r, count, sums + r, square); break;
      default: products_in_range<kGroup>(own, rows + r, count, sums + r, square);
    }
  }
}

template <typename T, typename V>
inline void store_result(T* to, V value, bool stream) {
  if constexpr (std::is_same_v<V, DoubleVector>) {
    stream ? store_streaming(to, value) : store_cached(to, value);
  } else {
    stream ? store_streaming(to, value) : store(to, value);
  }
}

/// out[e] = start[e] + sum over R rows + alpha * own[e], in S; start null: from 0; own null: without it. `Last`: out is a
/// result, else the sums of a group.
template <typename S, typename T, int R, bool Last>
void add_rows(const T* const* rows, const T* own, double alpha, const S* start, int64_t count, S* sums, T* out, bool stream) {
  constexpr int lanes = kLanes<S>;
  const T* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  int64_t e = 0;
  const auto one = [&](int64_t at) {
    S sum = start ? start[at] : S(0);
    for (int r = 0; r < R; ++r) sum += S(to_float(row[r][at]));
    if (own) sum += S(alpha) * S(to_float(own[at]));
    if constexpr (Last) {
      from_float(Rounded<T>(sum), out + at);
    } else {
      sums[at] = sum;
    }
  };
  if (stream)
    for (; e < count && reinterpret_cast<uintptr_t>(out + e) % 64; ++e) one(e);  // to where a line begins
  const Vector<S> factor = Vector<S>{} + S(alpha);
  for (; e + lanes <= count; e += lanes) {
    Vector<S> sum = start ? load<Vector<S>>(start + e) : Vector<S>{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum += load_as<S>(row[r] + e);
    if (own) sum += factor * load_as<S>(own + e);
    if constexpr (Last) {
      store_result(out + e, sum, stream);
    } else {
      store(sums + e, sum);
    }
  }
  for (; e < count; ++e) one(e);
}

/// out = sum of the rows + alpha * own over at most kBlock elements, summed in S; `sums` holds as many.
template <typename S, typename T>
void sum_rows(const T* const* rows, int num_rows, const T* own, double alpha, int64_t count, S* sums, T* out, bool stream) {
  const S* start = nullptr;
  for (; num_rows > kGroup; num_rows -= kGroup, rows += kGroup, start = sums)
    add_rows<S, T, kGroup, false>(rows, nullptr, 0, start, count, sums, out, false);
  switch (num_rows) {
    case 1: return add_rows<S, T, 1, true>(rows, own, alpha, start, count, sums, out, stream);
    case 2: return add_rows<S, T, 2, true>(rows, own, alpha, start, count, sums, out, stream);
    case 3: return add_rows<S, T, 3, true>(rows, own, alpha, start, count, sums, out, stream);
    default: return add_rows<S, T, kGroup, true>(rows, own, alpha, start, count, sums, out, stream);
  }
}

/// Float32 rows are summed in float32, unless alpha is beyond its range: what it adds need not be.
template <typename T>
void combine_stretch(const T* const* rows, int num_rows, const T* own, double alpha, int64_t count, double* sums, T* out,
                     bool stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (alpha < 0x1p100) return sum_rows<float>(rows, num_rows, own, alpha, count, reinterpret_cast<float*>(sums), out, stream);
  }
  sum_rows<double>(rows, num_rows, own, alpha, count, sums, out, stream);
}

template <typename T>
void inner_range(const Column& column, const Channels& channels, int64_t begin, int64_t end, double* inner) {
  Rows<T> rows(column);
  Scratch scratch(size_t(column.num_rows) * 16);
  double* sums = scratch.as<double>();
  const T** others = reinterpret_cast<const T**>(sums + column.num_rows);
  rows.for_channels(channels.rest, begin, end, false, [&](int64_t channel, int64_t, int64_t count, const T* const* row) {
    const int own = rows.find(channels.top[channel]);
    if (own < 0) return;
    for (int r = 0; r + 1 < rows.count(); ++r) others[r] = row[r < own ? r : r + 1];
    double* matrix_row = inner + rows.task(own) * column.num_rows;
    double square = 0;
    products(row[own], others, rows.count() - 1, count, sums, &square);
    matrix_row[rows.task(own)] += square;
    for (int r = 0; r + 1 < rows.count(); ++r) matrix_row[rows.task(r < own ? r : r + 1)] += sums[r];
  });
}

/// Results as S; rows that are not flat are gathered as T, and results scattered.
template <typename T, typename S>
void combine_range(const Column& column, const Channels& channels, const double* alpha, int64_t begin, int64_t end,
                   const Output& out) {
  Rows<T> rows(column);
  Scratch scratch(kBlock * (sizeof(double) + sizeof(T)));
  double* sums = scratch.as<double>();
  T* results = reinterpret_cast<T*>(sums + kBlock);
  rows.for_channels(channels.rest, begin, end, true, [&](int64_t channel, int64_t at, int64_t count, const T* const* row) {
    const int own = rows.find(channels.top[channel]);
    const double factor = own < 0 ? 0 : alpha[rows.task(own)];
    const T* projected = factor == 0 ? nullptr : row[own];
    if (column.layout.dim == 0) {
      T* to = static_cast<T*>(out.rows[0]) + at;
      combine_stretch(row, rows.count(), projected, factor, count, sums, to, out.stream);
    } else if constexpr (sizeof(T) >= 4) {
      combine_stretch(row, rows.count(), projected, factor, count, sums, results, false);
      for_runs(column.layout, out.strides[0], at, count, [&](int64_t offset, int64_t stride, int64_t run, int64_t from) {
        for (int64_t i = 0; i < run; ++i) from_float(results[from + i], static_cast<S*>(out.rows[0]) + offset + i * stride);
      });
    }
  });
  if (out.stream) fence_streaming();
}

}  // namespace

namespace MTL_ISA {

void priority_inner(const Column& column, const Channels& channels, int64_t begin, int64_t end, double* inner) {
  const bool flat = column.layout.dim == 0;
  switch (column.dtype) {
    case DType::float32: return inner_range<float>(column, channels, begin, end, inner);
    case DType::bfloat16:
      return flat ? inner_range<BFloat16>(column, channels, begin, end, inner)
                  : inner_range<float>(column, channels, begin, end, inner);
    case DType::float16:
      return flat ? inner_range<Float16>(column, channels, begin, end, inner)
                  : inner_range<float>(column, channels, begin, end, inner);
    case DType::float64: return inner_range<double>(column, channels, begin, end, inner);
  }
}

void priority_combine(const Column& column, const Channels& channels, const double* alpha, int64_t begin, int64_t end,
                      const Output& out) {
  const bool flat = column.layout.dim == 0;
  switch (column.dtype) {
    case DType::float32: return combine_range<float, float>(column, channels, alpha, begin, end, out);
    case DType::bfloat16:
      return flat ? combine_range<BFloat16, BFloat16>(column, channels, alpha, begin, end, out)
                  : combine_range<float, BFloat16>(column, channels, alpha, begin, end, out);
    case DType::float16:
      return flat ? combine_range<Float16, Float16>(column, channels, alpha, begin, end, out)
                  : combine_range<float, Float16>(column, channels, alpha, begin, end, out);
    case DType::float64: return combine_range<double, double>(column, channels, alpha, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
