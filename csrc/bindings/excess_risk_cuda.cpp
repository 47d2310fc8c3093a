// excess_risk on CUDA: a launch per dtype that sums the chunks, then one that adds each task's in order.

#include "cuda_call.h"
#include "excess_risk.h"

namespace mtlkernels {
namespace {

Tensor new_float64(const Tensor& model, int64_t size) {
  return torch::stable::new_empty(model, torch::headeronly::IntHeaderOnlyArrayRef(&size, 1),
                                  torch::headeronly::ScalarType::Double);
}

Tensor excess_risk_cuda(TensorList grads, std::vector<Tensor> memory, Tensor factor, double epsilon) {
  GradientMemories given(grads, memory, factor);
  Tensor result = new_float64(factor, given.num_tasks);
  if (given.tasks.empty()) {
    torch::stable::zero_(result);
    return result;
  }
  const Columns checked = given.columns();
  require(checked.same_device(factor), "factor is not on the gradients' device");
  const torch::stable::accelerator::DeviceGuard guard(checked.device_index());
  const Tensor table = as_float64(factor, "factor is not float32 or float64");
  const double* factors = static_cast<const double*>(table.const_data_ptr());
  given.rows = flat_gradients(checked, given.rows);
  const Columns columns = given.columns();
  const auto blocks_of = [&](int64_t n) { return (columns[n].layout.numel + kDeviceChunk - 1) / kDeviceChunk; };
  int64_t blocks = 0;
  for (int64_t n = 0; n < columns.size(); ++n) blocks += blocks_of(n);
  require(blocks < (int64_t(1) << 31), "the gradients have too many elements for one call");
  const Tensor partials = new_float64(factor, blocks);
  double* sums = static_cast<double*>(partials.mutable_data_ptr());
  std::vector<void*> pointers(columns.size() * 4);
  std::vector<PlannedTensor> tensors[4];  // by dtype
  std::vector<cuda::Slot> slots;
  for (int64_t k = 0, n = 0, block = 0; k < given.num_tasks; ++k) {
    slots.push_back({int32_t(k), int32_t(block), 0});
    for (; n < columns.size() && given.tasks[n] == k; block += blocks_of(n++)) {
      if (columns[n].layout.numel == 0) continue;
      void** own = pointers.data() + n * 4;
      own[0] = const_cast<void*>(columns[n].rows[0]);
      own[1] = const_cast<void*>(columns[n].rows[1]);
      own[2] = const_cast<double*>(factors + k);
      own[3] = sums + block;
      tensors[int(columns[n].dtype)].push_back({own, columns[n].layout.numel});
    }
    slots.back().end = int32_t(block);
  }
  const cuda::Stream stream = current_stream(columns.device_index());
  for (DType dtype : kDTypes) {
    if (tensors[int(dtype)].empty()) continue;
    const char* error = cuda::excess_risk_chunks(dtype, tensors[int(dtype)], epsilon, stream);
    require(!error, error);
  }
  const char* error = cuda::gram_finish(slots, 1, 0, sums, static_cast<double*>(result.mutable_data_ptr()), stream);
  require(!error, error);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) { m.impl("excess_risk", TORCH_BOX(&excess_risk_cuda)); }

}  // namespace mtlkernels
