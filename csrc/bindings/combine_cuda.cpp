// combine, combine_ and mix on CUDA: a launch per dtype (and per result of mix), on the current stream of the tensors' device.

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "combine.h"

namespace mtlkernels {
namespace {

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16, DType::float64};

constexpr int64_t kMaxTasks = 1024;  // several tensors of that many pointers still fit in one table

/// The lists with every column that is not flat in memory copied to be so, and which those are.
struct Flattened {
  TensorList grads;
  std::vector<Tensor> out;
  std::vector<int64_t> columns;
};

Flattened flatten(const Columns& columns, const TensorList& grads, const std::vector<Tensor>& out) {
  Flattened flat{grads, out, {}};
  for (int64_t n = 0; n < columns.size(); ++n) {
    if (columns[n].layout.dim == 0) continue;
    flat.columns.push_back(n);
    for (size_t i = n; i < grads.size(); i += columns.size())
      if (grads[i]) flat.grads[i] = torch::stable::contiguous(*grads[i]);
    for (size_t i = n; i < out.size(); i += columns.size()) flat.out[i] = torch::stable::new_empty(out[i], out[i].sizes());
  }
  return flat;
}

void run(const TensorList& grads, int64_t num_tasks, const Tensor& weights, bool per_tensor, std::vector<Tensor>& out,
         int64_t num_out) {
  require(num_tasks <= kMaxTasks, "on CUDA, combine and mix take at most 1024 tasks");
  const Columns given(grads, num_tasks, false, &out, num_out);
  if (given.size() == 0 || num_out == 0) return;
  const int64_t rows = weights.dim() == 2 ? weights.size(0) : 1;
  require(rows == (per_tensor ? given.size() : num_out), "weights has the wrong shape");
  require(weights.is_cuda() && weights.get_device_index() == given.device_index(), "weights is not on the gradients' device");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const Tensor table = torch::stable::contiguous(torch::stable::to(weights, torch::headeronly::ScalarType::Double));
  const double* values = static_cast<const double*>(table.const_data_ptr());
  Flattened flat = flatten(given, grads, out);
  const Columns columns(flat.grads, num_tasks, false, &flat.out, num_out);
  cuda::Stream stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(given.device_index(), &stream));

  const int64_t num_pointers = num_tasks + 2;
  std::vector<void*> pointers(columns.size() * num_pointers);
  for (int64_t m = 0; m < num_out; ++m) {
    for (DType dtype : kDTypes) {
      std::vector<PlannedTensor> tensors;
      for (int64_t n = 0; n < columns.size(); ++n) {
        if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
        void** own = pointers.data() + n * num_pointers;
        for (int64_t k = 0; k < num_tasks; ++k) own[k] = const_cast<void*>(columns[n].rows[k]);
        own[num_tasks] = columns.output(n).rows[m];
        own[num_tasks + 1] = const_cast<double*>(values + (per_tensor ? n : m) * num_tasks);
        tensors.push_back({own, columns[n].layout.numel});
      }
      const char* error = tensors.empty() ? nullptr : cuda::combine(dtype, tensors, int(num_tasks), stream);
      require(!error, error);
    }
  }
  for (int64_t n : flat.columns)
    for (size_t i = n; i < out.size(); i += columns.size()) torch::stable::copy_(out[i], flat.out[i]);
}

std::vector<Tensor> combine_cuda(TensorList grads, Tensor weights) { return combine(grads, weights, run); }

void combine_inplace_cuda(std::vector<Tensor> out, TensorList grads, Tensor weights) { combine_into(out, grads, weights, run); }

std::vector<Tensor> mix_cuda(TensorList grads, Tensor coefficients) { return mix(grads, coefficients, run); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("combine", TORCH_BOX(&combine_cuda));
  m.impl("combine_", TORCH_BOX(&combine_inplace_cuda));
  m.impl("mix", TORCH_BOX(&mix_cuda));
}

}  // namespace mtlkernels
