#pragma once
// The steps of SGD and Adam (AdamW) along a combined gradient, element by element: mtlkernels/finish.py has the formulas, and
// torch.optim the order of operations. Plain C++ for host and device, where V, what is moved at a time, may be a vector of S.
// Math has V's square root, and a multiply-add that is one rounding where torch's is.

#include <math.h>

#include "numeric.h"

namespace mtlkernels {

struct SgdOptions {
  double momentum, dampening, weight_decay;
  bool nesterov, maximize, first;
};

struct AdamOptions {
  double beta1, beta2, eps, weight_decay;
  bool decoupled, amsgrad, maximize;
};

// Of internal linkage: these are compiled once for every instruction set.
namespace {

/// What SGD does with a parameter and its momentum. S: what it is computed in.
template <typename S>
struct SgdRule {
  using Options = SgdOptions;
  static constexpr int kRows = 2;

  S down, momentum, undamped, decay;
  int has_momentum, nesterov, maximize, first;  // as wide as S or half of it: a copy through memory reads no padding

  MTL_HOST_DEVICE SgdRule(const SgdOptions& options, double lr, double)
      : down(S(-lr)),
        momentum(S(options.momentum)),
        undamped(S(1 - options.dampening)),
        decay(S(options.weight_decay)),
        has_momentum(options.momentum != 0),
        nesterov(options.nesterov),
        maximize(options.maximize),
        first(options.first) {}

  MTL_HOST_DEVICE bool reads(int row) const { return row == 0 || (has_momentum && !first); }
  MTL_HOST_DEVICE bool writes(int row) const { return row == 0 || has_momentum; }

  template <typename Math, typename V>
  MTL_HOST_DEVICE void move(V grad, V (&rows)[kRows]) const {
    if (maximize) grad = -grad;
    if (decay != 0) grad = Math::fused(V{} + decay, rows[0], grad);
    if (has_momentum) {
      rows[1] = first ? grad : Math::fused(V{} + undamped, grad, rows[1] * momentum);
      grad = nesterov ? Math::fused(V{} + momentum, rows[1], grad) : rows[1];
    }
    rows[0] = Math::fused(V{} + down, grad, rows[0]);
  }
};

/// What Adam does with a parameter, its first and second moments, and with amsgrad the largest second moment so far.
template <typename S>
struct AdamRule {
  using Options = AdamOptions;
  static constexpr int kRows = 4;

  S shrink, decay, weight, beta2, weight2, root, eps, down;
  int amsgrad, maximize;

  MTL_HOST_DEVICE AdamRule(const AdamOptions& options, double lr, double step)
      : shrink(S(options.decoupled ? 1 - lr * options.weight_decay : 1)),
        decay(S(options.decoupled ? 0 : options.weight_decay)),
        weight(S(1 - options.beta1)),
        beta2(S(options.beta2)),
        weight2(S(1 - options.beta2)),
        root(S(pow(1 - pow(options.beta2, step), 0.5))),  // not sqrt, which Python's power is not in the last bit
        eps(S(options.eps)),
        down(S(-(lr / (1 - pow(options.beta1, step))))),
        amsgrad(options.amsgrad),
        maximize(options.maximize) {}

  MTL_HOST_DEVICE bool reads(int row) const { return row < 3 || amsgrad; }
  MTL_HOST_DEVICE bool writes(int row) const { return row < 3 || amsgrad; }

  template <typename Math, typename V>
  MTL_HOST_DEVICE void move(V grad, V (&rows)[kRows]) const {
    if (maximize) grad = -grad;
    rows[0] *= shrink;
    if (decay != 0) grad = Math::fused(V{} + decay, rows[0], grad);
    const V difference = grad - rows[1];
    rows[1] =
        weight < S(0.5) ? Math::fused(V{} + weight, difference, rows[1]) : Math::fused(V{} + (weight - 1), difference, grad);
    rows[2] = Math::fused(grad * weight2, grad, rows[2] * beta2);
    // As torch.maximum, NaN where either is.
    if (amsgrad) rows[3] = rows[3] > rows[2] || rows[3] != rows[3] ? rows[3] : rows[2];
    rows[0] += rows[1] * down / (Math::square_root(amsgrad ? rows[3] : rows[2]) / root + eps);
  }
};

}  // namespace
}  // namespace mtlkernels
