// The excess risk of a task, sum_e h^2 / sqrt(S + h^2 + epsilon) with h = factor g: gradient and memory S are read from memory
// once, nothing is written.
//
// Terms are float32 (float64 beside float64 gradients), sums of a few, and float64 from there on. A term is h (h / root), whose
// second factor is at most 1: nothing but the root's square can overflow, and where it does the term is made NaN. A block whose
// sum is not finite, or so small that terms underflowed, is summed again in float64, and so is every block where factor or
// epsilon leave float32's range.

#include "gram.h"
#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements; a multiple of every vector
constexpr int64_t kTerms = 8;     // of a float32 sum

inline FloatVector term(FloatVector h, FloatVector memory, FloatVector epsilon) {
  const FloatVector square = h * h + (memory + epsilon);
  return h * (h / square_root(square)) + (square - square);  // plus 0, or NaN where the square is not finite
}

inline DoubleVector term(DoubleVector h, DoubleVector memory, DoubleVector epsilon) {
  const DoubleVector square = h * h;
  return square / square_root(memory + square + epsilon);
}

template <typename T>
double sum_terms(const T* grad, const T* memory, double factor, double epsilon, int64_t count) {
  const Vector<T> factors = Vector<T>{} + T(factor), epsilons = Vector<T>{} + T(epsilon);
  const auto term_of = [&](const T* g, const T* kept) {
    return term(factors * load<Vector<T>>(g), load<Vector<T>>(kept), epsilons);
  };
  double total = 0;
  int64_t e = 0;
  for (; e + kTerms * kLanes<T> <= count; e += kTerms * kLanes<T>) {
    Vector<T> sum = {};
#pragma GCC unroll 8
    for (int64_t t = 0; t < kTerms; ++t) sum += term_of(grad + e + t * kLanes<T>, memory + e + t * kLanes<T>);
    total += sum_lanes(sum);
  }
  for (; e + kLanes<T> <= count; e += kLanes<T>) total += sum_lanes(term_of(grad + e, memory + e));
  if (e < count) {
    T last[kLanes<T>] = {}, kept[kLanes<T>];
    for (T& one : kept) one = 1;  // a term of 0, whatever epsilon is
    std::memcpy(last, grad + e, size_t(count - e) * sizeof(T));
    std::memcpy(kept, memory + e, size_t(count - e) * sizeof(T));
    total += sum_lanes(term_of(last, kept));
  }
  return total;
}

}  // namespace

namespace MTL_ISA {

double excess_risk(const Column& column, double factor, double epsilon, int64_t begin, int64_t end) {
  Column memories = column;
  memories.dtype = column.dtype == DType::float64 ? DType::float64 : DType::float32;
  const bool narrow = column.dtype != DType::float64 && epsilon > 0 && fit_float(&factor, 1) && fit_float(&epsilon, 1);
  Scratch scratch(2 * kBlock * sizeof(double));
  double total = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    if (narrow) {
      const float* grad = read_row<float>(column, 0, at, count, scratch.as<float>());
      const float* memory = read_row<float>(memories, 1, at, count, scratch.as<float>(kBlock));
      const double sum = sum_terms(grad, memory, factor, epsilon, count);
      if (!out_of_range(sum) || (sum == 0 && all_zero(grad, count))) {
        total += sum;
        continue;
      }
    }
    const double* grad = read_row<double>(column, 0, at, count, scratch.as<double>());
    total += sum_terms(grad, read_row<double>(memories, 1, at, count, scratch.as<double>(kBlock)), factor, epsilon, count);
  }
  return total;
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
