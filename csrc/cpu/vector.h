#pragma once
// Vectors of one instruction set, and blocks of rows brought into fast memory as float or double.
//
// The file that includes this is compiled once per instruction set with MTL_ISA naming it. Everything here has internal linkage
// and instantiates nothing from the standard library: a template compiled for AVX-512 must never be the copy the linker keeps.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "scratch.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mtlkernels::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef float HalfFloatVector __attribute__((vector_size(kVectorBytes / 2)));

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};

template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename V, typename T>
inline V load(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

/// a b + c, rounded once where the instruction set can, as torch's kernels for it do.
inline double fused(double a, double b, double c) {
#if defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
inline DoubleVector fused(DoubleVector a, DoubleVector b, DoubleVector c) {
#if defined(__AVX512F__)
  return (DoubleVector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (DoubleVector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
inline HalfFloatVector fused(HalfFloatVector a, HalfFloatVector b, HalfFloatVector c) {
#if defined(__AVX512F__)
  return (HalfFloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__)
  return (HalfFloatVector)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
  return a * b + c;
#endif
}

inline FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatVector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

/// Rounded to nearest.
inline FloatVector square_root(FloatVector value) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_sqrt_ps((__m256)value);
#elif defined(__SSE2__)
  return (FloatVector)_mm_sqrt_ps((__m128)value);
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
#endif
}

inline DoubleVector square_root(DoubleVector value) {
#if defined(__AVX512F__)
  return (DoubleVector)_mm512_sqrt_pd((__m512d)value);
#elif defined(__AVX2__)
  return (DoubleVector)_mm256_sqrt_pd((__m256d)value);
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) value[lane] = __builtin_sqrt(value[lane]);
  return value;
#endif
}
inline HalfFloatVector square_root(HalfFloatVector value) {
#if defined(__AVX512F__)
  return (HalfFloatVector)_mm256_sqrt_ps((__m256)value);
#elif defined(__AVX2__)
  return (HalfFloatVector)_mm_sqrt_ps((__m128)value);
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
#endif
}

/// In one instruction: what the compiler makes of __builtin_convertvector converts the halves apart.
inline DoubleVector as_double(HalfFloatVector value) {
#if defined(__AVX512F__)
  return (DoubleVector)_mm512_cvtps_pd((__m256)value);
#else
  return __builtin_convertvector(value, DoubleVector);
#endif
}

inline DoubleVector load_as_double(const float* from) { return as_double(load<HalfFloatVector>(from)); }
inline DoubleVector load_as_double(const double* from) { return load<DoubleVector>(from); }

/// Stores past the caches; `to` is aligned to the stored vector's size.
inline void store_streaming(float* to, DoubleVector value) {
  const HalfFloatVector narrow = __builtin_convertvector(value, HalfFloatVector);
#if defined(__AVX512F__)
  _mm256_stream_ps(to, (__m256)narrow);
#elif defined(__AVX2__)
  _mm_stream_ps(to, (__m128)narrow);
#else
  store(to, narrow);
#endif
}

inline void store_streaming(double* to, DoubleVector value) {
#if defined(__AVX512F__)
  _mm512_stream_pd(to, (__m512d)value);
#elif defined(__AVX2__)
  _mm256_stream_pd(to, (__m256d)value);
#else
  store(to, value);
#endif
}

inline void store_streaming(float* to, FloatVector value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)value);
#else
  store(to, value);
#endif
}

inline void store_cached(float* to, DoubleVector value) { store(to, __builtin_convertvector(value, HalfFloatVector)); }
inline void store_cached(float* to, FloatVector value) { store(to, value); }
inline void store_cached(double* to, DoubleVector value) { store(to, value); }

/// Sum of all lanes, halves added first, in float64.
inline double sum_lanes(DoubleVector value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)value);
#elif defined(__AVX2__)
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128((__m256d)value), _mm256_extractf128_pd((__m256d)value, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
#else
  return value[0] + value[1];
#endif
}

inline double sum_lanes(FloatVector value) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)value));
  return sum_lanes((DoubleVector)_mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)value, 1))));
#elif defined(__AVX2__)
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)value));
  return sum_lanes((DoubleVector)_mm256_add_pd(low, _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)value, 1))));
#else
  return (double(value[0]) + double(value[2])) + (double(value[1]) + double(value[3]));
#endif
}

/// Makes streamed stores visible to other threads before the caller goes on.
inline void fence_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/// Memory of one call, released at its end; aligned to a cache line. On the stack: the last one made goes first.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(borrow(bytes)) {}
  ~Scratch() { give_back(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* as(size_t offset = 0) {
    return static_cast<T*>(memory_.data) + offset;
  }

 private:
  const Borrowed memory_;
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  // Exponent and mantissa moved into place are the value times 2^-112, exact also for float16's subnormal numbers.
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(scaled));
}

inline void from_float(double value, double* to) { *to = value; }
inline void from_float(float value, float* to) { *to = value; }

inline void from_float(float value, BFloat16* to) {
  const uint32_t bits = float_to_bits(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

inline void from_float(float value, Float16* to) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    to->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds past 65504
    to->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
    to->bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    to->bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

#if defined(__AVX512F__)
inline FloatVector load_as_floats(const BFloat16* from) {
  return (FloatVector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
inline HalfFloatVector load_as_float(const BFloat16* from) {
  return (HalfFloatVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}
inline HalfFloatVector load_as_float(const Float16* from) {
  return (HalfFloatVector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
inline __m128i narrowed(HalfFloatVector value, BFloat16*) {
  const __m256 single = (__m256)value;
  const __m256i bits = _mm256_castps_si256(single), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __mmask8 nan = _mm256_cmp_ps_mask(single, single, _CMP_UNORD_Q);
  return _mm256_cvtepi32_epi16(_mm256_mask_mov_epi32(rounded, nan, _mm256_set1_epi32(0x7fc0)));
}
inline __m128i narrowed(HalfFloatVector value, Float16*) { return _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
template <typename Half>
inline void store_cached(Half* to, HalfFloatVector value) {
  _mm_storeu_si128((__m128i*)to, narrowed(value, to));
}
template <typename Half>
inline void store_streaming(Half* to, DoubleVector value) {
  _mm_stream_si128((__m128i*)to, narrowed(__builtin_convertvector(value, HalfFloatVector), to));
}
inline __m256i narrowed(FloatVector value, BFloat16*) {
  const __m512 single = (__m512)value;
  const __m512i bits = _mm512_castps_si512(single), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(single, single, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
inline void store_cached(BFloat16* to, FloatVector value) { _mm256_storeu_si256((__m256i*)to, narrowed(value, to)); }
inline void store_streaming(BFloat16* to, FloatVector value) { _mm256_stream_si256((__m256i*)to, narrowed(value, to)); }
#else
template <typename Half>
inline HalfFloatVector load_as_float(const Half* from) {
  HalfFloatVector value;
  for (int lane = 0; lane < kLanes<double>; ++lane) value[lane] = to_float(from[lane]);
  return value;
}
template <typename Half>
inline void store_cached(Half* to, HalfFloatVector value) {
  for (int lane = 0; lane < kLanes<double>; ++lane) from_float(value[lane], to + lane);
}
template <typename Half>
inline void store_streaming(Half* to, DoubleVector value) {
  store_cached(to, __builtin_convertvector(value, HalfFloatVector));
}
#endif

template <typename Half>
inline DoubleVector load_as_double(const Half* from) {
  return as_double(load_as_float(from));
}
template <typename Half>
inline void store_cached(Half* to, DoubleVector value) {
  store_cached(to, __builtin_convertvector(value, HalfFloatVector));
}
inline HalfFloatVector load_as_float(const float* from) { return load<HalfFloatVector>(from); }
inline void store_cached(float* to, HalfFloatVector value) { store(to, value); }

/// What a sum of Ts is rounded to on its way to a T, and what a memory of them is kept in: float, or double of doubles.
template <typename T>
using Rounded = std::conditional_t<sizeof(T) == 8, double, float>;

/// Whether float32 holds the factors, and their products with gradients of ordinary size.
inline bool fit_float(const double* factors, int count) {
  for (int i = 0; i < count; ++i) {
    const double size = factors[i] < 0 ? -factors[i] : factors[i];
    if (size != 0 && !(size > 0x1p-100 && size < 0x1p100)) return false;
  }
  return true;
}

/// A vector of A: double, or the rows' own float, or of bfloat16 rows.
template <typename A, typename T>
inline Vector<A> load_as(const T* from) {
  if constexpr (sizeof(A) == 8) {
    return load_as_double(from);
  } else if constexpr (sizeof(T) == 2) {
    return load_as_floats(from);
  } else {
    return load<Vector<A>>(from);
  }
}

/// As many elements of a T as a DoubleVector has, in what they are computed with.
template <typename T>
inline auto load_as_wide(const T* from) {
  if constexpr (sizeof(T) == 8) {
    return load<DoubleVector>(from);
  } else {
    return load_as_float(from);
  }
}

template <typename From, typename To>
inline void convert(const From* from, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = To(to_float(from[i]));
}

#if defined(__F16C__)
inline void convert(const Float16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}
#endif

/// Calls visit(offset, stride, run, at) for each run of the innermost dimension that covers logical elements [begin, begin +
/// count): `run` elements `stride` apart from `offset` on, the first being element `at` of the range.
template <typename Visit>
inline void for_runs(const Layout& layout, const int64_t* strides, int64_t begin, int64_t count, const Visit& visit) {
  const int last = layout.dim - 1;
  for (int64_t at = 0; at < count;) {
    int64_t rest = begin + at, offset = 0;
    const int64_t inner = rest % layout.sizes[last];
    for (int d = last; d >= 0; --d) {
      offset += rest % layout.sizes[d] * strides[d];
      rest /= layout.sizes[d];
    }
    const int64_t left = layout.sizes[last] - inner, run = left < count - at ? left : count - at;
    visit(offset, strides[last], run, at);
    at += run;
  }
}

template <typename From, typename To>
inline void gather(const Column& column, int k, int64_t begin, int64_t count, To* to) {
  const From* row = static_cast<const From*>(column.rows[k]);
  if (column.layout.dim == 0) return convert(row + begin, count, to);
  for_runs(column.layout, column.strides[k], begin, count, [&](int64_t offset, int64_t stride, int64_t run, int64_t at) {
    if (stride == 1) return convert(row + offset, run, to + at);
    for (int64_t i = 0; i < run; ++i) to[at + i] = To(to_float(row[offset + i * stride]));
  });
}

/// Elements [begin, begin + count) of row k as To: in place where the memory holds just that, otherwise copied to `scratch`.
template <typename To>
inline const To* read_row(const Column& column, int k, int64_t begin, int64_t count, To* scratch) {
  const bool in_place = column.layout.dim == 0 && column.dtype == (sizeof(To) == 4 ? DType::float32 : DType::float64);
  if (in_place) return static_cast<const To*>(column.rows[k]) + begin;
  switch (column.dtype) {
    case DType::float32: gather<float>(column, k, begin, count, scratch); break;
    case DType::bfloat16: gather<BFloat16>(column, k, begin, count, scratch); break;
    case DType::float16: gather<Float16>(column, k, begin, count, scratch); break;
    case DType::float64: gather<double>(column, k, begin, count, scratch); break;
  }
  return scratch;
}

/// Elements [begin, begin + count) of a tensor of any strides, from consecutive ones.
template <typename From, typename To>
inline void scatter(const From* from, const Layout& layout, const int64_t* strides, int64_t begin, int64_t count, To* to) {
  for_runs(layout, strides, begin, count, [&](int64_t offset, int64_t stride, int64_t run, int64_t at) {
    for (int64_t i = 0; i < run; ++i) from_float(from[at + i], to + offset + i * stride);
  });
}

/// As scatter, to the single result of a column, flat or not.
template <typename From, typename To>
inline void store_row(const From* from, const Layout& layout, const Output& out, int64_t begin, int64_t count, To* to) {
  if (layout.dim != 0) return scatter(from, layout, out.strides[0], begin, count, to);
  for (int64_t i = 0; i < count; ++i) from_float(from[i], to + begin + i);
}

}  // namespace
}  // namespace mtlkernels::cpu
