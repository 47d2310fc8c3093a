#pragma once
// Standard normal numbers from random words, the same bits everywhere: element_normals of mtlkernels/random.py, which tells the
// formula and how exact it is. Compiled without fused multiply-adds, by Horner's rule. V is float, or a vector of them on the
// CPU.

#include "numeric.h"

namespace mtlkernels {

constexpr int32_t kRootHalf = 0x3f3504f3;       // bits of the float nearest to sqrt(1/2)
constexpr float kLog2 = -1.3862943649291992f;   // -2 ln 2
constexpr uint32_t kQuarterTurn = 0x40000000u;  // of 2^32

/// -2 ln(1 + x) / x for 1 + x from sqrt(1/2) to sqrt(2).
template <typename V>
MTL_HOST_DEVICE static inline V log_polynomial(V x) {
  V value = x * 0.20213793218135834f + -0.3244517147541046f;
  value = value * x + 0.34501662850379944f;
  value = value * x + -0.39800330996513367f;
  value = value * x + 0.4993981719017029f;
  value = value * x + -0.6667011976242065f;
  value = value * x + 1.0000072717666626f;
  return value * x + -1.9999998807907104f;
}

/// sin(pi y) / y of the square of y, for y from -1/2 to 1/2.
template <typename V>
MTL_HOST_DEVICE static inline V sine_polynomial(V square) {
  V value = square * 0.07756038755178452f + -0.5982421040534973f;
  value = value * square + 2.550069808959961f;
  value = value * square + -5.167709827423096f;
  return value * square + 3.1415927410125732f;
}

}  // namespace mtlkernels
