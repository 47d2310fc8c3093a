// trimmed_mean and trimmed_mean_ on the CPU: chunks of every column in parallel.

#include "elementwise.h"

namespace mtlkernels {
namespace {

void run(const TensorList& grads, int64_t num_tasks, int64_t trim, const std::optional<Tensor>& given,
         std::vector<Tensor>& out) {
  check_trim(trim, num_tasks);
  const Columns columns(grads, num_tasks, false, &out, 1);
  const std::optional<Tensor> active = checked_active(given, columns, num_tasks);
  const std::vector<cpu::Output> outputs = outputs_of(columns);
  const std::vector<Piece> pieces = cut(columns);
  const cpu::Trim what{trim, active ? static_cast<const bool*>(active->const_data_ptr()) : nullptr};
  const auto trimmed_mean = cpu::kernels().trimmed_mean;
  for_each(int64_t(pieces.size()), columns.total_elements(), [&](int64_t p) {
    const auto [n, begin, end] = pieces[p];
    trimmed_mean(columns[n], what, begin, end, outputs[n]);
  });
}

std::vector<Tensor> trimmed_mean_cpu(TensorList grads, int64_t num_tasks, int64_t trim, std::optional<Tensor> active) {
  return into_new(grads, num_tasks, [&](std::vector<Tensor>& out) { run(grads, num_tasks, trim, active, out); });
}

void trimmed_mean_inplace_cpu(std::vector<Tensor> out, TensorList grads, int64_t num_tasks, int64_t trim,
                              std::optional<Tensor> active) {
  into_buffers(out, grads, num_tasks, [&](std::vector<Tensor>& targets) { run(grads, num_tasks, trim, active, targets); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtlkernels, CPU, m) {
  m.impl("trimmed_mean", TORCH_BOX(&trimmed_mean_cpu));
  m.impl("trimmed_mean_", TORCH_BOX(&trimmed_mean_inplace_cpu));
}

}  // namespace mtlkernels
