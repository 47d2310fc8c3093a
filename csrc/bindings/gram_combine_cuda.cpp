// gram_combine_ on CUDA: the launches of gram, each of which writes the results, for as many tasks as one read takes; more in
// the two reads of gram and combine.

#include "../common/gram_combine_plan.h"
#include "../common/gram_plan.h"
#include "elementwise_cuda.h"
#include "gram.h"

namespace mtlkernels {
namespace {

using torch::headeronly::ScalarType;

Tensor new_matrix(const Tensor& weights, int64_t rows, int64_t columns) {
  const int64_t shape[] = {rows, columns};
  return torch::stable::new_empty(weights, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), ScalarType::Double);
}

/// Fills `out` and returns the Gram.
Tensor run(const TensorList& grads, const Tensor& weights, std::vector<Tensor>& out) {
  const int64_t num_tasks = weights.size(0);
  const Columns columns(grads, num_tasks, false, &out, 1);
  require(columns.same_device(weights), "weights is not on the gradients' device");
  const torch::stable::accelerator::DeviceGuard guard(columns.device_index());
  const Tensor table = as_float64(weights, "weights is not float32 or float64");
  int64_t blocks = 0;
  for (int64_t n = 0; n < columns.size(); ++n) blocks += (columns[n].layout.numel + kDeviceChunk - 1) / kDeviceChunk;
  require(blocks < (int64_t(1) << 31), "the gradients have too many elements for one call");
  const Tensor gram = new_matrix(weights, num_tasks, num_tasks);
  const Tensor partials = new_matrix(weights, blocks, num_pairs(gram_class(int(num_tasks))));
  double* sums = static_cast<double*>(partials.mutable_data_ptr());
  int32_t first_block = 0;
  const std::vector<int64_t> weights_of(columns.size(), reinterpret_cast<int64_t>(table.const_data_ptr()));
  launch_flat(columns, grads, num_tasks, false, out, weights_of,
              [&](DType dtype, const std::vector<PlannedTensor>& tensors, cuda::Stream stream) {
                const char* error = cuda::gram_combine_chunks(dtype, tensors, int(num_tasks), first_block, sums, stream);
                for (const PlannedTensor& tensor : tensors)
                  first_block += int32_t((tensor.numel + kDeviceChunk - 1) / kDeviceChunk);
                return error;
              });
  const char* error = cuda::gram_finish({{0, 0, int32_t(blocks)}}, int(num_tasks), 0, sums,
                                        static_cast<double*>(gram.mutable_data_ptr()), current_stream(columns.device_index()));
  require(!error, error);
  return gram;
}

Tensor gram_combine_cuda(std::vector<Tensor> out, TensorList grads, Tensor weights) {
  require(weights.dim() == 1, "weights is not [K]");
  const int64_t num_tasks = weights.size(0);
  require(int64_t(grads.size()) == num_tasks * int64_t(out.size()), "out has the wrong number of tensors");
  if (out.empty() || num_tasks == 0) {
    Tensor nothing = new_matrix(weights, num_tasks, num_tasks);
    torch::stable::zero_(nothing);
    return nothing;
  }
  if (num_tasks > kGramCombineTasks) {
    Tensor gram = gram_cuda(grads, num_tasks, "model");
    combine_inplace_cuda(out, grads, weights);
    return gram;
  }
  Tensor gram;
  into_buffers(out, grads, num_tasks, [&](std::vector<Tensor>& targets) { gram = run(grads, weights, targets); });
  return gram;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) { m.impl("gram_combine_", TORCH_BOX(&gram_combine_cuda)); }

}  // namespace mtlkernels
