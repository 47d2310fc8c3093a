// gradient_dropout and gradient_dropout_ on CUDA. The rate and the seed stay on the device.

#include "elementwise_cuda.h"
#include "gradient_dropout.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, const Dropout& dropout, std::vector<Tensor>& out) {
  const Columns columns(grads, 1, true, &out, 1, true);
  if (columns.size() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(columns.device_index());
  dropout.check(columns);
  const auto* p = static_cast<const double*>(dropout.p.const_data_ptr());
  const auto* seed = static_cast<const int64_t*>(dropout.seed.const_data_ptr());
  launch_flat(columns, grads, 1, true, out, dropout.places,
              [&](DType dtype, const std::vector<PlannedTensor>& tensors, cuda::Stream stream) {
                return cuda::gradient_dropout(dtype, tensors, dropout.gaussian, p, seed, stream);
              });
}

std::vector<Tensor> gradient_dropout_cuda(std::vector<Tensor> grads, Tensor p, std::string mode, Tensor seed,
                                          std::vector<int64_t> places) {
  const TensorList rows(grads.begin(), grads.end());
  const Dropout dropout(p, mode, seed, places);
  return into_new(rows, 1, [&](std::vector<Tensor>& out) { run(rows, dropout, out); });
}

void gradient_dropout_inplace_cuda(std::vector<Tensor> out, std::vector<Tensor> grads, Tensor p, std::string mode, Tensor seed,
                                   std::vector<int64_t> places) {
  const TensorList rows(grads.begin(), grads.end());
  const Dropout dropout(p, mode, seed, places);
  into_buffers(out, rows, 1, [&](std::vector<Tensor>& targets) { run(rows, dropout, targets); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("gradient_dropout", TORCH_BOX(&gradient_dropout_cuda));
  m.impl("gradient_dropout_", TORCH_BOX(&gradient_dropout_inplace_cuda));
}

}  // namespace mtlkernels
