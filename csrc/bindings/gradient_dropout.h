#pragma once
// gradient_dropout and gradient_dropout_, as far as they are the same on every device.

#include "elementwise.h"

namespace mtlkernels {

/// What the noise is drawn by: the rate, one float64, the kind of noise, one int64 seed, and the index of each tensor.
struct Dropout {
  Tensor p;
  bool gaussian;
  Tensor seed;
  std::vector<int64_t> places;

  Dropout(const Tensor& p, const std::string& mode, const Tensor& seed, const std::vector<int64_t>& places)
      : p(p), gaussian(mode == "gaussian"), seed(seed), places(places) {
    require(gaussian || mode == "bernoulli", "mode is none of gaussian, bernoulli");
  }

  /// Throws unless it fits the columns.
  void check(const Columns& columns) const {
    require(p.scalar_type() == torch::headeronly::ScalarType::Double && p.numel() == 1, "p is not one float64");
    require(columns.size() == 0 || columns.same_device(p), "p is not on the gradients' device");
    check_random(seed, places, columns);
  }
};

}  // namespace mtlkernels
