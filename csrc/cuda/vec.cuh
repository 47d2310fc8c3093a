#pragma once
// Gradient elements in registers: 16 bytes a load, float (double for float64) in arithmetic.

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mtlkernels {

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
constexpr int kLanes = 16 / int(sizeof(T));

/// What products and short sums of a T are computed in.
template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }

__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(double value, double& to) { to = value; }
__device__ inline void narrow(float value, __half& to) { to = __float2half_rn(value); }
__device__ inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = __float_as_uint(value);
  to.bits = isnan(value) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

/// Whether float32 holds a factor, and its products with gradients of ordinary size.
__device__ inline bool fits_float(double factor) {
  const double size = fabs(factor);
  return factor == 0 || (size > 0x1p-100 && size < 0x1p100);
}

/// 16 bytes of Ts.
template <typename T>
union Packed {
  uint4 raw;
  uint32_t words[4];
  T values[kLanes<T>];
  __device__ Packed() : raw{0, 0, 0, 0} {}
};

/// As many Ts as 16 bytes of a memory of them hold elements, so that a warp's accesses to a memory leave no gaps: 8 bytes of
/// 16-bit Ts.
template <typename T>
union Beside {
  enum { lanes = kLanes<Sum<T>> };
  using Raw = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  Raw raw;
  T values[lanes];
  __device__ Beside() : raw{} {}
};

/// Loads 16 bytes that nothing writes during the kernel; `from` is 16-byte aligned.
template <typename T>
__device__ inline Packed<T> load_packed(const T* from) {
  Packed<T> packed;
  packed.raw = __ldg(reinterpret_cast<const uint4*>(from));
  return packed;
}

/// Stores 16 bytes; `to` is 16-byte aligned. In one instruction: a plain store of four floats may be taken apart.
template <typename T>
__device__ inline void store_packed(T* to, const Packed<T>& packed) {
  __stwb(reinterpret_cast<uint4*>(to), packed.raw);
}

/// Vectors of each of K rows that a thread loads at a time: with few rows more of each, so that enough bytes are under way.
template <int K>
constexpr int kBatch = K == 1   ? 4
                       : K == 2 ? 2
                                : 1;

template <typename T>
__device__ inline bool is_aligned(const T* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

}  // namespace mtlkernels
