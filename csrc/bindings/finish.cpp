// Checks what both ops are given, and keeps aside what shares memory with what is still to be read.

#include "finish.h"

namespace mtlkernels {
namespace {

using torch::headeronly::ScalarType;

bool is_scalar(const Tensor& tensor, ScalarType dtype) { return tensor.dim() == 0 && tensor.scalar_type() == dtype; }

/// Runs `run(finish)` on the parameters and the lists of states.
template <typename Run>
void finish_update(const std::vector<const std::vector<Tensor>*>& lists, const TensorList& grads, const Tensor& weights,
                   const Tensor& lr, const std::optional<Tensor>& skip, const Run& run) {
  const int64_t num_tensors = int64_t(lists[0]->size());
  require(weights.dim() == 1 || weights.dim() == 2, "weights has the wrong number of dimensions");
  require(weights.dim() == 1 || weights.size(0) == num_tensors, "weights has the wrong shape");
  const int64_t num_tasks = weights.size(-1);
  require(int64_t(grads.size()) == num_tasks * num_tensors, "grads is not a row of the parameters' length for each task");
  require(is_scalar(lr, ScalarType::Double), "lr is not a float64 scalar");
  require(!skip || is_scalar(*skip, ScalarType::Bool), "skip is not a bool scalar");
  for (int64_t n = 0; n < num_tensors; ++n) {
    bool present = false;
    for (int64_t k = 0; k < num_tasks; ++k) present |= grads[k * num_tensors + n].has_value();
    require(present, "no task has a gradient; leave the tensor out", -1, n);
  }
  if (num_tensors == 0) return;
  std::vector<Tensor> moved;
  for (const std::vector<Tensor>* list : lists) {
    require(int64_t(list->size()) == num_tensors, "a list of states has not the parameters' length");
    moved.insert(moved.end(), list->begin(), list->end());
  }
  const int64_t num_moved = int64_t(lists.size());
  const std::vector<int64_t> aside = entangled(moved, grads, num_tasks, num_moved);
  std::vector<Tensor> targets = moved;
  for (int64_t i : aside) targets[i] = torch::stable::clone(moved[i]);
  run(Finish{grads, weights, lr, skip, targets, num_tasks, num_tensors, num_moved});
  for (int64_t i : aside) torch::stable::copy_(moved[i], targets[i]);
}

}  // namespace

void combine_sgd(const std::vector<Tensor>& params, const std::vector<Tensor>& momenta, const TensorList& grads,
                 const Tensor& weights, const Tensor& lr, const std::optional<Tensor>& skip, const SgdOptions& options,
                 RunSgd run) {
  std::vector<const std::vector<Tensor>*> lists = {&params};
  if (options.momentum != 0) lists.push_back(&momenta);
  require(options.momentum != 0 || momenta.empty(), "momenta has tensors, but momentum is 0");
  finish_update(lists, grads, weights, lr, skip, [&](const Finish& finish) { run(finish, options); });
}

void combine_adam(const std::vector<Tensor>& params, const std::vector<Tensor>& exp_avgs,
                  const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& max_exp_avg_sqs,
                  const std::vector<Tensor>& steps, const TensorList& grads, const Tensor& weights, const Tensor& lr,
                  const std::optional<Tensor>& skip, const AdamOptions& options, RunAdam run) {
  std::vector<const std::vector<Tensor>*> lists = {&params, &exp_avgs, &exp_avg_sqs};
  if (options.amsgrad) lists.push_back(&max_exp_avg_sqs);
  require(options.amsgrad || max_exp_avg_sqs.empty(), "max_exp_avg_sqs has tensors without amsgrad");
  require(steps.size() == params.size(), "steps has not the parameters' length");
  for (size_t n = 0; n < steps.size(); ++n)
    require(is_scalar(steps[n], ScalarType::Float), "its step is not a float32 scalar", -1, int64_t(n));
  finish_update(lists, grads, weights, lr, skip, [&](const Finish& finish) { run(finish, steps, options); });
}

}  // namespace mtlkernels
