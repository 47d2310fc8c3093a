#pragma once
// The noise of gradient dropout, for host and device: n = base + scale draw, where an element's draw is a standard normal
// number, or 1 or 0.

#include <cmath>

#include "numeric.h"

namespace mtlkernels {

/// What the rate p makes of draws, in the arithmetic of S. Scale is NaN, and so is the noise, for p outside of [0, 1).
template <typename S>
struct NoiseLevel {
  S base, scale;
  uint32_t threshold;  // an element whose word is less is dropped

  MTL_HOST_DEVICE NoiseLevel(double p, bool gaussian) {
    const bool valid = p >= 0 && p < 1;
    const S keep = valid ? S(1 - p) : S(NAN);
    base = gaussian ? S(1) : S(0);
    scale = gaussian ? root(S(p) / keep) : S(1) / keep;
    threshold = valid ? uint32_t(p * 0x1p32) : 0;
  }

 private:
  MTL_HOST_DEVICE static float root(float value) { return sqrtf(value); }
  MTL_HOST_DEVICE static double root(double value) { return sqrt(value); }
};

}  // namespace mtlkernels
