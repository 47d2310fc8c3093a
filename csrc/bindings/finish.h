#pragma once
// combine_sgd_ and combine_adam_, as far as they are the same on every device.

#include "combine.h"

namespace mtlkernels {

/// What both ops are given. `moved` are the parameters, then each list of states, of as many tensors.
struct Finish {
  const TensorList& grads;
  const Tensor& weights;  // [num_tasks] or [N, num_tasks]
  const Tensor& lr;
  const std::optional<Tensor>& skip;
  std::vector<Tensor> moved;
  int64_t num_tasks, num_tensors, num_moved;

  /// Row of weights of tensor n.
  int64_t weight_row(int64_t n) const { return weights.dim() == 2 ? n : 0; }
};

/// A device's part: moves finish.moved. A moved tensor may be one of its own gradients. `steps` are of Adam only.
using RunSgd = void (*)(const Finish& finish, const SgdOptions& options);
using RunAdam = void (*)(const Finish& finish, const std::vector<Tensor>& steps, const AdamOptions& options);

void combine_sgd(const std::vector<Tensor>& params, const std::vector<Tensor>& momenta, const TensorList& grads,
                 const Tensor& weights, const Tensor& lr, const std::optional<Tensor>& skip, const SgdOptions& options,
                 RunSgd run);
void combine_adam(const std::vector<Tensor>& params, const std::vector<Tensor>& exp_avgs,
                  const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& max_exp_avg_sqs,
                  const std::vector<Tensor>& steps, const TensorList& grads, const Tensor& weights, const Tensor& lr,
                  const std::optional<Tensor>& skip, const AdamOptions& options, RunAdam run);

/// The ops with a device's part.
template <RunSgd run>
void combine_sgd_op(std::vector<Tensor> params, std::vector<Tensor> momenta, TensorList grads, Tensor weights, Tensor lr,
                    std::optional<Tensor> skip, double momentum, double dampening, double weight_decay, bool nesterov,
                    bool maximize, bool first) {
  const SgdOptions options{momentum, dampening, weight_decay, nesterov, maximize, first};
  combine_sgd(params, momenta, grads, weights, lr, skip, options, run);
}

template <RunAdam run>
void combine_adam_op(std::vector<Tensor> params, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                     std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> steps, TensorList grads, Tensor weights,
                     Tensor lr, std::optional<Tensor> skip, double beta1, double beta2, double eps, double weight_decay,
                     bool decoupled, bool amsgrad, bool maximize) {
  const AdamOptions options{beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize};
  combine_adam(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, grads, weights, lr, skip, options, run);
}

}  // namespace mtlkernels
