// The combination of task gradients and a step of SGD or Adam along it in one sweep, each row read from memory once, each
// parameter and state written once. The combined gradient stays in registers.

#include "vector.h"
#include "weighted_sum.h"

namespace mtlkernels::cpu {
namespace {

/// What a sum of Ts is rounded to.
template <typename T>
inline HalfFloatVector as_rounded(DoubleVector sum, const T*) {
  return __builtin_convertvector(sum, HalfFloatVector);
}
inline DoubleVector as_rounded(DoubleVector sum, const double*) { return sum; }

struct Math {
  template <typename V>
  static V fused(V a, V b, V c) {
    return cpu::fused(a, b, c);
  }
  template <typename V>
  static V square_root(V value) {
    return cpu::square_root(value);
  }
};

/// Moves what the rule has of each row along the sums.
template <typename T, typename Rule>
struct Move {
  static constexpr int64_t kAhead = 384;
  Rule rule;
  T* row[Rule::kRows];

  template <typename Rows>
  __attribute__((always_inline)) static void step(const Rule& rule, Rows& row, int64_t e, DoubleVector sum) {
    decltype(load_as_wide(row[0])) values[Rule::kRows], grad = as_rounded(sum, row[0]);
    for (int r = 0; r < Rule::kRows; ++r) values[r] = rule.reads(r) ? load_as_wide(row[r] + e) : grad;
    rule.template move<Math>(grad, values);
    for (int r = 0; r < Rule::kRows; ++r)
      if (rule.writes(r)) store_cached(row[r] + e, values[r]);
  }

  __attribute__((always_inline)) void operator()(int64_t e, DoubleVector sum) const {
    if (kAhead && e * int64_t(sizeof(T)) % 64 == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < Rule::kRows; ++r)
        if (rule.writes(r)) __builtin_prefetch(row[r] + e + kAhead, 1);
    }
    step(rule, row, e, sum);
  }

  /// Beside elements that are nobody's.
  void last(int64_t e, int64_t count, DoubleVector sum) const {
    T values[Rule::kRows][kLanes<double>] = {};
    for (int r = 0; r < Rule::kRows; ++r)
      if (rule.reads(r)) std::memcpy(values[r], row[r] + e, size_t(count) * sizeof(T));
    step(rule, values, 0, sum);
    for (int r = 0; r < Rule::kRows; ++r)
      if (rule.writes(r)) std::memcpy(row[r] + e, values[r], size_t(count) * sizeof(T));
  }
};

template <typename T, typename Rule>
void finish_block(const T* const* rows, const double* weights, int num_rows, const Rule& rule, T* const* moved, int64_t count,
                  double* sums) {
  Move<T, Rule> move{rule, {}};
  for (int r = 0; r < Rule::kRows; ++r) move.row[r] = moved[r];
  sum_block(rows, weights, num_rows, count, sums, move);
}

/// Rows, parameter and states lie flat in memory in one order. `rows` and `weights` are those of the tasks that count.
template <typename T, typename Rule>
void finish_flat(const T** rows, const double* weights, int num_rows, const Rule& rule, int64_t begin, int64_t end,
                 const Output& moved) {
  Scratch scratch(kBlock * sizeof(double) + size_t(num_rows) * 8);
  double* sums = scratch.as<double>();
  const T** now = reinterpret_cast<const T**>(sums + kBlock);
  for (int64_t at = begin; at < end; at += kBlock) {
    T* own[Rule::kRows] = {};
    for (int r = 0; r < moved.num_rows; ++r) own[r] = static_cast<T*>(moved.rows[r]) + at;
    for (int r = 0; r < num_rows; ++r) now[r] = rows[r] + at;
    finish_block(now, weights, num_rows, rule, own, end - at < kBlock ? end - at : kBlock, sums);
  }
}

/// Any strides: blocks of every row are gathered as S, and what moves is scattered.
template <typename T, typename Rule>
void finish_strided(const Column& column, const int* tasks, const double* weights, int num_rows, const Rule& rule,
                    int64_t begin, int64_t end, const Output& moved) {
  using S = Rounded<T>;
  const Column own{moved.rows, moved.strides, moved.num_rows, column.dtype, column.layout};
  Scratch scratch(kBlock * (sizeof(double) + size_t(num_rows + Rule::kRows) * sizeof(S)) + size_t(num_rows) * 8);
  double* sums = scratch.as<double>();
  const S** rows = reinterpret_cast<const S**>(sums + kBlock);
  S *values[Rule::kRows], *gathered = reinterpret_cast<S*>(rows + num_rows);
  for (int r = 0; r < Rule::kRows; ++r) values[r] = gathered + (num_rows + r) * kBlock;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    for (int r = 0; r < num_rows; ++r) rows[r] = read_row<S>(column, tasks[r], at, count, gathered + r * kBlock);
    for (int r = 0; r < moved.num_rows; ++r)
      if (rule.reads(r)) read_row<S>(own, r, at, count, values[r]);
    finish_block(rows, weights, num_rows, rule, values, count, sums);
    for (int r = 0; r < moved.num_rows; ++r)
      if (rule.writes(r)) scatter(values[r], column.layout, moved.strides[r], at, count, static_cast<T*>(moved.rows[r]));
  }
}

template <typename T, template <typename> typename Rule, typename Options>
void finish_range(const Column& column, const double* weights, const Options& options, double lr, double step, int64_t begin,
                  int64_t end, const Output& moved) {
  const Rule<Rounded<T>> rule(options, lr, step);
  Scratch scratch(size_t(column.num_rows) * 24);
  double* used = scratch.as<double>();
  const T** rows = reinterpret_cast<const T**>(used + column.num_rows);
  int* tasks = reinterpret_cast<int*>(rows + column.num_rows);
  int num_rows = 0;
  for (int k = 0; k < column.num_rows; ++k) {
    if (!column.rows[k] || weights[k] == 0) continue;
    used[num_rows] = weights[k];
    rows[num_rows] = static_cast<const T*>(column.rows[k]);
    tasks[num_rows++] = k;
  }
  if (column.layout.dim == 0) {
    finish_flat(rows, used, num_rows, rule, begin, end, moved);
  } else {
    finish_strided<T>(column, tasks, used, num_rows, rule, begin, end, moved);
  }
}

template <template <typename> typename Rule, typename Options>
void finish(const Column& column, const double* weights, const Options& options, double lr, double step, int64_t begin,
            int64_t end, const Output& moved) {
  if (begin >= end) return;
  switch (column.dtype) {
    case DType::float32: return finish_range<float, Rule>(column, weights, options, lr, step, begin, end, moved);
    case DType::bfloat16: return finish_range<BFloat16, Rule>(column, weights, options, lr, step, begin, end, moved);
    case DType::float16: return finish_range<Float16, Rule>(column, weights, options, lr, step, begin, end, moved);
    case DType::float64: return finish_range<double, Rule>(column, weights, options, lr, step, begin, end, moved);
  }
}

}  // namespace

namespace MTL_ISA {

void combine_sgd(const Column& column, const double* weights, const SgdOptions& options, double lr, int64_t begin, int64_t end,
                 const Output& moved) {
  finish<SgdRule>(column, weights, options, lr, 0, begin, end, moved);
}

void combine_adam(const Column& column, const double* weights, const AdamOptions& options, double lr, double step,
                  int64_t begin, int64_t end, const Output& moved) {
  finish<AdamRule>(column, weights, options, lr, step, begin, end, moved);
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
