#pragma once
// The ops that combine gradients element by element, as far as they are the same on every device.

#include "combine.h"

namespace mtlkernels {

/// run(targets) fills N new tensors, each like the first gradient of its column.
template <typename Run>
std::vector<Tensor> into_new(const TensorList& grads, int64_t num_tasks, const Run& run) {
  std::vector<Tensor> out = new_results(grads, num_tasks, 1);
  run(out);
  return out;
}

/// run(targets) fills `out`; where a buffer shares memory with what is still to be read, its result is kept aside until the
/// end.
template <typename Run>
void into_buffers(const std::vector<Tensor>& out, const TensorList& grads, int64_t num_tasks, const Run& run) {
  require(int64_t(grads.size()) == num_tasks * int64_t(out.size()), "out has the wrong number of tensors");
  std::vector<Tensor> targets = out;
  const std::vector<int64_t> aside = entangled(out, grads, num_tasks);
  for (int64_t n : aside) targets[n] = torch::stable::empty_like(out[n]);
  run(targets);
  for (int64_t n : aside) {
    Tensor target = out[n];
    torch::stable::copy_(target, targets[n]);
  }
}

/// bool [num_tasks] on the columns' device, or absent; made contiguous.
std::optional<Tensor> checked_active(const std::optional<Tensor>& active, const Columns& columns, int64_t num_tasks);

/// Throws unless a trimmed mean of so many tasks has some left.
void check_trim(int64_t trim, int64_t num_tasks);

/// What GradDrop draws by: leak float64 [K], which tasks are active, one int64 seed, and the index of each tensor.
struct Draw {
  Tensor leak;
  std::optional<Tensor> active;
  Tensor seed;
  std::vector<int64_t> places;

  int64_t num_tasks() const { return leak.dim() == 1 ? leak.size(0) : 0; }
};

/// The same, checked against the columns, and contiguous.
Draw checked(const Draw& draw, const Columns& columns);

/// Throws unless `seed` is one int64 on the columns' device and `places` is an index for each column.
void check_random(const Tensor& seed, const std::vector<int64_t>& places, const Columns& columns);

/// Which of the columns' results are stored past the caches: large ones that are not one of their rows.
std::vector<cpu::Output> outputs_of(const Columns& columns);

}  // namespace mtlkernels
