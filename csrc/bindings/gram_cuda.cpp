// gram on CUDA: the chunks of each dtype, then one launch that adds them in order; or a launch per dtype for channels.

#include <string>

#include "cuda_call.h"

namespace mtlkernels {
namespace {

Tensor empty_like_device(const Tensor& model, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(model, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()),
                                  torch::headeronly::ScalarType::Double);
}

Tensor gram_per_channel(const Columns& columns, const Tensor& model, int64_t num_tasks, cuda::Stream stream) {
  int64_t total = 0;
  for (int64_t n = 0; n < columns.size(); ++n) total += columns.channels(n);
  Tensor result = empty_like_device(model, {total, num_tasks, num_tasks});
  torch::stable::zero_(result);  // channels without elements
  double* out = static_cast<double*>(result.mutable_data_ptr());
  const int64_t num_pointers = num_tasks + 2;
  std::vector<void*> pointers(columns.size() * num_pointers);
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor> tensors;
    int64_t first = 0;
    for (int64_t n = 0; n < columns.size(); first += columns.channels(n++)) {
      if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
      void** own = pointers.data() + n * num_pointers;
      for (int64_t k = 0; k < num_tasks; ++k) own[k] = const_cast<void*>(columns[n].rows[k]);
      own[num_tasks] = out + first * num_tasks * num_tasks;
      own[num_tasks + 1] = reinterpret_cast<void*>(columns[n].layout.numel / columns.channels(n));
      tensors.push_back({own, columns.channels(n)});
    }
    const char* error = tensors.empty() ? nullptr : cuda::gram_channels(dtype, tensors, int(num_tasks), stream);
    require(!error, error);
  }
  return result;
}

Tensor gram_of_chunks(const Columns& columns, const Tensor& model, int64_t num_tasks, bool per_tensor, cuda::Stream stream) {
  std::vector<int64_t> shape{num_tasks, num_tasks};
  if (per_tensor) shape.insert(shape.begin(), columns.size());
  Tensor result = empty_like_device(model, shape);
  std::vector<cuda::Slot> slots;
  std::vector<std::vector<PlannedTensor>> groups(4);  // by dtype, as the plan sees them
  int64_t blocks = 0;
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor>& group = groups[int(dtype)];
    for (int64_t n = 0; n < columns.size(); ++n) {
      if (columns[n].dtype != dtype) continue;
      const int64_t own = (columns[n].layout.numel + kDeviceChunk - 1) / kDeviceChunk;
      if (per_tensor) slots.push_back({int32_t(n), int32_t(blocks), int32_t(blocks + own)});
      blocks += own;
      if (own > 0) group.push_back({const_cast<void* const*>(columns[n].rows), columns[n].layout.numel});
    }
  }
  require(blocks < (int64_t(1) << 31), "the gradients have too many elements for one call");
  if (!per_tensor) slots.push_back({0, 0, int32_t(blocks)});
  const int rows_class = gram_class(int(num_tasks));
  const Tensor partials = empty_like_device(model, {blocks, num_pairs(rows_class)});
  double* sums = static_cast<double*>(partials.mutable_data_ptr());
  int32_t first = 0;
  for (DType dtype : kDTypes) {
    const std::vector<PlannedTensor>& group = groups[int(dtype)];
    if (group.empty()) continue;
    const char* error = cuda::gram_chunks(dtype, group, int(num_tasks), first, sums, stream);
    require(!error, error);
    for (const PlannedTensor& tensor : group) first += int32_t((tensor.numel + kDeviceChunk - 1) / kDeviceChunk);
  }
  const char* error = cuda::gram_finish(slots, int(num_tasks), sums, static_cast<double*>(result.mutable_data_ptr()), stream);
  require(!error, error);
  return result;
}

Tensor gram_cuda(TensorList grads, int64_t num_tasks, std::string per) {
  const bool per_channel = per == "channel", per_tensor = per == "tensor";
  require(per_channel || per_tensor || per == "model", "per is none of model, tensor, channel");
  require(num_tasks <= 64, "on CUDA, gram takes at most 64 tasks");
  const Columns given(grads, num_tasks, per_channel);
  const Tensor* model = nullptr;
  for (const std::optional<Tensor>& tensor : grads)
    if (tensor && !model) model = &*tensor;
  require(model, "no task has a gradient");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const TensorList flat = flat_gradients(given, grads);
  const Columns columns(flat, num_tasks, per_channel);
  const cuda::Stream stream = current_stream(given.device_index());
  return per_channel ? gram_per_channel(columns, *model, num_tasks, stream)
                     : gram_of_chunks(columns, *model, num_tasks, per_tensor, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) { m.impl("gram", TORCH_BOX(&gram_cuda)); }

}  // namespace mtlkernels
