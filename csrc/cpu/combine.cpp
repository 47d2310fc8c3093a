// Weighted sums of task gradients, out_m[e] = sum_k w_mk * g_k[e], each row read from memory once, each result written once.
//
// Sums run in float64 in the order of k and are rounded to float32, then to 16 bits; the memory is slower than the arithmetic.
// Results that no cache could keep are stored past it, which saves reading the line before it is overwritten.

#include "vector.h"
#include "weighted_sum.h"

namespace mtlkernels::cpu {
namespace {

/// Rounds sums to where they belong.
template <typename T, bool Stream>
struct Store {
  static constexpr int64_t kAhead = 0;
  T* out;

  void operator()(int64_t e, DoubleVector sum) const {
    if constexpr (Stream) {
      store_streaming(out + e, sum);
    } else {
      store_cached(out + e, sum);
    }
  }
  void last(int64_t e, int64_t count, DoubleVector sum) const {
    T some[kLanes<double>];
    store_cached(some, sum);
    std::memcpy(out + e, some, size_t(count) * sizeof(T));
  }
};

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
    if (used == 0) {
      std::memset(to, 0, size_t(count) * sizeof(T));
    } else if (stream) {
      sum_block(rows_, weights_, used, count, sums_, Store<T, true>{to});
    } else {
      sum_block(rows_, weights_, used, count, sums_, Store<T, false>{to});
    }
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
