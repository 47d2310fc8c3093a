// Weighted sums of task gradients, out_m[e] = sum_k w_mk * g_k[e], each row read from memory once, each result written once.
//
// Sums run in float64 in the order of k and are rounded to float32, then to 16 bits; the memory is slower than the arithmetic.
// Results that no cache could keep are stored past it, which saves reading the line before it is overwritten.

#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 512;  // elements; a multiple of every vector and cache line
constexpr int kRows = 8;         // rows per sweep: their pointers and the output's stay in registers

/// What a sum is rounded to on its way to a T.
template <typename T>
using Rounded = std::conditional_t<sizeof(T) == 8, double, float>;

/// One sweep over up to kRows rows: from the sums of earlier sweeps (unless `First`) to the output or to the next sweep.
template <typename T, int R, bool First, bool Last, bool Stream>
void sweep(const T* const* rows, const double* weights, int64_t count, double* sums, T* out) {
  constexpr int lanes = kLanes<double>;
  const T* row[R];
  DoubleVector weight[R];
  for (int r = 0; r < R; ++r) {
    row[r] = rows[r];
    weight[r] = DoubleVector{} + weights[r];
  }
  int64_t e = 0;
  for (; e + lanes <= count; e += lanes) {
    DoubleVector sum = First ? DoubleVector{} : load<DoubleVector>(sums + e);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum += weight[r] * load_as_double(row[r] + e);
      if (e * int64_t(sizeof(T)) % 64 == 0) __builtin_prefetch(row[r] + e + kBlock);  // of the next block
    }
    if constexpr (!Last) {
      store(sums + e, sum);
    } else if constexpr (Stream) {
      store_streaming(out + e, sum);
    } else {
      store_cached(out + e, sum);
    }
  }
  for (; e < count; ++e) {
    double sum = First ? 0.0 : sums[e];
    for (int r = 0; r < R; ++r) sum += weights[r] * double(to_float(row[r][e]));
    if constexpr (Last) {
      from_float(Rounded<T>(sum), out + e);
    } else {
      sums[e] = sum;
    }
  }
}

template <typename T>
using Sweep = void (*)(const T* const*, const double*, int64_t, double*, T*);

template <typename T, bool First, bool Last, bool Stream>
Sweep<T> pick_sweep(int rows) {
  switch (rows) {
    case 1: return sweep<T, 1, First, Last, Stream>;
    case 2: return sweep<T, 2, First, Last, Stream>;
    case 3: return sweep<T, 3, First, Last, Stream>;
    case 4: return sweep<T, 4, First, Last, Stream>;
    case 5: return sweep<T, 5, First, Last, Stream>;
    case 6: return sweep<T, 6, First, Last, Stream>;
    case 7: return sweep<T, 7, First, Last, Stream>;
    default: return sweep<T, 8, First, Last, Stream>;
  }
}

/// out = sum of `num_rows` weighted rows over one block.
template <typename T>
void combine_block(const T* const* rows, const double* weights, int num_rows, int64_t count, double* sums, T* out,
                   bool stream) {
  if (num_rows == 0) {
    std::memset(out, 0, size_t(count) * sizeof(T));
    return;
  }
  for (int r = 0; r < num_rows; r += kRows) {
    const bool first = r == 0, last = r + kRows >= num_rows;
    const int now = last ? num_rows - r : kRows;
    const Sweep<T> run = !last    ? first ? pick_sweep<T, true, false, false>(now) : pick_sweep<T, false, false, false>(now)
                            : first ? stream ? pick_sweep<T, true, true, true>(now) : pick_sweep<T, true, true, false>(now)
                            : stream ? pick_sweep<T, false, true, true>(now)
                                  : pick_sweep<T, false, true, false>(now);
    run(rows + r, weights + r, count, sums, out);
  }
}

/// The rows of `weights` [num_out][num_rows] over one block, read from rows[k] (null: no gradient) and written to to[m].
template <typename T>
class Block {
 public:
  explicit Block(int num_rows) : num_rows_(num_rows), scratch_(kBlock * sizeof(double) + size_t(num_rows) * 16) {
    sums_ = scratch_.as<double>();
    weights_ = sums_ + kBlock;
    rows_ = reinterpret_cast<const T**>(weights_ + num_rows);
  }

  void run(const T* const* rows, const double* weights, int64_t count, T* to, bool stream) {
    int used = 0;
    for (int k = 0; k < num_rows_; ++k) {
      if (!rows[k] || weights[k] == 0) continue;
      rows_[used] = rows[k];
      weights_[used++] = weights[k];
    }
    combine_block<T>(rows_, weights_, used, count, sums_, to, stream);
  }

 private:
  const int num_rows_;
  Scratch scratch_;
  double *sums_, *weights_;
  const T** rows_;
};

/// Rows and outputs lie flat in memory as they are.
template <typename T>
void combine_flat(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out) {
  Block<T> block(column.num_rows);
  Scratch scratch(size_t(column.num_rows) * 8);
  const T** rows = scratch.as<const T*>();
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int k = 0; k < column.num_rows; ++k) rows[k] = column.rows[k] ? static_cast<const T*>(column.rows[k]) + at : nullptr;
    for (int m = 0; m < out.num_rows; ++m) {
      T* to = static_cast<T*>(out.rows[m]) + at;
      block.run(rows, weights + m * column.num_rows, count, to, out.stream && reinterpret_cast<uintptr_t>(to) % 64 == 0);
    }
  }
  if (out.stream) fence_streaming();
}

/// Any strides: blocks of rows are gathered as T, and results scattered to S.
template <typename T, typename S>
void combine_strided(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out) {
  const int num_rows = column.num_rows;
  Block<T> block(num_rows);
  Scratch scratch(size_t(num_rows + out.num_rows) * kBlock * sizeof(T) + size_t(num_rows) * 8);
  const T** rows = scratch.as<const T*>();
  T* values = reinterpret_cast<T*>(rows + num_rows);
  T* results = values + size_t(num_rows) * kBlock;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int k = 0; k < num_rows; ++k) {
      bool read = false;
      for (int m = 0; m < out.num_rows && column.rows[k]; ++m) read |= weights[m * num_rows + k] != 0;
      rows[k] = read ? read_row<T>(column, k, at, count, values + k * kBlock) : nullptr;
    }
    for (int m = 0; m < out.num_rows; ++m) block.run(rows, weights + m * num_rows, count, results + m * kBlock, false);
    for (int m = 0; m < out.num_rows; ++m)
      scatter(results + m * kBlock, column.layout, out.strides[m], at, count, static_cast<S*>(out.rows[m]));
  }
}

template <typename T, typename S>
void combine_range(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out) {
  if (column.layout.dim == 0) {
    combine_flat<S>(column, weights, begin, end, out);
  } else {
    combine_strided<T, S>(column, weights, begin, end, out);
  }
}

}  // namespace

namespace MTL_ISA {

void combine(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out) {
  if (begin >= end) return;
  switch (column.dtype) {
    case DType::float32: return combine_range<float, float>(column, weights, begin, end, out);
    case DType::bfloat16: return combine_range<float, BFloat16>(column, weights, begin, end, out);
    case DType::float16: return combine_range<float, Float16>(column, weights, begin, end, out);
    case DType::float64: return combine_range<double, double>(column, weights, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
