#pragma once
// Tiles of a Gram matrix: inner products of up to kTile rows with as many others, over one block of elements.
//
// A pair has one vector of float32 sums of a few products a lane. The sums of all pairs of a tile are then folded
// together, a transposition that adds, into one vector with a pair a lane, which float64 takes over. float64 rows are summed in
// float64, bfloat16 rows in float32 without being widened where the processor multiplies pairs of them.

#include "vector.h"

namespace mtlkernels::cpu {
namespace {

// Pairs in flight: R * C sums and R + C operands have to fit in 32 (AVX-512) or 16 vector registers.
constexpr int kTile = kVectorBytes == 64 ? 4 : 3;
constexpr int kTriangle = 4;                         // rows whose pairs with each other fit everywhere
constexpr int kSums = kTile * kTile > 10 ? 16 : 12;  // of a tile, in whole vectors of doubles

/// How rows of T are multiplied: an `Operand` has kStep elements of a row; its products with another are added
/// to a `Sum`, kSteps of them at most before float64 takes it over.
///
/// Where elements repeat, all roundings of a float32 sum have one sign: with 128 terms the Gram of a constant gradient is off
/// by 1e-6, with 8 by 1e-7.
template <typename T>
struct Product {
  using Operand = Vector<T>;
  using Sum = Vector<T>;
  static constexpr int kStep = kLanes<T>;
  static constexpr int64_t kSteps = sizeof(T) == 8 ? 1 << 20 : 8;
  static Operand load(const T* from) { return cpu::load<Operand>(from); }
  static Sum add(Operand a, Operand b, Sum sum) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
/// Two terms a lane and step: 16 of a sum, whose last bits the squares of eight-bit significands reach late. Denormal elements
/// and products count as zero.
template <>
struct Product<BFloat16> {
  using Operand = __m512i;
  using Sum = FloatVector;
  static constexpr int kStep = 32;
  static constexpr int64_t kSteps = 8;
  static Operand load(const BFloat16* from) { return _mm512_loadu_si512(from); }
  static Sum add(Operand a, Operand b, Sum sum) { return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

/// Adds neighbouring lanes, or groups of 2^Level lanes, of both: results of `a` and `b` in turn.
template <int Level>
inline FloatVector fold(FloatVector a, FloatVector b) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)a, y = (__m512)b;
  const __m512d u = _mm512_castps_pd(x), v = _mm512_castps_pd(y);
  if constexpr (Level == 0) return (FloatVector)_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  if constexpr (Level == 1) return (FloatVector)_mm512_unpacklo_pd(u, v) + (FloatVector)_mm512_unpackhi_pd(u, v);
  return (FloatVector)_mm512_shuffle_f32x4(x, y, 0x88) + (FloatVector)_mm512_shuffle_f32x4(x, y, 0xdd);
#elif defined(__AVX2__)
  const __m256 x = (__m256)a, y = (__m256)b;
  const __m256d u = _mm256_castps_pd(x), v = _mm256_castps_pd(y);
  if constexpr (Level == 0) return (FloatVector)_mm256_unpacklo_ps(x, y) + (FloatVector)_mm256_unpackhi_ps(x, y);
  if constexpr (Level == 1) return (FloatVector)_mm256_unpacklo_pd(u, v) + (FloatVector)_mm256_unpackhi_pd(u, v);
  return (FloatVector)_mm256_permute2f128_ps(x, y, 0x20) + (FloatVector)_mm256_permute2f128_ps(x, y, 0x31);
#else
  if constexpr (Level == 0) return FloatVector{a[0] + a[2], b[0] + b[2], a[1] + a[3], b[1] + b[3]};
  return FloatVector{a[0] + a[2], a[1] + a[3], b[0] + b[2], b[1] + b[3]};
#endif
}

/// The sum of the lanes of sums[i] in lane i, for up to kLanes<float> vectors; other lanes have anything.
template <int N, int Level = 0>
inline FloatVector fold_all(const FloatVector* sums) {
  if constexpr (1 << Level == kLanes<float>) {
    return sums[0];
  } else {
    constexpr int half = (N + 1) / 2;
    FloatVector folded[half];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) folded[i] = fold<Level>(sums[2 * i], sums[2 * i + 1 < N ? 2 * i + 1 : 2 * i]);
    return fold_all<half, Level + 1>(folded);
  }
}

/// Adds the sum of the lanes of sums[i], for i < N, to lane i of `totals`, a vector of doubles after the other.
template <int N>
inline void add_lanes(const FloatVector* sums, DoubleVector* totals) {
  constexpr int now = N < kLanes<float> ? N : kLanes<float>;
  float lanes[kLanes<float>];
  store(lanes, fold_all<now>(sums));
  totals[0] += load_as_double(lanes);
  if constexpr (now > kLanes<double>) totals[1] += load_as_double(lanes + kLanes<double>);
  if constexpr (N > now) add_lanes<N - now>(sums + now, totals + 2);
}

template <int N>
inline void add_lanes(const DoubleVector* sums, DoubleVector* totals) {
  double lanes[kSums] = {};
  for (int i = 0; i < N; ++i) lanes[i] = sum_lanes(sums[i]);
  for (int i = 0; i < N; i += kLanes<double>) totals[i / kLanes<double>] += load<DoubleVector>(lanes + i);
}

/// Memory to ask for while a tile runs: as many lines of each of `count` stretches as it reads of a row.
struct Ahead {
  const char* const* from;
  int64_t count;
};

/// sums[r * C + c] = <a_r, b_c> over `count` elements. `Triangle` computes c >= r only, with a == b, row by row without gaps.
/// `sums` has room for kSums.
template <typename T, int R, int C, bool Triangle>
void tile(const T* const* a, const T* const* b, int64_t count, Ahead ahead, double* sums) {
  using P = Product<T>;
  constexpr int pairs = Triangle ? R * (R + 1) / 2 : R * C, vectors = (pairs + kLanes<double> - 1) / kLanes<double>;
  constexpr int unroll = pairs <= 3 ? 4 : pairs <= 6 ? 2 : 1;  // enough independent sums to hide the latency of an addition
  constexpr int64_t step = P::kStep * unroll;
  const T *left[R], *right[C];
  for (int r = 0; r < R; ++r) left[r] = a[r];
  for (int c = 0; c < C; ++c) right[c] = b[c];
  DoubleVector totals[vectors] = {};
  const int64_t whole = count / P::kStep * P::kStep;
  for (int64_t e = 0; e < whole;) {
    typename P::Sum partial[unroll][pairs] = {};
    const auto multiply = [&](int u, int64_t at) __attribute__((always_inline)) {
      typename P::Operand x[R], y[C];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = P::load(left[r] + at);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) y[c] = Triangle ? x[c < R ? c : 0] : P::load(right[c] + at);
      int pair = 0;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = Triangle ? r : 0; c < C; ++c, ++pair) partial[u][pair] = P::add(x[r], y[c], partial[u][pair]);
    };
    const int64_t end = whole - e < P::kSteps * step ? whole : e + P::kSteps * step;
    for (; e + step <= end; e += step) {
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) {
        const int64_t at = e + u * P::kStep;
        for (int64_t i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.from[i] + at * int64_t(sizeof(T)));
        multiply(u, at);
      }
    }
    if (e < end) {
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u)
        if (e + u * P::kStep < end) multiply(u, e + u * P::kStep);
      e = end;
    }
#pragma GCC unroll 4
    for (int u = 1; u < unroll; ++u)
#pragma GCC unroll 16
      for (int pair = 0; pair < pairs; ++pair) partial[0][pair] += partial[u][pair];
    add_lanes<pairs>(partial[0], totals);
  }
  for (int i = 0; i < vectors; ++i) store(sums + i * kLanes<double>, totals[i]);
  for (int64_t e = whole; e < count; ++e) {  // exactly: the Gram of fewer elements than rows has the rank that it should have
    int pair = 0;
    for (int r = 0; r < R; ++r)
      for (int c = Triangle ? r : 0; c < C; ++c, ++pair)
        sums[pair] += double(to_float(left[r][e])) * double(to_float(right[c][e]));
  }
}

template <typename T>
using Tile = void (*)(const T* const*, const T* const*, int64_t, Ahead, double*);

template <typename T, int R>
Tile<T> rectangle(int columns) {
  if constexpr (kTile == 4) {
    if (columns == 4) return tile<T, R, kTile, false>;
  }
  return columns == 3 ? tile<T, R, 3, false> : columns == 2 ? tile<T, R, 2, false> : tile<T, R, 1, false>;
}

template <typename T>
Tile<T> pick_tile(int rows, int columns, bool triangle) {
  if (triangle) {
    if (rows == 4) return tile<T, 4, 4, true>;
    return rows == 3 ? tile<T, 3, 3, true> : rows == 2 ? tile<T, 2, 2, true> : tile<T, 1, 1, true>;
  }
  if constexpr (kTile == 4) {
    if (rows == 4) return rectangle<T, kTile>(columns);
  }
  return rows == 3 ? rectangle<T, 3>(columns) : rows == 2 ? rectangle<T, 2>(columns) : rectangle<T, 1>(columns);
}

}  // namespace
}  // namespace mtlkernels::cpu
