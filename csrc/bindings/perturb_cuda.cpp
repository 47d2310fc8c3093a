// perturb_ on CUDA: a launch per dtype, on the current stream of the tensors' device.

#include "cuda_call.h"
#include "perturb.h"

namespace mtlkernels {
namespace {

void run(const TensorList& rows, const Tensor& radii, bool adaptive, std::vector<Tensor>& out) {
  const Columns given(rows, 2, false, &out, 1);
  require(given.same_device(radii), "radii is not on the parameters' device");
  const auto type = radii.scalar_type();
  require(type == torch::headeronly::ScalarType::Double || type == torch::headeronly::ScalarType::Float,
          "radii is not float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const Tensor table = torch::stable::contiguous(torch::stable::to(radii, torch::headeronly::ScalarType::Double));
  const double* values = static_cast<const double*>(table.const_data_ptr());
  const TensorList flat = flat_gradients(given, rows);
  std::vector<Tensor> targets = out;
  std::vector<int64_t> aside;  // results of columns that are not flat, copied to their places at the end
  for (int64_t n = 0; n < given.size(); ++n) {
    if (given[n].layout.dim == 0) continue;
    targets[n] = torch::stable::new_empty(out[n], out[n].sizes());
    aside.push_back(n);
  }
  const Columns columns(flat, 2, false, &targets, 1);
  std::vector<void*> pointers(columns.size() * 4);
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor> tensors;
    for (int64_t n = 0; n < columns.size(); ++n) {
      if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
      void** own = pointers.data() + n * 4;
      for (int row = 0; row < 2; ++row) own[row] = const_cast<void*>(columns[n].rows[row]);
      own[2] = columns.output(n).rows[0];
      own[3] = const_cast<double*>(values + n);
      tensors.push_back({own, columns[n].layout.numel});
    }
    if (tensors.empty()) continue;
    const char* error = cuda::perturb(dtype, tensors, adaptive, current_stream(given.device_index()));
    require(!error, error);
  }
  for (int64_t n : aside) torch::stable::copy_(out[n], targets[n]);
}

void perturb_cuda(std::vector<Tensor> out, std::vector<Tensor> params, std::vector<Tensor> grads, Tensor radii, bool adaptive) {
  perturb_into(out, params, grads, radii, adaptive, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) { m.impl("perturb_", TORCH_BOX(&perturb_cuda)); }

}  // namespace mtlkernels
