// perturb_ on CUDA: a launch per dtype, on the current stream of the tensors' device.

#include "elementwise_cuda.h"
#include "perturb.h"

namespace mtlkernels {
namespace {

void run(const TensorList& rows, const Tensor& radii, bool adaptive, std::vector<Tensor>& out) {
  const Columns given(rows, 2, false, &out, 1);
  require(given.same_device(radii), "radii is not on the parameters' device");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const Tensor table = as_float64(radii, "radii is not float32 or float64");
  std::vector<int64_t> radius_of(given.size());
  for (int64_t n = 0; n < given.size(); ++n)
    radius_of[n] = reinterpret_cast<int64_t>(static_cast<const double*>(table.const_data_ptr()) + n);
  launch_flat(given, rows, 2, false, out, radius_of,
              [&](DType dtype, const std::vector<PlannedTensor>& tensors, cuda::Stream stream) {
                return cuda::perturb(dtype, tensors, adaptive, stream);
              });
}

void perturb_cuda(std::vector<Tensor> out, std::vector<Tensor> params, std::vector<Tensor> grads, Tensor radii, bool adaptive) {
  perturb_into(out, params, grads, radii, adaptive, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) { m.impl("perturb_", TORCH_BOX(&perturb_cuda)); }

}  // namespace mtlkernels
