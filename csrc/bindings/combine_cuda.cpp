// combine, combine_channels, both in place, and mix on CUDA: a launch per dtype, on the current stream of the tensors' device.

#include <algorithm>
#include <iterator>

#include "combine.h"
#include "cuda_call.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, int64_t num_tasks, const Tensor& weights, Per per, std::vector<Tensor>& out,
         int64_t num_out) {
  require(num_tasks <= kMaxTasks, "on CUDA, combine and mix take at most 1024 tasks");
  const bool per_channel = per == Per::channel;
  const Columns given(grads, num_tasks, per_channel, &out, num_out);
  if (given.size() == 0 || num_out == 0) return;
  std::vector<int64_t> first_row(given.size() + 1, 0);  // of weights, of each column
  for (int64_t n = 0; n < given.size(); ++n)
    first_row[n + 1] = first_row[n] + (per == Per::result ? 0 : per_channel ? given.channels(n) : 1);
  const int64_t rows = weights.dim() == 2 ? weights.size(0) : 1;
  require(rows == (per == Per::result ? num_out : first_row[given.size()]), "weights has the wrong shape");
  require(given.same_device(weights), "weights is not on the gradients' device");
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const Tensor table = as_float64(weights, "weights is not float32 or float64");
  const double* values = static_cast<const double*>(table.const_data_ptr());
  const TensorList flat = flat_gradients(given, grads);
  std::vector<Tensor> targets = out;
  std::vector<size_t> aside;  // results of columns that are not flat, copied to their places at the end
  for (size_t i = 0; i < out.size(); ++i) {
    if (given[int64_t(i) % given.size()].layout.dim == 0) continue;
    targets[i] = torch::stable::new_empty(out[i], out[i].sizes());
    aside.push_back(i);
  }
  const Columns columns(flat, num_tasks, per_channel, &targets, num_out);
  const cuda::Stream stream = current_stream(given.device_index());

  // Several results of a tensor at a time read its gradients once for all of them.
  const int64_t at_once = num_tasks <= kMixRows ? std::min<int64_t>(kMixResults, num_out) : 1;
  const int64_t most = num_tasks + at_once + 2;  // pointers of a tensor
  std::vector<void*> pointers(columns.size() * most);
  for (int64_t first = 0; first < num_out; first += at_once) {
    const int64_t count = std::min(at_once, num_out - first);
    for (auto each = std::rbegin(kDTypes); each != std::rend(kDTypes); ++each) {  // against the Gram's order
      const DType dtype = *each;
      std::vector<PlannedTensor> tensors;
      for (int64_t n = 0; n < columns.size(); ++n) {
        if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
        void** own = pointers.data() + n * most;
        for (int64_t k = 0; k < num_tasks; ++k) own[k] = const_cast<void*>(columns[n].rows[k]);
        for (int64_t m = 0; m < count; ++m) own[num_tasks + m] = columns.output(n).rows[first + m];
        if (count == 1) own[num_tasks + 1] = const_cast<double*>(values + (first + first_row[n]) * num_tasks);
        const int64_t numel = columns[n].layout.numel, channels = per_channel ? columns.channels(n) : 1;
        if (per_channel) own[num_tasks + 2] = reinterpret_cast<void*>(numel / channels);
        tensors.push_back({own, per_channel ? channels : numel});
      }
      if (tensors.empty()) continue;
      const char* error = per_channel ? cuda::combine_channels(dtype, tensors, int(num_tasks), stream)
                          : count == 1
                              ? cuda::combine(dtype, tensors, int(num_tasks), stream)
                              : cuda::mix(dtype, tensors, int(num_tasks), int(count), values + first * num_tasks, stream);
      require(!error, error);
    }
  }
  for (size_t i : aside) torch::stable::copy_(out[i], targets[i]);
}

std::vector<Tensor> combine_cuda(TensorList grads, Tensor weights) { return combine(grads, weights, false, run); }

std::vector<Tensor> combine_channels_cuda(TensorList grads, Tensor weights) { return combine(grads, weights, true, run); }

void combine_channels_inplace_cuda(std::vector<Tensor> out, TensorList grads, Tensor weights) {
  combine_into(out, grads, weights, true, run);
}

std::vector<Tensor> mix_cuda(TensorList grads, Tensor coefficients) { return mix(grads, coefficients, run); }

}  // namespace

void combine_inplace_cuda(std::vector<Tensor> out, TensorList grads, Tensor weights) {
  combine_into(out, grads, weights, false, run);
}

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("combine", TORCH_BOX(&combine_cuda));
  m.impl("combine_", TORCH_BOX(&combine_inplace_cuda));
  m.impl("combine_channels", TORCH_BOX(&combine_channels_cuda));
  m.impl("combine_channels_", TORCH_BOX(&combine_channels_inplace_cuda));
  m.impl("mix", TORCH_BOX(&mix_cuda));
}

}  // namespace mtlkernels
