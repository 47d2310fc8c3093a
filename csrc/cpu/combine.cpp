// Weighted sums of task gradients, out_m[e] = sum_k w_mk * g_k[e], each row read from memory once, each result written once.
//
// Sums run in float64 in the order of k and are rounded once; the memory is slower than the arithmetic. Results that no cache
// could keep are stored past it, which saves reading the line before it is overwritten.

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements; a multiple of every vector and cache line
constexpr int kRows = 8;          // rows per sweep: their pointers and the output's stay in registers

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
    for (int r = 0; r < R; ++r) sum += weight[r] * load_as_double(row[r] + e);
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
    for (int r = 0; r < R; ++r) sum += weights[r] * double(row[r][e]);
    if constexpr (Last) {
      out[e] = T(sum);
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
void combine_block(const T* const* rows, const double* weights, int num_rows, int64_t count, double* sums, T* out, bool stream) {
  if (num_rows == 0) {
    std::memset(out, 0, size_t(count) * sizeof(T));
    return;
  }
  for (int r = 0; r < num_rows; r += kRows) {
    const bool first = r == 0, last = r + kRows >= num_rows;
    const int now = last ? num_rows - r : kRows;
    const Sweep<T> run = !last   ? first ? pick_sweep<T, true, false, false>(now) : pick_sweep<T, false, false, false>(now)
                         : first ? stream ? pick_sweep<T, true, true, true>(now) : pick_sweep<T, true, true, false>(now)
                         : stream ? pick_sweep<T, false, true, true>(now)
                                  : pick_sweep<T, false, true, false>(now);
    run(rows + r, weights + r, count, sums, out);
  }
}

template <typename From, typename To>
void scatter(const From* from, const Layout& layout, const int64_t* strides, int64_t begin, int64_t count, To* to) {
  if (layout.dim == 0) return convert_back(from, count, to + begin);
  for_runs(layout, strides, begin, count, [&](int64_t offset, int64_t stride, int64_t run, int64_t at) {
    for (int64_t i = 0; i < run; ++i) from_float(from[at + i], to + offset + i * stride);
  });
}

template <typename T>
void write_row(const T* values, const Column& column, const Output& out, int m, int64_t begin, int64_t count) {
  const int64_t* strides = column.layout.dim ? out.strides[m] : nullptr;
  if constexpr (sizeof(T) == 8) {
    scatter(values, column.layout, strides, begin, count, static_cast<double*>(out.rows[m]));
  } else if (column.dtype == DType::float32) {
    scatter(values, column.layout, strides, begin, count, static_cast<float*>(out.rows[m]));
  } else if (column.dtype == DType::bfloat16) {
    scatter(values, column.layout, strides, begin, count, static_cast<BFloat16*>(out.rows[m]));
  } else {
    scatter(values, column.layout, strides, begin, count, static_cast<Float16*>(out.rows[m]));
  }
}

template <typename T>
void combine_range(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out) {
  const int num_rows = column.num_rows;
  const bool direct = column.layout.dim == 0 && column.dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64);
  // Per block: every row converted once, the results of all outputs, and the float64 sums of one.
  const size_t converted = direct ? 0 : size_t(num_rows) * kBlock, results = direct ? 0 : size_t(out.num_rows) * kBlock;
  Scratch scratch(kBlock * sizeof(double) + (converted + results) * sizeof(T) + size_t(num_rows) * 3 * 8);
  double* sums = scratch.as<double>();
  T* values = reinterpret_cast<T*>(sums + kBlock);
  T* finished = values + converted;
  double* used_weights = reinterpret_cast<double*>(finished + results);
  const T** rows = reinterpret_cast<const T**>(used_weights + num_rows);
  const T** used = rows + num_rows;

  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int k = 0; k < num_rows; ++k) {
      bool read = false;
      for (int m = 0; m < out.num_rows && column.rows[k]; ++m) read |= weights[m * num_rows + k] != 0;
      rows[k] = read ? read_row<T>(column, k, at, count, values + (direct ? 0 : k * kBlock)) : nullptr;
    }
    for (int m = 0; m < out.num_rows; ++m) {
      int num_used = 0;
      for (int k = 0; k < num_rows; ++k) {
        if (!rows[k] || weights[m * num_rows + k] == 0) continue;
        used[num_used] = rows[k];
        used_weights[num_used++] = weights[m * num_rows + k];
      }
      T* to = direct ? static_cast<T*>(out.rows[m]) + at : finished + m * kBlock;
      const bool stream = direct && out.stream && reinterpret_cast<uintptr_t>(to) % 64 == 0;
      combine_block<T>(used, used_weights, num_used, count, sums, to, stream);
    }
    // Only now: an output may be one of the rows that a later output reads.
    for (int m = 0; m < out.num_rows && !direct; ++m) write_row<T>(finished + m * kBlock, column, out, m, at, count);
  }
  if (out.stream) fence_streaming();
}

}  // namespace

namespace MTL_ISA {

void combine(const Column& column, const double* weights, int64_t begin, int64_t end, const Output& out) {
  if (begin >= end) return;
  if (column.dtype == DType::float64) {
    combine_range<double>(column, weights, begin, end, out);
  } else {
    combine_range<float>(column, weights, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
