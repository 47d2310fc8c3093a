// Weighted sums of task gradients; combine.h says how.

#include "combine.h"

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

/// Rows and outputs lie flat in memory as they are; sums are in A.
template <typename T, typename A = double>
void combine_flat(const Column& column, const double* given, int64_t begin, int64_t end, const Output& out) {
  Block<T, A> block(column.num_rows);
  const int64_t num_weights = int64_t(column.num_rows) * out.num_rows;
  Scratch scratch(size_t(column.num_rows + num_weights) * 8);
  const T** rows = scratch.as<const T*>();
  A* weights = reinterpret_cast<A*>(rows + column.num_rows);
  for (int64_t i = 0; i < num_weights; ++i) weights[i] = A(given[i]);
  const int64_t step = out.num_rows == 1 ? kLongBlock : kBlock;  // what is read again stays in the first-level cache
  for (int64_t at = begin; at < end; at += step) {
    const int64_t count = end - at < step ? end - at : step;
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
    case DType::bfloat16:
      if constexpr (kVectorBytes == 64) {
        if (column.layout.dim == 0 && fit_float(weights, column.num_rows * out.num_rows))
          return combine_flat<BFloat16, float>(column, weights, begin, end, out);
      }
      return combine_range<float, BFloat16>(column, weights, begin, end, out);
    case DType::float16: return combine_range<float, Float16>(column, weights, begin, end, out);
    case DType::float64: return combine_range<double, double>(column, weights, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
