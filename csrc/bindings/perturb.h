#pragma once
// perturb_, as far as it is the same on every device.

#include "combine.h"

namespace mtlkernels {

/// A device's part: out[n] = params[n] + radii[n] grads[n], adaptive: params[n] + radii[n] params[n]^2 grads[n]. `rows` are the
/// parameters, then their gradients. An output may be one of its own rows.
using RunPerturb = void (*)(const TensorList& rows, const Tensor& radii, bool adaptive, std::vector<Tensor>& out);

/// Results whose buffers share memory with what is still to be read are kept aside.
inline void perturb_into(const std::vector<Tensor>& out, const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                         const Tensor& radii, bool adaptive, RunPerturb run) {
  require(out.size() == params.size() && out.size() == grads.size(), "out, params and grads differ in length");
  require(radii.dim() == 1 && radii.size(0) == int64_t(out.size()), "radii has the wrong shape");
  if (out.empty()) return;
  TensorList rows(params.begin(), params.end());
  rows.insert(rows.end(), grads.begin(), grads.end());
  std::vector<Tensor> targets = out;
  const std::vector<int64_t> aside = entangled(out, rows, 2);
  for (int64_t n : aside) targets[n] = torch::stable::empty_like(out[n]);
  run(rows, radii, adaptive, targets);
  for (int64_t n : aside) {
    Tensor target = out[n];
    torch::stable::copy_(target, targets[n]);
  }
}

}  // namespace mtlkernels
