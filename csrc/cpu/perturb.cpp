// The ascent of sharpness-aware minimisation, out[e] = a[e] + r b[e], or a[e] + r a[e]^2 b[e] for the adaptive one. Each row is
// read from memory once, the result written once.
//
// Computed in float64 and rounded once; the memory is slower than the arithmetic. The order (r a) b a keeps every factor within
// range: |r a b| is at most the radius of the perturbation.

#include <type_traits>

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;  // elements that are gathered at a time where rows do not lie flat

template <typename V>
inline V ascended(V value, V grad, V radius, bool adaptive) {
  return value + (adaptive ? radius * value * grad * value : radius * grad);
}

/// to[i] from a[i] and b[i], which may be `to` itself.
template <typename T, bool adaptive, bool stream>
void ascend(const T* a, const T* b, double radius, int64_t count, T* to) {
  constexpr int lanes = kLanes<double>;
  const DoubleVector radii = DoubleVector{} + radius;
  int64_t e = 0;
  for (; e + lanes <= count; e += lanes) {
    const DoubleVector result = ascended(load_as_double(a + e), load_as_double(b + e), radii, adaptive);
    if constexpr (stream) {
      store_streaming(to + e, result);
    } else {
      store_cached(to + e, result);
    }
  }
  for (; e < count; ++e) {
    const double result = ascended(double(to_float(a[e])), double(to_float(b[e])), radius, adaptive);
    from_float(std::conditional_t<sizeof(T) == 8, double, float>(result), to + e);
  }
}

template <typename T>
void ascend(const T* a, const T* b, double radius, bool adaptive, bool stream, int64_t count, T* to) {
  if (stream && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    return adaptive ? ascend<T, true, true>(a, b, radius, count, to) : ascend<T, false, true>(a, b, radius, count, to);
  }
  return adaptive ? ascend<T, true, false>(a, b, radius, count, to) : ascend<T, false, false>(a, b, radius, count, to);
}

/// Elements of T, gathered as G where the rows do not lie flat.
template <typename T, typename G>
void perturb_range(const Column& column, double radius, bool adaptive, int64_t begin, int64_t end, const Output& out) {
  if (column.layout.dim == 0) {
    const T *a = static_cast<const T*>(column.rows[0]) + begin, *b = static_cast<const T*>(column.rows[1]) + begin;
    ascend(a, b, radius, adaptive, out.stream, end - begin, static_cast<T*>(out.rows[0]) + begin);
    if (out.stream) fence_streaming();
    return;
  }
  Scratch scratch(2 * kBlock * sizeof(G));
  G *first = scratch.as<G>(), *second = first + kBlock;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    const G *a = read_row<G>(column, 0, at, count, first), *b = read_row<G>(column, 1, at, count, second);
    ascend(a, b, radius, adaptive, false, count, first);
    scatter(first, column.layout, out.strides[0], at, count, static_cast<T*>(out.rows[0]));
  }
}

}  // namespace

namespace MTL_ISA {

void perturb(const Column& column, double radius, bool adaptive, int64_t begin, int64_t end, const Output& out) {
  if (begin >= end) return;
  switch (column.dtype) {
    case DType::float32: return perturb_range<float, float>(column, radius, adaptive, begin, end, out);
    case DType::bfloat16: return perturb_range<BFloat16, float>(column, radius, adaptive, begin, end, out);
    case DType::float16: return perturb_range<Float16, float>(column, radius, adaptive, begin, end, out);
    case DType::float64: return perturb_range<double, double>(column, radius, adaptive, begin, end, out);
  }
}

}  // namespace MTL_ISA
}  // namespace mtlkernels::cpu
