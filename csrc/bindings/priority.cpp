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

void check_strengths(const Tensor& squares, const std::vector<Tensor>& scales, const std::vector<Tensor>& running_vars) {
  using torch::headeronly::ScalarType;
  const auto device = [](const Tensor& tensor) {
    std::pair<int32_t, int32_t> result;
    check_torch(aoti_torch_get_device_type(tensor.get(), &result.first));
    check_torch(aoti_torch_get_device_index(tensor.get(), &result.second));
    return result;
  };
  require(scales.size() == running_vars.size(), "running_vars has the wrong number of tensors");
  require(squares.scalar_type() == ScalarType::Double, "squares is not float64");
  int64_t channels = 0;
  for (size_t n = 0; n < scales.size(); ++n) {
    const Tensor &scale = scales[n], &variance = running_vars[n];
    const auto dtype = scale.scalar_type();
    require(scale.dim() == 2 && variance.dim() == 2, "scale or running_var is not [K, C]", -1, int64_t(n));
    require(scale.size(0) == variance.size(0) && scale.size(1) == variance.size(1), "scale and running_var differ in shape", -1,
            int64_t(n));
    require(dtype == ScalarType::Float || dtype == ScalarType::Double, "scale is not float32 or float64", -1, int64_t(n));
    require(dtype == variance.scalar_type(), "scale and running_var differ in dtype", -1, int64_t(n));
    require(device(scale) == device(squares) && device(variance) == device(squares), "is on another device than squares", -1,
            int64_t(n));
    channels += scale.size(1);
  }
  require(squares.dim() == 1 && squares.numel() == channels, "squares is not one value for each channel");
}

}  // namespace mtlkernels
