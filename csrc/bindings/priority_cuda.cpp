// connection_strength, priority_combine and priority_combine_ on CUDA: a launch per dtype, on the current stream of the
// tensors' device.

#include <algorithm>
#include <cstring>

#include "cuda_call.h"
#include "priority.h"

namespace mtlkernels {
namespace {

using torch::headeronly::ScalarType;

Tensor new_empty(const Tensor& model, int64_t size, ScalarType dtype) { return torch::stable::new_empty(model, {size}, dtype); }

void run(const Layers& layers, std::vector<Tensor>& out) {
  const int64_t num_tasks = layers.num_tasks;
  require(num_tasks <= kPriorityTasks, "on CUDA, priority_combine takes at most 64 tasks");
  const Columns given(layers.grads, num_tasks, true, &out, 1);
  if (given.size() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(given.device_index());
  const TensorList flat = flat_gradients(given, layers.grads);
  std::vector<Tensor> targets = out;
  std::vector<int64_t> aside;  // results of columns that are not flat, copied to their places at the end
  for (int64_t n = 0; n < given.size(); ++n) {
    if (given[n].layout.dim == 0) continue;
    targets[n] = torch::stable::new_empty(out[n], out[n].sizes());
    aside.push_back(n);
  }
  const Columns columns(flat, num_tasks, true, &targets, 1);

  std::vector<PriorityShape> shapes;
  std::vector<const int64_t*> tops;
  int64_t scratch_size = 0;
  for (int64_t n = 0; n < columns.size(); ++n) {
    const int64_t numel = columns[n].layout.numel;
    tops.push_back(tops_of(layers, columns, n));
    const int64_t channels = tops[n] && numel > 0 ? columns.channels(n) : 1;  // without top tasks: one long channel
    shapes.push_back(priority_shape(channels, std::max<int64_t>(numel / channels, 1), element_size(columns[n].dtype)));
    if (tops[n]) scratch_size += (shapes[n].blocks * num_tasks + 1) * num_tasks;
  }
  const Tensor scratch = new_empty(out[0], scratch_size, ScalarType::Double);
  Tensor state = new_empty(out[0], 2 * columns.size(), ScalarType::Int);
  torch::stable::zero_(state);
  double* free_scratch = static_cast<double*>(scratch.mutable_data_ptr());
  int32_t* free_state = static_cast<int32_t*>(state.mutable_data_ptr());
  const int64_t num_pointers = num_tasks + 3 + kPriorityShapeWords;
  std::vector<void*> pointers(columns.size() * num_pointers);
  for (DType dtype : kDTypes) {
    std::vector<PlannedTensor> tensors;
    for (int64_t n = 0; n < columns.size(); ++n) {
      if (columns[n].dtype != dtype || columns[n].layout.numel == 0) continue;
      const PriorityShape& shape = shapes[n];
      void** own = pointers.data() + n * num_pointers;
      for (int64_t k = 0; k < num_tasks; ++k) own[k] = const_cast<void*>(columns[n].rows[k]);
      own[num_tasks] = columns.output(n).rows[0];
      own[num_tasks + 1] = const_cast<int64_t*>(tops[n]);
      own[num_tasks + 2] = free_scratch;
      std::memcpy(own + num_tasks + 3, &shape, sizeof(shape));
      tensors.push_back({own, shape.blocks * (tops[n] ? 2 : 1)});
      if (tops[n]) free_scratch += (shape.blocks * num_tasks + 1) * num_tasks;
    }
    if (tensors.empty()) continue;
    const char* error = cuda::priority_combine(dtype, tensors, int(num_tasks), layers.skip_degenerate, free_state,
                                               current_stream(given.device_index()));
    require(!error, error);
    free_state += 2 * tensors.size();
  }
  for (int64_t n : aside) torch::stable::copy_(out[n], targets[n]);
}

std::vector<Tensor> priority_combine_cuda(TensorList grads, TensorList top, int64_t num_tasks, bool skip_degenerate) {
  return priority_combine(layers_of(grads, top, num_tasks, skip_degenerate), run);
}

void priority_combine_inplace_cuda(std::vector<Tensor> out, TensorList grads, TensorList top, int64_t num_tasks,
                                   bool skip_degenerate) {
  priority_combine_into(out, layers_of(grads, top, num_tasks, skip_degenerate), run);
}

std::tuple<Tensor, Tensor> connection_strength_cuda(Tensor squares, std::vector<Tensor> scales,
                                                    std::vector<Tensor> running_vars, double eps) {
  check_strengths(squares, scales, running_vars);
  int32_t device = 0;
  check_torch(aoti_torch_get_device_index(squares.get(), &device));
  const torch::stable::accelerator::DeviceGuard guard(device);
  int64_t total = 0;
  for (const Tensor& scale : scales) total += scale.numel();
  const Tensor strengths = new_empty(squares, total, ScalarType::Double);
  const Tensor top = new_empty(squares, squares.numel(), ScalarType::Long);
  const Tensor square = torch::stable::contiguous(squares);
  std::vector<Tensor> kept;  // what is copied to be contiguous, until all launches are under way
  std::vector<void*> pointers(scales.size() * 7);
  for (DType dtype : {DType::float32, DType::float64}) {
    std::vector<PlannedTensor> layers;
    int64_t first = 0, first_strength = 0;
    for (size_t n = 0; n < scales.size(); ++n) {
      const int64_t num_tasks = scales[n].size(0), channels = scales[n].size(1);
      if ((scales[n].scalar_type() == ScalarType::Double) == (dtype == DType::float64) && channels > 0) {
        kept.push_back(torch::stable::contiguous(scales[n]));
        kept.push_back(torch::stable::contiguous(running_vars[n]));
        void** own = pointers.data() + 7 * n;
        own[0] = static_cast<double*>(square.mutable_data_ptr()) + first;
        own[1] = kept[kept.size() - 2].mutable_data_ptr();
        own[2] = kept[kept.size() - 1].mutable_data_ptr();
        own[3] = static_cast<double*>(strengths.mutable_data_ptr()) + first_strength;
        own[4] = static_cast<int64_t*>(top.mutable_data_ptr()) + first;
        own[5] = reinterpret_cast<void*>(num_tasks);
        own[6] = reinterpret_cast<void*>(channels);
        layers.push_back({own, 1});
      }
      first += channels;
      first_strength += num_tasks * channels;
    }
    if (layers.empty()) continue;
    const char* error = cuda::connection_strength(dtype, layers, eps, current_stream(device));
    require(!error, error);
  }
  return {strengths, top};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CUDA, m) {
  m.impl("connection_strength", TORCH_BOX(&connection_strength_cuda));
  m.impl("priority_combine", TORCH_BOX(&priority_combine_cuda));
  m.impl("priority_combine_", TORCH_BOX(&priority_combine_inplace_cuda));
}

}  // namespace mtlkernels
