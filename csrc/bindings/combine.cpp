// Allocates results, and keeps results aside whose buffers share memory with what is still to be read.

#include "combine.h"

#include <algorithm>

namespace mtlkernels {
namespace {

Tensor first_gradient(const TensorList& grads, int64_t n, int64_t num_columns, int64_t num_tasks) {
  for (int64_t k = 0; k < num_tasks; ++k)
    if (grads[k * num_columns + n]) return *grads[k * num_columns + n];
  require(false, "no task has a gradient; leave the tensor out", -1, n);
  return {};
}

}  // namespace

std::vector<Tensor> new_results(const TensorList& grads, int64_t num_tasks, int64_t num_out) {
  const int64_t num_columns = num_tasks > 0 ? int64_t(grads.size()) / num_tasks : 0;
  std::vector<Tensor> out;
  out.reserve(num_columns * num_out);
  for (int64_t m = 0; m < num_out; ++m)
    for (int64_t n = 0; n < num_columns; ++n)
      out.push_back(torch::stable::empty_like(first_gradient(grads, n, num_columns, num_tasks)));
  return out;
}

namespace {

/// The bytes from a tensor's first to its last element.
struct Extent {
  uintptr_t begin, end;
};

Extent extent(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return {0, 0};
    last += (sizes[d] - 1) * strides[d];
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + uintptr_t((last + 1) * int64_t(tensor.element_size()))};
}

/// How far each element's memory is its own: whether two indices meet, and whether the extent has no gaps.
struct Reach {
  bool overlaps, dense;
};

Reach reach_of(const Tensor& tensor) {
  if (tensor.is_contiguous()) return {false, true};
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  bool dense = true;
  for (const auto& [stride, size] : dims) {
    if (stride < reach) return {true, false};
    dense &= stride == reach;
    reach = stride * (size - 1) + reach;
  }
  return {false, dense};
}

bool same_memory(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  if (a.const_data_ptr() != b.const_data_ptr() || x.size() != y.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && x[d] != y[d]) return false;
  return true;
}

}  // namespace

std::vector<int64_t> entangled(const std::vector<Tensor>& out, const TensorList& grads, int64_t num_tasks, int64_t num_out) {
  const int64_t num_buffers = int64_t(out.size()), num_columns = num_buffers / num_out;
  std::vector<std::pair<Extent, int64_t>> buffers;
  std::vector<bool> dense(num_buffers, true);
  for (int64_t n = 0; n < num_buffers; ++n) {
    const Extent memory = extent(out[n]);
    if (memory.begin == memory.end) continue;
    const Reach reach = reach_of(out[n]);
    require(!reach.overlaps, "out overlaps itself", -1, n);
    dense[n] = reach.dense;
    buffers.emplace_back(memory, n);
  }
  std::sort(buffers.begin(), buffers.end(), [](const auto& a, const auto& b) { return a.first.begin < b.first.begin; });
  std::vector<bool> flagged(num_buffers, false);
  bool mutual = false;
  uintptr_t taken = 0, reached = 0;  // memory up to `taken` is another buffer's for certain; up to `reached`, perhaps
  for (const auto& [memory, n] : buffers) {
    require(memory.begin >= taken, "out overlaps another tensor's buffer", -1, n);
    mutual |= memory.begin < reached;  // buffers with gaps may lie between each other's elements
    taken = std::max(taken, dense[n] ? memory.end : memory.begin + 1);
    reached = std::max(reached, memory.end);
  }
  for (int64_t k = 0; k < num_tasks && !mutual; ++k) {
    for (int64_t n = 0; n < num_columns; ++n) {
      const std::optional<Tensor>& row = grads[k * num_columns + n];
      if (!row) continue;
      const Extent read = extent(*row);
      auto at = std::partition_point(buffers.begin(), buffers.end(), [&](const auto& b) { return b.first.end <= read.begin; });
      for (; at != buffers.end() && at->first.begin < read.end; ++at)
        if (at->second % num_columns != n || !same_memory(out[at->second], *row)) flagged[at->second] = true;
    }
  }
  std::vector<int64_t> result;
  for (int64_t n = 0; n < num_buffers; ++n)
    if (flagged[n] || mutual) result.push_back(n);
  return result;
}

namespace {

Per per_of(const Tensor& weights, bool per_channel) {
  require(weights.dim() == 2 || (weights.dim() == 1 && !per_channel), "weights has the wrong number of dimensions");
  return per_channel ? Per::channel : weights.dim() == 2 ? Per::tensor : Per::result;
}

}  // namespace

std::vector<Tensor> combine(const TensorList& grads, const Tensor& weights, bool per_channel, RunCombine run) {
  const Per per = per_of(weights, per_channel);
  const int64_t num_tasks = weights.size(-1);
  std::vector<Tensor> out = new_results(grads, num_tasks, 1);
  run(grads, num_tasks, weights, per, out, 1);
  return out;
}

void combine_into(const std::vector<Tensor>& out, const TensorList& grads, const Tensor& weights, bool per_channel,
                  RunCombine run) {
  const Per per = per_of(weights, per_channel);
  const int64_t num_tasks = weights.size(-1), num_columns = int64_t(out.size());
  require(num_tasks > 0 && int64_t(grads.size()) == num_tasks * num_columns, "out has the wrong number of tensors");
  std::vector<Tensor> targets = out;
  const std::vector<int64_t> aside = entangled(out, grads, num_tasks);
  for (int64_t n : aside) targets[n] = torch::stable::empty_like(out[n]);
  run(grads, num_tasks, weights, per, targets, 1);
  for (int64_t n : aside) {
    Tensor target = out[n];
    torch::stable::copy_(target, targets[n]);
  }
}

std::vector<Tensor> mix(const TensorList& grads, const Tensor& coefficients, RunCombine run) {
  require(coefficients.dim() == 2, "coefficients is not [M, K]");
  const int64_t num_out = coefficients.size(0), num_tasks = coefficients.size(1);
  std::vector<Tensor> out = new_results(grads, num_tasks, num_out);
  run(grads, num_tasks, coefficients, Per::result, out, num_out);
  return out;
}

}  // namespace mtlkernels
