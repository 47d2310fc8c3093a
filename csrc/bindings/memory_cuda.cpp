// memory_combine_ on CUDA: a launch per dtype, on the current stream of the tensors' device.

#include "cuda_call.h"
#include "memory.h"

namespace mtlkernels {
namespace {

void run(const TensorList& rows, int64_t num_tasks, const Tensor& factors, bool squares, std::vector<Tensor>& out) {
  require(num_tasks <= kMemoryTasks, "on CUDA, memory_combine_ takes at most 64 tasks");
  const Columns given(rows, 2 * num_tasks, false, &out, 1, false, num_tasks);
  require(given.same_device(factors), "factors is not on the gradients' device");
  const auto type = factors.scalar_type();
  require(type == torch::headeronly::ScalarType::Double || type == torch::headeronly::ScalarType::Float,
          "factors is not float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const Tensor table = torch::stable::contiguous(torch::stable::to(factors, torch::headeronly::ScalarType::Double));
  // Rows and results of columns that are not flat, in other memory; what is written there is copied to its place at the end.
  TensorList flat = rows;
  std::vector<Tensor> targets = out;
  const int64_t num_columns = given.size(), num_rows = 2 * num_tasks;
  std::vector<int64_t> aside;
  for (int64_t n = 0; n < num_columns; ++n) {
    if (given[n].layout.dim == 0) continue;
    aside.push_back(n);
    targets[n] = torch::stable::new_empty(out[n], out[n].sizes());
    for (int64_t k = 0; k < num_rows; ++k) {
      std::optional<Tensor>& row = flat[k * num_columns + n];
      if (row) row = torch::stable::contiguous(*row);
    }
  }
  const Columns columns(flat, num_rows, false, &targets, 1, false, num_tasks);
  std::vector<void*> pointers(num_columns * (num_rows + 1));
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor> tensors;
    for (int64_t n = 0; n < num_columns; ++n) {
      if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
      void** own = pointers.data() + n * (num_rows + 1);
      for (int64_t k = 0; k < num_rows; ++k) own[k] = const_cast<void*>(columns[n].rows[k]);
      own[num_rows] = columns.output(n).rows[0];
      tensors.push_back({own, columns[n].layout.numel});
    }
    if (tensors.empty()) continue;
    const char* error = cuda::memory_combine(dtype, tensors, int(num_tasks), static_cast<const double*>(table.const_data_ptr()),
                                             squares, current_stream(given.device_index()));
    require(!error, error);
  }
  for (int64_t n : aside) {
    torch::stable::copy_(out[n], targets[n]);
    for (int64_t k = num_tasks; k < num_rows; ++k) {
      Tensor memory = *rows[k * num_columns + n];
      torch::stable::copy_(memory, *flat[k * num_columns + n]);
    }
  }
}

void memory_combine_cuda(std::vector<Tensor> out, std::vector<Tensor> memory, TensorList grads, Tensor factors, bool squares) {
  memory_combine_into(out, memory, grads, factors, squares, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) { m.impl("memory_combine_", TORCH_BOX(&memory_combine_cuda)); }

}  // namespace mtlkernels
