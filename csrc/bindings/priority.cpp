// Allocates the results of priority_combine, or keeps those aside whose buffers share memory with what is still to be read.

#include "priority.h"

#include "combine.h"

namespace mtlkernels {

Layers layers_of(const TensorList& grads, const TensorList& top, int64_t num_tasks, bool skip_degenerate) {
  require(num_tasks > 0 ? int64_t(grads.size()) == num_tasks * int64_t(top.size()) : grads.empty() && top.empty(),
          "top has the wrong number of tensors");
  Layers layers{grads, top, num_tasks, skip_degenerate};
  for (std::optional<Tensor>& tasks : layers.top)
    if (tasks) tasks = torch::stable::contiguous(*tasks);
  return layers;
}

std::vector<Tensor> priority_combine(const Layers& layers, RunPriority run) {
  std::vector<Tensor> out = new_results(layers.grads, layers.num_tasks, 1);
  run(layers, out);
  return out;
}

void priority_combine_into(const std::vector<Tensor>& out, const Layers& layers, RunPriority run) {
  require(int64_t(layers.grads.size()) == layers.num_tasks * int64_t(out.size()), "out has the wrong number of tensors");
  std::vector<Tensor> targets = out;
  const std::vector<int64_t> aside = entangled(out, layers.grads, layers.num_tasks);
  for (int64_t n : aside) targets[n] = torch::stable::empty_like(out[n]);
  run(layers, targets);
  for (int64_t n : aside) {
    Tensor target = out[n];
    torch::stable::copy_(target, targets[n]);
  }
}

const int64_t* tops_of(const Layers& layers, const Columns& columns, int64_t n) {
  const std::optional<Tensor>& top = layers.top[n];
  if (!top) return nullptr;
  require(top->scalar_type() == torch::headeronly::ScalarType::Long, "top is not int64", -1, n);
  require(top->dim() == 1 && top->numel() == columns.channels(n), "top is not one task for each channel", -1, n);
  require(columns.same_device(*top), "top is not on the gradients' device", -1, n);
  return static_cast<const int64_t*>(top->const_data_ptr());
}

}  // namespace mtlkernels
